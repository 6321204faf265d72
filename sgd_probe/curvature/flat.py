"""Near-flat directions: minimisers of ``||Hv||`` in small Krylov spaces of their own.

Krylov methods do not converge inside the bulk, so these are directions, not eigenvectors. What
counts is how little the Hessian does to them: a small share of stiff eigenvectors in a direction
carries most of its motion, and ``||Hv||`` sees it where ``v.Hv`` does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sgd_probe.curvature.lanczos import LinearOperator
from sgd_probe.curvature.linear_algebra import norm, orthogonalise, random_unit


@dataclass(frozen=True)
class FlatResult:
    """Near-flat directions.

    Attributes:
        vectors: orthonormal rows, shape (k, size); fewer than asked for in a small space.
        rayleigh_quotients: v.Hv on the operator's own samples, float64, shape (k,).
        product_norms: ``||Hv||`` on the operator's own samples, float64, shape (k,).
        products: matrix-vector products used.
    """

    vectors: Tensor
    rayleigh_quotients: Tensor
    product_norms: Tensor
    products: int


def flat_directions(
    operator: LinearOperator,
    count: int,
    top: Tensor,
    *,
    dimension: int = 10,
    generator: torch.Generator | None = None,
    on_product: Callable[[int], None] | None = None,
) -> FlatResult:
    """Find directions that the Hessian hardly moves, orthogonal to the top modes and to each other.

    Args:
        operator: symmetric.
        count: number of directions.
        top: orthonormal rows to stay away from, shape (k, size).
        dimension: Krylov dimension, the products spent on each direction.
        generator: source of random vectors (CPU).
        on_product: called with the number of products so far, for progress.
    """
    generator = generator or torch.Generator().manual_seed(0)
    taken = top
    quotients: list[float] = []
    norms: list[float] = []
    products = 0
    for _ in range(count):
        free = operator.size - len(taken)
        if free < 1:
            break
        direction, quotient, length, used = _minimiser(operator, taken, min(dimension, free), generator)
        products += used
        if on_product is not None:
            on_product(products)
        taken = torch.cat([taken, direction.unsqueeze(0)])
        quotients.append(quotient)
        norms.append(length)
    return FlatResult(
        vectors=taken[len(top) :],
        rayleigh_quotients=torch.tensor(quotients, dtype=torch.float64),
        product_norms=torch.tensor(norms, dtype=torch.float64),
        products=products,
    )


def _minimiser(
    operator: LinearOperator, taken: Tensor, dimension: int, generator: torch.Generator
) -> tuple[Tensor, float, float, int]:
    """The unit vector of smallest ``||Hv||`` in one Krylov space outside the rows of ``taken``.

    ``H Q`` is held in full (its part along ``taken`` too), as a small matrix of coefficients: in the
    orthonormal frame of Q's vectors, the next one, and ``taken``.
    """
    size = operator.size
    basis = torch.empty((dimension + 1, size), dtype=taken.dtype, device=taken.device)
    inside = torch.zeros((dimension + 1, dimension), dtype=torch.float64)
    outside = torch.zeros((len(taken), dimension), dtype=torch.float64)
    vector = random_unit(size, taken, generator)
    orthogonalise(vector, taken)
    basis[0] = vector / norm(vector)
    used = 0
    for step in range(dimension):
        product = operator.matvec(basis[step])
        used = step + 1
        along = torch.zeros(len(taken), dtype=torch.float64, device=taken.device)
        column = torch.zeros(used, dtype=torch.float64, device=taken.device)
        orthogonalise(product, taken, along)
        orthogonalise(product, basis[:used], column)
        outside[:, step], inside[:used, step] = along.cpu(), column.cpu()
        rest = norm(product)
        scale = float(inside.abs().max())
        if rest <= 10 * torch.finfo(taken.dtype).eps * scale or used == size - len(taken):
            break
        inside[used, step] = rest
        basis[used] = product / rest
    image = torch.cat([inside[: used + 1, :used], outside[:, :used]])
    _, singular, right = torch.linalg.svd(image, full_matrices=False)
    weights = right[-1]
    direction = weights.to(taken) @ basis[:used]
    orthogonalise(direction, taken)
    quotient = float(weights @ inside[:used, :used] @ weights)
    return direction / norm(direction), quotient, float(singular[-1]), used
