"""Orthonormal vectors of a Krylov space, kept in blocks of rows.

Blocks let the basis grow without being copied, shrink without being copied, and give memory back row
block by row block, so that no step of the solver holds more than the vectors that it needs. The first block
has room for what is wanted in the end, as one contiguous matrix.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from sgd_probe.curvature.aliased import CurvatureError
from sgd_probe.curvature.linear_algebra import Reduce, inner, whole

#: Rows of a block, but for the first.
BLOCK_ROWS = 8
#: Columns that are rotated at a time.
_CHUNK_COLUMNS = 8_192


class KrylovBasis:
    """A growing list of orthonormal vectors of one length.

    Args:
        like: any tensor of the dtype and device to work in.
        size: length of the vectors.
        first: rows of the first block.
        reduce: of vectors that are divided among processes, each of which has such a basis of its parts.

    Attributes:
        like: that tensor.
        reduce: that reduction.
    """

    def __init__(self, like: Tensor, size: int, first: int = BLOCK_ROWS, reduce: Reduce = whole) -> None:
        self.like = like
        self.reduce = reduce
        self._size = size
        self._first = first
        self._blocks: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        """The vector at an index, a view."""
        block, row = self._place(index)
        return self._blocks[block][row]

    def append(self, vector: Tensor, length: float = 1.0) -> None:
        """Add a vector of some length, as a unit vector; the caller has made it orthogonal to the others."""
        if self._count == self.rows_held:
            rows = BLOCK_ROWS if self._blocks else self._first
            self._blocks.append(self.like.new_empty((rows, self._size)))
        self._count += 1
        torch.div(vector, length, out=self[self._count - 1])

    def bring_forward(self, position: int, chosen: Sequence[int]) -> list[int]:
        """Exchange vectors so that the chosen ones, ascending, begin at a position at or before them.

        Returns:
            Where each vector was before.
        """
        order = list(range(self._count))
        for there, here in enumerate(chosen, start=position):
            if there != here:
                moved = self[there].clone()
                self[there].copy_(self[here])
                self[here].copy_(moved)
                order[there], order[here] = order[here], order[there]
        return order

    def orthogonalise(self, vector: Tensor, recurrence: bool = False) -> Tensor:
        """Take the components along the basis out of a vector, in place, twice for accuracy.

        Args:
            vector: shape (size,).
            recurrence: a three-term recurrence says that all components but the last two are rounding
                errors. Those two go first; what one pass over the whole basis then leaves is as small
                as what two passes leave.

        Returns:
            What was taken out: float64 on the CPU, shape (len(self),).

        Raises:
            CurvatureError: the vector is not finite, or its inner products overflow.
        """
        taken = torch.zeros(self._count, dtype=torch.float64)
        rows = self._rows()
        start = max(self._count - 2, 0) if recurrence else 0
        taken[start:] = _take_out(self._last(start) if recurrence else rows, vector, self.reduce)
        taken.add_(_take_out(rows, vector, self.reduce))
        # Every inf and nan of the vector is in every inner product: no look at the vector itself is needed.
        if not taken.isfinite().all():
            raise CurvatureError(
                "expected a finite product of the operator, found inf, nan or numbers too large for "
                f"{str(vector.dtype).removeprefix('torch.')}: is the training diverging?"
            )
        return taken

    def rotate(self, coefficients: Tensor) -> None:
        """Replace the vectors by combinations of them, in place, and forget the rest.

        Args:
            coefficients: shape (len(self), new count), orthonormal columns.
        """
        keep = coefficients.shape[1]
        turns = torch.split(coefficients.T.to(self.like), [len(rows) for rows in self._rows()], dim=1)
        for start in range(0, self._size, _CHUNK_COLUMNS):
            columns = slice(start, start + _CHUNK_COLUMNS)
            turned = _combination(turns, [rows[:, columns] for rows in self._rows()])
            for start_row, rows in zip(self._starts(), self._blocks, strict=True):
                part = turned[start_row : start_row + len(rows)]
                rows[: len(part), columns] = part
        self.truncate(keep)

    def truncate(self, count: int) -> None:
        """Forget all vectors but the first ``count``, with their memory."""
        self._count = min(count, self._count)
        del self._blocks[self._place(self._count - 1)[0] + 1 if self._count else 0 :]

    def combine(self, coefficients: Tensor) -> Tensor:
        """One combination of the vectors, shape (size,)."""
        total = self.like.new_zeros(self._size)
        parts = torch.split(coefficients.to(self.like), [len(rows) for rows in self._rows()])
        for rows, part in zip(self._rows(), parts, strict=True):
            total.addmv_(rows.T, part)
        return total

    def matrix(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The vectors, or some of them, as the rows of one contiguous matrix.

        A view where all of them lie in the first block, else a copy.
        """
        start, stop, _ = slice(start, stop).indices(self._count)
        if self._blocks and stop <= self._first:
            return self._blocks[0][start:stop]
        chosen = [self[index] for index in range(start, stop)]
        return torch.stack(chosen) if chosen else self.like.new_empty((0, self._size))

    def with_room(self, rows: int) -> Tensor:
        """The vectors, and behind them rows for others: one contiguous matrix, a view of the first block.

        Raises:
            ValueError: the first block is not as large.
        """
        if not self._blocks or self._count + rows > self._first:
            raise ValueError(
                f"expected a first block of {self._count + rows} rows, found one of {self._first}"
            )
        return self._blocks[0][: self._count + rows]

    @property
    def rows_held(self) -> int:
        """Vectors that memory is taken for."""
        return sum(map(len, self._blocks))

    def _place(self, index: int) -> tuple[int, int]:
        """Block and row of a vector."""
        if index < self._first:
            return 0, index
        block, row = divmod(index - self._first, BLOCK_ROWS)
        return block + 1, row

    def _starts(self) -> list[int]:
        """Index of the first vector of every block."""
        return [0] + [self._first + BLOCK_ROWS * block for block in range(len(self._blocks) - 1)]

    def _last(self, start: int) -> list[Tensor]:
        """The vectors from an index on: at most two."""
        (first, row), (last, end) = self._place(start), self._place(self._count - 1)
        if first == last:
            return [self._blocks[first][row : end + 1]]
        return [self[index].unsqueeze(0) for index in range(start, self._count)]

    def _rows(self) -> list[Tensor]:
        """The filled rows of every block."""
        return [
            rows[: self._count - start] for start, rows in zip(self._starts(), self._blocks, strict=False)
        ]


def _combination(turns: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Sum of the products of coefficients with rows, block by block."""
    total = turns[0] @ parts[0]
    for turn, rows in zip(turns[1:], parts[1:], strict=True):
        total.addmm_(turn, rows)
    return total


def measure_pass(like: Tensor, size: int) -> float:
    """Seconds to make one vector orthogonal to another: the fastest of a few."""
    rows, vector = like.new_zeros((2, size)), like.new_ones(size)
    fastest = math.inf
    for _ in range(3):
        started = time.perf_counter()
        _take_out([rows], vector, whole)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest / len(rows)


def _take_out(parts: list[Tensor], vector: Tensor, reduce: Reduce) -> Tensor:
    """Take the components along rows out of a vector, in place; returns them, float64 on the CPU."""
    if not parts:
        return torch.zeros(0, dtype=torch.float64)
    found = reduce(torch.cat([inner(rows, vector) for rows in parts]))
    for rows, components in zip(parts, torch.split(found, [len(rows) for rows in parts]), strict=True):
        vector.addmv_(rows.T, components.to(vector.dtype), alpha=-1.0)
    return found.cpu()
