"""The basis of a window: top modes, interior and near-flat directions with their certificates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sgd_probe.curvature.certify import Certificate, certify
from sgd_probe.curvature.density import SeenDensity, seen_density
from sgd_probe.curvature.flat import Quadrature, flat_directions
from sgd_probe.curvature.hessian import HessianOperator
from sgd_probe.curvature.interior import interior_directions
from sgd_probe.curvature.lanczos import lanczos
from sgd_probe.curvature.linear_algebra import orthogonality

#: How a direction was chosen.
Kind = Literal["top", "interior", "flat"]


@dataclass(frozen=True)
class Mode:
    """One direction: how it was found, and what held-out batches say of it.

    Attributes:
        name: ``top_01`` ..., ``interior_01`` ... or ``flat_01`` ....
        kind: an eigenvector of large |eigenvalue|, a Ritz vector at a level below, or near-flat.
        eigenvalue: v.Hv on the finding batches.
        residual: ``||Hv - eigenvalue v|| / |lambda_1|`` on the finding batches.
        converged: the residual is within the tolerance; that of an interior mode also within a tenth of
            its own eigenvalue.
        certificate: from the certifying batches.
        layer_shares: share of each parameter in the squared length of the direction.
        quadrature: what a mixed direction is a mixture of; None for an eigenvector.
    """

    name: str
    kind: Kind
    eigenvalue: float
    residual: float
    converged: bool
    certificate: Certificate
    layer_shares: Mapping[str, float]
    quadrature: Quadrature | None

    @property
    def flat(self) -> bool:
        """A near-flat direction."""
        return self.kind == "flat"

    @property
    def mixed(self) -> bool:
        """Not to be taken for an eigenvector: near-flat, or an interior mode that has not converged."""
        return self.flat or (self.kind == "interior" and not self.converged)


@dataclass(frozen=True)
class ModeBasis:
    """Directions and what is known of each.

    Attributes:
        rows: the directions and behind them their images, as one contiguous matrix: what a step is projected
            on is read at one go.
        modes: the top modes by descending |eigenvalue|, the interior ones likewise, then the flat
            directions.
        products: Hessian-vector products spent, certification included.
        split_half_overlap: how well the held-out samples settle the top subspace, in [0, 1].
        held_out_overlap: how nearly the top modes span a subspace that the held-out Hessian leaves alone.
        orthogonality: largest |v_i . v_j|.
        converged: every top mode is within the tolerance.
        message: why the solver stopped.
        density: of the spectrum on the finding batches, as the search saw it; None without flat directions.
    """

    rows: Tensor
    modes: tuple[Mode, ...]
    products: int
    split_half_overlap: float
    orthogonality: float
    converged: bool
    message: str
    held_out_overlap: float = math.nan
    density: SeenDensity | None = None

    @property
    def vectors(self) -> Tensor:
        """Orthonormal rows, shape (k, size), in the order of ``modes``."""
        return self.rows[: len(self.modes)]

    @property
    def images(self) -> Tensor | None:
        """Two held-out estimates of Hv of every direction that is no top one, shape (2, mixed, size)."""
        return _halves(self.rows[len(self.modes) :])

    @property
    def lambda_max(self) -> float:
        """Eigenvalue of largest magnitude on the finding batches."""
        return self.modes[0].eigenvalue


def find_modes(
    finding: HessianOperator,
    certifying: HessianOperator,
    *,
    top: int,
    flat: int,
    tolerance: float,
    flat_curvature: Callable[[Tensor], float],
    flat_dimension: int,
    generator: torch.Generator,
    interior: int = 0,
    max_vectors: int | None = None,
    start: Tensor | None = None,
    on_product: Callable[[int], None] | None = None,
) -> ModeBasis:
    """Find top, interior and near-flat modes on one set of batches and certify them on another.

    Closes the finding operator.

    Args:
        finding: the operator whose modes are sought.
        certifying: the same loss over disjoint batches.
        top: number of eigenvectors of largest |eigenvalue|.
        flat: number of near-flat directions.
        tolerance: residual bound of the top modes and of converged interior ones, relative to |lambda_1|.
        flat_curvature: from the top eigenvalues to the effective curvature that flat directions aim at.
        flat_dimension: products spent on each flat direction.
        generator: source of random vectors.
        interior: number of Ritz vectors at log-spaced levels below the top; fewer where the search for
            those has left fewer.
        max_vectors: vectors that the eigensolver may hold at once.
        start: first Lanczos vector.
        on_product: called with the number of products so far.
    """
    like = torch.empty(0, dtype=finding.space.dtype, device=finding.home)
    # The directions come to lie side by side in the first block of the Krylov basis, and their images behind
    # them; one batch has no halves to take images of.
    halves = 2 if len(certifying.batches) > 1 else 0
    stiff = lanczos(
        finding,
        top,
        like,
        tolerance=tolerance,
        max_vectors=max_vectors,
        beside=(1 + halves) * (interior + flat),
        start=start,
        generator=generator,
        on_product=on_product,
        reduce=finding.space.reduce,
    )
    room = finding.space.dimension - flat * flat_dimension
    if max_vectors is not None:
        room = min(room, max_vectors - flat - flat_dimension)
    between = interior_directions(finding, stiff, interior, tolerance=tolerance, room=room)

    def report(done: int) -> None:
        if on_product is not None:
            on_product(stiff.products + between.products + done)

    valley = flat_directions(
        finding,
        flat,
        stiff.krylov,
        flat_curvature(stiff.eigenvalues),
        dimension=flat_dimension,
        generator=generator,
        on_product=report,
    )
    # The memory of the other blocks, and of the graphs, serves the certification.
    krylov, known = stiff.krylov, len(stiff.vectors) + len(between.vectors)
    krylov.bring_forward(known, range(len(krylov) - len(valley.vectors), len(krylov)))
    krylov.truncate(known + len(valley.vectors))
    vectors = krylov.matrix()
    top_rows = len(stiff.vectors)
    rows = krylov.with_room(halves * (len(vectors) - top_rows))
    finding.close()
    scale = max(float(stiff.eigenvalues.abs().max()), torch.finfo(torch.float64).tiny)
    spread = (valley.product_norms.square() - valley.rayleigh_quotients.square()).clamp_min(0).sqrt() / scale
    found = [
        *_found("top", stiff.eigenvalues, stiff.residuals, stiff.residuals <= tolerance),
        *_found("interior", between.ritz_values, between.residuals, between.converged, between.quadratures),
        *_found("flat", valley.rayleigh_quotients, spread, spread <= tolerance, valley.quadratures),
    ]
    roomy = max_vectors is None or 2 * top_rows + len(vectors) <= max_vectors
    images = _halves(rows[len(vectors) :])
    certification = certify(certifying, vectors, top=top_rows, with_overlap=roomy, images=images)
    modes = tuple(
        Mode(
            name=f"{row.kind}_{row.rank:02d}",
            kind=row.kind,
            eigenvalue=row.eigenvalue,
            residual=row.residual,
            converged=row.converged,
            certificate=certificate,
            quadrature=row.quadrature,
            layer_shares=finding.space.layer_shares(vector),
        )
        for row, certificate, vector in zip(found, certification.certificates, vectors, strict=True)
    )
    return ModeBasis(
        rows=rows,
        modes=modes,
        products=stiff.products + between.products + valley.products + len(vectors),
        split_half_overlap=certification.split_half_overlap,
        orthogonality=orthogonality(vectors, finding.space.reduce),
        converged=stiff.converged,
        message=stiff.message,
        held_out_overlap=certification.held_out_overlap,
        density=seen_density(
            between.kept, valley.rayleigh_quotients.tolist(), valley.seen, finding.space.dimension
        ),
    )


def _halves(rows: Tensor) -> Tensor | None:
    """Rows of two estimates, one after the other, shape (2, rows / 2, size); None where there are none."""
    return rows.view(2, len(rows) // 2, rows.shape[1]) if len(rows) else None


@dataclass(frozen=True)
class _Found:
    """A direction before it is certified."""

    kind: Kind
    rank: int
    eigenvalue: float
    residual: float
    converged: bool
    quadrature: Quadrature | None


def _found(
    kind: Kind,
    eigenvalues: Tensor,
    residuals: Tensor,
    converged: Tensor,
    quadratures: Sequence[Quadrature | None] | None = None,
) -> list[_Found]:
    rows = zip(
        eigenvalues.tolist(),
        residuals.tolist(),
        converged.tolist(),
        quadratures or [None] * len(eigenvalues),
        strict=True,
    )
    return [_Found(kind, rank, *row) for rank, row in enumerate(rows, start=1)]
