"""From gradients and weights of a step to k numbers a mode, without keeping anything of the step."""

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
        decay: v.W(theta - theta_0), W the coupled weight decay of each weight.
        gradient_square: g.g, a single number.
    """

    gradient: Array
    displacement: Array
    decay: Array
    gradient_square: float

    @property
    def finite(self) -> bool:
        """Every number is finite."""
        return bool(np.isfinite(self.gradient).all() and np.isfinite(self.displacement).all())


class Projector:
    """Projects live parameters and their gradients on a basis; keeps theta_0 and one vector to work in.

    Args:
        basis: shape (k, size), contiguous rows over the flat layout of the parameters.
        parameters: the live parameters in that layout; never written to.
    """

    def __init__(self, basis: Tensor, parameters: Sequence[Tensor]) -> None:
        self._basis = basis
        self._parameters = list(parameters)
        self._work = torch.zeros(basis.shape[1], dtype=basis.dtype, device=basis.device)
        self._views = [
            piece.view(parameter.shape)
            for piece, parameter in zip(_pieces(self._work, parameters), parameters, strict=True)
        ]
        self._origin = self._flat(self._parameters).clone()

    def decay_at_origin(self, decays: Sequence[float]) -> Array:
        """v.W theta_0 with one decay W per parameter, shape (k,)."""
        if not any(decays):
            return np.zeros(len(self._basis))
        return self._project(self._decayed(self._origin, decays))

    def displacement(self) -> Array:
        """v.(theta - theta_0) of the weights as they are, shape (k,)."""
        return self._project(self._flat(self._parameters).sub_(self._origin))

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
        gradient, square = self._basis @ flat, flat @ flat
        moved = self._flat(self._parameters).sub_(self._origin)
        displacement = self._basis @ moved
        if len(set(decays)) == 1:
            decay = displacement * decays[0]
        else:
            decay = self._basis @ self._decayed(moved, decays)
        # One transfer from the device for all the numbers of a step.
        numbers = torch.cat([gradient, displacement, decay, square[None]]).double().cpu().numpy()
        gradient_row, displacement_row, decay_row = numbers[:-1].reshape(3, -1)
        return Projection(gradient_row, displacement_row, decay_row, float(numbers[-1]))

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
