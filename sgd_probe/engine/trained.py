"""The training as it is probed: which of its weights, and how products with their Hessian are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.finite_differences import FiniteDifferenceOperator
from sgd_probe.curvature.hessian import CurvatureError, HessianOperator, LossFunction
from sgd_probe.curvature.sharded import ShardedDifferenceOperator, at_rest
from sgd_probe.curvature.space import ParameterFilter, ParameterSpace
from sgd_probe.engine.config import ProbeConfig
from sgd_probe.engine.distributed import Processes
from sgd_probe.engine.memory import Means
from sgd_probe.engine.optimizers import OptimizerState, read_optimizer, read_scales
from sgd_probe.isolation import isolated


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """The weights that are probed, with all that it takes to evaluate their loss.

    Attributes:
        module: the user's module.
        loss: its training loss on one batch.
        optimizer: what moves the weights.
        config: every knob.
        params: which parameters to probe, of those that the optimizer moves.
        processes: those of a distributed training.
        space: the probed parameters, as the user trains them.
    """

    module: nn.Module
    loss: LossFunction
    optimizer: torch.optim.Optimizer
    config: ProbeConfig
    params: ParameterFilter
    processes: Processes | None
    space: ParameterSpace

    @classmethod
    def of(
        cls,
        module: nn.Module,
        loss: LossFunction,
        optimizer: torch.optim.Optimizer,
        config: ProbeConfig,
        params: ParameterFilter,
        processes: Processes | None,
    ) -> Trained:
        """The training as it begins; arguments as the attributes.

        Raises:
            ValueError: there is nothing to probe, or it cannot be probed.
        """
        space = _summed(_moved(module, optimizer, params), processes, config)
        return cls(
            module=module,
            loss=loss,
            optimizer=optimizer,
            config=config,
            params=params,
            processes=processes,
            space=space,
        )

    def now(self) -> Trained:
        """As the user trains it now: people freeze layers, thaw them, prune and add some.

        Raises:
            ValueError: it cannot be probed like that.
        """
        try:
            found = _moved(self.module, self.optimizer, self.params)
        except ValueError:
            # None of them needs a gradient between two steps of a training that freezes its parts in turn.
            return self
        return dataclasses.replace(self, space=_summed(found, self.processes, self.config))

    def trains(self, space: ParameterSpace) -> bool:
        """The space is of the same parameters under the same names."""
        own = self.space
        return own.names == space.names and all(
            a is b for a, b in zip(own.parameters, space.parameters, strict=True)
        )

    @property
    def dtype(self) -> torch.dtype | None:
        """Precision of the curvature where it is not that of the weights.

        Weights in half precision: their curvature is that of the loss in float32, at those very weights.
        """
        return torch.float32 if torch.finfo(self.space.dtype).bits < 32 else None

    @property
    def vector_bytes(self) -> int:
        """Of a vector of weights, in the precision of the curvature."""
        return self.space.size * (self.dtype or self.space.dtype).itemsize

    @property
    def by_differences(self) -> bool:
        """Products are finite differences of gradients."""
        return self.space.divided or self.config.second_derivatives == "finite_differences"

    @property
    def kind(self) -> Callable[..., HessianOperator]:
        """How products are taken."""
        if self.space.divided:
            assert self.processes is not None
            return partial(ShardedDifferenceOperator, ranks=self.processes)
        return FiniteDifferenceOperator if self.by_differences else HessianOperator

    def operator(
        self, batches: Sequence[CurvatureBatch], space: ParameterSpace, means: Means, alone: bool = False
    ) -> HessianOperator:
        """The Hessian of the mean loss on some batches.

        Args:
            batches: of this process.
            space: the probed parameters, perhaps in other coordinates.
            means: how much memory it may take.
            alone: of this process's batches only, also where there are others.
        """
        if self.space.divided:
            return self.kind(self.module, self.loss, batches, space)
        options: dict[str, Any] = {} if self.by_differences else {"retain_graph": means.keep_graphs}
        return self.kind(
            self.module,
            self.loss,
            batches,
            space,
            dtype=self.dtype,
            microbatch=means.config.microbatch,
            ranks=None if alone else self.processes,
            home=torch.device("cpu") if means.on_cpu else None,
            **options,
        )

    def read_optimizer(self) -> OptimizerState:
        """What the optimizer does now."""
        return read_optimizer(self.optimizer, self.space.parameters)

    def scaled_space(self, optimizer: OptimizerState) -> ParameterSpace:
        """The coordinates in which the optimizer is plain SGD.

        Args:
            optimizer: as it stands.

        Raises:
            CurvatureError: there are none.
        """
        try:
            scales = read_scales(self.optimizer, self.space.parameters, optimizer)
            return self.space if scales is None else self.space.scaled(scales)
        except ValueError as error:
            raise CurvatureError(str(error)) from error

    def shared(self) -> AbstractContextManager[None]:
        """What fails in the body on one of several processes fails on all of them; none is left waiting."""
        return nullcontext() if self.processes is None else self.processes.shared()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Whatever the body does to the user's state is put back."""
        at_rest(self.module)
        with isolated(self.module, self.optimizer.param_groups):
            yield


def _moved(module: nn.Module, optimizer: torch.optim.Optimizer, params: ParameterFilter) -> ParameterSpace:
    """The chosen parameters, of those that the optimizer moves."""
    moved = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    at_rest(module)
    return ParameterSpace.of(module, params, among=moved)


def _summed(space: ParameterSpace, processes: Processes | None, config: ProbeConfig) -> ParameterSpace:
    """The same; where its weights are divided, with its products summed over the processes.

    Raises:
        ValueError: it cannot be probed like that.
    """
    if not space.divided:
        return space
    if processes is None:
        raise ValueError("expected to be told of the processes that hold the other parts of the weights")
    meshes = [cast(Any, parameter).device_mesh.size() for parameter in space.parameters]
    if set(meshes) != {processes.size}:
        raise ValueError(
            f"expected weights divided among all {processes.size} processes, found them divided among "
            f"{', '.join(map(str, sorted(set(meshes))))}"
        )
    if config.microbatch is not None:
        raise ValueError(
            f"expected no `microbatch` where weights are divided among processes, found {config.microbatch}: "
            "a batch is evaluated as in the training, in its memory"
        )
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in space.parameters):
        raise ValueError(
            "expected no hooks on gradients (register_post_accumulate_grad_hook), found some: where weights "
            "are divided, an evaluation of the probe would call them"
        )
    return dataclasses.replace(space, reduce=processes.sums)
