"""Directions between the stiff and the flat ones: Ritz vectors at log-spaced levels of |lambda|.

A search for the largest eigenvalues leaves Ritz vectors of every size behind. Those next to the largest
have often converged; a Krylov space does not converge inside the bulk, and there they are mixtures of
eigenvectors about their level. Which of the two one is, its residual says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sgd_probe.curvature.flat import Quadrature
from sgd_probe.curvature.krylov import KrylovBasis
from sgd_probe.curvature.lanczos import LanczosResult, LinearOperator
from sgd_probe.curvature.linear_algebra import dot, norm

#: Products that it takes at most, however many directions are asked for.
INTERIOR_PRODUCTS = 2
#: Smaller eigenvalues, relative to the largest, are lost in the rounding of the products in float32.
_FLOOR = 1e-4
#: An eigenvector's residual relative to its own eigenvalue: ||Hv||^2 / |v.Hv| is that eigenvalue to 1%.
_OWN_SHARE = 0.1


@dataclass(frozen=True)
class InteriorResult:
    """Ritz vectors below the top ones, by descending |Ritz value|.

    Attributes:
        vectors: orthonormal rows, shape (k, size); fewer than asked for where the search left fewer.
        ritz_values: v.Hv on the operator's own samples, float64, shape (k,).
        residuals: ``||Hv - v.Hv v|| / |lambda_1|`` on those samples, float64, shape (k,).
        converged: which of them may be called eigenvectors, bool, shape (k,).
        quadratures: what each is a mixture of; None for an eigenvector.
        kept: Ritz values of all that ``krylov`` holds now, float64.
        products: matrix-vector products used.
    """

    vectors: Tensor
    ritz_values: Tensor
    residuals: Tensor
    converged: Tensor
    quadratures: tuple[Quadrature | None, ...]
    kept: Tensor
    products: int


def interior_directions(
    operator: LinearOperator, stiff: LanczosResult, count: int, *, tolerance: float, room: int | None = None
) -> InteriorResult:
    """Take directions at log-spaced levels from what a search for the top ones has left behind.

    One counts as an eigenvector where its residual is within the tolerance of |lambda_1| and within a tenth
    of its own |Ritz value|: what is small beside the largest eigenvalue may be large beside its own.

    Args:
        operator: the one that was searched.
        stiff: the search. Its ``krylov`` then begins with the top vectors and those taken.
        count: number of directions.
        tolerance: bound on the residual of an eigenvector, relative to |lambda_1|.
        room: vectors that ``krylov`` keeps, but for those taken; all by default.
    """
    krylov, top = stiff.krylov, len(stiff.vectors)
    chosen = choose(stiff.ritz_values, stiff.ritz_residuals, top, count)
    order, found = krylov.bring_forward(top, chosen), slice(top, top + len(chosen))
    if room is not None:
        krylov.truncate(max(room, found.stop))
    values, residuals = stiff.ritz_values[order], stiff.ritz_residuals[order]
    scale = float(values.abs().max())
    within = (residuals <= tolerance) & (residuals * scale <= _OWN_SHARE * values.abs())
    blended = [index for index in range(found.start, found.stop) if not within[index]]
    mixtures = _mixtures(operator, krylov, values, residuals * scale, blended) if blended else {}
    return InteriorResult(
        vectors=krylov.matrix(found.start, found.stop),
        ritz_values=values[found],
        residuals=residuals[found],
        converged=within[found],
        quadratures=tuple(mixtures.get(index) for index in range(found.start, found.stop)),
        kept=values[: len(krylov)],
        products=INTERIOR_PRODUCTS if blended else 0,
    )


def choose(values: Tensor, residuals: Tensor, top: int, count: int) -> list[int]:
    """Pick the Ritz vectors nearest to log-spaced levels below the top ones.

    Only resolved ones are picked. Some eigenvalue lies within the residual of a Ritz value (Parlett, The
    Symmetric Eigenvalue Problem, 4.5), so that one within its own residual cannot be told from zero: it is
    small because positive and negative curvature cancel. The levels lie between the last top value,
    exclusive, and the smallest resolved one, inclusive.

    Args:
        values: Ritz values by descending magnitude, shape (m,).
        residuals: theirs, relative to the largest magnitude, shape (m,).
        top: how many of the first are taken already, at least one.
        count: how many to pick; fewer where fewer are resolved.

    Returns:
        Their indices, ascending.
    """
    sizes = values.abs().tolist()
    doubts = [max(residual, _FLOOR) * sizes[0] for residual in residuals.tolist()]
    free = [index for index in range(top, len(sizes)) if sizes[index] > doubts[index]]
    count = min(count, len(free))
    if not count:
        return []
    high, low = math.log(sizes[top - 1]), math.log(sizes[free[-1]])
    chosen = []
    for step in range(count, 0, -1):  # from below, so that the end of the range is always there
        level = high + (low - high) * step / count
        nearest = min(free, key=lambda index: abs(math.log(sizes[index]) - level))
        free.remove(nearest)
        chosen.append(nearest)
    return sorted(chosen)


def _mixtures(
    operator: LinearOperator, krylov: KrylovBasis, values: Tensor, spreads: Tensor, rows: list[int]
) -> dict[int, Quadrature]:
    """What Ritz vectors are mixtures of: Gauss quadratures of their spectra, exact for ``v.H^p v``, p <= 3.

    All residuals of a Krylov space point along one vector. On it and the Ritz vectors the operator is an
    arrowhead matrix, known after two products: one finds the vector, one the last entry.

    Args:
        operator: symmetric.
        krylov: the first of the Ritz vectors.
        values: the values of all of them, shape (m,).
        spreads: ``||Hv - value v||`` of all of them, shape (m,).
        rows: which ones are asked for, at least one; all of them are in ``krylov``.
    """
    widest = max(rows, key=lambda row: float(spreads[row]))
    along = operator.matvec(krylov[widest])
    krylov.orthogonalise(along)
    along /= norm(along, krylov.reduce)
    corner = torch.tensor([dot(operator.matvec(along), along, krylov.reduce)], dtype=torch.float64)
    arrowhead = torch.diag(torch.cat([values, corner]))
    arrowhead[-1, :-1] = arrowhead[:-1, -1] = spreads
    nodes, axes = torch.linalg.eigh(arrowhead)
    return {row: Quadrature(nodes, axes[row].square()) for row in rows}
