"""From the sums of a window to evidence on every mode.

g = lambda (x - x*) + xi holds whatever the optimizer does with g afterwards, so the evidence is a regression
of the used gradient on the displacement, not the look of the path. Two hypotheses are weighed: a flat mode,
g = xi, and one with :data:`CONFINED_RELAXATION_TIMES` relaxation times in the window about an unknown centre.
Each may have noise that is an AR(1) process; its variance and correlation are at their most likely values
under each (a generalised likelihood ratio), so that correlated noise is not taken for a restoring force.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from sgd_probe.dynamics.noise import epoch_cancellation
from sgd_probe.dynamics.regression import (
    AHEAD,
    GRADIENT,
    ONE,
    Regression,
    X,
    least_squares,
    prewhitened,
)
from sgd_probe.dynamics.statistics import PARTS, WindowStatistics
from sgd_probe.result import Interval
from sgd_probe.theory.sampling import plain_epoch_factor

Array = NDArray[np.float64]

#: Relaxation times of the hypothesis that a flat mode is weighed against.
CONFINED_RELAXATION_TIMES = 20.0
#: Log evidence that "confined" and "diffusive" ask for.
NEEDED, NEEDED_FLAT = 0.7, 1.0
#: Fewer steps cannot carry the rule.
MIN_STEPS = 40
#: Nor can a schedule so steep that fewer steps of one size would do as much: 20 relaxation times in
#: them would be unstable.
MIN_EQUAL_STEPS = 20
#: Nor a window of fewer memories 1 / (1 - mu) of the momentum.
MIN_MEMORIES = 10
#: From so many memories on the rule's rates are those without momentum; below, "confined" asks for more.
FULL_MEMORIES = 30
#: t-statistic of the slope down to which a flat mode may seem to be pushed outwards.
OUTWARD = -0.3
#: Log likelihood that correlated noise costs the hypothesis that is to be refuted, and the one that is to be
#: accepted. The latter has a share over the number of steps: a short window can take correlated noise for a
#: restoring force, and hide a force behind it.
_REFUTED = 0.5
_ACCEPTED, _ACCEPTED_SHORT = 0.8, 70.0
#: Gain in log likelihood, the slope free, from which a correlation enters the measured curvature: three
#: standard errors. (Where a mode forgets within a step or two, 1 - eta lambda and the noise's correlation
#: can be mistaken for each other.)
_FIRM = 4.5
#: A slope that is free must be so much more likely to choose the noise's correlation.
_FREE_SLOPE = 6.0
#: Parts of a window differ in noise if they would by chance in this share of windows.
_FADING_LEVEL = 3e-2
#: Where it changes more, evening it out does not restore the rule's rates.
MOST_FADING = 12.0
#: Of the noise of an epoch's steps, more than all of it is left where it is not noise.
_MORE_THAN_NOISE = 1.5
#: Correlation beyond the step before that an AR(1) does not explain: significance and size.
_BEYOND_LEVEL, _BEYOND_SIZE = 1e-4, 0.1
_Z95 = 1.96


@dataclass(frozen=True)
class Evidence:
    """What the statistics say of one mode.

    Attributes:
        log_bayes_factor: log evidence of 20 relaxation times in the window against none.
        t_level: t-statistic of the slope of g on (1, x).
        t_trend: the same with a linear trend.
        drift_z: |net displacement| over that of free diffusion.
        noise_variance: residual variance of g on (1, x).
        slope: that slope, the measured curvature.
        slope_error: its standard error.
        needed: log evidence that "confined" asks for in this window.
        needed_flat: log evidence against confinement that "diffusive" asks for.
        outward: t-statistic of the slope below which it asks for a gradient that does not push outwards.
        noise_correlation: of successive steps, taken out before weighing.
        fading: noise variance in the last part of the window over that in the first, where parts differ
            significantly; else 1.
        free_share: variance of a flat mode's net displacement over that under independent draws: 1 with
            replacement, 0 over whole epochs of equal batches.
        curvature: the slope less the bias of a short window, with its interval.
        drift: net displacement per unit of the confinement clock, a mean gradient with its sign turned.
        reservation: why no verdict can stand on this; "" where one can.
    """

    log_bayes_factor: float
    t_level: float
    t_trend: float
    drift_z: float
    noise_variance: float
    slope: float
    slope_error: float
    needed: float = NEEDED
    needed_flat: float = NEEDED_FLAT
    outward: float = OUTWARD
    noise_correlation: float = 0.0
    fading: float = 1.0
    free_share: float = 1.0
    curvature: Interval = Interval.unknown()  # noqa: RUF009  (immutable)
    drift: float = 0.0
    reservation: str = ""


def too_short(statistics: WindowStatistics, momentum: float = 0.0) -> str:
    """Why a window cannot carry the rule; "" where it can."""
    if statistics.steps < MIN_STEPS:
        return f"only {statistics.steps} steps were observed, {MIN_STEPS} are needed"
    if statistics.informative < MIN_STEPS:
        return f"only {statistics.informative} steps had noise of their own, {MIN_STEPS} are needed"
    if not statistics.diffusion_clock > 0:
        return "the learning rate was zero"
    if statistics.equal_steps < MIN_EQUAL_STEPS:
        return (
            "the learning rate changed so much that the window counts no more than "
            f"{statistics.equal_steps:.0f} equal steps, {MIN_EQUAL_STEPS} are needed"
        )
    memories = statistics.steps * (1 - momentum)
    if momentum and memories < MIN_MEMORIES * (1 - 1e-9):
        return (
            f"the window is too short for this momentum: {memories:.0f} times as long as it remembers, "
            f"{MIN_MEMORIES} times are needed"
        )
    return ""


def weigh(statistics: WindowStatistics, momentum: float) -> list[Evidence]:
    """Evidence for every mode.

    Args:
        statistics: of a window that is not :func:`too_short`.
        momentum: of heavy ball; enters the prior width of the unknown centre.

    Raises:
        ValueError: the window is too short, but for its momentum, of which :func:`judge` is told.
    """
    why = too_short(statistics)
    if why:
        raise ValueError(f"expected a window that can carry the rule, but {why}")
    steps, modes = statistics.informative, statistics.modes
    with np.errstate(all="ignore"):
        plain = statistics.regress()
        sums = _Sums.of(statistics)
        parts = _Parts.of(statistics, plain)
        sums = parts.weigh(sums)
        prior = _Prior.of(statistics, momentum)
        factor, correlation, gain = _log_bayes_factor(sums, plain.slope, steps, prior)
        white = prewhitened(sums.products, sums.lagged, sums.ends, correlation)
        level, trend = (least_squares(white, steps, AHEAD[with_trend]) for with_trend in (False, True))
        # White noise has its plain slope: a correlation that is none only adds to its error.
        firm = np.where(gain > _FIRM, correlation, 0.0)
        slope = least_squares(prewhitened(*sums, firm), steps)
        # What noise adds up to over many steps, correlation included.
        long_run = parts.mean_variance / (1 - correlation) ** 2
        # A flat mode without replacement is back after an epoch: what it may reach within one counts.
        reach = max(statistics.displacement_clock, _saturated(statistics))
        moved = statistics.position - statistics.start
        drift = np.abs(moved) / np.sqrt(long_run * reach)
        beyond = _correlated_beyond(statistics, white, correlation, level)
        curvature, error = _unbiased(slope, statistics)
    units, (needed, needed_flat, outward) = statistics.noise_units, _needed(statistics, momentum)
    share = float(statistics.displacement_clock * units / statistics.diffusion_clock)
    pace = moved / statistics.confinement_clock
    window = too_short(statistics, momentum) or _not_as_declared(statistics)
    found = []
    for k in range(modes):
        doubts = beyond[k]
        change = max(parts.fading[k], 1 / parts.fading[k])
        if change > MOST_FADING:
            doubts = f"its noise variance changed {change:.0f} times within the window"
        reservation = window or doubts
        uneven = 1.0 if parts.fading[k] != 1 else 0.0
        found.append(
            Evidence(
                log_bayes_factor=float(factor[k]),
                t_level=float(level.t[k]),
                t_trend=float(trend.t[k]),
                drift_z=float(drift[k]),
                noise_variance=float(plain.variance[k]) * units,
                slope=float(slope.slope[k]),
                slope_error=float(slope.standard_error[k]),
                needed=needed + uneven,
                needed_flat=needed_flat,
                outward=outward,
                noise_correlation=float(correlation[k]),
                fading=float(parts.fading[k]),
                free_share=share,
                curvature=Interval(
                    float(curvature[k]),
                    float(curvature[k] - _Z95 * error[k]),
                    float(curvature[k] + _Z95 * error[k]),
                ),
                drift=float(pace[k]),
                reservation=reservation,
            )
        )
    return found


class _Prior(NamedTuple):
    """The confined hypothesis: its curvature, and its centre's force, the variance over that of the noise."""

    curvature: float
    width: float

    @classmethod
    def of(cls, statistics: WindowStatistics, momentum: float) -> _Prior:
        clock = statistics.confinement_clock
        curvature = CONFINED_RELAXATION_TIMES / clock
        step = statistics.diffusion_clock / clock * (1 - momentum)
        # lambda*^2 V / sigma^2 of the stationary state: how far off the centre may lie.
        width = curvature * step * (1 + momentum) / ((1 - momentum) * (2 * (1 + momentum) - step * curvature))
        memory = statistics.draw.memory
        if memory > 0 and 1 / memory >= 2:
            held = min(max(1 - curvature * step / (1 - momentum), -0.99), 0.999_999)
            width *= plain_epoch_factor(held, int(1 / memory))
        return cls(curvature, width)


