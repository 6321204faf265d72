"""What a window says against itself: marks of single modes, warnings of the whole, in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sgd_probe.curvature.modes import Mode
from sgd_probe.dynamics.force import JointRegression
from sgd_probe.dynamics.guards import changed_norms
from sgd_probe.dynamics.noise import HEAVY_TAILS, agree
from sgd_probe.dynamics.verdict import CONFINED_RELAXATION_TIMES, Evidence, Judgement
from sgd_probe.engine.measured import Measured
from sgd_probe.engine.predictions import Predictions
from sgd_probe.result import Interval, ModeKind, ModeResult, Verdict

#: A mode whose curvature changes by more than this share during the window is marked.
CURVATURE_CHANGE = 0.5
#: The stiff subspace has turned where less than this share of its overlap at the start is left.
TURNED = 0.5
#: A preconditioner that changes by more than this factor is not frozen.
PRECONDITIONER_CHANGE = 1.5
#: Noise at the start and over the window that differ by more than this factor, beyond their errors.
_NOISE_CHANGE = 2.0
#: Mean gradients so many standard errors off zero: the window does not start at a critical point.
_OFF_ZERO = 4.0
_Z95 = 1.96


@dataclass(frozen=True)
class Marks:
    """Reservations about one mode.

    Attributes:
        texts: in plain words.
        undermined: one of them takes the ground from under the verdict.
    """

    texts: tuple[str, ...]
    undermined: bool


def marks(
    measured: Measured,
    index: int,
    *,
    curvature: float,
    evidence: Evidence | None,
    judgement: Judgement,
    predictions: Predictions,
    noise: Interval,
    kurtosis: float,
    force: Interval,
    force_fails: bool,
) -> Marks:
    """What is to be said against one mode."""
    mode = measured.basis.modes[index]
    fatal = _fatal(measured, index, mode, judgement, force, force_fails)
    texts = list(fatal)
    if mode.kind != "flat" and not mode.converged:
        mixture = "a mixture, " if mode.mixed else ""
        texts.append(f"{mixture}not an eigenvector: residual {mode.residual:.1e} of lambda_1")
    start, error = mode.certificate.eigenvalue, mode.certificate.standard_error
    if mode.kind == "interior" and abs(start) < _Z95 * error:
        texts.append(f"its held-out curvature, {start:.2g} ± {error:.1g}, cannot be told from zero")
    if kurtosis > HEAVY_TAILS and judgement.verdict is not Verdict.NO_NOISE:
        texts.append(f"heavy-tailed noise (kurtosis {kurtosis:.0f}): its interval is too narrow")
    times = curvature * measured.statistics.confinement_clock
    if mode.mixed and judgement.verdict is Verdict.DIFFUSIVE and times >= 1:
        texts.append(
            f"held-out curvature predicts {times:.1f} relaxation times: diffusive over this window, "
            "perhaps not over longer ones"
        )
    if evidence is not None and evidence.fading != 1:
        texts.append(f"its noise variance changed {evidence.fading:.2g} times within the window")
    if measured.resampled is not None and judgement.verdict is not Verdict.NO_NOISE:
        before = measured.resampled.variance[index]
        apart = noise.value / before.value if before.value > 0 else math.nan
        if max(apart, 1 / apart) > _NOISE_CHANGE and not agree(before, noise):
            texts.append(
                f"the noise of its used gradients is {apart:.2g} times that of whole minibatch gradients at "
                "the window's start: clipping, or noise that has changed"
            )
    edge = predictions.near_edge(curvature)
    if edge:
        texts.append(edge)
    return Marks(tuple(texts), bool(fatal))


def _fatal(
    measured: Measured, index: int, mode: Mode, judgement: Judgement, force: Interval, force_fails: bool
) -> list[str]:
    """Marks that undermine the verdict."""
    found = []
    start = mode.certificate.eigenvalue
    end = measured.end_eigenvalues[index] if measured.end_eigenvalues else math.nan
    if not mode.mixed and math.isfinite(end) and abs(end - start) > CURVATURE_CHANGE * abs(start):
        found.append(f"its curvature went from {start:.3g} to {end:.3g} during the window")
    if judgement.verdict is Verdict.NO_NOISE:
        return found
    if force_fails:
        found.append(
            f"its gradient follows the measured curvature {force.value:.2g} times instead of once "
            f"({force.low:.2g} to {force.high:.2g}): the loss is not that quadratic, or no longer"
        )
    if measured.preconditioner_changes:
        change = measured.preconditioner_changes[index]
        if not 1 / PRECONDITIONER_CHANGE < change < PRECONDITIONER_CHANGE:
            found.append(
                f"the preconditioner along it changed {change:.2g} times during the window, which takes "
                "it as frozen"
            )
    return found


def warnings(
    measured: Measured,
    modes: Sequence[ModeResult],
    withheld: str,
    joint: JointRegression | None,
) -> list[str]:
    """What is to be said against the whole window."""
    statistics, optimizer = measured.statistics, measured.optimizer
    found = []
    if withheld:
        found.append(f"No mode gets a verdict: {withheld}.")
    if optimizer.unpredicted:
        found.append(f"Nothing is predicted: {optimizer.unpredicted}.")
    if statistics.skipped:
        found.append(
            f"{statistics.skipped} steps were left out (not finite, skipped by the optimizer, or with a "
            "changed weight decay)."
        )
    if statistics.steps + statistics.skipped < measured.planned_steps:
        found.append(
            f"The run ended after {statistics.steps} of the window's {measured.planned_steps} steps."
        )
    if measured.jumps:
        found.append(
            f"The learning rate jumped by more than a tenth at {measured.jumps} of the window's steps; its "
            "clocks count that, the theory's constant rate does not."
        )
    if measured.basis.lambda_max == 0:
        found.append("The loss has no curvature at all: it is linear in the probed weights.")
    if not measured.basis.converged:
        found.append(f"Not every stiff mode converged: {measured.basis.message}.")
    negative = [m for m in modes if m.held_out_eigenvalue + 2 * m.held_out_standard_error < 0]
    if negative:
        found.append(
            f"{len(negative)} of the modes have negative curvature "
            f"({min(m.held_out_eigenvalue for m in negative):.3g}): the weights are not near a minimum."
        )
    stiff = [m for m in modes if m.kind is ModeKind.TOP]
    found += _of_the_stiff(measured, stiff, withheld, joint)
    norms = measured.norms
    changed = changed_norms({n: a for n, (a, _) in norms.items()}, {n: b for n, (_, b) in norms.items()})
    if changed:
        others = f" ({len(changed) - 1} more changed by a tenth)" if len(changed) > 1 else ""
        found.append(f"During the window {changed[0]}{others}.")
    return found


def has_turned(measured: Measured) -> bool:
    """The stiff subspace at the window's end is no longer that of its start."""
    return measured.end_overlap < TURNED * measured.basis.held_out_overlap


