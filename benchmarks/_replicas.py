"""Modes of known curvature, thousands at a time, moved step by step as torch.optim.SGD moves weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sgd_probe.dynamics.statistics import Draw, WindowStatistics

Array = NDArray[np.float64]
RATE = 0.05
#: Replicas that are moved at once: few enough to stay in the processor's cache.
CHUNK = 500


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A window on modes of one curvature.

    Attributes:
        kappa: curvature times the sum of effective learning rates; of the loss and the coupled weight decay.
        steps: T.
        momentum: mu of heavy ball.
        cosine: the learning rate falls to nothing over the window.
        student: the noise is Student's t of three degrees of freedom.
        correlation: of the noise of successive steps, an AR(1) process.
        fading: noise variance at the window's end over that at its start.
        batches: steps an epoch without replacement, N / B; infinity with replacement.
        samples: draw batches of 64 from so many samples (heavy-tailed ones) instead.
        fresh: share of the noise that is drawn anew at each step.
        clip: gradients are clipped to this norm, that of eight noise components.
        away: distance from the centre at the start, in stationary standard deviations.
        pull: a constant mean gradient that moves a flat mode this many times as far as free diffusion.
    """

    kappa: float = 0.0
    steps: int = 1000
    momentum: float = 0.0
    cosine: bool = False
    student: bool = False
    correlation: float = 0.0
    fading: float = 1.0
    batches: float = math.inf
    samples: int = 0
    fresh: float = 0.0
    clip: float = math.inf
    away: float = 0.0
    pull: float = 0.0

    @property
    def independent_gaussian(self) -> Truth:
        """The same mode and optimizer with Gaussian noise, independent and steady, and nothing else."""
        return Truth(kappa=self.kappa, steps=self.steps, momentum=self.momentum, cosine=self.cosine)

    @property
    def rates(self) -> Array:
        """Learning rate of each step."""
        if self.cosine:
            return RATE * 0.5 * (1 + np.cos(np.pi * np.arange(self.steps) / self.steps))
        return np.full(self.steps, RATE)

    @property
    def effective_rates(self) -> Array:
        return self.rates / (1 - self.momentum)

    @property
    def curvature(self) -> float:
        return self.kappa / float(self.effective_rates.sum())

    def statistics(self, replicas: int, seed: int, told: bool = True) -> Iterator[WindowStatistics]:
        """The package's own sums over the window, a chunk of replicas at a time.

        Args:
            replicas: number of modes.
            seed: of the noise.
            told: the sums know how minibatches were drawn.
        """
        for index, start in enumerate(range(0, replicas, CHUNK)):
            rng = np.random.default_rng([seed, index])
            yield self._watch(min(CHUNK, replicas - start), rng, told)

    def _watch(self, count: int, rng: np.random.Generator, told: bool) -> WindowStatistics:
        rates, effective = self.rates.tolist(), self.effective_rates.tolist()
        noise, settling = self._noise(count, rng), self._settling(rng)
        pull = self.pull * math.sqrt(sum(e * e for e in effective)) / sum(effective)
        position, buffer, origin = np.zeros(count), np.zeros(count), np.zeros(count)
        found = WindowStatistics.empty(count, self.steps)
        for step in range(-settling, self.steps):
            kick, draw = next(noise)
            if step == 0:
                # Nothing flat has settled: it starts at its critical point, its buffer warm.
                position = position if self.kappa > 0 else np.zeros(count)
                if self.away:
                    position = position + self.away * math.sqrt(RATE / (2 * self.curvature))
                origin = position
            shrink = self.fading ** (max(step, 0) / self.steps / 2)
            gradient = self.curvature * position + pull * (step >= 0) + shrink * kick
            if math.isfinite(self.clip):
                others = (rng.standard_normal((7, count)) ** 2).sum(0)
                gradient = gradient * np.minimum(1, self.clip / np.sqrt(others + gradient**2))
            buffer = self.momentum * buffer + gradient
            after = position - rates[max(step, 0)] * buffer
            if step >= 0:
                seen = draw if told else Draw()
                found = found.update(
                    position - origin, gradient, after - origin, rates[step], effective[step], draw=seen
                )
            position = after
        return found

    def _settling(self, rng: np.random.Generator) -> int:
        """Steps before the window: eight relaxation times, a warm buffer, some part of an epoch."""
        settling = int(20 / (1 - self.momentum)) if self.momentum else 0
        if self.kappa > 0:
            settling += int(8 * (1 - self.momentum) / (RATE * self.curvature))
        epoch = self.samples / 64 if self.samples else self.batches
        return settling + int(rng.integers(math.ceil(epoch))) if math.isfinite(epoch) else settling

    def _noise(self, count: int, rng: np.random.Generator) -> Iterator[tuple[Array, Draw]]:
        def white(size: int | tuple[int, ...]) -> Array:
            if self.student:
                return np.asarray(rng.standard_t(3, size) / math.sqrt(3))
            return rng.standard_normal(size)

        if self.samples:
            return self._shuffled_samples(count, rng)
        if math.isfinite(self.batches):
            return self._shuffled(count, white)
        return self._independent(count, white)

    def _independent(
        self, count: int, white: Callable[[int | tuple[int, ...]], Array]
    ) -> Iterator[tuple[Array, Draw]]:
        share, kick = math.sqrt(1 - self.correlation**2), white(count)
        for _ in itertools.count():
            yield kick, Draw()
            kick = self.correlation * kick + share * white(count)

    def _shuffled(
        self, count: int, white: Callable[[int | tuple[int, ...]], Array]
    ) -> Iterator[tuple[Array, Draw]]:
        """Batch means of an epoch: exchangeable, and zero on the whole (Gaussian samples)."""
        shares = np.ones(math.ceil(self.batches))
        shares[-1] -= len(shares) - self.batches
        while True:
            means = white((len(shares), count)) / np.sqrt(shares)[:, None]
            means -= (shares[:, None] * means).sum(0) / self.batches
            anew = white((len(shares), count)) / np.sqrt(shares)[:, None]
            kicks = math.sqrt(1 - self.fresh) * means + math.sqrt(self.fresh) * anew
            for j, kick in enumerate(kicks):
                yield kick, Draw(self.batches, float(shares[j]), j == 0, self.fresh)

    def _shuffled_samples(self, count: int, rng: np.random.Generator) -> Iterator[tuple[Array, Draw]]:
        """A data set of heavy-tailed samples, shuffled anew each epoch; the last batch is smaller."""
        values = 8 * rng.standard_t(5, (self.samples, count)) / math.sqrt(5 / 3)
        values -= values.mean(0)
        starts = np.arange(0, self.samples, 64)
        sizes = np.diff(np.append(starts, self.samples))
        while True:
            order = rng.permuted(values, axis=0)
            means = np.add.reduceat(order, starts, axis=0) / sizes[:, None]
            for j, kick in enumerate(means):
                yield kick, Draw(self.samples / 64, sizes[j] / 64, j == 0)
