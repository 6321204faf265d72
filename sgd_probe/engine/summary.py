"""From what a window measured to its result: verdicts, diffusion, predictions and warnings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sgd_probe.curvature.modes import Mode, ModeBasis
from sgd_probe.dynamics.diffusion import (
    headline_lag,
    mean_squared_displacements,
    noise_variance,
    scaled,
)
from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.dynamics.verdict import (
    CONFINED_RELAXATION_TIMES,
    Evidence,
    Horizon,
    Judgement,
    expected_false_flags,
    judge,
    too_short,
    weigh,
)
from sgd_probe.engine.optimizers import OptimizerState
from sgd_probe.engine.sampling import Sampling
from sgd_probe.result import (
    CostResult,
    CurvatureResult,
    Interval,
    LagPoint,
    ModeKind,
    ModeResult,
    Verdict,
    WindowResult,
)
from sgd_probe.theory import closed_forms
from sgd_probe.theory.closed_forms import SGDDynamics

#: Predictions are withheld above this share of the stability limit: there a 5% error of the
#: eigenvalue changes the stationary variance several times.
STABILITY_MARGIN = 0.9
#: The chi-square interval of a noise variance covers less than it says above this kurtosis.
HEAVY_TAILS = 10.0
#: A mode whose curvature changes by more than this share during the window is marked.
CURVATURE_CHANGE = 0.5
_Z95 = 1.96


@dataclass(frozen=True)
class Measured:
    """All that a closed window knows.

    Attributes:
        index: of the window.
        opened_at_step: optimizer steps done when it opened.
        closed_at_step: optimizer steps done when it closed.
        planned_steps: length fixed when it opened.
        basis: its modes.
        decays: coupled weight decay along each mode.
        end_eigenvalues: v.Hv at its end; empty where they could not be measured.
        random_noise: noise variance of a random direction at its start.
        statistics: its running sums.
        optimizer: as it stood when the window opened.
        sampling: what the loader does.
        samples_found: samples of the finding batches.
        samples_certified: samples of the certifying batches.
        batches: batches in each set.
        parameters: number of probed weights.
        self_test: what the operator's self-test said.
        cost: seconds.
        warnings: what the engine noticed on the way.
        min_noise_share: below it a mode has no noise.
    """

    index: int
    opened_at_step: int
    closed_at_step: int
    planned_steps: int
    basis: ModeBasis
    decays: tuple[float, ...]
    end_eigenvalues: tuple[float, ...]
    random_noise: float
    statistics: WindowStatistics
    optimizer: OptimizerState
    sampling: Sampling
    samples_found: int
    samples_certified: int
    batches: int
    parameters: int
    self_test: str
    cost: CostResult
    warnings: tuple[str, ...]
    min_noise_share: float


def decisive_curvature(mode: Mode, decay: float) -> float:
    """The curvature that decides a mode's fate, decay included: for a mixed direction not v.Hv.

    A mixture about an interior level has the sign of that level.
    """
    certificate = mode.certificate
    if not mode.mixed:
        return certificate.eigenvalue + decay
    falling = mode.kind == "interior" and certificate.eigenvalue < 0
    return (-certificate.effective_curvature if falling else certificate.effective_curvature) + decay


def summarise(measured: Measured) -> WindowResult:
    """Judge every mode and put the window's result together."""
    statistics, basis = measured.statistics, measured.basis
    steps = statistics.steps
    evidences: Sequence[Evidence | None] = [None] * len(basis.modes)
    if not too_short(statistics):
        evidences = weigh(statistics, measured.optimizer.momentum)
    modes = tuple(_mode(measured, index, evidences[index]) for index in range(len(basis.modes)))
    clock, square = statistics.confinement_clock, statistics.diffusion_clock
    mixed = sum(mode.mixed for mode in basis.modes)
    return WindowResult(
        index=measured.index,
        opened_at_step=measured.opened_at_step,
        closed_at_step=measured.closed_at_step,
        steps=steps,
        skipped_steps=statistics.skipped,
        planned_steps=measured.planned_steps,
        complete=steps + statistics.skipped >= measured.planned_steps,
        learning_rate=statistics.learning_rates / steps if steps else math.nan,
        effective_learning_rate=square / clock if clock > 0 else math.nan,
        confinement_clock=clock,
        diffusion_clock=square,
        optimizer=measured.optimizer.describe(),
        sampling=measured.sampling.describe(),
        curvature=CurvatureResult(
            lambda_max=basis.lambda_max,
            samples_found=measured.samples_found,
            samples_certified=measured.samples_certified,
            batches_found=measured.batches,
            batches_certified=measured.batches,
            parameters=measured.parameters,
            products=basis.products + len(measured.end_eigenvalues),
            orthogonality=basis.orthogonality,
            split_half_overlap=basis.split_half_overlap,
            converged=basis.converged,
            message=basis.message,
            self_test=measured.self_test,
        ),
        cost=measured.cost,
        modes=modes,
        warnings=(*measured.warnings, *_warnings(measured, modes)),
        expected_false_flags=(
            math.nan if _withheld(measured) else expected_false_flags(len(modes) - mixed, mixed)
        ),
    )