def _of_the_stiff(
    measured: Measured, stiff: Sequence[ModeResult], withheld: str, joint: JointRegression | None
) -> list[str]:
    found = []
    changed = [m for m in stiff if any("during the window" in mark for mark in m.marks)]
    if changed:
        found.append(
            f"{len(changed)} stiff modes changed their curvature by more than half during the window: the "
            "network still learns fast, and its modes rotate."
        )
    if has_turned(measured):
        found.append(
            f"The stiff subspace turned during the window (overlap with its image under the Hessian "
            f"{measured.basis.held_out_overlap:.2f} at its start, {measured.end_overlap:.2f} at its end): "
            "verdicts of stiff modes are about directions that are stiff no longer."
        )
    off = [z for z, m in zip(measured.start_gradient, stiff, strict=False) if abs(z) > _OFF_ZERO]
    if len(off) > len(stiff) / 2:
        found.append(
            f"The window does not start near a critical point: along {len(off)} of {len(stiff)} stiff modes "
            f"the mean gradient is more than {_OFF_ZERO:g} standard errors from zero."
        )
    if joint is not None and not withheld:
        with np.errstate(divide="ignore", invalid="ignore"):
            pulls = np.abs(joint.matrix + joint.matrix.T) / np.hypot(
                joint.standard_errors, joint.standard_errors.T
            )
        np.fill_diagonal(pulls, 0.0)
        if np.nanmax(pulls, initial=0.0) > _OFF_ZERO + 1:
            found.append(
                "Stiff modes pull on each other: they have turned within their subspace. Its curvatures, "
                f"however it is turned, are {', '.join(f'{c:.3g}' for c in joint.eigenvalues)}."
            )
    if not withheld:
        slow = [m for m in stiff if 0 < m.relaxation_times < CONFINED_RELAXATION_TIMES]
        if slow and len(slow) == len(stiff):
            found.append(
                "The window is shorter than any stiff mode needs to show that it is confined "
                f"({max(m.relaxation_times for m in slow):.1f} relaxation times at most, "
                f"{CONFINED_RELAXATION_TIMES:g} needed)."
            )
    return found
