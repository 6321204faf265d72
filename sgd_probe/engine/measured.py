"""What a closed window hands over to be judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sgd_probe.curvature.modes import Mode, ModeBasis
from sgd_probe.dynamics.force import JointStatistics
from sgd_probe.dynamics.noise import Resampled
from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.engine.optimizers import OptimizerState
from sgd_probe.engine.sampling import Sampling
from sgd_probe.result import CostResult, LossSlice


@dataclass(frozen=True)
class Measured:
    """All that a closed window knows.

    Attributes:
        index: of the window.
        opened_at_step: optimizer steps done when it opened.
        closed_at_step: optimizer steps done when it closed.
        planned_steps: length fixed when it opened.
        basis: its modes.
        decays: weight decay along each mode.
        end_eigenvalues: v.Hv at its end; empty where they could not be measured.
        random_noise: noise variance of a random direction at its start.
        statistics: its running sums.
        optimizer: as it stood when the window opened, with what was noticed since.
        sampling: what the loader does.
        samples_found: samples of the finding batches.
        samples_certified: samples of the certifying batches.
        batches: batches in each set.
        parameters: number of probed weights.
        self_test: what the operator's self-test said.
        cost: seconds.
        warnings: what the engine noticed on the way.
        min_noise_share: below it a mode has no noise.
        plan: why it is as long as it is.
        end_overlap: of the stiff directions with their images under the Hessian at its end.
        joint: sums of products between the stiff modes; None where they were not kept.
        resampled: noise at its start at fixed weights; None for too few batches.
        start_gradient: mean gradient at its start over its standard error, for every mode.
        radial: share of each mode that only stretches rows of weights.
        norms: of every weight matrix, at its start and end.
        preconditioner_changes: along each mode, end over start; empty where nothing is preconditioned.
        jumps: steps at which the learning rate jumped.
        slices: the loss along some of the modes at its start.
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
    plan: str = ""
    end_overlap: float = float("nan")
    joint: JointStatistics | None = None
    resampled: Resampled | None = None
    start_gradient: tuple[float, ...] = ()
    radial: tuple[float, ...] = ()
    norms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    preconditioner_changes: tuple[float, ...] = ()
    jumps: int = 0
    slices: tuple[LossSlice, ...] = ()


def decisive_curvature(mode: Mode, decay: float) -> float:
    """The curvature that decides a mode's fate, decay included: for a mixed direction not v.Hv.

    A mixture about an interior level has the sign of that level.
    """
    certificate = mode.certificate
    if not mode.mixed:
        return certificate.eigenvalue + decay
    falling = mode.kind == "interior" and certificate.eigenvalue < 0
    return (-certificate.effective_curvature if falling else certificate.effective_curvature) + decay