class _Sums(NamedTuple):
    """Products of (1, t, x, g) of a step with itself, with the step before, and at the ends: (4, 4, k)."""

    products: Array
    lagged: Array
    ends: Array

    @classmethod
    def of(cls, statistics: WindowStatistics) -> _Sums:
        return cls(statistics.products, statistics.lagged[0], statistics.ends())


@dataclass(frozen=True)
class _Parts:
    """Noise that differs between the parts of a window; weights that even it out."""

    weights: Array
    fading: Array
    mean_variance: Array
    pieces: tuple[_Sums, ...]

    @classmethod
    def of(cls, statistics: WindowStatistics, plain: Regression) -> _Parts:
        """Bartlett's test of equal variances, with the sample's kurtosis in place of the Gaussian one."""
        same = cls(
            np.ones((1, statistics.modes)), np.ones(statistics.modes), plain.variance, (_Sums.of(statistics),)
        )
        marks = [part for part in statistics.parts if part.steps < statistics.steps]
        if len(marks) != PARTS - 1:
            return same
        whole = _Sums.of(statistics)
        nothing = np.zeros_like(whole.products)
        products = np.diff([nothing, *(part.products for part in marks), whole.products], axis=0)
        lagged = np.diff([nothing, *(part.lagged for part in marks), whole.lagged], axis=0)
        steps = np.diff([0, *(part.steps for part in marks), statistics.steps])[:, None]
        clocks = np.diff([0, *(part.diffusion_clock for part in marks), statistics.diffusion_clock])[:, None]
        # Residuals of the line through the whole window, or of no line at all, whichever is smaller.
        slope, ones = np.nan_to_num(plain.slope), statistics.products[ONE]
        centre = (ones[GRADIENT] - slope * ones[X]) / ones[ONE]
        line = np.stack([-centre, np.zeros_like(centre), -slope, np.ones_like(centre)])
        variances = np.einsum("ik,pijk,jk->pk", line, products, line) / steps
        pooled = (variances * steps).sum(0) / steps.sum()
        statistic = (steps * np.log(pooled / variances)).sum(0)
        spread = np.maximum((statistics.kurtosis() - 1) / 2, 1.0)
        differ = statistic / spread > chi2.isf(_FADING_LEVEL, PARTS - 1)
        differ &= np.isfinite(variances).all(0) & (variances > 0).all(0)
        weights = np.where(differ, pooled / variances, 1.0)
        mean = np.where(differ, (variances * clocks).sum(0) / clocks.sum(), plain.variance)
        pieces = tuple(_Sums(p, j, whole.ends) for p, j in zip(products, lagged, strict=True))
        return cls(weights, np.where(differ, variances[-1] / variances[0], 1.0), mean, pieces)

    def weigh(self, sums: _Sums) -> _Sums:
        """The sums with every part's noise brought to the same variance."""
        if len(self.pieces) == 1 or bool((self.weights == 1).all()):
            return sums
        products = sum(w * piece.products for w, piece in zip(self.weights, self.pieces, strict=True))
        lagged = sum(w * piece.lagged for w, piece in zip(self.weights, self.pieces, strict=True))
        same = (self.weights == 1).all(0)
        return _Sums(np.where(same, sums.products, products), np.where(same, sums.lagged, lagged), sums.ends)


