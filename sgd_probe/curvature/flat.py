"""Near-flat directions: as noisy as they can be while the Hessian does next to nothing to them.

Krylov methods do not converge inside the bulk, so these are directions, not eigenvectors. What
decides how a direction v moves is its effective curvature ``||Hv||^2 / v.Hv``, the mean of its
eigenvalues weighted by their noise where noise follows curvature: a small share of stiff
eigenvectors carries most of the motion, and v.Hv does not see it.

Each direction is taken from a small Krylov space of its own, outside all vectors that the eigensolver
has left behind: those are free, and hold the stiff part that a random start would bring along. In it
the direction maximises ``v.Hv - ||Hv||^2 / c``. Where that is positive, the effective curvature is
below c, and among such directions this one has nearly the most noise (proportional to v.Hv). Where c
cannot be reached, the direction of smallest effective curvature is taken, a harmonic Ritz vector.

On other samples a direction is less flat than on those that found it, up to four times, so c is set
below what is wanted (:data:`FINDING_SHARE`). Less still would make it flatter, and silent: the vector of
smallest ``||Hv||``, the obvious choice, can have a few hundredths of a random direction's noise, too
little to be seen to diffuse. docs/settling.md has the figures, and those of what else was tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sgd_probe.curvature.krylov import KrylovBasis
from sgd_probe.curvature.lanczos import LinearOperator
from sgd_probe.curvature.linear_algebra import dimension as dimension_of
from sgd_probe.curvature.linear_algebra import norm, random_unit

#: Effective curvature aimed at on the finding samples, as a share of what is wanted on others. There it is
#: larger: with 1,024 samples hardly so in general, four times where a few samples carry most of it.
FINDING_SHARE = 0.3


@dataclass(frozen=True)
class Quadrature:
    """Eigenvalues that a direction is a mixture of, as its own Krylov space sees them.

    Attributes:
        nodes: Ritz values, float64, shape (m,).
        weights: shares of the direction's squared length, adding up to one, shape (m,).
    """

    nodes: Tensor
    weights: Tensor


@dataclass(frozen=True)
class FlatResult:
    """Near-flat directions.

    Attributes:
        vectors: orthonormal rows, shape (k, size); fewer than asked for in a small space.
        rayleigh_quotients: v.Hv on the operator's own samples, float64, shape (k,).
        product_norms: ``||Hv||`` on the operator's own samples, float64, shape (k,).
        quadratures: what each is a mixture of.
        seen: what each random start sees of the spectrum outside the basis and the directions before it.
        products: matrix-vector products used.
    """

    vectors: Tensor
    rayleigh_quotients: Tensor
    product_norms: Tensor
    quadratures: tuple[Quadrature, ...]
    seen: tuple[Quadrature, ...]
    products: int


def flat_directions(
    operator: LinearOperator,
    count: int,
    outside: KrylovBasis,
    curvature: float,
    *,
    dimension: int = 6,
    generator: torch.Generator | None = None,
    on_product: Callable[[int], None] | None = None,
) -> FlatResult:
    """Find near-flat directions outside a basis, and orthogonal to each other.

    Args:
        operator: symmetric.
        count: number of directions.
        outside: orthonormal vectors to stay away from; the directions found are appended to it.
        curvature: effective curvature wanted on other samples, positive; on the operator's own a
            direction aims at :data:`FINDING_SHARE` of it.
        dimension: Krylov dimension, the products spent on each direction.
        generator: source of random vectors (CPU).
        on_product: called with the number of products so far, for progress.
    """
    generator = generator or torch.Generator().manual_seed(0)
    already, whole = len(outside), dimension_of(operator.size, outside.reduce)
    found: list[_Direction] = []
    products = 0
    for _ in range(min(count, whole - already)):
        space = _OwnSpace(operator, whole, outside, generator)
        for _ in range(min(dimension, whole - len(outside))):
            products += 1
            going_on = space.extend()
            if on_product is not None:
                on_product(products)
            if not going_on:
                break
        direction = space.choose(FINDING_SHARE * curvature)
        outside.append(direction.vector)
        found.append(direction)
    return FlatResult(
        vectors=outside.matrix(start=already),
        rayleigh_quotients=torch.tensor([d.rayleigh_quotient for d in found], dtype=torch.float64),
        product_norms=torch.tensor([d.product_norm for d in found], dtype=torch.float64),
        quadratures=tuple(d.quadrature for d in found),
        seen=tuple(d.seen for d in found),
        products=products,
    )


@dataclass(frozen=True)
class _Direction:
    vector: Tensor
    rayleigh_quotient: float
    product_norm: float
    quadrature: Quadrature
    seen: Quadrature


class _OwnSpace:
    """The Krylov space of one random vector outside a basis.

    The operator's image of the space is held in full, as coefficients on the space itself, on the next
    vector and on the basis outside.
    """

    def __init__(
        self, operator: LinearOperator, whole: int, outside: KrylovBasis, generator: torch.Generator
    ) -> None:
        self._operator, self._whole, self._outside = operator, whole, outside
        self._reduce = outside.reduce
        self._basis = KrylovBasis(outside.like, operator.size, reduce=outside.reduce)
        start = random_unit(operator.size, outside.like, generator, self._reduce)
        outside.orthogonalise(start)
        self._next = start / norm(start, self._reduce)
        self._columns: list[tuple[Tensor, Tensor, float]] = []

    def extend(self) -> bool:
        """Apply the operator once more; False where the space is invariant and can grow no further."""
        self._basis.append(self._next)
        product = self._operator.matvec(self._basis[len(self._basis) - 1])
        along, column = self._outside.orthogonalise(product), self._basis.orthogonalise(product)
        rest = norm(product, self._reduce)
        self._columns.append((along, column, rest))
        scale = max(float(column.abs().max()) for _, column, _ in self._columns)
        full = len(self._basis) + len(self._outside) == self._whole
        if full or rest <= 10 * torch.finfo(product.dtype).eps * scale:
            return False
        self._next = product / rest
        return True

    def choose(self, curvature: float) -> _Direction:
        """The noisiest direction of effective curvature below a bound, or the one of the least."""
        size = len(self._basis)
        inside = torch.zeros((size + 1, size), dtype=torch.float64)
        outside = torch.zeros((len(self._outside), size), dtype=torch.float64)
        for index, (along, column, rest) in enumerate(self._columns):
            inside[: index + 1, index], inside[index + 1, index], outside[:, index] = column, rest, along
        projected = torch.triu(inside[:size])
        projected = projected + projected.triu(1).T
        image = torch.cat([inside, outside])
        squared = image.T @ image
        weights = noisiest(projected, squared, curvature)
        vector = self._basis.combine(weights)
        self._outside.orthogonalise(vector)
        values, vectors = torch.linalg.eigh(projected)
        return _Direction(
            vector=vector / norm(vector, self._reduce),
            rayleigh_quotient=float(weights @ projected @ weights),
            product_norm=math.sqrt(max(float(weights @ squared @ weights), 0.0)),
            quadrature=Quadrature(values, (vectors.T @ weights).square()),
            seen=Quadrature(values, vectors[0].square()),
        )


def noisiest(projected: Tensor, squared: Tensor, curvature: float) -> Tensor:
    """Unit coefficients y that maximise ``y.Ty - y.Sy / c``, or ``y.Ty / y.Sy`` if that is negative.

    Args:
        projected: T, the operator within an orthonormal basis: float64, shape (m, m).
        squared: S, the inner products of the operator's images of that basis: float64, shape (m, m).
        curvature: c, positive.

    Returns:
        Shape (m,).
    """
    values, vectors = torch.linalg.eigh(projected - squared / curvature)
    noisiest: Tensor = vectors[:, -1]
    if float(values[-1]) > 0:
        return noisiest
    # Harmonic Ritz vectors: in coordinates in which S is the identity. A direction that H annihilates is
    # as flat as can be.
    strengths, axes = torch.linalg.eigh(squared)
    if float(strengths[0]) <= torch.finfo(torch.float64).eps * float(strengths[-1]):
        still: Tensor = axes[:, 0]
        return still
    whiten = axes / strengths.sqrt()
    _, turned = torch.linalg.eigh(whiten.T @ projected @ whiten)
    flattest: Tensor = whiten @ turned[:, -1]
    return torch.nn.functional.normalize(flattest, dim=0)
