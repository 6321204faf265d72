"""The rule: from the statistics of one window to a verdict on every mode.

g = lambda (x - x*) + xi holds whatever the optimizer does afterwards, so the evidence is a
regression of the used gradient on the displacement, not the look of the path. The rule for sampling
with replacement; its rates on simulated truth are in the tests: of flat modes 88% are called
diffusive and 3 to 5% confined, of modes with 20 relaxation times in the window 95% are called confined
and 1% diffusive; between 3 and 20 one window cannot decide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.result import Verdict

#: Relaxation times of the hypothesis that a flat mode is weighed against.
CONFINED_RELAXATION_TIMES = 20.0
#: Expected shares of wrong flags, measured on simulated truth.
FALSE_CONFINED_RATE = 0.05
FALSE_FREE_RATE = 0.02
#: Fewer steps cannot carry the rule.
MIN_STEPS = 40
#: Nor can a schedule so steep that fewer steps of one size would do as much: 20 relaxation times in
#: them would be unstable.
MIN_EQUAL_STEPS = 20


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
    """

    log_bayes_factor: float
    t_level: float
    t_trend: float
    drift_z: float
    noise_variance: float
    slope: float
    slope_error: float


@dataclass(frozen=True)
class Judgement:
    """A verdict with its narrowing word and its reason in one sentence."""

    verdict: Verdict
    detail: str
    reason: str


def too_short(statistics: WindowStatistics) -> str:
    """Why a window cannot carry the rule; "" where it can."""
    if statistics.steps < MIN_STEPS:
        return f"only {statistics.steps} steps were observed, {MIN_STEPS} are needed"
    if not statistics.diffusion_clock > 0:
        return "the learning rate was zero"
    if statistics.equal_steps < MIN_EQUAL_STEPS:
        return (
            "the learning rate changed so much that the window counts no more than "
            f"{statistics.equal_steps:.0f} equal steps, {MIN_EQUAL_STEPS} are needed"
        )
    return ""


def weigh(statistics: WindowStatistics, momentum: float) -> list[Evidence]:
    """Evidence for every mode.

    Args:
        statistics: of a window that is not :func:`too_short`.
        momentum: of heavy ball; enters the prior width of the unknown centre.

    Raises:
        ValueError: the window is too short.
    """
    why = too_short(statistics)
    if why:
        raise ValueError(f"expected a window that can carry the rule, but {why}")
    steps, clock = statistics.steps, statistics.confinement_clock
    rate = CONFINED_RELAXATION_TIMES / clock
    # lambda*^2 V / sigma^2 of the stationary state: how wide the centre may lie, in units of the noise.
    step = statistics.diffusion_clock / clock * (1 - momentum)
    width = rate * step * (1 + momentum) / ((1 - momentum) * (2 * (1 + momentum) - step * rate))
    level, trend = statistics.regress(), statistics.regress(trend=True)
    pull = rate**2 * statistics.sum_xx - 2 * rate * statistics.sum_xg
    centre = width * (statistics.sum_g - rate * statistics.sum_x) ** 2 / (1 + width * steps)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = -(pull - centre) / (2 * level.variance) - 0.5 * math.log1p(width * steps)
        drift = np.abs(statistics.position) / np.sqrt(level.variance * statistics.diffusion_clock)
    rows = zip(
        factor, level.t, trend.t, drift, level.variance, level.slope, level.standard_error, strict=True
    )
    return [Evidence(*(float(value) for value in row)) for row in rows]


def judge(evidence: Evidence) -> Judgement:
    """Apply the rule to one mode that has noise."""
    e = evidence
    if not all(map(math.isfinite, (e.log_bayes_factor, e.t_level, e.t_trend, e.drift_z))):
        return Judgement(Verdict.UNDETERMINED, "", "The mode did not move, so nothing can be said of it.")
    if e.log_bayes_factor >= 1:
        return Judgement(
            Verdict.CONFINED,
            "",
            f"Confinement is e^{e.log_bayes_factor:.1f} times as likely as a flat mode (e^1 needed).",
        )
    if e.t_level >= 4:
        return Judgement(
            Verdict.CONFINED, "relaxing", f"The gradient pulls back (t = {e.t_level:.1f}) while it settles."
        )
    if e.t_trend >= 4.2:
        return Judgement(
            Verdict.CONFINED,
            "moving centre",
            f"The gradient pulls towards a moving centre (t = {e.t_trend:.1f}).",
        )
    if e.drift_z >= 2.81 and e.t_level <= -2.6:
        return Judgement(
            Verdict.UNSTABLE, "", f"It runs away and the gradient pushes outwards (t = {e.t_level:.1f})."
        )
    if e.drift_z >= 2.81:
        return Judgement(
            Verdict.DRIFTING, "", f"It moved {e.drift_z:.1f} times as far as noise alone would carry it."
        )
    if e.log_bayes_factor <= -1 and e.t_level < 3 and e.t_trend < 3.5:
        return Judgement(
            Verdict.DIFFUSIVE,
            "",
            f"A flat mode is e^{-e.log_bayes_factor:.1f} times as likely as confinement; no net drift.",
        )
    return Judgement(Verdict.UNDETERMINED, "", "Between flat and confined: this window is too short to tell.")


def expected_false_flags(top: int, flat: int) -> float:
    """How many flags of a window are expected to be wrong, from the rule's measured rates.

    Confined is called on 5% of flat modes, diffusive or drifting on 2% of confined ones.
    """
    return FALSE_CONFINED_RATE * flat + FALSE_FREE_RATE * top
