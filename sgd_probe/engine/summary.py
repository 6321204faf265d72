"""From what a window measured to its result: verdicts, diffusion, predictions and warnings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from sgd_probe.curvature.modes import ModeBasis
from sgd_probe.dynamics.diffusion import (
    anomalous_exponent,
    diffusion_by_lag,
    green_kubo,
    headline_lag,
    mean_squared_displacements,
    noise_variance,
    pooled_diffusion,
    scaled,
)
from sgd_probe.dynamics.force import ForceTest, JointRegression, force_test
from sgd_probe.dynamics.guards import along_symmetry
from sgd_probe.dynamics.noise import Cancellation, epoch_cancellation
from sgd_probe.dynamics.verdict import (
    Evidence,
    Horizon,
    Judgement,
    expected_false_flags,
    judge,
    too_short,
    weigh,
)
from sgd_probe.engine.measured import Measured, decisive_curvature
from sgd_probe.engine.predictions import Predictions
from sgd_probe.engine.reservations import has_turned, marks, warnings
from sgd_probe.result import (
    CurvatureResult,
    Interval,
    LagPoint,
    ModeKind,
    ModeResult,
    Verdict,
    WindowResult,
)
from sgd_probe.theory import closed_forms

_Z95 = 1.96


@dataclasses.dataclass(frozen=True)
class _Views:
    """The window's sums, looked at in every way that more than one mode needs."""

    evidence: Sequence[Evidence | None]
    force: ForceTest
    predictions: Predictions
    free: Mapping[int, float]
    cancellation: Cancellation | None
    withheld: str

    @classmethod
    def of(cls, measured: Measured) -> _Views:
        statistics, optimizer = measured.statistics, measured.optimizer
        short = too_short(statistics)
        withheld = (
            short
            or optimizer.withheld
            or too_short(statistics, optimizer.momentum)
            or measured.sampling.withheld
        )
        nothing: Sequence[Evidence | None] = [None] * len(measured.basis.modes)
        predictions = Predictions.of(statistics, optimizer, measured.sampling)
        moved = mean_squared_displacements(statistics, 0, optimizer.momentum, optimizer.nesterov)
        lags = [lag for lag, _, _ in moved]
        return cls(
            evidence=nothing if short else weigh(statistics, optimizer.momentum),
            force=force_test(statistics),
            predictions=predictions,
            # Of unit noise: it is proportional to the noise.
            free=dict(zip(lags, predictions.displacements(0.0, 1.0, lags)[0].tolist(), strict=True)),
            cancellation=epoch_cancellation(statistics),
            withheld=withheld,
        )


def summarise(measured: Measured) -> WindowResult:
    """Judge every mode and put the window's result together."""
    statistics, basis = measured.statistics, measured.basis
    steps = statistics.steps
    views = _Views.of(measured)
    modes = tuple(_mode(measured, views, index) for index in range(len(basis.modes)))
    clock, square = statistics.confinement_clock, statistics.diffusion_clock
    mixed = sum(mode.mixed for mode in basis.modes)
    joint = _joint(measured)
    horizon = Horizon.of(statistics, measured.sampling.steps_per_epoch)
    cancellation = views.cancellation
    known = next((e for e in views.evidence if e is not None), None)
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
            held_out_overlap=basis.held_out_overlap,
            end_overlap=measured.end_overlap,
            converged=basis.converged,
            message=basis.message,
            self_test=measured.self_test,
            **_density(basis),
        ),
        cost=measured.cost,
        modes=modes,
        warnings=(*measured.warnings, *warnings(measured, modes, views.withheld, joint)),
        expected_false_flags=(
            math.nan
            if views.withheld
            else expected_false_flags(len(modes) - mixed, mixed, statistics.draw.memory * statistics.steps)
        ),
        coordinates=measured.optimizer.coordinates,
        plan=measured.plan,
        epochs=horizon.epochs,
        free_share=known.free_share if known is not None else math.nan,
        epoch_correlation=math.nan if cancellation is None else cancellation.correlation.value,
        epoch_correlation_interval=Interval.unknown() if cancellation is None else cancellation.correlation,
        expected_epoch_correlation=measured.sampling.epoch_correlation,
        pooled_diffusion=_pooled(measured, modes),
        joint_curvatures=() if joint is None else tuple(joint.eigenvalues.tolist()),
        rate_jumps=measured.jumps,
        stability_limit=_stability_limit(views.predictions),
        slices=measured.slices,
    )


