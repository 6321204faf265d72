"""Modes under a shuffled loader, thousands at once: the truth for sampling without replacement."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sgd_probe.dynamics.statistics import Draw, WindowStatistics

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Shuffled:
    """Plain SGD at learning rate 0.05 whose minibatches see every sample once an epoch.

    Attributes:
        relaxation_times: curvature times the confinement clock.
        steps: of the window.
        batches: N / B; a remainder makes a smaller last batch.
        fresh: share of the noise that is drawn anew each time.
        pull: a constant mean gradient.
        replicas: number of modes.
        seed: of the noise.
        declared: what the statistics are told of the loader: ``batches``, if nothing.
    """

    relaxation_times: float
    steps: int
    batches: float
    fresh: float = 0.0
    pull: float = 0.0
    replicas: int = 2_000
    seed: int = 0
    declared: float = 0.0

    def statistics(self) -> WindowStatistics:
        """What the package's own sums make of it; the window opens within an epoch."""
        rng, rate = np.random.default_rng(self.seed), 0.05
        curvature = self.relaxation_times / (self.steps * rate)
        count = math.ceil(self.batches)
        shares = np.ones(count)
        shares[-1] -= count - self.batches
        settling = int(8 / (rate * curvature)) if curvature > 0 else 0
        settling += count - settling % count + count // 3
        x, origin = np.zeros(self.replicas), np.zeros(self.replicas)
        found = WindowStatistics.empty(self.replicas, self.steps)
        for step in range(-settling, self.steps):
            place = (step + settling) % count
            if place == 0:
                kicks = self._epoch(rng, shares)
            if step == 0:
                origin = x
            g = curvature * x + kicks[place] + self.pull * (step >= 0)
            after = x - rate * g
            if step >= 0:
                known = self.declared or self.batches
                draw = Draw(known, float(shares[place]), place == 0, self.fresh)
                found = found.update(x - origin, g, after - origin, rate, rate, draw=draw)
            x = after
        return found

    def _epoch(self, rng: np.random.Generator, shares: Array) -> Array:
        """Noise of each step, ``(S^2 / B)`` of unit size: exchangeable within the epoch."""
        root = np.sqrt(shares)[:, None]
        means = rng.standard_normal((len(shares), self.replicas)) / root
        means -= (shares[:, None] * means).sum(0) / self.batches
        anew = rng.standard_normal(means.shape) / root
        return np.asarray(math.sqrt(1 - self.fresh) * means + math.sqrt(self.fresh) * anew)
