"""Lanczos with full reorthogonalisation for the eigenvalues of largest magnitude.

The stop looks at two pairs more than were asked for and at values that stand still twice: residuals
alone stop on a wrong set, all small before the last outlier has appeared. What no stop sees from one
starting vector are the further copies of an exactly multiple eigenvalue; those appear late, if at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sgd_probe.curvature.linear_algebra import inner, norm, orthogonalise, random_unit

#: Share of noise in a given first vector: one that is orthogonal to an eigenvector never finds it.
_NOISE = 0.1


class LinearOperator(Protocol):
    """A symmetric operator on vectors of one length."""

    @property
    def size(self) -> int: ...

    def matvec(self, vector: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LanczosResult:
    """Eigenpairs of largest |eigenvalue|, in descending order of it.

    Attributes:
        eigenvalues: float64, shape (k,).
        vectors: orthonormal rows, shape (k, size).
        residuals: ``||Hv - lambda v|| / |lambda_1|`` per pair, float64, shape (k,).
        orthogonality: largest |v_i . v_j| of two different rows.
        products: matrix-vector products used.
        converged: every pair reached the tolerance and the set was stable.
        message: why it stopped.
    """

    eigenvalues: Tensor
    vectors: Tensor
    residuals: Tensor
    orthogonality: float
    products: int
    converged: bool
    message: str


def lanczos(
    operator: LinearOperator,
    count: int,
    like: Tensor,
    *,
    tolerance: float = 1e-2,
    max_products: int | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_product: Callable[[int], None] | None = None,
) -> LanczosResult:
    """Find the eigenpairs of largest |eigenvalue| at both ends of the spectrum.

    Args:
        operator: symmetric.
        count: number of pairs; fewer are returned where the space is smaller.
        like: any tensor of the dtype and device to work in.
        tolerance: bound on ``||Hv - lambda v|| / |lambda_1|``.
        max_products: products after which it gives up, and says so; default ``3 * count + 40``.
        start: first vector (the sum of an earlier basis, say), to which noise is added; random if None.
        generator: source of random vectors (CPU).
        on_product: called with the number of products so far, for progress.

    Returns:
        The pairs found, converged or not: look at ``residuals`` and ``message``.
    """
    size = operator.size
    generator = generator or torch.Generator().manual_seed(0)
    count = min(count, size)
    limit = min(max_products or 3 * count + 40, size)
    basis = torch.empty((limit + 1, size), dtype=like.dtype, device=like.device)
    projected = torch.zeros((limit, limit), dtype=torch.float64)  # the basis' own H, built column by column
    basis[0] = random_unit(size, like, generator)
    if start is not None:
        basis[0].mul_(_NOISE * norm(start)).add_(start.to(like))
        basis[0] /= norm(basis[0])

    negligible = max(10 * torch.finfo(like.dtype).eps, 1e-3 * tolerance)
    previous: Tensor | None = None
    scale, done, chain, still, message = 0.0, 0, 0, 0, f"stopped at the limit of {limit} products"
    values, vectors, errors = projected.new_zeros(0), projected.new_zeros((0, 0)), projected.new_zeros(0)
    for step in range(limit):
        product = operator.matvec(basis[step])
        done, chain = step + 1, chain + 1
        if on_product is not None:
            on_product(done)
        column = torch.zeros(done, dtype=torch.float64, device=like.device)
        orthogonalise(product, basis[:done], column)
        projected[:done, step] = projected[step, :done] = column.cpu()
        coupling = norm(product)
        scale = max(scale, float(column.abs().max()), coupling)
        exhausted = done == size
        # An invariant space has zero residuals whatever it misses: look into its complement first. All of
        # that is known when a random vector of it turns out to be an eigenvector.
        looked = chain > count + 2
        if coupling <= negligible * scale or exhausted:
            # The space so far is invariant: go on in its complement, uncoupled from it.
            looked = chain == 1
            coupling, chain = 0.0, 0
            product = random_unit(size, like, generator)
            orthogonalise(product, basis[:done])
        if not exhausted:
            basis[done] = product / norm(product)
        values, vectors, errors = _ritz(projected[:done, :done], coupling)
        if exhausted:
            message = "the basis spans the whole space"
            break
        wanted = count + 2
        if done >= wanted + 1:
            largest = values.abs()[:wanted]
            small = looked and bool((errors[:wanted] <= tolerance * largest[0]).all())
            stable = previous is not None and bool(
                ((largest - previous).abs() <= tolerance * largest[0]).all()
            )
            previous = largest
            still = still + 1 if small and stable else 0
            if still == 2:
                message = f"converged after {done} products"
                break
    values, errors = values[:count], errors[:count]
    found = vectors[:, :count].T.to(like) @ basis[:done]
    gram = torch.stack([inner(found, row) for row in found]).cpu()
    lengths = gram.diagonal().sqrt()
    gram = gram / lengths.outer(lengths)
    orthogonality = float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max())
    residuals = errors / values.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return LanczosResult(
        eigenvalues=values,
        vectors=found / lengths.to(found).unsqueeze(1),
        residuals=residuals,
        orthogonality=orthogonality,
        products=done,
        converged=message.startswith(("converged", "the basis spans")),
        message=message,
    )


def _ritz(projected: Tensor, coupling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values by descending magnitude, their coefficients, and their residual norms."""
    values, vectors = torch.linalg.eigh(projected)
    order = values.abs().argsort(descending=True)
    values, vectors = values[order], vectors[:, order]
    return values, vectors, (coupling * vectors[-1]).abs()
