"""Inner products that stay accurate in float32 at any length."""

from __future__ import annotations

import torch
from torch import Tensor

#: Products are summed in the vectors' own precision over chunks of this length, then in float64.
CHUNK = 65_536


def inner(rows: Tensor, vector: Tensor) -> Tensor:
    """Inner product of every row with a vector, accumulated in float64.

    A float32 sum over millions of terms loses half of its digits; summing chunks in float64 costs
    nothing beside reading the rows, and keeps a Krylov basis a hundred times more orthogonal.

    Args:
        rows: shape (k, size).
        vector: shape (size,).

    Returns:
        float64, shape (k,).
    """
    whole = vector.numel() // CHUNK * CHUNK
    total = (rows[:, whole:] @ vector[whole:]).double()
    if whole:
        blocks = rows[:, :whole].reshape(len(rows), whole // CHUNK, CHUNK).transpose(0, 1)
        total += (blocks @ vector[:whole].view(-1, CHUNK, 1)).squeeze(-1).double().sum(0)
    return total


def norm(vector: Tensor) -> float:
    """Euclidean norm, accumulated in float64."""
    return float(inner(vector.unsqueeze(0), vector).sqrt())


def orthogonalise(vector: Tensor, rows: Tensor, coefficients: Tensor | None = None) -> None:
    """Take the components along orthonormal rows out of a vector, in place, twice for accuracy.

    Args:
        vector: shape (size,), changed in place.
        rows: shape (k, size), orthonormal.
        coefficients: float64 of shape (k,), to which the components taken out are added.
    """
    for _ in range(2):
        found = inner(rows, vector)
        vector.addmv_(rows.T, found.to(vector.dtype), alpha=-1.0)
        if coefficients is not None:
            coefficients += found


def random_unit(size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector, drawn on the CPU so that it is the same on every device."""
    vector = torch.randn(size, generator=generator, dtype=torch.float32).to(like)
    return vector.div_(norm(vector))