def _density(basis: ModeBasis) -> dict[str, tuple[float, ...]]:
    if basis.density is None:
        return {}
    seen = basis.density
    columns = {"nodes": seen.nodes, "weights": seen.weights, "widths": seen.widths}
    return {f"density_{name}": tuple(column.tolist()) for name, column in columns.items()}


def _stability_limit(predictions: Predictions) -> float:
    return math.nan if predictions.dynamics is None else closed_forms.stability_limit(predictions.dynamics)


def _joint(measured: Measured) -> JointRegression | None:
    if measured.joint is None or len(measured.joint.products) < 3:
        return None
    try:
        return measured.joint.regress()
    except ValueError:  # too few steps, or modes that did not move
        return None


def _pooled(measured: Measured, modes: Sequence[ModeResult]) -> Interval:
    """The flat modes that diffuse, together: does their noise explain how far they get?"""
    chosen = [i for i, m in enumerate(modes) if m.kind is ModeKind.FLAT and m.verdict is Verdict.DIFFUSIVE]
    if not chosen:
        return Interval.unknown()
    correlation = None
    if measured.resampled is not None:
        correlation = measured.resampled.correlation[chosen][:, chosen]
    return pooled_diffusion(measured.statistics, chosen, measured.optimizer.momentum, correlation=correlation)


def _mode(measured: Measured, views: _Views, index: int) -> ModeResult:
    mode, statistics, optimizer = measured.basis.modes[index], measured.statistics, measured.optimizer
    certificate, evidence, predictions = mode.certificate, views.evidence[index], views.predictions
    steps, momentum, nesterov = statistics.steps, optimizer.momentum, optimizer.nesterov
    curvature = decisive_curvature(mode, measured.decays[index])
    noise, kurtosis, share = Interval.unknown(), math.nan, math.nan
    if evidence is not None:
        kurtosis = float(statistics.kurtosis()[index])
        noise = noise_variance(evidence.noise_variance, statistics.informative, kurtosis)
        share = evidence.noise_variance / measured.random_noise if measured.random_noise > 0 else math.nan
    judgement = _judgement(measured, views, index, share)
    moved = mean_squared_displacements(statistics, index, momentum, nesterov)
    lags = [lag for lag, _, _ in moved]
    discrete, langevin = predictions.displacements(curvature, noise.value, lags)
    points = tuple(
        LagPoint(*point, float(d), float(b), noise.value * views.free.get(point[0], math.nan))
        for point, d, b in zip(moved, discrete, langevin, strict=True)
    )
    lag = headline_lag(steps, momentum) if steps else 0
    at_lag = next((point for point in points if point.lag == lag), None)
    diffusion, per_time, detrended = (Interval.unknown() for _ in range(3))
    predicted_diffusion = langevin_diffusion = math.nan
    if at_lag is not None:
        unit = 1 / (2 * lag * closed_forms.momentum_kernel(lag, momentum, nesterov))
        diffusion = scaled(at_lag.measured, unit)
        predicted_diffusion, langevin_diffusion = at_lag.discrete * unit, at_lag.langevin / (2 * lag)
        if not optimizer.withheld and statistics.confinement_clock > 0:
            per_time = scaled(diffusion, steps / statistics.confinement_clock)
        by_lag = diffusion_by_lag(statistics, index, momentum, nesterov)
        detrended = next((d.detrended for d in by_lag if d.lag == lag), detrended)
    slope, error = float(views.force.slope[index]), float(views.force.standard_error[index])
    force = _around(slope, error)
    noted = marks(
        measured,
        index,
        curvature=curvature,
        evidence=evidence,
        judgement=judgement,
        predictions=predictions,
        noise=noise,
        kurtosis=kurtosis,
        force=force,
        force_fails=bool(views.force.fails[index]),
    )
    free = noise.value * statistics.diffusion_clock / (2 * steps) if steps else math.nan
    flat = judgement.verdict is Verdict.DIFFUSIVE
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
        growth_ratio=(
            predictions.growth_ratio(mode, measured.decays[index])
            if predictions.covers(curvature)
            else math.nan
        ),
        end_eigenvalue=measured.end_eigenvalues[index] if measured.end_eigenvalues else math.nan,
        relaxation_times=math.nan if optimizer.withheld else curvature * statistics.confinement_clock,
        noise_variance=noise,
        noise_kurtosis=kurtosis,
        noise_share=share,
        measured_curvature=_slope(evidence, judgement),
        diffusion=diffusion,
        diffusion_per_time=per_time,
        diffusion_lag=lag,
        predicted_diffusion=predicted_diffusion,
        langevin_diffusion=langevin_diffusion,
        free_diffusion=free if predictions.covers(curvature) else math.nan,
        log_bayes_factor=evidence.log_bayes_factor if evidence else math.nan,
        t_level=evidence.t_level if evidence else math.nan,
        t_trend=evidence.t_trend if evidence else math.nan,
        drift_z=evidence.drift_z if evidence else math.nan,
        verdict=judgement.verdict,
        detail=judgement.detail,
        reason=judgement.reason,
        marks=noted.texts,
        undermined=noted.undermined or (mode.kind == "top" and has_turned(measured)),
        layer_shares=mode.layer_shares,
        displacements=points,
        resampled_noise=(
            Interval.unknown() if measured.resampled is None else measured.resampled.variance[index]
        ),
        noise_correlations=_noise_correlations(measured, index),
        noise_correlation=evidence.noise_correlation if evidence else math.nan,
        epoch_correlation=(
            Interval.unknown() if views.cancellation is None else views.cancellation.modes[index]
        ),
        noise_fading=evidence.fading if evidence else math.nan,
        drift=_drift(measured, index, free),
        detrended_diffusion=detrended,
        green_kubo_diffusion=green_kubo(statistics, index) if flat else Interval.unknown(),
        anomalous_exponent=anomalous_exponent(statistics, index, momentum) if steps else Interval.unknown(),
        force_slope=force if mode.mixed else Interval.unknown(),
        start_gradient_z=measured.start_gradient[index] if measured.start_gradient else math.nan,
        radial_share=measured.radial[index] if measured.radial else math.nan,
        preconditioner_change=(
            measured.preconditioner_changes[index] if measured.preconditioner_changes else 1.0
        ),
    )


