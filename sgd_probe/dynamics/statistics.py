"""What a window remembers of its steps: running sums, and nothing else.

For every mode the pair (x, g) of each step, displacement before the step and gradient used by it,
enters a handful of sums; displacements enter at dyadic lags. Memory does not grow with the window.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class WindowStatistics:
    """Sums over the used steps t = 0 .. steps - 1 of a window, one number per mode (shape (k,)).

    Attributes:
        steps: used steps.
        skipped: steps left out.
        sum_x ... sum_tg: sums of x, x^2, g, g^2, x g, t x, t g.
        sum_g3: sum of g^3.
        sum_g4: sum of g^4.
        learning_rates: sum of nominal learning rates.
        confinement_clock: sum of effective learning rates (L).
        diffusion_clock: sum of their squares (S2).
        position: displacement after the last used step.
        lag_position: displacement at the last multiple of 2^j steps, shape (levels, k).
        lag_square: sum of squared non-overlapping displacements over 2^j steps, shape (levels, k).
        lag_count: how many of them, shape (levels,).
    """

    steps: int
    skipped: int
    sum_x: Array
    sum_xx: Array
    sum_g: Array
    sum_gg: Array
    sum_xg: Array
    sum_tx: Array
    sum_tg: Array
    sum_g3: Array
    sum_g4: Array
    learning_rates: float
    confinement_clock: float
    diffusion_clock: float
    position: Array
    lag_position: Array
    lag_square: Array
    lag_count: NDArray[np.int64]

    @property
    def equal_steps(self) -> float:
        """Steps of one size that would drive both clocks as far: L^2 / S2; 0 where nothing moved."""
        return self.confinement_clock**2 / self.diffusion_clock if self.diffusion_clock > 0 else 0.0

    @classmethod
    def empty(cls, modes: int, planned_steps: int) -> WindowStatistics:
        """The statistics of no step yet; lags go up to a half of the planned length."""
        levels = max(int(math.log2(max(planned_steps, 2))), 1)
        zeros = np.zeros(modes)
        return cls(
            steps=0,
            skipped=0,
            **{name: zeros for name in _SUMS},
            learning_rates=0.0,
            confinement_clock=0.0,
            diffusion_clock=0.0,
            position=zeros,
            lag_position=np.zeros((levels, modes)),
            lag_square=np.zeros((levels, modes)),
            lag_count=np.zeros(levels, dtype=np.int64),
        )

    def update(
        self, x: Array, g: Array, x_after: Array, learning_rate: float, effective_learning_rate: float
    ) -> WindowStatistics:
        """Take one step in.

        Args:
            x: displacement before the step, shape (k,).
            g: gradient used by the step, coupled weight decay included, shape (k,).
            x_after: displacement after it, shape (k,).
            learning_rate: nominal learning rate of the step.
            effective_learning_rate: with momentum and dampening.
        """
        steps, gg = self.steps + 1, g * g
        lag_position, lag_square, lag_count = self.lag_position, self.lag_square, self.lag_count
        # Level j is due when 2^j divides the step count: as many levels as it has trailing zeros.
        due = min((steps & -steps).bit_length(), len(lag_count))
        lag_position, lag_square, lag_count = lag_position.copy(), lag_square.copy(), lag_count.copy()
        lag_square[:due] += (x_after - lag_position[:due]) ** 2
        lag_position[:due] = x_after
        lag_count[:due] += 1
        return WindowStatistics(
            steps=steps,
            skipped=self.skipped,
            sum_x=self.sum_x + x,
            sum_xx=self.sum_xx + x * x,
            sum_g=self.sum_g + g,
            sum_gg=self.sum_gg + gg,
            sum_xg=self.sum_xg + x * g,
            sum_tx=self.sum_tx + self.steps * x,
            sum_tg=self.sum_tg + self.steps * g,
            sum_g3=self.sum_g3 + gg * g,
            sum_g4=self.sum_g4 + gg * gg,
            learning_rates=self.learning_rates + learning_rate,
            confinement_clock=self.confinement_clock + effective_learning_rate,
            diffusion_clock=self.diffusion_clock + effective_learning_rate**2,
            position=x_after,
            lag_position=lag_position,
            lag_square=lag_square,
            lag_count=lag_count,
        )

    def skip(self) -> WindowStatistics:
        """Count a step that is left out."""
        return dataclasses.replace(self, skipped=self.skipped + 1)

    def regress(self, trend: bool = False) -> Regression:
        """Least squares of g on (1, x), or on (1, x, t) with ``trend``, for every mode."""
        n = float(self.steps)
        xx = self.sum_xx - self.sum_x**2 / n
        xg = self.sum_xg - self.sum_x * self.sum_g / n
        gg = self.sum_gg - self.sum_g**2 / n
        freedom = n - 2
        if trend:
            sum_t = n * (n - 1) / 2
            tt = n * (n * n - 1) / 12
            tx = self.sum_tx - sum_t * self.sum_x / n
            tg = self.sum_tg - sum_t * self.sum_g / n
            xx, xg, gg = xx - tx * tx / tt, xg - tx * tg / tt, gg - tg * tg / tt
            freedom -= 1
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = xg / xx
            # A mode that never moved has no slope; all of its gradient's variance is noise.
            variance = np.maximum(gg - np.where(xx > 0, slope * xg, 0.0), 0.0) / freedom
            error = np.sqrt(variance / xx)
            return Regression(slope=slope, standard_error=error, t=slope / error, variance=variance)

    def kurtosis(self) -> Array:
        """Kurtosis of the used gradient along each mode: 3 for Gaussian noise."""
        n = float(self.steps)
        mean = self.sum_g / n
        second = self.sum_gg / n - mean**2
        fourth = self.sum_g4 / n - 4 * mean * self.sum_g3 / n + 6 * mean**2 * self.sum_gg / n - 3 * mean**4
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(fourth / second**2)


@dataclass(frozen=True)
class Regression:
    """Slope of g on x for every mode, shape (k,).

    Attributes:
        slope: the slope, a curvature.
        standard_error: of the slope.
        t: slope over standard error.
        variance: residual variance, the noise variance.
    """

    slope: Array
    standard_error: Array
    t: Array
    variance: Array


_SUMS = ("sum_x", "sum_xx", "sum_g", "sum_gg", "sum_xg", "sum_tx", "sum_tg", "sum_g3", "sum_g4")
