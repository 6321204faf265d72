"""Numbers with their 95% intervals, by bootstrap over seeds: modes share their noise, seeds do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Bootstrap samples.
TIMES = 2_000


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, seeds: Array) -> Estimate:
        """The mean of independent numbers, one a seed, (seeds,)."""
        return cls.spread(float(seeds.mean()), resampled(seeds[:, None])[:, 0])

    @classmethod
    def spread(cls, value: float, samples: Array) -> Estimate:
        """A value with the quantiles of its bootstrap samples, (times,)."""
        low, high = np.quantile(samples, [0.025, 0.975])
        return cls(value, float(low), float(high))

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2

    def within(self, low: float, high: float) -> bool:
        """The whole interval lies between these."""
        return low <= self.low and self.high <= high

    def numbers(self) -> list[float]:
        return [float(f"{each:.5g}") for each in (self.value, self.low, self.high)]

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def resampled(seeds: Array, seed: int = 0) -> Array:
    """Means of bootstrap samples of (seeds, k) numbers, a whole seed at a time, (times, k)."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=TIMES)
    return np.asarray(counts @ seeds / len(seeds))


def squared_deviations(positions: Array) -> Array:
    """Squared distances from the mean over seeds, unbiased, of (..., seeds, k)."""
    seeds = positions.shape[-2]
    centred = positions - positions.mean(-2, keepdims=True)
    return np.asarray(centred**2 * seeds / (seeds - 1))


def slope(rates: Sequence[float], values: Sequence[Array]) -> Estimate:
    """Of log mean against log rate; each rate's numbers, one a seed, are resampled by themselves."""
    logs = np.log(rates)

    def fit(means: Array) -> Array:
        return np.asarray(np.polyfit(logs, np.log(means), 1)[0])

    samples = np.stack([resampled(each[:, None], index)[:, 0] for index, each in enumerate(values)])
    return Estimate.spread(float(fit(np.array([each.mean() for each in values]))), fit(samples))