def _withheld(measured: Measured) -> str:
    """Why no mode of this window gets a verdict; "" where they do."""
    optimizer = measured.optimizer
    short = too_short(measured.statistics)
    return (
        short
        or optimizer.withheld
        or too_short(measured.statistics, optimizer.momentum)
        or measured.sampling.withheld
    )


def _mode(measured: Measured, index: int, evidence: Evidence | None) -> ModeResult:
    mode, statistics = measured.basis.modes[index], measured.statistics
    certificate = mode.certificate
    steps = statistics.steps
    curvature = decisive_curvature(mode, measured.decays[index])
    noise, kurtosis, share = Interval.unknown(), math.nan, math.nan
    if evidence is not None:
        kurtosis = float(statistics.kurtosis()[index])
        noise = noise_variance(evidence.noise_variance, statistics.informative, kurtosis)
        share = evidence.noise_variance / measured.random_noise if measured.random_noise > 0 else math.nan
    judgement = _judgement(measured, evidence, share)
    end = measured.end_eigenvalues[index] if measured.end_eigenvalues else math.nan
    dynamics = _dynamics(measured)
    # Predictions are withheld near the edge, where a small error of the curvature is a large one of theirs.
    theory = None if _stability(dynamics, curvature) > STABILITY_MARGIN else dynamics
    momentum = measured.optimizer.momentum
    points = _points(statistics, index, momentum, curvature, noise.value, theory)
    lag = headline_lag(steps, momentum) if steps else 0
    at_lag = next((point for point in points if point.lag == lag), None)
    diffusion, per_time = Interval.unknown(), Interval.unknown()
    predicted = langevin = math.nan
    if at_lag is not None:
        unit = 1 / (2 * lag * closed_forms.momentum_kernel(lag, momentum))
        diffusion = scaled(at_lag.measured, unit)
        predicted, langevin = at_lag.discrete * unit, at_lag.langevin / (2 * lag)
        if not measured.optimizer.withheld and statistics.confinement_clock > 0:
            per_time = scaled(diffusion, steps / statistics.confinement_clock)
    return ModeResult(
        name=mode.name,
        kind=ModeKind(mode.kind),
        eigenvalue=mode.eigenvalue,
        residual=mode.residual,
        converged=mode.converged,
        held_out_eigenvalue=certificate.eigenvalue,
        held_out_standard_error=certificate.standard_error,
        effective_curvature=certificate.effective_curvature,
        noise_weighted_curvature=_around(
            certificate.noise_weighted_curvature, certificate.noise_weighted_error
        ),
        batch_curvature_variance=certificate.batch_variance,
        growth_ratio=_growth(measured, mode, index, theory),
        end_eigenvalue=end,
        relaxation_times=(
            math.nan if measured.optimizer.withheld else curvature * statistics.confinement_clock
        ),
        noise_variance=noise,
        noise_kurtosis=kurtosis,
        noise_share=share,
        measured_curvature=_slope(evidence, judgement),
        diffusion=diffusion,
        diffusion_per_time=per_time,
        diffusion_lag=lag,
        predicted_diffusion=predicted,
        langevin_diffusion=langevin,
        free_diffusion=(
            noise.value * statistics.diffusion_clock / (2 * steps) if theory is not None else math.nan
        ),
        log_bayes_factor=evidence.log_bayes_factor if evidence else math.nan,
        t_level=evidence.t_level if evidence else math.nan,
        t_trend=evidence.t_trend if evidence else math.nan,
        drift_z=evidence.drift_z if evidence else math.nan,
        verdict=judgement.verdict,
        detail=judgement.detail,
        reason=judgement.reason,
        marks=_marks(measured, mode, curvature, end, kurtosis, judgement),
        layer_shares=mode.layer_shares,
        displacements=points,
    )


