"""Inner products that stay accurate in float32 at any length."""

from __future__ import annotations

import torch
from torch import Tensor

#: Products are summed in the vectors' own precision over pieces of this length, then in float64. A CPU
#: adds one by one, so that its error grows with the length; a device adds in trees and needs few calls.
CHUNK = 16_384
DEVICE_CHUNK = 1_048_576


def inner(rows: Tensor, vector: Tensor) -> Tensor:
    """Inner product of every row with a vector, accumulated in float64.

    A float32 sum over millions of terms loses half of its digits; summing short pieces in float64
    costs nothing beside reading the rows, and keeps a Krylov basis a hundred times more orthogonal.

    Args:
        rows: shape (k, size).
        vector: shape (size,).

    Returns:
        float64, shape (k,).
    """
    length = _chunk(vector)
    if len(vector) <= length:
        return (rows @ vector).double()
    total = torch.zeros(len(rows), dtype=torch.float64, device=vector.device)
    for piece, part in zip(torch.split(rows, length, dim=1), torch.split(vector, length), strict=True):
        total += piece @ part
    return total


def dot(one: Tensor, other: Tensor) -> float:
    """Inner product of two vectors, accumulated in float64."""
    return float(inner(one.unsqueeze(0), other))


def gram(rows: Tensor) -> Tensor:
    """Inner products of all rows with each other, accumulated in float64.

    Args:
        rows: shape (k, size).

    Returns:
        float64, shape (k, k).
    """
    total = torch.zeros((len(rows), len(rows)), dtype=torch.float64, device=rows.device)
    for piece in torch.split(rows, _chunk(rows), dim=1):
        total += piece @ piece.T
    return total


def norm(vector: Tensor) -> float:
    """Euclidean norm, accumulated in float64."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def random_unit(size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector, drawn on the CPU so that it is the same on every device."""
    vector = torch.randn(size, generator=generator, dtype=torch.float32).to(like)
    return vector.div_(norm(vector))


def orthogonality(rows: Tensor) -> float:
    """Largest |v_i . v_j| of two different unit rows; 0 for fewer than two."""
    if len(rows) < 2:
        return 0.0
    products = gram(rows)
    return float((products - torch.diag(products.diagonal())).abs().max())


def _chunk(tensor: Tensor) -> int:
    return CHUNK if tensor.device.type == "cpu" else DEVICE_CHUNK
