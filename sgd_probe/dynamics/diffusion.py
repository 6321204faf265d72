"""How far a mode gets: mean squared displacements by lag, and the diffusion coefficients in them.

Evidence of diffusion is a D that does not depend on the lag: at lag 1 it only restates the noise variance.
Displacements of one lag do not overlap, so that those of a flat mode with white noise are independent and
their squares have a chi-square distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, polygamma

from sgd_probe.dynamics.noise import chi_square_interval as chi_square_interval
from sgd_probe.dynamics.noise import noise_variance as noise_variance
from sgd_probe.dynamics.regression import AHEAD, GRADIENT, ONE, X, least_squares
from sgd_probe.dynamics.statistics import LAGS, WindowStatistics
from sgd_probe.result import Interval
from sgd_probe.theory.closed_forms import momentum_kernel

Array = NDArray[np.float64]
_Z95 = 1.96


@dataclass(frozen=True)
class LagDiffusion:
    """D of one mode at one lag.

    Attributes:
        lag: optimizer steps.
        count: non-overlapping displacements.
        freedom: independent ones among them, fewer under momentum or a schedule.
        per_step: D, squared weight units per optimizer step, with its interval.
        per_time: the same per unit time ``eta t`` (the sum of effective learning rates).
        detrended: D per step with the mean displacement taken off, so that slow drift does not enter.
    """

    lag: int
    count: int
    freedom: float
    per_step: Interval
    per_time: Interval
    detrended: Interval


def diffusion_by_lag(
    statistics: WindowStatistics, mode: int, momentum: float, nesterov: bool = False
) -> tuple[LagDiffusion, ...]:
    """``D_b = sum (dx_b)^2 / (2 sum dS2)`` in units of the clock, the momentum's memory divided out.

    The clock of the displacements is the sum of squared learning rates that they span, so that a schedule
    does not enter. Intervals are those of a flat mode with Gaussian noise.
    """
    if not statistics.diffusion_clock > 0:
        return ()
    per_step = statistics.diffusion_clock / statistics.steps
    per_time = statistics.diffusion_clock / statistics.confinement_clock
    found = []
    for level, count in enumerate(statistics.lag_count.tolist()):
        if not count:
            continue
        lag = 2**level
        square = float(statistics.lag_square[level, mode])
        net = float(statistics.lag_net[level, mode])
        kernel, equal = momentum_kernel(lag, momentum, nesterov), float(statistics.lag_equal[level])
        freedom = max(independent_share(lag, momentum, nesterov) * equal, 1.0)
        unit = 1 / (2 * float(statistics.lag_elapsed[level]) * kernel)
        plain = chi_square_interval(square * unit, freedom)
        detrended = Interval.unknown()
        # The mean displacement takes as much of noise with it as it has independent parts.
        taken = 1 / (count * kernel)
        if taken < 1:
            left = max(square - net * net / count, 0.0)
            detrended = chi_square_interval(left * unit / (1 - taken), max(freedom * (1 - 1 / count), 1.0))
        found.append(
            LagDiffusion(
                lag,
                count,
                freedom,
                scaled(plain, per_step),
                scaled(plain, per_time),
                scaled(detrended, per_step),
            )
        )
    return tuple(found)


def mean_squared_displacements(
    statistics: WindowStatistics, mode: int, momentum: float, nesterov: bool = False
) -> list[tuple[int, int, Interval]]:
    """(lag in steps, count, mean squared displacement) at every dyadic lag with a displacement.

    The interval is that of a flat mode with Gaussian noise.
    """
    points = []
    for level, count in enumerate(statistics.lag_count.tolist()):
        if count:
            square = float(statistics.lag_square[level, mode]) / count
            equal = float(statistics.lag_equal[level])
            freedom = max(independent_share(2**level, momentum, nesterov) * equal, 1.0)
            points.append((2**level, count, chi_square_interval(square, freedom)))
    return points


def independent_share(lag: int, momentum: float, nesterov: bool = False) -> float:
    """Independent displacements of a flat mode over non-overlapping ones of that lag.

    Momentum correlates a displacement with the next by rho, from the mean squares over ``lag`` and
    twice it, and with later ones by ``mu^lag`` less each; squares correlate by the squares of that.
    """
    rho = momentum_kernel(2 * lag, momentum, nesterov) / momentum_kernel(lag, momentum, nesterov) - 1
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


def green_kubo(statistics: WindowStatistics, mode: int, lags: int = LAGS - 1) -> Interval:
    """D per step of a flat mode from its noise alone: ``eta_eff^2 sigma^2 (1/2 + sum_j rho_j)``.

    The autocorrelation of the residuals of g on (1, x), summed to so many lags. More precise than squared
    displacements, and blind to correlation beyond those lags: to be used on flat modes, with replacement,
    where no reservation names the noise.

    Raises:
        ValueError: more lags than are kept.
    """
    if not 0 <= lags <= LAGS:
        raise ValueError(f"expected 0 to {LAGS} lags, found {lags}")
    if statistics.draw.memory > 0 or statistics.steps <= lags + 3:
        return Interval.unknown()
    products = statistics.products[..., mode : mode + 1]
    fit = least_squares(products, statistics.steps, AHEAD[False])
    slope = float(fit.slope[0]) if math.isfinite(fit.slope[0]) else 0.0
    centre = float((products[ONE, GRADIENT, 0] - slope * products[ONE, X, 0]) / products[ONE, ONE, 0])
    line = np.array([-centre, 0.0, -slope, 1.0])
    variance = float(fit.variance[0])
    total = float(line @ products[..., 0] @ line)
    if not total > 0:
        return Interval.unknown()
    shares = [float(line @ statistics.lagged[j, :, :, mode] @ line) / total for j in range(lags)]
    value = 0.5 * (1 + 2 * sum(shares)) * variance * statistics.diffusion_clock / statistics.steps
    # Bartlett's variance of a spectral estimate at zero frequency with a flat window.
    error = math.sqrt(2 * (2 * lags + 1) / statistics.steps)
    return Interval(value, value * math.exp(-_Z95 * error), value * math.exp(_Z95 * error))


def anomalous_exponent(
    statistics: WindowStatistics, mode: int, momentum: float, shortest: int | None = None
) -> Interval:
    """Exponent of the mean squared displacement, ``MSD ~ lag^alpha``: 1 for diffusion, 0 once confined.

    A weighted fit of log D over dyadic lags. For a flat mode with white noise the mean squares at successive
    lags differ by independent steps of variance ``2 / n - 2 / m`` (n, m displacements), which gives weights
    and interval; the bias of a logarithm is taken off.

    Args:
        statistics: of the window.
        mode: which.
        momentum: of heavy ball.
        shortest: shortest lag; by default an eighth of :func:`headline_lag`, at least the momentum's memory.
    """
    if shortest is None:
        shortest = max(headline_lag(statistics.steps, momentum) // 8, math.ceil(1 / (1 - momentum)))
    points = [
        (point.lag, point.freedom, point.per_step.value)
        for point in diffusion_by_lag(statistics, mode, momentum)
        if point.lag >= shortest and point.count >= 4 and point.per_step.value > 0
    ]
    if len(points) < 2:
        return Interval.unknown()
    # log D without the bias of the logarithm of a chi-square mean.
    logs = [math.log(d) - float(digamma(n / 2)) + math.log(n / 2) for _, n, d in points]
    counts = [n for _, n, _ in points]
    spread = [float(polygamma(1, n / 2)) for n in counts]
    octaves = np.diff([math.log(lag) for lag, _, _ in points])
    growth, variance = np.diff(logs), np.diff(spread)
    weights = octaves**2 / variance
    slope = float((weights * growth / octaves).sum() / weights.sum())
    error = 1 / math.sqrt(float(weights.sum()))
    return Interval(1 + slope, 1 + slope - _Z95 * error, 1 + slope + _Z95 * error)


def pooled_diffusion(
    statistics: WindowStatistics,
    modes: Sequence[int],
    momentum: float,
    lag: int | None = None,
    correlation: Array | None = None,
) -> Interval:
    """Measured over free diffusion, for several flat modes together: 1 where their noise explains them.

    Each mode counts in units of its own noise variance. Modes share their minibatches, so that their number
    counts for less by the mean square of their noise correlation.

    Args:
        statistics: of the window.
        modes: which.
        momentum: of heavy ball.
        lag: of the displacements; :func:`headline_lag` by default.
        correlation: of the noise of these modes, shape (len(modes), len(modes)).
    """
    lag = headline_lag(statistics.steps, momentum) if lag is None else lag
    variances = statistics.regress().variance
    shares, counts = [], []
    for mode in modes:
        point = next((p for p in diffusion_by_lag(statistics, mode, momentum) if p.lag == lag), None)
        free = float(variances[mode]) * statistics.diffusion_clock / (2 * statistics.steps)
        if point is not None and free > 0:
            shares.append(point.per_step.value / free)
            counts.append(point.freedom)
    if not shares:
        return Interval.unknown()
    effective = float(len(shares))
    if correlation is not None:
        effective = len(shares) ** 2 / float((np.asarray(correlation) ** 2).sum())
    return chi_square_interval(float(np.mean(shares)), effective * float(np.mean(counts)))
