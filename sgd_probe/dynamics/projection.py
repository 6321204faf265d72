"""From gradients and weights of a step to a few numbers a mode, without keeping anything of the step.

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


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class Projector:
    """Projects live parameters and their gradients on a basis; keeps theta_0 and one vector to work in.

    Args:
        basis: shape (k, size), contiguous rows over the flat layout of the parameters.
        parameters: the live parameters in that layout; never written to.
        scaling: the diagonal of S, shape (size,); None is the identity.
        preconditioned_decay: weight decay is part of what S scales twice, like the gradient.
        images: two estimates of Hv for the last rows of the basis, shape (2, rows, size).
        origin: theta_0, shape (size,); the weights as they are by default.
        part: what this process holds of a parameter, or of its gradient.
        reduce: from float64 sums over this process's parts to sums over all.

    Attributes:
        origin: theta_0.
    """

    def __init__(
        self,
        basis: Tensor,
        parameters: Sequence[Tensor],
        scaling: Tensor | None = None,
        preconditioned_decay: bool = False,
        images: Tensor | None = None,
        origin: Tensor | None = None,
        part: Callable[[Tensor], Tensor] = _itself,
        reduce: Callable[[Tensor], Tensor] = _itself,
    ) -> None:
        self._basis = basis
        self._part, self._reduce = part, reduce
        self._scaling = scaling
        self._preconditioned_decay = preconditioned_decay and scaling is not None
        self._images = None if images is None else images.flatten(0, 1)
        self._parameters = list(parameters)
        self._work = torch.zeros(basis.shape[1], dtype=basis.dtype, device=basis.device)
        weights = self._weights()
        self._views = [
            piece.view(weight.shape)
            for piece, weight in zip(_pieces(self._work, weights), weights, strict=True)
        ]
        self.origin = self._flat(weights).clone() if origin is None else origin

    def decay_at_origin(self, decays: Sequence[float]) -> Array:
        """v.W theta_0 with one decay W per parameter, shape (k,)."""
        if not any(decays):
            return np.zeros(len(self._basis))
        origin = self.origin if self._scaling is None else self.origin / self._scaling
        return self._project(self._decayed(origin, decays))

    def displacement(self) -> Array:
        """v.(theta - theta_0) of the weights as they are, shape (k,)."""
        return self._project(self._moved())

    def norms(self) -> Array:
        """Norm of every parameter at theta_0 and as it is now, shape (2, parameters)."""
        weights = self._weights()
        then = torch.stack([piece.norm() for piece in _pieces(self.origin, weights)])
        now = torch.stack([weight.detach().norm().to(then) for weight in weights])
        # The root of a square is the number itself, to the bit.
        norms: Array = self._reduce(torch.stack([then, now]).double().square()).sqrt().cpu().numpy()
        return norms

    def project(self, decays: Sequence[float]) -> Projection | None:
        """Read value and ``grad`` of every parameter.

        Args:
            decays: coupled weight decay of each parameter.

        Returns:
            The projections, or None where no parameter has a gradient: the step was skipped.
        """
        numbers = self.read(decays)
        return None if numbers is None else self.complete([numbers])[0]

    def read(self, decays: Sequence[float]) -> Tensor | None:
        """The same, as far as this process's parts go: float64 numbers for :meth:`complete`."""
        gradients = [_dense(parameter.grad) for parameter in self._parameters]
        if all(gradient is None for gradient in gradients):
            return None
        flat = self._flat([None if gradient is None else self._part(gradient) for gradient in gradients])
        if self._scaling is not None:
            flat.mul_(self._scaling)
        gradient, square = self._basis @ flat, flat @ flat
        moved = self._moved()
        displacement = self._basis @ moved
        if len(set(decays)) == 1 and not (decays[0] and self._preconditioned_decay):
            decay = displacement * decays[0]
        else:
            decay = self._basis @ self._decayed(moved, decays)
        force = moved.new_empty(0) if self._images is None else self._images @ moved
        return torch.cat([square[None], gradient, displacement, decay, force]).double()

    def complete(self, steps: Sequence[Tensor | None]) -> list[Projection]:
        """What several steps amount to; all their numbers take one reduction and one transfer.

        Args:
            steps: what :meth:`read` has returned; None makes a projection of NaN.
        """
        modes, images = len(self._basis), 0 if self._images is None else len(self._images)
        nothing = torch.full(
            (1 + 3 * modes + images,), torch.nan, dtype=torch.float64, device=self._basis.device
        )
        rows = torch.stack([nothing if numbers is None else numbers for numbers in steps])
        found = []
        for numbers in self._reduce(rows).cpu().numpy():
            along, position, decayed = numbers[1 : 3 * modes + 1].reshape(3, modes)
            pulls = np.zeros((2, modes))
            if images:
                pulls[:, modes - images // 2 :] = numbers[3 * modes + 1 :].reshape(2, -1)
            found.append(Projection(along, position, decayed, float(numbers[0]), pulls))
        return found

    def _weights(self) -> list[Tensor]:
        return [self._part(parameter) for parameter in self._parameters]

    def _moved(self) -> Tensor:
        moved = self._flat(self._weights()).sub_(self.origin)
        return moved if self._scaling is None else moved.div_(self._scaling)

    @torch.no_grad()
    def _flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Lay tensors out in the working vector; None reads as zeros."""
        if any(tensor is None for tensor in tensors):
            self._work.zero_()
        pairs = [(view, t) for view, t in zip(self._views, tensors, strict=True) if t is not None]
        views, present = zip(*pairs, strict=True)
        torch._foreach_copy_(list(views), list(present))
        return self._work

    def _decayed(self, vector: Tensor, decays: Sequence[float]) -> Tensor:
        scaled = vector.clone()
        if self._preconditioned_decay and self._scaling is not None:
            scaled.mul_(self._scaling).mul_(self._scaling)
        for piece, decay in zip(_pieces(scaled, self._views), decays, strict=True):
            piece.mul_(decay)
        return scaled

    def _project(self, vector: Tensor) -> Array:
        numbers: Array = self._reduce((self._basis @ vector).double()).cpu().numpy()
        return numbers


def _dense(gradient: Tensor | None) -> Tensor | None:
    """Embeddings may have sparse gradients."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def _pieces(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat vector, one per tensor."""
    ends = np.cumsum([tensor.numel() for tensor in tensors]).tolist()
    return [vector[start:end] for start, end in zip([0, *ends], ends, strict=False)]