def _log_bayes_factor(sums: _Sums, slope: Array, steps: int, prior: _Prior) -> tuple[Array, Array, Array]:
    """Log likelihood ratio of confined to flat, and the noise correlation of the likelier of them.

    The noise is white or correlated under either, whichever is likelier at its price. The price is higher for
    the hypothesis that is to be accepted, so that neither wins by its noise alone; between the two the ratio
    is 0.

    Last, the log likelihood that the correlation gains where the slope is free.
    """
    free = np.nan_to_num(slope)
    hypotheses = [(np.zeros_like(free), None), (np.full_like(free, prior.curvature), prior.width)]
    candidates = [*hypotheses, (free, prior.width)]
    own = [_most_likely_correlation(sums, c, w) for c, w in candidates]
    white = np.stack([_likelihood(sums, c, w, steps, np.zeros_like(free)) for c, w in candidates])
    coloured = np.stack(
        [_likelihood(sums, c, w, steps, phi) for (c, w), phi in zip(candidates, own, strict=True)]
    )
    accepted = _ACCEPTED + _ACCEPTED_SHORT / steps
    dear, cheap = np.maximum(white, coloured - accepted), np.maximum(white, coloured - _REFUTED)
    stiffer = free > prior.curvature
    for_confined = _confined(dear, stiffer) - cheap[0]
    for_flat = dear[0] - _confined(cheap, stiffer)
    factor = np.maximum(for_confined, 0) - np.maximum(for_flat, 0)
    # A free slope that is likelier than both decides only what the noise is like.
    price = np.array([0.0, 0.0, _FREE_SLOPE])[:, None]
    choice = (coloured - price).argmax(0)
    worth = (coloured - price).max(0) - (white - price).max(0) > accepted
    correlation = np.where(worth, np.choose(choice, own), 0.0)
    return np.asarray(factor), correlation, coloured[2] - white[2]