def _judgement(measured: Measured, evidence: Evidence | None, noise_share: float) -> Judgement:
    withheld = _withheld(measured)
    if evidence is None:
        return Judgement(Verdict.UNDETERMINED, "", _sentence(withheld))
    if measured.random_noise <= 0:
        return Judgement(Verdict.NO_NOISE, "", "Its gradient does not fluctuate from batch to batch.")
    if noise_share <= measured.min_noise_share:
        return Judgement(
            Verdict.NO_NOISE,
            "",
            f"Its gradient hardly fluctuates ({noise_share:.1e} of a random direction's noise): "
            "unused weights, perhaps.",
        )
    if withheld:
        return Judgement(Verdict.UNDETERMINED, "", _sentence(withheld))
    judgement = judge(evidence)
    if judgement.verdict is Verdict.UNDETERMINED:
        return judgement
    horizon = Horizon.of(measured.statistics)
    return dataclasses.replace(judgement, reason=f"{judgement.reason} Over {horizon}.")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _slope(evidence: Evidence | None, judgement: Judgement) -> Interval:
    """The slope is a curvature only where something confines; elsewhere it is an artefact."""
    if evidence is None or judgement.verdict is not Verdict.CONFINED:
        return Interval.unknown()
    return evidence.curvature


def _around(value: float, error: float) -> Interval:
    return Interval(value, value - _Z95 * error, value + _Z95 * error)


def _growth(measured: Measured, mode: Mode, index: int, theory: SGDDynamics | None) -> float:
    """Predicted variance after the window over that of free diffusion; noise follows curvature."""
    steps, decay = measured.statistics.steps, measured.decays[index]
    if theory is None or not steps:
        return math.nan
    if mode.quadrature is None:
        return closed_forms.growth_ratio(mode.certificate.eigenvalue + decay, steps, theory)
    nodes, weights = mode.quadrature.nodes.tolist(), mode.quadrature.weights.tolist()
    noise = [abs(node) * weight for node, weight in zip(nodes, weights, strict=True)]
    ratios = [closed_forms.growth_ratio(node + decay, steps, theory) for node in nodes]
    total = sum(noise)
    return sum(n * r for n, r in zip(noise, ratios, strict=True)) / total if total > 0 else math.nan


def _dynamics(measured: Measured) -> SGDDynamics | None:
    """The dynamics of the window, or None where the theory does not cover the optimizer."""
    statistics, optimizer = measured.statistics, measured.optimizer
    if optimizer.withheld or not statistics.diffusion_clock > 0:
        return None
    # Under a schedule: the rate with which the two clocks agree.
    effective = statistics.diffusion_clock / statistics.confinement_clock
    return optimizer.dynamics(effective * (1 - optimizer.momentum) / (1 - optimizer.dampening))


def _stability(dynamics: SGDDynamics | None, curvature: float) -> float:
    """Share of the stability limit at which a mode sits; NaN where nobody can tell."""
    return math.nan if dynamics is None else curvature / closed_forms.stability_limit(dynamics)


def _points(
    statistics: WindowStatistics,
    index: int,
    momentum: float,
    curvature: float,
    noise: float,
    theory: SGDDynamics | None,
) -> tuple[LagPoint, ...]:
    points = []
    for lag, count, interval in mean_squared_displacements(statistics, index, momentum):
        discrete = langevin = math.nan
        if theory is not None and math.isfinite(noise):
            discrete = closed_forms.mean_squared_displacement(curvature, noise, lag, theory)
            langevin = closed_forms.langevin_mean_squared_displacement(curvature, noise, lag, theory)
        points.append(LagPoint(lag, count, interval, discrete, langevin))
    return tuple(points)


