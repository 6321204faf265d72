"""The truth that the package is measured against: modes moved step by step as torch.optim.SGD moves weights.

Every function works on thousands of independent replicas at once, one per element of an array.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sgd_probe.dynamics.statistics import WindowStatistics

Array = NDArray[np.float64]


class HeavyBall:
    """torch.optim.SGD in numpy: its first buffer is the undamped gradient.

    Attributes:
        position: the weights.
        buffer: the momentum buffer, or None before the first step.
    """

    def __init__(self, position: Array, momentum: float = 0.0, dampening: float = 0.0) -> None:
        self.position = position
        self.buffer: Array | None = None
        self._momentum = momentum
        self._dampening = dampening

    def step(self, gradient: Array, learning_rate: float) -> None:
        direction = gradient
        if self._momentum:
            if self.buffer is None:
                self.buffer = gradient
            else:
                self.buffer = self._momentum * self.buffer + (1 - self._dampening) * gradient
            direction = self.buffer
        self.position = self.position - learning_rate * direction


@dataclass(frozen=True)
class Noise:
    """Independent noise of unit variance: Gaussian, or Student's t of so many degrees of freedom."""

    freedom: float = math.inf

    def draw(self, rng: np.random.Generator, size: int) -> Array:
        if math.isinf(self.freedom):
            return rng.standard_normal(size)
        scale = math.sqrt(self.freedom / (self.freedom - 2))
        return np.asarray(rng.standard_t(self.freedom, size) / scale)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A window on modes of one curvature, all in the same state when it opens.

    Attributes:
        relaxation_times: curvature times the confinement clock (0: flat; negative: unstable).
        rates: learning rate of every step.
        momentum: heavy ball's mu.
        noise: of the gradient, of unit variance.
        pull: a constant mean gradient.
        replicas: number of modes.
        seed: of the noise.
    """

    relaxation_times: float
    rates: Array
    momentum: float = 0.0
    noise: Noise = Noise()
    pull: float = 0.0
    replicas: int = 10_000
    seed: int = 0

    @property
    def effective_rates(self) -> Array:
        return self.rates / (1 - self.momentum)

    @property
    def curvature(self) -> float:
        return self.relaxation_times / float(self.effective_rates.sum())

    def steps(self) -> Iterator[tuple[Array, Array, Array]]:
        """(displacement before, gradient, displacement after) of every step of the window.

        Before the window a confined mode settles for eight relaxation times, so that the window
        opens at a draw of the stationary state: theta_0 is the origin and the centre is unknown. The
        buffer is warm.
        """
        rng = np.random.default_rng(self.seed)
        ball = HeavyBall(np.zeros(self.replicas), self.momentum)
        rate = float(self.rates[0])
        settling = int(20 / (1 - self.momentum)) if self.momentum else 0
        if self.relaxation_times > 0:
            settling += int(8 * (1 - self.momentum) / (rate * self.curvature))
        for _ in range(settling):
            ball.step(self._gradient(ball.position, rng), rate)
        origin = ball.position
        if self.relaxation_times <= 0:  # nothing to settle into: it starts at the critical point
            ball.position = origin = np.zeros(self.replicas)
        for rate in self.rates.tolist():
            before = ball.position
            gradient = self._gradient(before, rng)
            ball.step(gradient, rate)
            yield before - origin, gradient, ball.position - origin

    def statistics(self) -> WindowStatistics:
        """What the package's own sums make of it."""
        found = WindowStatistics.empty(self.replicas, len(self.rates))
        steps = zip(self.steps(), self.rates.tolist(), self.effective_rates.tolist(), strict=True)
        for (before, gradient, after), rate, effective in steps:
            found = found.update(before, gradient, after, rate, effective)
        return found

    def _gradient(self, position: Array, rng: np.random.Generator) -> Array:
        return self.curvature * position + self.pull + self.noise.draw(rng, self.replicas)


def constant(steps: int, rate: float = 0.05) -> Array:
    """The same learning rate at every step."""
    return np.full(steps, rate)


def cosine(steps: int, rate: float = 0.05) -> Array:
    """A learning rate that falls to nothing over the window."""
    return rate * 0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps))
