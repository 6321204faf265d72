"""From gradients and weights of a step to a few numbers a mode.

A product of the basis with several vectors reads it once for all of them, and costs a fraction of as many
products with one. So a step's gradient and displacement are copied as the step passes, and a few steps are
projected together: the numbers are those of one at a time, and a bounded number of vectors waits for them.

With a scaling S all is in the coordinates ``y = S^-1 theta``: there the gradient is ``S g``.

Where processes hold a part of every weight each, a number is the sum of what each process reads off its part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

#: Steps that are projected together, at most, and the memory that they may take meanwhile.
MOST_STEPS, MOST_BYTES = 16, 2**28


@dataclass(frozen=True)
class Projection:
    """One step along k modes, each array of shape (k,).

    Attributes:
        gradient: v.g of the optimizer's gradient.
        displacement: v.(theta - theta_0).
        decay: v.W(theta - theta_0), W the weight decay of each weight.
        gradient_square: g.g, a single number.
        force: (Hv).(theta - theta_0) by two estimates of Hv, shape (2, k); zero for modes without.
    """

    gradient: Array
    displacement: Array
    decay: Array
    gradient_square: float
    force: Array

    @property
    def finite(self) -> bool:
        """Every number is finite."""
        return bool(np.isfinite(self.gradient).all() and np.isfinite(self.displacement).all())


def steps_together(vector_bytes: int, most: int = MOST_STEPS) -> int:
    """Steps that a projector may take before it projects them: two vectors wait for each.

    Args:
        vector_bytes: of a vector of weights.
        most: that there is room for, beside the bounds of this module.
    """
    steps = min(MOST_BYTES // (2 * max(vector_bytes, 1)), MOST_STEPS, most)
    # Products with a multiple of eight vectors are the fast ones.
    return max(steps - steps % 4 if steps > 4 else steps, 1)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class Projector:
    """Projects live parameters and their gradients on a basis; keeps theta_0 and the steps that wait.

    Args:
        rows: shape (k, size), contiguous rows over the flat layout of the parameters: the basis, and where
            there are more than ``modes`` two estimates of Hv for its last vectors, one after the other.
        parameters: the live parameters in that layout; never written to.
        scaling: the diagonal of S, shape (size,); None is the identity.
        preconditioned_decay: weight decay is part of what S scales twice, like the gradient.
        modes: vectors of the basis; all rows by default.
        origin: theta_0, shape (size,); the weights as they are by default.
        part: what this process holds of a parameter, or of its gradient.
        reduce: from float64 sums over this process's parts to sums over all.
        together: steps that are projected together; as many as pay by default.

    Attributes:
        origin: theta_0.
        together: that number.
    """

    def __init__(
        self,
        rows: Tensor,
        parameters: Sequence[Tensor],
        scaling: Tensor | None = None,
        preconditioned_decay: bool = False,
        modes: int | None = None,
        origin: Tensor | None = None,
        part: Callable[[Tensor], Tensor] = _itself,
        reduce: Callable[[Tensor], Tensor] = _itself,
        together: int | None = None,
    ) -> None:
        self._all, self._basis = rows, rows[:modes]
        self._part, self._reduce = part, reduce
        self._scaling = scaling
        self._preconditioned_decay = preconditioned_decay and scaling is not None
        self._parameters = list(parameters)
        self._shapes = [part(parameter).shape for parameter in parameters]
        self.together = together or steps_together(rows.shape[1] * rows.element_size())
        self._rows = rows.new_zeros((2, self.together, rows.shape[1]))
        # A step finds cold caches: all that can be had before is.
        self._places = [tuple(map(self._place, pair)) for pair in zip(*self._rows, strict=True)]
        self._squares: list[Tensor] = []
        self.origin = self._weights() if origin is None else origin

    @property
    def waiting(self) -> int:
        """Steps taken and not projected yet."""
        return len(self._squares)

    @property
    def full(self) -> bool:
        """The steps that wait must be projected before another is taken."""
        return self.waiting == self.together

    def decay_at_origin(self, decays: Sequence[float]) -> Array:
        """v.W theta_0 with one decay W per parameter, shape (k,)."""
        if not any(decays):
            return np.zeros(len(self._basis))
        origin = self.origin.clone() if self._scaling is None else self.origin / self._scaling
        return self._project(self._decay(origin[None], decays))

    def displacement(self) -> Array:
        """v.(theta - theta_0) of the weights as they are, shape (k,)."""
        return self._project(self._move(self._weights())[None])

    def norms(self) -> Array:
        """Norm of every parameter at theta_0 and as it is now, shape (2, parameters)."""
        then = torch.stack([piece.norm() for piece in _pieces(self.origin, self._shapes)])
        now = torch.stack([weights.detach().norm().to(then) for weights in self._parts()])
        # The root of a square is the number itself, to the bit.
        norms: Array = self._reduce(torch.stack([then, now]).double().square()).sqrt().cpu().numpy()
        return norms

    @torch.no_grad()
    def take(self) -> bool:
        """Copy value and ``grad`` of every parameter, as the step has left them.

        Returns:
            False where no parameter has a gradient: the step was skipped, and nothing of it waits.

        Raises:
            RuntimeError: no further step can wait.
        """
        if self.full:
            raise RuntimeError(f"expected `project` after every {self.together} steps, found one more step")
        gradients = [parameter.grad for parameter in self._parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        if not present:
            return False
        (row, views), (moved, moved_views) = self._places[self.waiting]
        if len(present) < len(gradients):
            row.zero_()
            views = [view for view, gradient in zip(views, gradients, strict=True) if gradient is not None]
        _copy(views, [self._part(gradient) for gradient in present])
        if self._scaling is not None:
            row.mul_(self._scaling)
        square = row.dot(row)  # while the caches hold it
        torch._foreach_copy_(moved_views, self._parts())
        self._move(moved)
        self._squares.append(square)
        return True

    def project(self, decays: Sequence[float]) -> list[Projection]:
        """The projections of the steps that wait, oldest first; after it none waits.

        Args:
            decays: coupled weight decay of each parameter, at all of these steps.
        """
        return self.complete(self.read(decays))

    @torch.no_grad()
    def read(self, decays: Sequence[float]) -> Tensor:
        """The same, as far as this process's parts go.

        Returns:
            Numbers for :meth:`complete`, float64, a row for every step.
        """
        if not self.waiting:
            return self.nothing()[:0]
        squares, self._squares = torch.stack(self._squares), []
        waiting, modes, moved = len(squares), len(self._basis), self._rows[1]
        # Rows that nothing waits in, too: their number must not change how the others are rounded. Images and
        # gradients meet for nothing, but one product of all with all takes less time than two.
        both = _products(self._all, self._rows.flatten(0, 1))
        gradient, moves = both[:modes, : self.together], both[:, self.together :]
        displacement, force = moves[:modes], moves[modes:]
        if len(set(decays)) == 1 and not (decays[0] and self._preconditioned_decay):
            decay = displacement * decays[0]
        else:
            decay = _products(self._basis, self._decay(moved, decays))
        numbers = torch.cat([gradient, displacement, decay, force])[:, :waiting]
        return torch.cat([squares[None], numbers]).double().T

    def nothing(self) -> Tensor:
        """What :meth:`read` would return of a step without gradients: one row of NaN."""
        width = 1 + 2 * len(self._basis) + len(self._all)
        return torch.full((1, width), torch.nan, dtype=torch.float64, device=self._basis.device)

    def complete(self, numbers: Tensor) -> list[Projection]:
        """What steps amount to; all their numbers take one reduction and one transfer from the device.

        Args:
            numbers: rows of :meth:`read` and :meth:`nothing`.
        """
        modes, images = len(self._basis), len(self._all) - len(self._basis)
        found = []
        for step in np.ascontiguousarray(self._reduce(numbers).cpu().numpy()):
            along, position, decayed = step[1 : 3 * modes + 1].reshape(3, modes)
            pulls = np.zeros((2, modes))
            if images:
                pulls[:, modes - images // 2 :] = step[3 * modes + 1 :].reshape(2, -1)
            found.append(Projection(along, position, decayed, float(step[0]), pulls))
        return found

    def rows(self) -> Tensor:
        """Gradients and displacements of the steps that wait, copied, shape (2, waiting, size)."""
        return self._rows[:, : self.waiting].clone()

    def restore(self, rows: Tensor) -> None:
        """Let the steps of another projector's :meth:`rows` wait."""
        count = rows.shape[1]
        self._rows[:, :count] = rows
        self._squares = [row.dot(row) for row in self._rows[0, :count]]

    @torch.no_grad()
    def _weights(self) -> Tensor:
        """A copy of the weights as they are, flat."""
        flat = torch.empty_like(self._basis[0])
        torch._foreach_copy_(self._shaped(flat), self._parts())
        return flat

    def _parts(self) -> list[Tensor]:
        return [self._part(parameter) for parameter in self._parameters]

    def _place(self, row: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A flat vector, and the same as views in the parameters' shapes."""
        return row, self._shaped(row)

    def _shaped(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat vector in the parameters' shapes."""
        pieces = _pieces(flat, self._shapes)
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def _move(self, weights: Tensor) -> Tensor:
        """Turn flat weights into the displacement from theta_0, in place."""
        weights.sub_(self.origin)
        return weights if self._scaling is None else weights.div_(self._scaling)

    def _decay(self, rows: Tensor, decays: Sequence[float]) -> Tensor:
        """Multiply rows, shape (n, size), by the decay of each weight, in place."""
        if self._preconditioned_decay and self._scaling is not None:
            rows.mul_(self._scaling).mul_(self._scaling)
        for columns, decay in zip(_pieces(rows.T, self._shapes), decays, strict=True):
            columns.mul_(decay)
        return rows

    def _project(self, row: Tensor) -> Array:
        numbers: Array = self._reduce(_products(self._basis, row)[:, 0].double()).cpu().numpy()
        return numbers


@torch.no_grad()
def _products(matrix: Tensor, rows: Tensor) -> Tensor:
    """Products of the rows of a matrix with other rows, in full precision whatever the user is content with.

    Autocast would round both. Of float32 a product of two matrices may keep a few digits only, where the user
    allows it; a product with one vector keeps all.
    """
    kind = matrix.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _products(matrix, rows)
    if matrix.dtype == torch.float32 and not _full_precision():
        return torch.stack([torch.mv(matrix, row) for row in rows], dim=1)
    return matrix @ rows.T


def _full_precision() -> bool:
    """Products of float32 matrices are in float32."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set for one backend alone, and nobody can say what holds
        return False


def _copy(views: list[Tensor], tensors: list[Tensor]) -> None:
    """Copy tensors into views of their shapes."""
    try:
        torch._foreach_copy_(views, tensors)
    except RuntimeError:
        # Embeddings may have sparse gradients. To ask every tensor first would take longer than to copy all.
        dense = [tensor.to_dense() if tensor.is_sparse else tensor for tensor in tensors]
        torch._foreach_copy_(views, dense)


def _pieces(vector: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of a flat vector, or of the rows of a matrix like one, one per shape."""
    ends = np.cumsum([shape.numel() for shape in shapes]).tolist()
    return [vector[start:end] for start, end in zip([0, *ends], ends, strict=False)]
