"""What a window found: the one value that everything downstream reads.

A :class:`WindowResult` holds plain numbers and text only. It knows no model, no trainer and no
logger; it is written as JSON and read back without pickle. Where a number could not be measured it
is NaN (``null`` in JSON), never a stand-in.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

SCHEMA_VERSION = 1


class Verdict(StrEnum):
    """What one window says of one mode, up to the horizon of that window."""

    CONFINED = "confined"
    SAMPLING_CONFINED = "sampling_confined"
    DIFFUSIVE = "diffusive"
    DRIFTING = "drifting"
    UNSTABLE = "unstable"
    UNDETERMINED = "undetermined"
    NO_NOISE = "no_noise"


class ModeKind(StrEnum):
    """How a direction was chosen, in the order in which a window lists them.

    An eigenvector of largest |eigenvalue|, a Ritz vector at a level between those and the flat ones, or a
    near-flat direction.
    """

    TOP = "top"
    INTERIOR = "interior"
    FLAT = "flat"


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its two-sided 95% interval (``low <= value <= high``; NaN where unknown)."""

    value: float
    low: float
    high: float

    @classmethod
    def unknown(cls) -> Interval:
        """The interval of a quantity that could not be measured."""
        return cls(math.nan, math.nan, math.nan)


@dataclass(frozen=True, slots=True)
class LagPoint:
    """Mean squared displacement of one mode over one lag.

    Attributes:
        lag: optimizer steps between the two ends of a displacement.
        count: non-overlapping displacements of that lag in the window.
        measured: mean squared displacement (squared weight units) with a chi-square interval.
        discrete: what the discrete theory predicts from held-out curvature and measured noise.
        langevin: what the Langevin equation predicts from the same numbers.
        free: what the discrete theory predicts of a perfectly flat mode with this noise.
    """

    lag: int
    count: int
    measured: Interval
    discrete: float
    langevin: float
    free: float = math.nan


