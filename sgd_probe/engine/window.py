"""An open window: the directions it watches, and what every optimizer step adds to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.modes import ModeBasis
from sgd_probe.curvature.space import ParameterSpace, part
from sgd_probe.dynamics.force import JointStatistics
from sgd_probe.dynamics.noise import Resampled
from sgd_probe.dynamics.projection import Projection, Projector
from sgd_probe.dynamics.statistics import Draw, WindowStatistics
from sgd_probe.engine.optimizers import OptimizerReader, OptimizerState, read_scales
from sgd_probe.engine.packing import pack, unpack
from sgd_probe.engine.planning import Foretold, WindowPlan
from sgd_probe.engine.step import Step
from sgd_probe.result import LossSlice

#: A learning rate that changes by more than this share from one step to the next has jumped.
JUMP = 0.1


@dataclass
class Window:
    """An open window.

    Attributes:
        index: of the window in its run.
        opened_at_step: optimizer steps done when it opened.
        plan: its length, fixed when it opened.
        basis: the directions, in the coordinates of ``space``.
        space: the probed parameters, scaled as the optimizer scales them.
        optimizer: as it stood when the window opened, with what has been noticed since.
        certifying: the held-out batches.
        samples_found: samples that found the directions, on all processes.
        samples_certified: those of the held-out batches.
        noise_trace: trace of the covariance of a step's gradient at its start.
        decays: weight decay along each mode.
        resampled: gradients of the certifying batches at its start, projected; None for too few.
        start_gradient: mean of those over its standard error, for every mode.
        radial: share of each mode that only stretches rows of weights.
        slices: the loss along some of the modes.
        statistics: the running sums of all modes.
        joint: those of products between the stiff modes.
        jumps: steps at which the learning rate jumped.
        late: steps since it has seen all of its own.
        foretold: what was said of it before.
        peak_bytes: what it took while it opened; NaN where nobody can tell.
        warnings: what was noticed on the way.
    """

    index: int
    opened_at_step: int
    plan: WindowPlan
    basis: ModeBasis
    space: ParameterSpace
    live: torch.optim.Optimizer
    optimizer: OptimizerState
    certifying: list[CurvatureBatch]
    samples_found: int
    samples_certified: int
    noise_trace: float
    decays: tuple[float, ...]
    resampled: Resampled | None
    start_gradient: tuple[float, ...]
    radial: tuple[float, ...]
    statistics: WindowStatistics
    joint: JointStatistics
    projector: Projector
    slices: tuple[LossSlice, ...] = ()
    jumps: int = 0
    late: int = 0
    open_seconds: float = 0.0
    observe_seconds: float = 0.0
    test_seconds: float = 0.0
    foretold: Foretold = field(default_factory=Foretold)
    peak_bytes: float = math.nan
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        modes = len(self.basis.modes)
        self._position = np.zeros(modes)
        self._decay_since = np.zeros(modes)
        self._force = np.zeros((2, modes))
        self._decay_at_origin = self.projector.decay_at_origin(self.optimizer.decay_factors)
        self._last_rate = 0.0
        self._gradient_squares = 0.0
        self._now = self.optimizer
        self._reader = OptimizerReader(self.live, self.space.parameters)
        self._seen = self.optimizer
        self._waiting: list[Step] = []
        self._numbers: list[Tensor] = []

    @property
    def due(self) -> bool:
        """The planned number of steps has been seen."""
        return self.steps + self.statistics.skipped >= self.plan.steps

    @property
    def steps(self) -> int:
        """Steps so far, with those that are not in the sums yet."""
        return self.statistics.steps + len(self._waiting)

    @property
    def top(self) -> int:
        """Number of stiff modes, the first of the basis."""
        return len(self.joint.products) // 2

    def observe(self, draw: Draw) -> None:
        """Read the step that the optimizer has just done.

        Args:
            draw: how its minibatch was drawn.
        """
        optimizer = self._reader.read()
        if optimizer is not self._seen:
            if optimizer.decay_factors != self._seen.decay_factors:
                self._read()  # what waits was pulled at by another decay
            self._seen = optimizer
        self._waiting.append(Step(draw, optimizer))
        if not self.projector.take():
            self._read()
            self._numbers.append(self.projector.nothing())
        elif self.projector.full:
            self._read()
        if not self.space.divided and (self.due or not self.projector.waiting):
            self.settle()

    def _read(self) -> None:
        """Turn the vectors that wait into numbers."""
        if self.projector.waiting:
            self._numbers.append(self.projector.read(self._seen.decay_factors))

    def settle(self) -> None:
        """Take the steps that wait into the sums; where weights are divided, all processes do so together."""
        self._read()
        steps, self._waiting = self._waiting, []
        numbers, self._numbers = self._numbers, []
        if steps:
            for step, projection in zip(steps, self.projector.complete(torch.cat(numbers)), strict=True):
                self._add(step, projection)

    def _add(self, step: Step, projection: Projection) -> None:
        finite, optimizer = projection.finite, step.optimizer
        usable = finite
        if optimizer is not self._now:
            if optimizer.decay_factors != self._now.decay_factors:
                # What the new decay pulls at was not read before this step: begin with the next one.
                self._decay_at_origin = self.projector.decay_at_origin(optimizer.decay_factors)
                usable = False
            self._notice(optimizer)
            self._now = optimizer
        if usable:
            gradient = projection.gradient + self._decay_at_origin + self._decay_since
            self.statistics = self.statistics.update(
                self._position,
                gradient,
                projection.displacement,
                optimizer.learning_rate,
                optimizer.effective_learning_rate,
                u=self._force,
                draw=step.draw,
            )
            self.joint = self.joint.update(self._position[: self.top], gradient[: self.top])
            self._gradient_squares += projection.gradient_square
        else:
            self.statistics = self.statistics.skip(step.draw)
        if finite or np.isfinite(projection.displacement).all():
            self._position = projection.displacement
            self._decay_since = projection.decay
            self._force = projection.force

    def withhold(self, why: str) -> None:
        """Give no verdicts: something has changed that they rest on."""
        if not self.optimizer.withheld:
            self.optimizer = dataclasses.replace(self.optimizer, withheld=why)

    def _notice(self, now: OptimizerState) -> None:
        """Keep what has changed since the window opened and qualifies it."""
        at_start = self.optimizer
        if now.momentum != at_start.momentum and not at_start.unpredicted:
            at_start = dataclasses.replace(at_start, unpredicted="its momentum changed during the window")
        if now.momentum > at_start.momentum:
            at_start = dataclasses.replace(at_start, momentum=now.momentum)
        if not now.moves_as(self.optimizer) and not at_start.withheld:
            at_start = dataclasses.replace(
                at_start,
                withheld="the learning rates of its parameter groups changed beside each other in the window",
            )
        self.optimizer = at_start
        rate = now.effective_learning_rate
        if self._last_rate > 0 and abs(rate / self._last_rate - 1) > JUMP:
            self.jumps += 1
        self._last_rate = rate

    def random_noise(self) -> float:
        """Noise variance of a random direction: never more than the used gradients have room for.

        Clipping shrinks those; the trace at the window's start knows nothing of it.
        """
        steps = self.statistics.steps
        mean_square = self._gradient_squares / steps if steps else math.inf
        return min(self.noise_trace, mean_square) / self.space.dimension

    def moved_otherwise(self) -> str:
        """Why the weights are not where the optimizer's steps have brought them; "" where they are."""
        displacement = self.projector.displacement()
        if not np.isfinite(displacement).all():
            return "The weights are no longer finite"
        if not self.late and not np.allclose(displacement, self._position, rtol=1e-3, atol=1e-7):
            return "The weights were changed outside the optimizer's steps (by weight averaging, perhaps)"
        return ""

    def preconditioner_changes(self) -> tuple[float, ...]:
        """Each mode's mean of ``P`` now over P at the start; empty where nothing is preconditioned."""
        if not self.optimizer.preconditioned or self.space.scaling is None:
            return ()
        scales = read_scales(self.live, self.space.parameters, self._now)
        if scales is None:
            return ()
        now = self.space.scaled(scales).scaling
        assert now is not None
        ratio = now.div_(self.space.scaling).square_().to(self.basis.vectors)
        changes = torch.stack([vector.square() @ ratio for vector in self.basis.vectors])
        return tuple(self.space.reduce(changes.double()).tolist())

    def state(self) -> dict[str, Any]:
        """Tensors and plain types from which :meth:`resumed` goes on.

        Raises:
            TypeError: the certifying batches hold what cannot be stored safely.
        """
        kept = {name: pack(getattr(self, name)) for name in _KEPT}
        projector = self.projector
        return {
            **kept,
            "scaling": self.space.scaling,
            "origin": projector.origin,
            "rows": projector.rows(),
            "together": projector.together,
            "on_cpu": self.basis.vectors.device != self.space.device,
        }

    @classmethod
    def resumed(cls, state: Mapping[str, Any], space: ParameterSpace, live: torch.optim.Optimizer) -> Window:
        """Go on with a window whose steps so far were observed in another process."""
        values = {name: unpack(state[name]) for name in _KEPT}
        hidden = {name: values.pop(name) for name in _HIDDEN}
        home = torch.device("cpu") if state.get("on_cpu") else space.device
        device, dtype = space.device, space.dtype
        basis: ModeBasis = values["basis"]
        values["basis"] = basis = dataclasses.replace(basis, rows=basis.rows.to(home, dtype))
        if state["scaling"] is not None:
            space = dataclasses.replace(space, scaling=state["scaling"].to(device, dtype))
        optimizer: OptimizerState = values["optimizer"]
        projector = Projector(
            basis.rows,
            space.parameters,
            None if space.scaling is None else space.scaling.to(home),
            optimizer.decay_is_preconditioned,
            len(basis.modes),
            state["origin"].to(home, dtype),
            part,
            space.reduce,
            state["together"],
        )
        projector.restore(state["rows"].to(home, dtype))
        window = cls(**values, space=space, live=live, projector=projector)
        for name, value in hidden.items():
            setattr(window, name, value)
        return window

    def norms(self) -> dict[str, tuple[float, float]]:
        """Norm of every weight matrix, or tensor of more dimensions, at the start and now."""
        norms = self.projector.norms()
        return {
            name: (float(then), float(now))
            for name, parameter, then, now in zip(
                self.space.names, self.space.parameters, *norms, strict=True
            )
            if parameter.ndim > 1
        }


