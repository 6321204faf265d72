"""Inner products that stay accurate in float32 at any length.

Where processes hold a part of every vector each, a product is the sum over all of them: ``reduce`` turns the
float64 sums over this process's parts into those over all. Where vectors are whole it does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

#: From sums over this process's part of some vectors, float64, to sums over the whole of them.
Reduce: TypeAlias = Callable[[Tensor], Tensor]

#: Products are summed in the vectors' own precision over pieces of this length, then in float64. A CPU
#: adds one by one, so that its error grows with the length; a device adds in trees and needs few calls.
CHUNK = 16_384
DEVICE_CHUNK = 1_048_576


def whole(sums: Tensor) -> Tensor:
    """The reduction of vectors that are not divided."""
    return sums


def inner(rows: Tensor, vector: Tensor, reduce: Reduce = whole) -> Tensor:
    """Inner product of every row with a vector, accumulated in float64.

    A float32 sum over millions of terms loses half of its digits; summing short pieces in float64
    costs nothing beside reading the rows, and keeps a Krylov basis a hundred times more orthogonal.

    Args:
        rows: shape (k, size).
        vector: shape (size,).
        reduce: of vectors that are divided.

    Returns:
        float64, shape (k,).
    """
    length = _chunk(vector)
    pieces = zip(torch.split(rows, length, dim=1), torch.split(vector, length), strict=True)
    return reduce(torch.stack([piece @ part for piece, part in pieces]).sum(dim=0, dtype=torch.float64))


def dot(one: Tensor, other: Tensor, reduce: Reduce = whole) -> float:
    """Inner product of two vectors, accumulated in float64."""
    return float(inner(one.unsqueeze(0), other, reduce))


def gram(rows: Tensor, reduce: Reduce = whole) -> Tensor:
    """Inner products of all rows with each other, accumulated in float64.

    Args:
        rows: shape (k, size).
        reduce: of vectors that are divided.

    Returns:
        float64, shape (k, k).
    """
    total = torch.zeros((len(rows), len(rows)), dtype=torch.float64, device=rows.device)
    for piece in torch.split(rows, _chunk(rows), dim=1):
        total += piece @ piece.T
    return reduce(total)


def norm(vector: Tensor, reduce: Reduce = whole) -> float:
    """Euclidean norm, accumulated in float64."""
    length = torch.linalg.vector_norm(vector, dtype=torch.float64)
    if reduce is whole:
        return float(length)
    return math.sqrt(float(reduce(length.square())))


def dimension(size: int, reduce: Reduce = whole) -> int:
    """Length of whole vectors, from that of this process's part."""
    return round(float(reduce(torch.tensor(float(size), dtype=torch.float64))))


def random_unit(size: int, like: Tensor, generator: torch.Generator, reduce: Reduce = whole) -> Tensor:
    """A random unit vector, drawn on the CPU so that it is the same on every device.

    Where vectors are divided, each process needs a generator of another seed.
    """
    vector = torch.randn(size, generator=generator, dtype=torch.float32).to(like)
    return vector.div_(norm(vector, reduce))


def orthogonality(rows: Tensor, reduce: Reduce = whole) -> float:
    """Largest |v_i . v_j| of two different unit rows; 0 for fewer than two."""
    if len(rows) < 2:
        return 0.0
    products = gram(rows, reduce)
    return float((products - torch.diag(products.diagonal())).abs().max())


def _chunk(tensor: Tensor) -> int:
    return CHUNK if tensor.device.type == "cpu" else DEVICE_CHUNK
