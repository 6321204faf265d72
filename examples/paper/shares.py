"""Shares and other statistics of all seeds together, with intervals by bootstrap over seeds, and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from estimates import TIMES, Array, Estimate


def over_seeds(statistic: Callable[..., float], *seeds: Array, seed: int = 0) -> Estimate:
    """A statistic of all seeds, with its interval by bootstrap over them.

    Args:
        statistic: of the arrays; NaN where it is not defined.
        *seeds: arrays whose first axis is the seed.
        seed: of their draws.
    """
    arrays = [np.asarray(each, dtype=float) for each in seeds]
    rng, count = np.random.default_rng(seed), len(arrays[0])
    drawn = rng.integers(count, size=(TIMES, count))
    found = np.array([statistic(*(each[rows] for each in arrays)) for rows in drawn])
    found = found[np.isfinite(found)]
    if not len(found):
        return Estimate(math.nan, math.nan, math.nan)
    return Estimate.spread(float(statistic(*arrays)), found)


def share(found: Array, among: Array) -> Estimate:
    """Of what was found among all, counts of each seed; seeds with more count for more."""
    return over_seeds(lambda a, b: a.sum() / b.sum() if b.sum() else math.nan, found, among)


def shown(estimate: Estimate, spec: str = ".2f") -> str:
    """A value with its interval, all in one format; nothing where there is none."""
    if math.isnan(estimate.value):
        return ""
    return "{:{s}} [{:{s}}, {:{s}}]".format(estimate.value, estimate.low, estimate.high, s=spec)


def percent(estimate: Estimate) -> str:
    """A share in per cent with its interval; a plain number where seeds do not differ."""
    value, low, high = (100 * each for each in (estimate.value, estimate.low, estimate.high))
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if low == high else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