@dataclass(frozen=True, slots=True)
class LossSlice:
    """The training loss along one direction, through the weights at which a window opened.

    Attributes:
        mode: name of the direction.
        offsets: displacements along it (weight units), ascending, zero in the middle.
        rises: loss there minus the loss at zero, mean over the held-out samples.
        errors: standard errors of the rises over the held-out batches (NaN for a single one).
        loss: at zero.
    """

    mode: str
    offsets: tuple[float, ...]
    rises: tuple[float, ...]
    errors: tuple[float, ...]
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeResult:
    """One direction of the loss over one window.

    Curvatures are per unit weight squared (the units of the loss over those of the weights
    squared); diffusion coefficients are squared weight units per optimizer step, or per unit time
    ``eta * t`` where the name says so.

    Attributes:
        name: ``top_01`` (stiffest) ..., ``interior_01`` ..., ``flat_01`` ...: stable keys for logs.
        kind: how the direction was chosen.
        eigenvalue: Rayleigh quotient v.Hv on the batches that found the direction.
        residual: ``||Hv - eigenvalue v|| / |lambda_1|`` on those batches.
        converged: the residual is below the tolerance, that of an interior mode also below a tenth of its
            own eigenvalue, so "eigenvector" is a fair word.
        held_out_eigenvalue: v.Hv on disjoint batches, the unbiased value.
        held_out_standard_error: standard error of the held-out value over those batches.
        effective_curvature: ``||Hv||^2 / |v.Hv|`` on the held-out batches: the curvature that
            decides how the direction moves when it is not an eigenvector (noise following curvature).
        noise_weighted_curvature: the same from the held-out minibatch gradients, without that
            assumption; unknown for fewer than eight batches.
        batch_curvature_variance: Var(v.H_B v) over held-out batches.
        growth_ratio: predicted variance after the window over that of free diffusion: from the
            eigenvalue, for a mixed direction from the mixture of eigenvalues that it is.
        end_eigenvalue: v.Hv on the held-out batches at the window's end.
        relaxation_times: predicted number of relaxation times in the window (kappa), from the
            curvature at its start, weight decay included: curvature times the confinement clock.
        noise_variance: variance of the used gradient along the mode (residual of g on 1 and x).
        noise_kurtosis: kurtosis of the used gradient along the mode (3 for Gaussian noise).
        noise_share: noise variance over that of a random direction at the window's start.
        measured_curvature: slope of the used gradient on the displacement with its interval; only
            for confined modes (for a flat mode this slope is an artefact), else NaN.
        diffusion: measured D per optimizer step at ``diffusion_lag``.
        diffusion_per_time: the same per unit time ``eta * t``.
        diffusion_lag: lag of the displacements behind D, in optimizer steps.
        predicted_diffusion: apparent D per step at that lag by the discrete theory.
        langevin_diffusion: apparent D per step at that lag by the Langevin equation.
        free_diffusion: D per step of a perfectly flat mode with this noise.
        log_bayes_factor: log evidence of 20 relaxation times in the window against a flat mode.
        t_level: t-statistic of the slope of g on (1, x).
        t_trend: t-statistic of that slope with a linear trend besides.
        drift_z: net displacement over that of free diffusion.
        verdict: the verdict.
        detail: a word that narrows the verdict ("relaxing", "moving centre"), or "".
        reason: one plain sentence: why this verdict.
        marks: plain-word reservations about this mode (it rotated, its noise has heavy tails ...).
        layer_shares: share of each parameter in the direction's squared length, largest first.
        displacements: mean squared displacement by lag.
        undermined: what a mark says takes the ground from under the verdict.
        resampled_noise: noise variance from gradients of held-out batches at the window's start, the check on
            ``noise_variance``; unknown for fewer than eight batches.
        noise_correlations: of its noise with that of every mode, by name, from the gradients of held-out
            batches at the window's start: modes share their minibatches. Empty for fewer than eight batches.
        noise_correlation: of the noise of successive steps (0 for independent draws).
        epoch_correlation: of the noise of two steps of an epoch, from whole epochs (five at least).
        noise_fading: noise variance in the window's last part over that in its first, where they differ
            significantly; else 1.
        drift: net displacement per optimizer step, with the interval that free diffusion gives it.
        detrended_diffusion: D per optimizer step with the net displacement taken off.
        green_kubo_diffusion: D per optimizer step of a flat mode from the correlation of its noise alone;
            only with replacement.
        anomalous_exponent: of the mean squared displacement in the lag: 1 for diffusion, 0 once confined.
        force_slope: slope of the used gradient on what the measured curvature says it should be (1 in a
            quadratic loss); for directions that are no eigenvectors.
        start_gradient_z: mean gradient at the window's start over its standard error.
        radial_share: share of the direction that only stretches rows of weights.
        preconditioner_change: mean of an adaptive optimizer's preconditioner along the mode at the window's
            end over that at its start; 1 for others.
    """

    name: str
    kind: ModeKind
    eigenvalue: float
    residual: float
    converged: bool
    held_out_eigenvalue: float
    held_out_standard_error: float
    effective_curvature: float
    end_eigenvalue: float
    relaxation_times: float
    noise_variance: Interval
    noise_kurtosis: float
    noise_share: float
    measured_curvature: Interval
    diffusion: Interval
    diffusion_per_time: Interval
    diffusion_lag: int
    predicted_diffusion: float
    langevin_diffusion: float
    free_diffusion: float
    log_bayes_factor: float
    t_level: float
    t_trend: float
    drift_z: float
    verdict: Verdict
    detail: str
    reason: str
    noise_weighted_curvature: Interval = field(default_factory=Interval.unknown)
    batch_curvature_variance: float = math.nan
    growth_ratio: float = math.nan
    marks: tuple[str, ...] = ()
    layer_shares: Mapping[str, float] = field(default_factory=dict)
    displacements: tuple[LagPoint, ...] = ()
    undermined: bool = False
    resampled_noise: Interval = field(default_factory=Interval.unknown)
    noise_correlations: Mapping[str, float] = field(default_factory=dict)
    noise_correlation: float = math.nan
    epoch_correlation: Interval = field(default_factory=Interval.unknown)
    noise_fading: float = math.nan
    drift: Interval = field(default_factory=Interval.unknown)
    detrended_diffusion: Interval = field(default_factory=Interval.unknown)
    green_kubo_diffusion: Interval = field(default_factory=Interval.unknown)
    anomalous_exponent: Interval = field(default_factory=Interval.unknown)
    force_slope: Interval = field(default_factory=Interval.unknown)
    start_gradient_z: float = math.nan
    radial_share: float = math.nan
    preconditioner_change: float = 1.0

    @property
    def mixed(self) -> bool:
        """No eigenvector, nor meant to be one: near-flat, or an interior mode that has not converged.

        How it moves is decided by its effective curvature, not by its Rayleigh quotient.
        """
        return self.kind is ModeKind.FLAT or (self.kind is ModeKind.INTERIOR and not self.converged)


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvatureResult:
    """How the directions of a window were found, and at what cost.

    Attributes:
        lambda_max: largest |eigenvalue|, with its sign, on the finding batches.
        samples_found: samples in the batches that found the directions.
        samples_certified: samples in the disjoint batches that certified them.
        batches_found: number of finding batches.
        batches_certified: number of certifying batches.
        parameters: number of weights in the probed space.
        products: Hessian-vector products, each over all batches of its set.
        split_half_overlap: how well the held-out samples settle the top subspace: mean squared cosine
            between its images under two halves of them, in [0, 1].
        orthogonality: largest |v_i . v_j| of two different modes.
        converged: every top mode reached the tolerance.
        message: why the solver stopped, in plain words.
        self_test: what the operator's self-test said.
        held_out_overlap: how nearly the top modes span a subspace that the held-out Hessian leaves alone:
            mean squared cosine with their images, in [0, 1].
        end_overlap: the same with the Hessian at the window's end: what is less has turned.
        density_nodes: eigenvalues, ascending, that stand for the spectrum of the Hessian on the finding
            batches, as the search for the directions saw it; empty without flat directions.
        density_weights: share of all eigenvalues that each stands for; they add up to one.
        density_widths: that share lies within so much of the node; zero for single eigenvalues.
    """

    lambda_max: float
    samples_found: int
    samples_certified: int
    batches_found: int
    batches_certified: int
    parameters: int
    products: int
    orthogonality: float
    converged: bool
    message: str
    self_test: str
    split_half_overlap: float = math.nan
    held_out_overlap: float = math.nan
    end_overlap: float = math.nan
    density_nodes: tuple[float, ...] = ()
    density_weights: tuple[float, ...] = ()
    density_widths: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CostResult:
    """What the probe has cost.

    Attributes:
        open_seconds: the pause when this window opened.
        observe_seconds: reading the steps of this window, all together.
        close_seconds: the pause when it closed.
        total_seconds: the probe's seconds since the fit began, this window included.
        training_seconds: wall seconds of the fit so far without the probe's.
        longest_pause_seconds: the longest time for which the training has stood still so far, since the fit
            began.
        foretold_open_seconds: the pause that was foretold for this opening: by the preflight for the first
            window, by the one before for the next.
        foretold_step: the optimizer step at which the preflight said that the first window would open; NaN
            for later ones.
        foretold_windows: how many the preflight said that the run would have.
        foretold_bytes: memory that the preflight said a window takes at its peak.
        peak_bytes: what this one took above what the process held before; NaN where the process had held more
            at some time before, or nobody can tell.
    """

    open_seconds: float
    observe_seconds: float
    close_seconds: float
    total_seconds: float
    training_seconds: float
    longest_pause_seconds: float = math.nan
    foretold_open_seconds: float = math.nan
    foretold_step: float = math.nan
    foretold_windows: float = math.nan
    foretold_bytes: float = math.nan
    peak_bytes: float = math.nan

    @property
    def fraction(self) -> float:
        """The probe's seconds over those of the training without it (NaN before any training)."""
        return self.total_seconds / self.training_seconds if self.training_seconds > 0 else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowResult:
    """Everything that one window measured.

    Attributes:
        index: 0 for the first window of the run.
        opened_at_step: optimizer steps done when the window opened.
        closed_at_step: optimizer steps done when it closed.
        steps: steps observed and used.
        skipped_steps: steps left out (non-finite or skipped by the optimizer).
        planned_steps: the length fixed when the window opened.
        complete: the planned length was reached.
        learning_rate: mean learning rate over the window.
        effective_learning_rate: diffusion clock over confinement clock, momentum included.
        confinement_clock: sum of effective learning rates over the used steps.
        diffusion_clock: sum of their squares.
        optimizer: one line on what the optimizer does.
        sampling: one line on what the loader does.
        curvature: how the directions were found.
        cost: what it cost.
        modes: the modes: top ones first, then interior and near-flat ones; the first two stiffest first.
        warnings: plain-word warnings that concern the whole window.
        expected_false_flags: how many of the flags raised by this window (diffusive or drifting
            called on a confined mode, or confined called on a flat one) are expected to be wrong.
        coordinates: what displacements are measured in: the weights, or weights scaled as the optimizer
            scales them.
        plan: why the window is as long as it is.
        epochs: the horizon of its verdicts in epochs; NaN where the loader has none.
        free_share: variance of a flat mode's net displacement over that under independent draws.
        epoch_correlation: of the noise of two steps of an epoch, measured; NaN before five whole epochs.
        epoch_correlation_interval: its 95% interval.
        expected_epoch_correlation: the same by the declared sampling, ``-1 / (n - 1)``.
        pooled_diffusion: measured over free D, all diffusive flat modes together: 1 where noise explains it.
        joint_curvatures: eigenvalues of the regression of the stiff modes' gradients on their displacements,
            all at once: they do not mind the modes turning within their subspace.
        rate_jumps: steps at which the learning rate jumped by more than a tenth.
        stability_limit: largest curvature at which the mean of a mode is stable under this optimizer: ``2 /
            eta`` for plain SGD, ``2 (1 + mu) / eta`` with momentum; NaN where the theory does not cover it.
        slices: the loss along the stiffest and the flattest direction, at the window's start.
    """

    index: int
    opened_at_step: int
    closed_at_step: int
    steps: int
    skipped_steps: int
    planned_steps: int
    complete: bool
    learning_rate: float
    effective_learning_rate: float
    confinement_clock: float
    diffusion_clock: float
    optimizer: str
    sampling: str
    curvature: CurvatureResult
    cost: CostResult
    modes: tuple[ModeResult, ...]
    warnings: tuple[str, ...] = ()
    expected_false_flags: float = math.nan
    coordinates: str = "weights"
    plan: str = ""
    epochs: float = math.nan
    free_share: float = math.nan
    epoch_correlation: float = math.nan
    expected_epoch_correlation: float = math.nan
    pooled_diffusion: Interval = field(default_factory=Interval.unknown)
    joint_curvatures: tuple[float, ...] = ()
    rate_jumps: int = 0
    epoch_correlation_interval: Interval = field(default_factory=Interval.unknown)
    stability_limit: float = math.nan
    slices: tuple[LossSlice, ...] = ()

    def counts(self) -> dict[Verdict, int]:
        """Number of modes per verdict; every verdict is a key and the values add up to the modes."""
        found = [mode.verdict for mode in self.modes]
        return {verdict: found.count(verdict) for verdict in Verdict}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only; non-finite numbers become ``None``."""
        plain = _plain(self)
        assert isinstance(plain, dict)
        return {"schema": SCHEMA_VERSION, **plain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WindowResult:
        """Read :meth:`to_dict` back.

        Raises:
            ValueError: the data is of another schema, lacks a field or holds a wrong one; the message
                names it.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"expected a window result as a JSON object, found {type(data).__name__}")
        schema = data.get("schema")
        if schema != SCHEMA_VERSION:
            raise ValueError(
                f"expected a window result of schema {SCHEMA_VERSION}, found {schema!r}: "
                "read it with the version of sgd_probe that wrote it"
            )
        values = {key: value for key, value in data.items() if key != "schema"}
        try:
            values["curvature"] = CurvatureResult(**_fields(CurvatureResult, values["curvature"]))
            values["cost"] = CostResult(**_fields(CostResult, values["cost"]))
            values["modes"] = tuple(_mode_from(mode) for mode in _list("modes", values["modes"]))
            values["warnings"] = _texts("warnings", values["warnings"])
            values["slices"] = tuple(
                LossSlice(**_fields(LossSlice, item)) for item in _list("slices", values.get("slices", ()))
            )
            return cls(**_fields(cls, values))
        except KeyError as error:
            raise ValueError(f"expected a whole window result, found none of its {error}") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"expected a whole window result, found a broken one: {error}") from error