def _confined(likely: Array, stiffer: NDArray[np.bool_]) -> Array:
    """A mode that is stiffer than the hypothesis may be as stiff as it looks."""
    return np.asarray(np.where(stiffer, np.maximum(likely[1], likely[2]), likely[1]))


def _combined(matrix: Array, curvature: Array, centre: Array) -> Array:
    """Sum of products of ``g - curvature x - centre`` from those of (1, t, x, g)."""
    line = np.stack([-centre, np.zeros_like(centre), -curvature, np.ones_like(centre)])
    return np.asarray(np.einsum("ik,ijk,jk->k", line, matrix, line))


def _most_likely_correlation(sums: _Sums, curvature: Array, width: float | None) -> Array:
    """Conditional least squares of the noise that a hypothesis leaves, on itself a step before."""
    centre = np.zeros_like(curvature)
    if width is not None:
        centre = (sums.products[ONE, GRADIENT] - curvature * sums.products[ONE, X]) / sums.products[ONE, ONE]
    product, ends = (_combined(m, curvature, centre) for m in (sums.products, sums.ends))
    found = _combined(sums.lagged, curvature, centre) / (product - ends)
    return np.asarray(np.clip(np.nan_to_num(found), -0.95, 0.95))


def _likelihood(sums: _Sums, curvature: Array, width: float | None, steps: int, phi: Array) -> Array:
    """Log likelihood, the noise variance at its most likely value, an unknown centre integrated over."""
    white = prewhitened(sums.products, sums.lagged, sums.ends, phi)
    square, penalty = _combined(white, curvature, np.zeros_like(curvature)), np.zeros_like(curvature)
    if width is not None:
        count = white[ONE, ONE]
        force = white[ONE, GRADIENT] - curvature * white[ONE, X]
        square = square - width * force**2 / (1 + width * count)
        penalty = -0.5 * np.log1p(width * count)
    return np.asarray(-steps / 2 * np.log(square) + 0.5 * np.log1p(-(phi**2)) + penalty)


