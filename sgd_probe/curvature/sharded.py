"""The Hessian where processes hold a part of every weight each: FSDP2, ``fully_shard``.

There a loss has a gradient by ``backward`` alone, which leaves every process the part that belongs to its
weights; ``create_graph`` does not survive the communication in between. So products are differences of such
gradients, with this process's parts of the weights moved in place and put back. Nothing is gathered for it
but what the module gathers for itself, layer by layer, as in the training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sgd_probe.curvature.aliased import LossFunction, checked
from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.finite_differences import FiniteDifferenceOperator
from sgd_probe.curvature.hessian import Ranks
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import capture, seed_all

_T = TypeVar("_T")


class SharingRanks(Ranks, Protocol):
    """Processes that can also wait for each other's success."""

    def together(self, work: Callable[[], _T]) -> _T:
        """Work of each process that must succeed on all."""


class ShardedDifferenceOperator(FiniteDifferenceOperator):
    """Hessian-vector products of a module that ``fully_shard`` has divided; vectors are divided like it.

    The loss of a batch is the mean over what the processes hold at that place, as for every operator with
    ``ranks``. Between forward and backward, and after it, the processes ask each other whether all has gone
    well; a process that fails within the module's own communication leaves the others waiting there, as it
    would in the training.

    Call it inside :func:`sgd_probe.isolation.isolated`, with the module :func:`at_rest`.

    Args:
        module: the user's module.
        loss: its training loss. It must not write to weights.
        batches: the curvature batches of this process, as many as any other has.
        space: the probed parameters, all divided, with a reduction over ``ranks``.
        ranks: all processes.
        relative_step: as for :class:`FiniteDifferenceOperator`.
        tolerance: likewise.

    Raises:
        CurvatureError: what :class:`FiniteDifferenceOperator` raises, on all processes.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: LossFunction,
        batches: Sequence[CurvatureBatch],
        space: ParameterSpace,
        *,
        ranks: SharingRanks,
        relative_step: float | None = None,
        tolerance: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype is not None:
            raise ValueError(f"expected weights in the precision to work in, found {dtype} asked for")
        super().__init__(
            module, loss, batches, space, ranks=ranks, relative_step=relative_step, tolerance=tolerance
        )
        self._sharing = ranks

    @property
    def parts_of_batch(self) -> int:
        return 1  # what reaches a process is its part of the mean

    def _over_ranks(self, work: Callable[[], Tensor]) -> Tensor:
        return work()  # backward has taken the mean already

    def _value(self, piece: CurvatureBatch, shift: Tensor | None = None) -> float:
        value, _ = self._evaluate(piece, shift)
        total, count = self.space.reduce(torch.tensor([value, 1.0], dtype=torch.float64)).tolist()
        return float(total / count)

    def _gradient(self, piece: CurvatureBatch, shift: Tensor | None = None) -> Tensor:
        _, gradient = self._evaluate(piece, shift)
        return gradient

    def _evaluate(self, piece: CurvatureBatch, shift: Tensor | None) -> tuple[float, Tensor]:
        """The loss of this process, and its part of the gradient of the mean over all processes."""

        def forward() -> Tensor:
            seed_all(piece.seed)
            return checked(self.loss(self.module, piece.thaw(), piece.index))

        restore, complete = capture(self.module), False
        try:
            with self._moved(shift):
                # Backward communicates: nobody may begin it before all have got so far.
                loss = self._sharing.together(forward)
                self._sharing.together(loss.backward)
            complete = True
            return float(loss.detach()), self.space.flatten([p.grad for p in self.space.parameters])
        finally:
            at_rest(self.module, interrupted=not complete)
            restore()

    @contextmanager
    def _moved(self, shift: Tensor | None) -> Iterator[None]:
        """Weights moved in place; they get their bits back, not a difference that rounding has touched."""
        homes = [weights.data for weights in self.space.parts]  # autograd's version counters stay as they are
        saved = [home.clone() for home in homes]
        try:
            if shift is not None:
                for home, change in zip(homes, self.space.split(shift), strict=True):
                    home.add_(change)
            yield
        finally:
            for home, value in zip(homes, saved, strict=True):
                home.copy_(value)


def at_rest(module: nn.Module, interrupted: bool = False) -> None:
    """Let the sharded parts of a module hold nothing but this process's parts, as after a training step.

    A validation, say, leaves gathered weights behind, which would not see that the parts are moved. They are
    gathered again when they are needed.

    Args:
        module: the user's module; one that is not sharded is left alone.
        interrupted: an evaluation has not got to its end.
    """
    units = list(sharded_units(module))
    for unit in units if interrupted else ():
        if hasattr(unit, "reset_iter_state"):  # older versions of torch have no such way
            try:
                unit.reset_iter_state()
            except RuntimeError:  # it is within another, which has taken care of it
                continue
    for unit in units:
        unit.reshard()


def sharded_units(module: nn.Module) -> Iterator[Any]:
    """What ``fully_shard`` was applied to; where nobody has imported it, there is none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is not None:
        yield from (child for child in module.modules() if isinstance(child, kind))