def _plain(value: Any) -> Any:
    """Reduce a result, or a part of one, to strict JSON types."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    cls: type = type(value)
    if dataclasses.is_dataclass(cls):
        return {name: _plain(getattr(value, name)) for name in _kinds(cls)}
    return value


@functools.cache
def _kinds(cls: type) -> dict[str, str]:
    """The fields of a class and the types that they are written with."""
    return {f.name: str(f.type) for f in dataclasses.fields(cls)}


_KINDS: dict[str, type] = {"float": float, "int": int, "bool": bool, "str": str}


def _fields(cls: type, values: Any) -> dict[str, Any]:
    """Check the plain fields of a class and its intervals; a float field that reads ``null`` is NaN."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{cls.__name__} should be an object, not {values!r}")
    kinds = _kinds(cls)
    return {key: _read(kinds.get(key, ""), key, value) for key, value in values.items()}


def _read(kind: str, name: str, value: Any) -> Any:
    if kind == "Interval":
        return _interval_from(value)
    if kind == "tuple[float, ...]":
        return tuple(_checked(float, name, item) for item in _list(name, value))
    return _checked(_KINDS.get(kind), name, value)


def _checked(kind: type | None, name: str, value: Any) -> Any:
    if kind is None:
        return value
    if kind is float:
        value = math.nan if value is None else float(value) if type(value) is int else value
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} should be of type {kind.__name__}, not {value!r}")
    return value


def _list(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name} should be a list, not {values!r}")
    return list(values)


def _texts(name: str, values: Any) -> tuple[str, ...]:
    return tuple(_checked(str, name, value) for value in _list(name, values))


def _interval_from(data: Any) -> Interval:
    return Interval(**_fields(Interval, data))


def _mode_from(data: Any) -> ModeResult:
    values = _fields(ModeResult, data)
    values["kind"] = ModeKind(values["kind"])
    values["verdict"] = Verdict(values["verdict"])
    values["marks"] = _texts("marks", values["marks"])
    for name in ("layer_shares", "noise_correlations"):
        numbers = dict(values.get(name, {}))
        values[name] = {key: _checked(float, key, number) for key, number in numbers.items()}
    values["displacements"] = tuple(
        LagPoint(**_fields(LagPoint, point)) for point in _list("displacements", values["displacements"])
    )
    return ModeResult(**values)