def _needed(statistics: WindowStatistics, momentum: float) -> tuple[float, float, float]:
    """Log evidence that "confined" and "diffusive" ask for, and the push outwards that a flat mode may show.

    So much that a flat mode is called confined in 5% of windows at most, and one of 20 relaxation times
    diffusive in 2%. Where a window has few memories of the momentum, or an epoch's sampling holds flat modes
    back, fewer independent stretches decide, and chance goes further: of the slope's sign too, while a mode
    that really runs away does so within a few memories.
    """
    confined, flat, outward = NEEDED, NEEDED_FLAT, OUTWARD
    # By steps, not by equal ones: momentum forgets at the same pace under any schedule.
    memories = statistics.steps * (1 - momentum)
    if momentum and memories < FULL_MEMORIES:
        few = (FULL_MEMORIES - memories) / (FULL_MEMORIES - MIN_MEMORIES)
        confined, flat, outward = confined + 0.3 * few, flat - 0.25 * few, outward - 0.6 * few
    epochs = statistics.draw.memory * statistics.steps
    if epochs > 0.2:
        more = 0.5 if epochs < 3 else 1.5
        confined, flat = confined + more, flat + more
    return confined, flat, outward


def _saturated(statistics: WindowStatistics) -> float:
    """Mean squared displacement of a flat mode within an epoch, in units of an innovation's noise."""
    if not statistics.draw.memory > 0:
        return 0.0
    mean_square = statistics.diffusion_clock / statistics.steps
    return min(mean_square * (1 / statistics.draw.memory + 1) / 3, statistics.diffusion_clock)


def _correlated_beyond(
    statistics: WindowStatistics, white: Array, correlation: Array, level: Regression
) -> Sequence[str]:
    """Whether what is left of the noise correlates two or three steps apart."""
    slope = np.nan_to_num(level.slope)
    centre = (white[ONE, GRADIENT] - slope * white[ONE, X]) / white[ONE, ONE]
    raw = [_combined(m, slope, centre) for m in (statistics.products, *statistics.lagged)]
    left = [
        (1 + correlation**2) * raw[j] - correlation * (raw[j - 1] + raw[j + 1])
        for j in range(1, len(raw) - 1)
    ]
    scale = (1 + correlation**2) * raw[0] - 2 * correlation * raw[1]
    shares = np.stack(left[1:]) / scale
    statistic = statistics.informative * (shares**2).sum(0)
    odd = (statistic > chi2.isf(_BEYOND_LEVEL, len(shares))) & (np.abs(shares).max(0) > _BEYOND_SIZE)
    text = (
        "the noise of its steps is correlated over more than two of them (ordered data, perhaps), which the "
        "rule cannot undo"
    )
    return [text if bad else "" for bad in odd]


def _not_as_declared(statistics: WindowStatistics) -> str:
    """Whether the noise of an epoch cancels although, or does not cancel as, the sampling is said to do."""
    ratio = epoch_cancellation(statistics)
    if ratio is None:
        return ""
    if ratio.low > _MORE_THAN_NOISE:
        return (
            f"over an epoch the gradients add up to {ratio.value:.1f} times what their noise explains: "
            "something beside noise and the modes' own curvature moves them"
        )
    if ratio.low > 2 * ratio.expected + 0.1:
        return (
            f"over an epoch {ratio.value:.0%} of the noise is left where the declared sampling leaves "
            f"{ratio.expected:.0%}"
        )
    return ""


def _unbiased(level: Regression, statistics: WindowStatistics) -> tuple[Array, Array]:
    """The slope less its bias in a short window, and its standard error.

    A mode's displacement is made of earlier noise, so least squares overestimates its curvature: by
    ``(1 + 3 rho) / L`` for an AR(1) of coefficient rho with an unknown mean (Kendall, Biometrika 41, 1954),
    where L is the confinement clock and ``rho = 1 - eta lambda``; momentum makes a step one of ``eta_eff``.
    """
    clock = statistics.confinement_clock
    step = statistics.diffusion_clock / clock
    if statistics.draw.memory * statistics.steps > 0.2:
        return level.slope, level.standard_error
    # Solve slope = curvature + (4 - 3 step curvature) / clock for the curvature.
    share = 3 * step / clock
    curvature = (level.slope - 4 / clock) / (1 - share)
    # The formula is that of a mode that is held.
    held = level.slope > 0
    return np.where(held, curvature, level.slope), level.standard_error / (1 - share)
