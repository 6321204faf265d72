"""From gradients and weights of a step to a few numbers a mode, without keeping anything of the step.

With a scaling S all is in the coordinates ``y = S^-1 theta``: there the gradient is ``S g``.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Projector:
    """Projects live parameters and their gradients on a basis; keeps theta_0 and one vector to work in.

    Args:
        basis: shape (k, size), contiguous rows over the flat layout of the parameters.
        parameters: the live parameters in that layout; never written to.
        scaling: the diagonal of S, shape (size,); None is the identity.
        preconditioned_decay: weight decay is part of what S scales twice, like the gradient.
        images: two estimates of Hv for the last rows of the basis, shape (2, rows, size).
        origin: theta_0, shape (size,); the weights as they are by default.

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
    ) -> None:
        self._basis = basis
        self._scaling = scaling
        self._preconditioned_decay = preconditioned_decay and scaling is not None
        self._images = None if images is None else images.flatten(0, 1)
        self._parameters = list(parameters)
        self._work = torch.zeros(basis.shape[1], dtype=basis.dtype, device=basis.device)
        self._views = [
            piece.view(parameter.shape)
            for piece, parameter in zip(_pieces(self._work, parameters), parameters, strict=True)
        ]
        self.origin = self._flat(self._parameters).clone() if origin is None else origin

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
        then = torch.stack([piece.norm() for piece in _pieces(self.origin, self._parameters)])
        now = torch.stack([parameter.detach().norm().to(then) for parameter in self._parameters])
        norms: Array = torch.stack([then, now]).double().cpu().numpy()
        return norms

    def project(self, decays: Sequence[float]) -> Projection | None:
        """Read value and ``grad`` of every parameter.

        Args:
            decays: coupled weight decay of each parameter.

        Returns:
            The projections, or None where no parameter has a gradient: the step was skipped.
        """
        gradients = [_dense(parameter.grad) for parameter in self._parameters]
        if all(gradient is None for gradient in gradients):
            return None
        flat = self._flat(gradients)
        if self._scaling is not None:
            flat.mul_(self._scaling)
        gradient, square = self._basis @ flat, flat @ flat
        moved = self._moved()
        displacement = self._basis @ moved
        if len(set(decays)) == 1 and not (decays[0] and self._preconditioned_decay):
            decay = displacement * decays[0]
        else:
            decay = self._basis @ self._decayed(moved, decays)
        images = self._images
        force = moved.new_empty(0) if images is None else images @ moved
        # One transfer from the device for all the numbers of a step.
        numbers = torch.cat([square[None], gradient, displacement, decay, force]).double().cpu().numpy()
        modes = len(self._basis)
        along, position, decayed = numbers[1 : 3 * modes + 1].reshape(3, modes)
        pulls = np.zeros((2, modes))
        if images is not None:
            pulls[:, modes - len(images) // 2 :] = numbers[3 * modes + 1 :].reshape(2, -1)
        return Projection(along, position, decayed, float(numbers[0]), pulls)

    def _moved(self) -> Tensor:
        moved = self._flat(self._parameters).sub_(self.origin)
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
        for piece, decay in zip(_pieces(scaled, self._parameters), decays, strict=True):
            piece.mul_(decay)
        return scaled

    def _project(self, vector: Tensor) -> Array:
        numbers: Array = (self._basis @ vector).double().cpu().numpy()
        return numbers


def _dense(gradient: Tensor | None) -> Tensor | None:
    """Embeddings may have sparse gradients."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def _pieces(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat vector, one per tensor."""
    ends = np.cumsum([tensor.numel() for tensor in tensors]).tolist()
    return [vector[start:end] for start, end in zip([0, *ends], ends, strict=False)]
