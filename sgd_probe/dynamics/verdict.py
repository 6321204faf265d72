"""The rule: from the evidence on a mode to a verdict, its reason and its horizon.

Rates on simulated truth are in docs/verdicts.md and in the tests. Between 3 and 20 relaxation times one
window cannot decide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sgd_probe.dynamics.evidence import CONFINED_RELAXATION_TIMES as CONFINED_RELAXATION_TIMES
from sgd_probe.dynamics.evidence import MIN_EQUAL_STEPS as MIN_EQUAL_STEPS
from sgd_probe.dynamics.evidence import MIN_STEPS as MIN_STEPS
from sgd_probe.dynamics.evidence import Evidence as Evidence
from sgd_probe.dynamics.evidence import too_short as too_short
from sgd_probe.dynamics.evidence import weigh as weigh
from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.result import Verdict

#: Expected shares of wrong flags, measured on simulated truth: flat modes called confined or drifting, the
#: same where a window has :data:`MANY_EPOCHS` of a shuffled loader, and modes of 20 relaxation times called
#: free.
FALSE_CONFINED_RATE = 0.05
FALSE_CONFINED_RATE_SHUFFLED = 0.01
FALSE_FREE_RATE = 0.02
MANY_EPOCHS = 5.0
#: A flat mode whose sampling leaves less than this share of its free displacement is held by the sampling.
HELD_SHARE = 0.5


@dataclass(frozen=True)
class Judgement:
    """A verdict with its narrowing word and its reason in one sentence."""

    verdict: Verdict
    detail: str
    reason: str


@dataclass(frozen=True)
class Horizon:
    """Up to where a verdict holds.

    Attributes:
        steps: optimizer steps of the window.
        epochs: the same in epochs; NaN where the loader has none (an endless stream, with replacement).
    """

    steps: int
    epochs: float

    @classmethod
    def of(cls, statistics: WindowStatistics, batches: float = math.inf) -> Horizon:
        """The horizon of a window.

        Args:
            statistics: of the window.
            batches: steps an epoch, where the statistics were not told (with replacement).
        """
        known = batches if math.isfinite(batches) else statistics.draw.batches
        return cls(statistics.steps, statistics.steps / known if math.isfinite(known) else math.nan)

    def __str__(self) -> str:
        steps = f"{self.steps:,} steps"
        if math.isnan(self.epochs):
            return steps
        epochs = f"{self.epochs:.2g}"
        return f"{steps} ({epochs} epoch{'s' if epochs != '1' else ''})"


def judge(evidence: Evidence) -> Judgement:
    """Apply the rule to one mode that has noise."""
    e = evidence
    numbers = (e.log_bayes_factor, e.t_level, e.t_trend, e.drift_z)
    if not all(map(math.isfinite, numbers)) or not e.noise_variance > 0:
        return Judgement(Verdict.UNDETERMINED, "", "The mode did not move, so nothing can be said of it.")
    if e.reservation:
        return Judgement(Verdict.UNDETERMINED, "", e.reservation[:1].upper() + e.reservation[1:] + ".")
    if e.log_bayes_factor >= e.needed:
        return Judgement(
            Verdict.CONFINED,
            "",
            f"Confinement is e^{e.log_bayes_factor:.1f} times as likely as a flat mode "
            f"(e^{e.needed:.3g} needed).",
        )
    if e.t_level >= 4:
        return Judgement(
            Verdict.CONFINED, "relaxing", f"The gradient pulls back (t = {e.t_level:.1f}) while it settles."
        )
    if e.t_trend >= 4.5:
        return Judgement(
            Verdict.CONFINED,
            "moving centre",
            f"The gradient pulls towards a moving centre (t = {e.t_trend:.1f}).",
        )
    if e.drift_z >= 2 and e.t_level <= -2:
        return Judgement(
            Verdict.UNSTABLE, "", f"It runs away and the gradient pushes outwards (t = {e.t_level:.1f})."
        )
    if e.drift_z >= 3:
        return Judgement(
            Verdict.DRIFTING, "", f"It moved {e.drift_z:.1f} times as far as noise alone would carry it."
        )
    if e.log_bayes_factor <= -e.needed_flat and e.t_level < 3.5:
        return _free(e)
    return Judgement(Verdict.UNDETERMINED, "", "Between flat and confined: this window is too short to tell.")


def _free(e: Evidence) -> Judgement:
    odds = f"A flat mode is e^{-e.log_bayes_factor:.1f} times as likely as confinement"
    if e.free_share < HELD_SHARE:
        return Judgement(
            Verdict.SAMPLING_CONFINED,
            "",
            f"{odds}, but sampling without replacement leaves {e.free_share:.0%} of its free spread.",
        )
    if e.t_level <= e.outward:
        return Judgement(
            Verdict.UNDETERMINED,
            "",
            f"It may be flat, or slowly unstable: the gradient pushes outwards (t = {e.t_level:.1f}).",
        )
    return Judgement(Verdict.DIFFUSIVE, "", f"{odds}; no net drift.")


def expected_false_flags(top: int, flat: int, shuffled_epochs: float = 0.0) -> float:
    """How many flags of a window are expected to be wrong, from the rule's measured rates.

    Confined or drifting is called on 5% of flat modes, on 1% where the window has many epochs of a shuffled
    loader; diffusive or sampling-confined on 2% of confined ones at most. Modes share their minibatches, so
    wrong flags come together.

    Args:
        top: confined modes.
        flat: flat modes.
        shuffled_epochs: how many epochs the window has in which no sample is drawn twice,
            ``statistics.draw.memory * statistics.steps``; 0 with replacement.
    """
    rate = FALSE_CONFINED_RATE if shuffled_epochs < MANY_EPOCHS else FALSE_CONFINED_RATE_SHUFFLED
    return rate * flat + FALSE_FREE_RATE * top
