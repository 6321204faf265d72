"""The noise of the used gradient: its variance, a check at fixed weights, and whether an epoch cancels it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.result import Interval

Array = NDArray[np.float64]

#: The chi-square interval of a noise variance covers less than it says above this kurtosis.
HEAVY_TAILS = 10.0
#: Fewer whole epochs say nothing of how noise cancels.
_MIN_EPOCHS = 5
_TAILS = (0.025, 0.975)


def chi_square_interval(mean_square: float, freedom: float) -> Interval:
    """95% interval of a variance from a mean square of ``freedom`` independent Gaussian numbers."""
    if not (freedom > 0 and math.isfinite(mean_square)):
        return Interval(mean_square, math.nan, math.nan)
    low, high = (float(quantile) for quantile in chi2.ppf(_TAILS, freedom))
    if not low > 0:  # so little freedom that nothing bounds it from above
        return Interval(mean_square, math.nan, math.nan)
    return Interval(mean_square, mean_square * freedom / high, mean_square * freedom / low)


def noise_variance(variance: float, steps: int, kurtosis: float) -> Interval:
    """Chi-square interval of a noise variance, widened for heavy tails.

    Degrees of freedom ``2 M / (kurtosis - 1)``, at most ``M - 1``, with M = ``steps`` - 1 independent
    residuals. Above a kurtosis of :data:`HEAVY_TAILS` the interval covers less than it says.
    """
    residuals = steps - 1
    spread = 2 * residuals / (kurtosis - 1) if kurtosis > 1 else math.inf
    return chi_square_interval(variance, min(spread, residuals - 1))


@dataclass(frozen=True)
class Resampled:
    """Minibatch gradients at fixed weights, projected on the modes.

    Attributes:
        variance: of each mode with its interval.
        kurtosis: of each mode, shape (k,).
        covariance: between modes, shape (k, k).
    """

    variance: tuple[Interval, ...]
    kurtosis: Array
    covariance: Array

    @property
    def heavy(self) -> NDArray[np.bool_]:
        """Modes whose interval covers less than it says, shape (k,)."""
        return np.asarray(self.kurtosis > HEAVY_TAILS)

    @property
    def correlation(self) -> Array:
        """Noise correlation between modes, shape (k, k); NaN where a mode has no noise."""
        scale = np.sqrt(np.diag(self.covariance))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.covariance / np.outer(scale, scale))


def resample(gradients: Array) -> Resampled:
    """Noise variances from minibatch gradients at fixed weights: the check on the residual variance.

    Args:
        gradients: of independent minibatches, each projected on the modes, shape (M, k); 32 of them give
            a variance to 25%.

    Raises:
        ValueError: fewer than three minibatches, or another shape.
    """
    if gradients.ndim != 2 or len(gradients) < 3:
        raise ValueError(
            f"expected the projected gradients of at least three minibatches, (M, k), found {gradients.shape}"
        )
    count = len(gradients)
    centred = gradients - gradients.mean(0)
    covariance = centred.T @ centred / (count - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        kurtosis = np.asarray((centred**4).mean(0) / (centred**2).mean(0) ** 2)
    variances = tuple(
        noise_variance(float(v), count, float(k)) for v, k in zip(np.diag(covariance), kurtosis, strict=True)
    )
    return Resampled(variances, kurtosis, covariance)


def agree(one: Interval, other: Interval) -> bool:
    """Two estimates of one positive quantity lie within their errors (on the log scale, 95%)."""
    values = (one.value, one.low, one.high, other.value, other.low, other.high)
    if not all(math.isfinite(v) and v > 0 for v in values):
        return False
    errors = [math.log(i.high / i.low) for i in (one, other)]
    return abs(math.log(one.value / other.value)) <= math.hypot(*errors) / 2


@dataclass(frozen=True)
class Cancellation:
    """Noise that is left of an epoch's sum, over that of independent draws; 95% interval, over all modes.

    Attributes:
        value: measured share.
        low: of its interval.
        high: of its interval.
        expected: by the declared sampling.
        correlation: of two different steps of an epoch, measured, with its interval.
        modes: the same for each mode.
    """

    value: float
    low: float
    high: float
    expected: float
    correlation: Interval
    modes: tuple[Interval, ...]


def epoch_cancellation(statistics: WindowStatistics) -> Cancellation | None:
    """How much of its noise an epoch cancels: nothing with replacement, all of it without.

    The residual variance of epoch sums of g on those of (1, x), over that of as many independent steps.
    The median mode counts, with the freedom of a single one, because modes share their noise.

    Returns:
        None where fewer than :data:`_MIN_EPOCHS` whole epochs were seen.
    """
    epochs = statistics.epochs
    if epochs < _MIN_EPOCHS or not statistics.modes:
        return None
    n, x, g = 0, 1, 2
    products = statistics.epoch_products
    xx = products[x, x] - products[n, x] ** 2 / products[n, n]
    xg = products[x, g] - products[n, x] * products[n, g] / products[n, n]
    gg = products[g, g] - products[n, g] ** 2 / products[n, n]
    with np.errstate(divide="ignore", invalid="ignore"):
        left = (gg - np.where(xx > 0, xg**2 / xx, 0.0)) / (epochs - 2)
        steps = float(np.sqrt(products[n, n, 0] / epochs))
        full = steps * statistics.regress().variance
        shares = np.maximum(left, 0.0) / full

    def correlation(share: Interval) -> Interval:
        ends = (share.value, share.low, share.high)
        return Interval(*((end - 1) / (steps - 1) if steps > 1 else math.nan for end in ends))

    if not np.isfinite(shares).any():
        return None
    interval = chi_square_interval(float(np.median(shares[np.isfinite(shares)])), epochs - 2)
    behind = statistics.diffusion_clock - statistics.epoch.squared_rates
    return Cancellation(
        interval.value,
        interval.low,
        interval.high,
        expected=max(statistics.past_clock / behind, 0.0) if behind > 0 else math.nan,
        correlation=correlation(interval),
        modes=tuple(correlation(chi_square_interval(float(share), epochs - 2)) for share in shares),
    )
