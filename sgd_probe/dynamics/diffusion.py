"""Intervals of the noise variance and of the mean squared displacement, mode by mode."""

from __future__ import annotations

import math

from scipy.stats import chi2

from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.result import Interval
from sgd_probe.theory.closed_forms import momentum_kernel

_TAILS = (0.025, 0.975)


def noise_variance(variance: float, steps: int, kurtosis: float) -> Interval:
    """Chi-square interval of a noise variance, widened for heavy tails.

    Degrees of freedom ``2 M / (kurtosis - 1)``, at most ``M - 1``, with M = ``steps`` - 1 independent
    residuals. Above a kurtosis of 10 the interval covers less than it says.
    """
    residuals = steps - 1
    spread = 2 * residuals / (kurtosis - 1) if kurtosis > 1 else math.inf
    return chi_square_interval(variance, min(spread, residuals - 1))


def chi_square_interval(mean_square: float, freedom: float) -> Interval:
    """95% interval of a variance from a mean square of ``freedom`` independent Gaussian numbers."""
    if not (freedom > 0 and math.isfinite(mean_square)):
        return Interval(mean_square, math.nan, math.nan)
    low, high = (float(quantile) for quantile in chi2.ppf(_TAILS, freedom))
    return Interval(mean_square, mean_square * freedom / high, mean_square * freedom / low)


def mean_squared_displacements(
    statistics: WindowStatistics, mode: int, momentum: float
) -> list[tuple[int, int, Interval]]:
    """(lag in steps, count, mean squared displacement) at every dyadic lag with a displacement.

    The interval is that of a flat mode with Gaussian noise.
    """
    points = []
    for level, count in enumerate(statistics.lag_count.tolist()):
        if count:
            square = float(statistics.lag_square[level, mode]) / count
            freedom = max(independent_share(2**level, momentum) * count, 1.0)
            points.append((2**level, count, chi_square_interval(square, freedom)))
    return points


def independent_share(lag: int, momentum: float) -> float:
    """Independent displacements of a flat mode over non-overlapping ones of that lag.

    Momentum correlates a displacement with the next by rho, from the mean squares over ``lag`` and
    twice it, and with later ones by ``mu^lag`` less each; squares correlate by the squares of that.
    """
    rho = momentum_kernel(2 * lag, momentum) / momentum_kernel(lag, momentum) - 1
    return 1 / (1 + 2 * rho**2 / (1 - momentum ** (2 * lag)))


def headline_lag(steps: int, momentum: float) -> int:
    """The dyadic lag at which D is quoted: long against the optimizer's memory, with about ten counts.

    D at lag 1 only restates the noise variance; D at the longest lags has no precision.
    """
    memory = 4 / (1 - momentum)
    longest, usual = (int(math.log2(max(steps / counts, 1))) for counts in (4, 10))
    return 1 << min(max(usual, math.ceil(math.log2(memory))), longest)


def scaled(interval: Interval, factor: float) -> Interval:
    """The interval of a positive multiple."""
    return Interval(interval.value * factor, interval.low * factor, interval.high * factor)
