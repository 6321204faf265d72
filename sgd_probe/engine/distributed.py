"""Several processes that train one model: reductions that no failure can hang.

Every process calls the same things in the same order. One that fails takes part in the reduction all the
same, and all learn of it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sgd_probe.curvature.hessian import CurvatureError, WrongHessianError
from sgd_probe.curvature.memory import is_out_of_memory

_T = TypeVar("_T")
_NOT_FINITE = (
    "expected finite values on all processes, found inf or nan, or a process that failed: its log says how"
)
#: On what is raised on all of them.
_SHARED = "raised on all processes"
#: How bad it is: nothing, worth another try later, or with less memory, for good.
_FINE, _LATER, _SHORT, _FOR_GOOD = 0.0, 1.0, 2.0, 3.0


class Processes:
    """The processes of a training, by their default group.

    Args:
        device: of what is reduced.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.size = dist.get_world_size()
        self.rank = dist.get_rank()

    def mean(self, work: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Mean over the processes of what each computes: the same bits on all.

        Args:
            work: on this process; its tensor is ours to change.
            like: a tensor of the shape, dtype and device of the result.

        Raises:
            CurvatureError: the work has failed on one of them, or its result is not finite.
            MemoryError: memory was short on one of them.
            WrongHessianError: it has failed in a way that waiting does not mend.
        """
        error: Exception | None = None
        try:
            value = work()
        except Exception as failure:
            # Poison instead of a flag of its own: a second reduction is needed only where something is wrong.
            error, value = failure, torch.full_like(like, math.nan)
        return self._averaged(value, error)

    def _averaged(self, value: Tensor, error: Exception | None) -> Tensor:
        dist.all_reduce(value)
        value.div_(self.size)
        if not math.isfinite(float(value.sum())) and not bool(torch.isfinite(value).all()):
            self._raise(error or CurvatureError(_NOT_FINITE))
        return value

    def together(self, work: Callable[[], _T]) -> _T:
        """Work that each process does for itself, and that must succeed on all.

        Raises:
            CurvatureError: it has failed on one of them.
            MemoryError: memory was short on one of them.
            WrongHessianError: it has failed in a way that waiting does not mend.
        """
        error: Exception | None = None
        found: _T | None = None
        try:
            found = work()
        except Exception as failure:
            error = failure
        if self._worst(error):
            self._raise(error)
        return found  # type: ignore[return-value]

    def in_step(self, work: Callable[[], _T], like: Tensor) -> _T:
        """Work in which they meet by means only, and one may fail in between, alone.

        The others then are in a mean, or in the one that ends this: there they learn of it.

        Args:
            work: on this process.
            like: a tensor such as those that its means are taken of; ours to change. A process that is short
                of memory could not make another.

        Raises:
            CurvatureError: it has failed on one of them.
            MemoryError: memory was short on one of them.
            WrongHessianError: it has failed in a way that waiting does not mend.
        """
        try:
            found = work()
        except Exception as error:
            if _SHARED in getattr(error, "__notes__", ()):
                raise
            self._averaged(like.fill_(math.nan), error)
            raise
        self._averaged(like.zero_(), None)
        return found

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the processes."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """The largest of every number over the processes."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def least(self, number: float) -> float:
        """The smallest over the processes."""
        return self._reduced([number], dist.ReduceOp.MIN)[0]

    def _reduced(self, numbers: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        # Not every accelerator has float64; these are flags, counts and seconds.
        values = torch.tensor(list(numbers), dtype=torch.float32, device=self._device)
        dist.all_reduce(values, op=operation)
        return [float(value) for value in values.tolist()]

    def _worst(self, error: Exception | None) -> float:
        return self.largest([_severity(error)])[0]

    def _raise(self, error: Exception | None) -> None:
        """Raise on all processes alike, whatever happened on this one."""
        worst = self._worst(error)
        told = str(error) if error is not None else "another process of the training failed; see its log"
        if error is not None and not isinstance(error, CurvatureError):
            told = f"{type(error).__name__}: {told}"
        kinds: dict[float, type[Exception]] = {_SHORT: MemoryError, _FOR_GOOD: WrongHessianError}
        shared = kinds.get(worst, CurvatureError)(told)
        shared.add_note(_SHARED)
        raise shared from error


def _severity(error: Exception | None) -> float:
    if error is None:
        return _FINE
    if is_out_of_memory(error):
        return _SHORT
    mends = isinstance(error, CurvatureError) and not isinstance(error, WrongHessianError)
    return _LATER if mends else _FOR_GOOD