#: What a window is resumed from: its fields but those that live, and what its steps have left in it.
_HIDDEN = (
    "_position",
    "_decay_since",
    "_force",
    "_decay_at_origin",
    "_last_rate",
    "_gradient_squares",
    "_now",
    "_seen",
    "_waiting",
    "_numbers",
)
_KEPT = (
    *(f.name for f in dataclasses.fields(Window) if f.name not in ("space", "live", "projector")),
    *_HIDDEN,
)


def radial_shares(vectors: Tensor, space: ParameterSpace) -> tuple[float, ...]:
    """Share of each direction's squared length that only stretches rows of the weights.

    Where a normalisation follows a layer, the loss does not depend on the length of the weights of an output:
    such a direction is a symmetry of the loss.

    Args:
        vectors: unit rows, shape (k, size), in the coordinates of ``space``.
        space: the probed parameters.
    """
    shares = torch.zeros(len(vectors), dtype=torch.float64)
    for weights, where in zip(space.parts, space.slices, strict=True):
        if weights.ndim < 2 or not weights.numel():
            continue
        count, weights = len(weights), weights.detach().reshape(-1)
        if space.scaling is not None:
            weights = weights / space.scaling[where]
        rows = weights.to(vectors.device).view(count, -1)
        lengths = rows.norm(dim=1, keepdim=True)
        radii = torch.where(lengths > 0, rows / lengths.clamp_min(torch.finfo(rows.dtype).tiny), 0.0)
        for index, vector in enumerate(vectors):
            along = (vector[where].view_as(radii) * radii).sum(1)
            shares[index] += float(along.double().square().sum())
    return tuple(space.reduce(shares).tolist())
