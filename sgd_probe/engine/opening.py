"""What follows for a window from the curvature at its start: its flatness, noise, decay and length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sgd_probe.curvature.certify import MIN_BATCHES
from sgd_probe.curvature.finite_differences import FiniteDifferenceOperator
from sgd_probe.curvature.hessian import HessianOperator
from sgd_probe.curvature.modes import ModeBasis
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.dynamics.noise import Resampled, resample
from sgd_probe.engine.config import ProbeConfig
from sgd_probe.engine.distributed import Processes
from sgd_probe.engine.measured import decisive_curvature
from sgd_probe.engine.optimizers import OptimizerState
from sgd_probe.engine.planning import WindowPlan, choose_window


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What the run knows of a window that is to open.

    Attributes:
        index: of the window in its run.
        step: optimizer steps done.
        steps_left: optimizer steps until the end of the run, or infinity.
        longest: its length, by what the window before has shown.
        accumulation: microbatches in an optimizer step.
        notes: what its result has to say anyway.
    """

    index: int
    step: int
    steps_left: float
    longest: float
    accumulation: int
    notes: tuple[str, ...] = ()

    def plan(
        self, config: ProbeConfig, top: Sequence[float], flat: Sequence[float], optimizer: OptimizerState
    ) -> WindowPlan:
        """How long the window is to be.

        Args:
            config: the knobs.
            top: curvatures of the stiff modes, decay included.
            flat: those of the flat ones.
            optimizer: as it stands.
        """
        rate = optimizer.effective_learning_rate
        return choose_window(config, top, flat, rate, self.steps_left, self.longest, optimizer.momentum)

    def plan_for(
        self, config: ProbeConfig, basis: ModeBasis, decays: Sequence[float], optimizer: OptimizerState
    ) -> WindowPlan:
        """How long the window is to be, with the directions that it has.

        Args:
            config: the knobs.
            basis: the directions.
            decays: weight decay along each.
            optimizer: as it stands.
        """
        found = [
            (mode.kind, decisive_curvature(mode, d)) for mode, d in zip(basis.modes, decays, strict=True)
        ]
        top, flat = ([curvature for kind, curvature in found if kind == which] for which in ("top", "flat"))
        return self.plan(config, top, flat, optimizer)

    def flat_curvature(self, config: ProbeConfig, eigenvalues: Tensor, optimizer: OptimizerState) -> float:
        """What flat directions aim at: half a relaxation time over the window that is to be expected.

        Args:
            config: the knobs.
            eigenvalues: of the stiff directions.
            optimizer: as it stands.
        """
        aim = config.flat_curvature * float(eigenvalues.abs().max())
        rate = optimizer.effective_learning_rate
        if rate > 0 and not optimizer.withheld:
            aim = min(aim, 0.5 / (rate * self.plan(config, eigenvalues.tolist(), [], optimizer).steps))
        return max(aim, torch.finfo(torch.float64).tiny)


def resample_start(
    operator: HessianOperator, basis: ModeBasis, accumulation: int, processes: Processes | None
) -> tuple[Resampled | None, tuple[float, ...]]:
    """Noise at fixed weights from the certifying batches, and how far the mean gradient is from zero.

    Every process has a minibatch gradient of its own, before they are averaged: so many more of them.

    Args:
        operator: of the certifying batches.
        basis: the directions.
        accumulation: microbatches in an optimizer step.
        processes: of a distributed training.

    Returns:
        The noise (None for too few batches), and the mean gradient over its standard error for every mode.
    """
    parts = operator.parts_of_batch
    count = len(operator.batches) * parts
    if count < MIN_BATCHES:
        return None, (math.nan,) * len(basis.modes)
    rows = torch.stack([(basis.vectors @ gradient).double() for gradient in operator.own_gradients()])
    if processes is not None and parts > 1:
        rows = processes.gathered(rows).flatten(0, 1)
    gradients = operator.space.reduce(rows).cpu().numpy()
    spread = gradients.std(0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        score = gradients.mean(0) * math.sqrt(count) / spread
    # A step takes the mean over so many minibatches, which has the less noise.
    return resample(gradients / math.sqrt(accumulation * parts)), tuple(score.tolist())


def decays_along(basis: ModeBasis, space: ParameterSpace, optimizer: OptimizerState) -> tuple[float, ...]:
    """Weight decay along each mode: v.Wv.

    Args:
        basis: the directions.
        space: their coordinates.
        optimizer: as it stands.
    """
    factors = optimizer.decay_factors
    if not any(factors):
        return (0.0,) * len(basis.modes)
    scaling = space.scaling if optimizer.decay_is_preconditioned else None
    shares = []
    for where in space.slices:  # one at a time: the whole basis in float64 would be as much as two of it
        rows = basis.vectors[:, where].double()
        shares.append((rows if scaling is None else rows * scaling[where].to(rows)).square().sum(1))
    weights = torch.tensor(factors, dtype=torch.float64, device=basis.vectors.device)
    return tuple(space.reduce(weights @ torch.stack(shares)).tolist())


def difference_note(*operators: HessianOperator) -> str:
    """What to say of products that were no double backward; "" where they were.

    Args:
        operators: that took them.
    """
    apart = [o.disagreement for o in operators if isinstance(o, FiniteDifferenceOperator)]
    if not apart:
        return ""
    why = "the weights are divided" if operators[0].space.divided else "`second_derivatives`"
    return (
        f"The curvature comes from finite differences of gradients ({why}), at two steps that agreed to "
        f"{max(apart):.0e} or better."
    )
