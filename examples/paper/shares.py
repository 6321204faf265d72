"""Numbers with intervals over seeds: modes share their minibatches, so only seeds are independent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """``f"{estimate:.2f}"``: the value and its interval, all in that format."""
        if math.isnan(self.value):
            return ""
        low, value, high = (format(each, spec) for each in (self.low, self.value, self.high))
        return f"{value} [{low}, {high}]"


def over_seeds(
    statistic: Callable[..., float], *seeds: Array | Sequence[float], times: int = 2_000, seed: int = 0
) -> Estimate:
    """A statistic of all seeds, with its interval by bootstrap over them.

    Args:
        statistic: of the arrays; NaN where it is not defined.
        *seeds: arrays whose first axis is the seed.
        times: bootstrap samples.
        seed: of their draws.
    """
    arrays = [np.asarray(each, dtype=float) for each in seeds]
    rng, count = np.random.default_rng(seed), len(arrays[0])
    drawn = rng.integers(count, size=(times, count))
    found = np.array([statistic(*(each[rows] for each in arrays)) for rows in drawn])
    found = found[np.isfinite(found)]
    if not len(found):
        return Estimate(math.nan, math.nan, math.nan)
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(float(statistic(*arrays)), float(low), float(high))


def mean(seeds: Array | Sequence[float]) -> Estimate:
    """Of one number a seed."""
    return over_seeds(lambda each: float(each.mean()), seeds)


def share(found: Array, among: Array) -> Estimate:
    """Of what was found among all, counts of each seed; seeds with more count for more."""
    return over_seeds(lambda a, b: a.sum() / b.sum() if b.sum() else math.nan, found, among)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