def _noise_correlations(measured: Measured, index: int) -> dict[str, float]:
    if measured.resampled is None:
        return {}
    row = measured.resampled.correlation[index].tolist()
    # None with a mode whose gradient does not fluctuate.
    named = zip((mode.name for mode in measured.basis.modes), row, strict=True)
    return {name: value for name, value in named if math.isfinite(value)}


def _drift(measured: Measured, index: int, free: float) -> Interval:
    """Net displacement per step; its interval is that of free diffusion under the loader's sampling."""
    statistics = measured.statistics
    if not statistics.steps:
        return Interval.unknown()
    value = float(statistics.position[index] - statistics.start[index]) / statistics.steps
    return _around(value, math.sqrt(2 * free / statistics.steps) if free >= 0 else math.nan)


def _judgement(measured: Measured, views: _Views, index: int, noise_share: float) -> Judgement:
    evidence, withheld = views.evidence[index], views.withheld
    if evidence is None:
        return Judgement(Verdict.UNDETERMINED, "", _sentence(withheld))
    if measured.random_noise <= 0:
        return Judgement(Verdict.NO_NOISE, "", "Its gradient does not fluctuate from batch to batch.")
    if noise_share <= measured.min_noise_share:
        radial = measured.radial[index] if measured.radial else 0.0
        if along_symmetry(math.sqrt(radial), noise_share, measured.min_noise_share):
            return Judgement(
                Verdict.NO_NOISE,
                "symmetry",
                f"Its gradient hardly fluctuates ({noise_share:.1e} of a random direction's noise), and it "
                "only stretches weights: a symmetry of the loss, no valley.",
            )
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
    horizon = Horizon.of(measured.statistics, measured.sampling.steps_per_epoch)
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
