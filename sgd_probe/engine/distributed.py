"""Several processes that train one model: reductions that no failure can hang.

Every process calls the same things in the same order, within :meth:`Processes.shared`. There every reduction
begins with a meeting: one number says how bad it is. A process that fails, wherever it is, goes to the next
meeting and says so; the others are there, or come, and all raise together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sgd_probe.curvature.hessian import CurvatureError, WrongHessianError
from sgd_probe.curvature.memory import is_out_of_memory

_T = TypeVar("_T")
#: How bad it is: nothing, worth another try later, or with less memory, for good.
_FINE, _LATER, _SHORT, _FOR_GOOD = 0.0, 1.0, 2.0, 3.0


class Processes:
    """The processes of a training, by their default group.

    Args:
        device: of what is reduced.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._told: Exception | None = None
        self.size = dist.get_world_size()
        self.rank = dist.get_rank()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """What fails in the body on one process fails on all: at their next reduction, or where it ends.

        Nothing may be caught within the body that only some of the processes meet with.

        Raises:
            CurvatureError: it has failed on one of them.
            MemoryError: memory was short on one of them.
            WrongHessianError: it has failed in a way that waiting does not mend.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as failure:
            if failure is self._told:  # all raise it, by now or soon
                raise
            error = failure
        self._meet(error)

    def together(self, work: Callable[[], _T]) -> _T:
        """Work that each process does for itself, and that must succeed on all.

        Raises:
            CurvatureError: it has failed on one of them.
            MemoryError: memory was short on one of them.
            WrongHessianError: it has failed in a way that waiting does not mend.
        """
        with self.shared():
            return work()

    def mean(self, work: Callable[[], Tensor]) -> Tensor:
        """Mean over the processes of what each computes: the same bits on all.

        Args:
            work: on this process; its tensor is ours to change.

        Raises:
            CurvatureError: the work has failed on one of them, or its result is not finite.
            WrongHessianError: it has failed in a way that waiting does not mend.
        """
        value = self.together(work)
        dist.all_reduce(value)
        value.div_(self.size)
        if not math.isfinite(float(value.sum())) and not bool(torch.isfinite(value).all()):
            self._told = CurvatureError("expected finite values on all processes, found inf or nan")
            raise self._told
        return value

    def sums(self, parts: Tensor) -> Tensor:
        """Sums over the processes of a few numbers each, of the same shape and device: the same bits on all.

        Raises:
            CurvatureError: another process has failed.
        """
        self._meet()
        numbers = parts.to(self._device, copy=True)
        dist.all_reduce(numbers)
        return numbers.to(parts.device)

    def gathered(self, numbers: Tensor) -> Tensor:
        """A few numbers of every process, in the order of their ranks: shape (processes, *shape).

        Raises:
            CurvatureError: another process has failed.
        """
        own = torch.zeros((self.size, *numbers.shape), dtype=numbers.dtype, device=numbers.device)
        own[self.rank] = numbers
        return self.sums(own)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the processes."""
        self._meet()
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """The largest of every number over the processes."""
        self._meet()
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def least(self, number: float) -> float:
        """The smallest over the processes."""
        self._meet()
        return self._reduced([number], dist.ReduceOp.MIN)[0]

    def any(self, *flags: bool) -> list[bool]:
        """Which of the flags some process has raised. The one meeting outside of :meth:`shared`."""
        return [bool(flag) for flag in self._reduced([float(f) for f in flags], dist.ReduceOp.MAX)]

    def _reduced(self, numbers: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        # Not every accelerator has float64; these are flags, counts and seconds.
        values = torch.tensor(list(numbers), dtype=torch.float32, device=self._device)
        dist.all_reduce(values, op=operation)
        return [float(value) for value in values.tolist()]

    def _meet(self, error: Exception | None = None) -> None:
        """Raise on all processes alike where one has failed, whatever happened on this one."""
        worst = self._reduced([_severity(error)], dist.ReduceOp.MAX)[0]
        if worst == _FINE:
            return
        told = str(error) if error is not None else "another process of the training failed; see its log"
        if error is not None and not isinstance(error, CurvatureError):
            told = f"{type(error).__name__}: {told}"
        kinds: dict[float, type[Exception]] = {_SHORT: MemoryError, _FOR_GOOD: WrongHessianError}
        self._told = kinds.get(worst, CurvatureError)(told)
        raise self._told from error


def _severity(error: Exception | None) -> float:
    if error is None:
        return _FINE
    if is_out_of_memory(error):
        return _SHORT
    mends = isinstance(error, CurvatureError) and not isinstance(error, WrongHessianError)
    return _LATER if mends else _FOR_GOOD