def _marks(
    measured: Measured,
    mode: Mode,
    curvature: float,
    end: float,
    kurtosis: float,
    judgement: Judgement,
) -> tuple[str, ...]:
    marks = []
    start = mode.certificate.eigenvalue
    if mode.kind != "flat" and not mode.converged:
        mixture = "a mixture, " if mode.mixed else ""
        marks.append(f"{mixture}not an eigenvector: residual {mode.residual:.1e} of lambda_1")
    error = mode.certificate.standard_error
    if mode.kind == "interior" and abs(start) < _Z95 * error:
        marks.append(f"its held-out curvature, {start:.2g} ± {error:.1g}, cannot be told from zero")
    if not mode.mixed and math.isfinite(end) and abs(end - start) > CURVATURE_CHANGE * abs(start):
        marks.append(f"its curvature went from {start:.3g} to {end:.3g} during the window")
    if kurtosis > HEAVY_TAILS and judgement.verdict is not Verdict.NO_NOISE:
        marks.append(f"heavy-tailed noise (kurtosis {kurtosis:.0f}): its interval is too narrow")
    times = curvature * measured.statistics.confinement_clock
    if mode.mixed and judgement.verdict is Verdict.DIFFUSIVE and times >= 1:
        marks.append(
            f"held-out curvature predicts {times:.1f} relaxation times: diffusive over this window, "
            "perhaps not over longer ones"
        )
    stability = _stability(_dynamics(measured), curvature)
    if stability > STABILITY_MARGIN:
        marks.append(f"at {stability:.0%} of the stability limit: predictions withheld")
    return tuple(marks)


def _warnings(measured: Measured, modes: Sequence[ModeResult]) -> list[str]:
    statistics = measured.statistics
    warnings = []
    withheld = _withheld(measured)
    if withheld:
        warnings.append(f"No mode gets a verdict: {withheld}.")
    if statistics.skipped:
        warnings.append(
            f"{statistics.skipped} steps were left out (not finite, skipped by the optimizer, or with a "
            "changed weight decay)."
        )
    if statistics.steps + statistics.skipped < measured.planned_steps:
        warnings.append(
            f"The run ended after {statistics.steps} of the window's {measured.planned_steps} steps."
        )
    if math.isfinite(statistics.draw.batches):
        warnings.append(
            "The loader samples without replacement. Verdicts take that into account; predictions of D and "
            "of displacements are those of sampling with replacement: too large over an epoch and more."
        )
    if measured.basis.lambda_max == 0:
        warnings.append("The loss has no curvature at all: it is linear in the probed weights.")
    if not measured.basis.converged:
        warnings.append(f"Not every stiff mode converged: {measured.basis.message}.")
    negative = [m for m in modes if m.held_out_eigenvalue + 2 * m.held_out_standard_error < 0]
    if negative:
        warnings.append(
            f"{len(negative)} of the modes have negative curvature "
            f"({min(m.held_out_eigenvalue for m in negative):.3g}): the weights are not near a minimum."
        )
    stiff = [m for m in modes if m.kind is ModeKind.TOP]
    changed = [m for m in stiff if any("during the window" in mark for mark in m.marks)]
    if changed:
        warnings.append(
            f"{len(changed)} stiff modes changed their curvature by more than half during the window: the "
            "network still learns fast, and its modes rotate."
        )
    if not withheld:
        slow = [m for m in stiff if 0 < m.relaxation_times < CONFINED_RELAXATION_TIMES]
        if slow and len(slow) == len(stiff):
            warnings.append(
                "The window is shorter than any stiff mode needs to show that it is confined "
                f"({max(m.relaxation_times for m in slow):.1f} relaxation times at most, "
                f"{CONFINED_RELAXATION_TIMES:g} needed)."
            )
    return warnings
