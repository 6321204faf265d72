"""The basis of a window: top modes and near-flat directions with their certificates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sgd_probe.curvature.certify import Certificate, certify
from sgd_probe.curvature.flat import Quadrature, flat_directions
from sgd_probe.curvature.hessian import HessianOperator
from sgd_probe.curvature.lanczos import lanczos
from sgd_probe.curvature.linear_algebra import orthogonality


@dataclass(frozen=True)
class Mode:
    """One direction: how it was found, and what held-out batches say of it.

    Attributes:
        name: ``top_01`` ... or ``flat_01`` ....
        flat: a near-flat direction, else an eigenvector of large |eigenvalue|.
        eigenvalue: v.Hv on the finding batches.
        residual: ``||Hv - eigenvalue v|| / |lambda_1|`` on the finding batches.
        converged: the residual is within the tolerance.
        certificate: from the certifying batches.
        layer_shares: share of each parameter in the squared length of the direction.
        quadrature: what a near-flat direction is a mixture of; None for an eigenvector.
    """

    name: str
    flat: bool
    eigenvalue: float
    residual: float
    converged: bool
    certificate: Certificate
    layer_shares: Mapping[str, float]
    quadrature: Quadrature | None


@dataclass(frozen=True)
class ModeBasis:
    """Directions as rows of one contiguous matrix, and what is known of each.

    Attributes:
        vectors: orthonormal rows, shape (k, size), in the order of ``modes``.
        modes: the top modes by descending |eigenvalue|, then the flat directions.
        products: Hessian-vector products spent, certification included.
        split_half_overlap: how well the held-out samples settle the top subspace, in [0, 1].
        orthogonality: largest |v_i . v_j|.
        converged: every top mode is within the tolerance.
        message: why the solver stopped.
    """

    vectors: Tensor
    modes: tuple[Mode, ...]
    products: int
    split_half_overlap: float
    orthogonality: float
    converged: bool
    message: str

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
    max_vectors: int | None = None,
    start: Tensor | None = None,
    on_product: Callable[[int], None] | None = None,
) -> ModeBasis:
    """Find top and near-flat modes on one set of batches and certify them on another.

    Args:
        finding: the operator whose modes are sought.
        certifying: the same loss over disjoint batches.
        top: number of eigenvectors of largest |eigenvalue|.
        flat: number of near-flat directions.
        tolerance: residual bound of the top modes, relative to |lambda_1|.
        flat_curvature: from the top eigenvalues to the effective curvature that flat directions aim at.
        flat_dimension: products spent on each flat direction.
        generator: source of random vectors.
        max_vectors: vectors that the eigensolver may hold at once.
        start: first Lanczos vector.
        on_product: called with the number of products so far.
    """
    like = torch.empty(0, dtype=finding.space.dtype, device=finding.space.device)
    stiff = lanczos(
        finding,
        top,
        like,
        tolerance=tolerance,
        max_vectors=max_vectors,
        start=start,
        generator=generator,
        on_product=on_product,
    )

    def report(done: int) -> None:
        if on_product is not None:
            on_product(stiff.products + done)

    room = finding.size - flat * flat_dimension
    if max_vectors is not None:
        room = min(room, max_vectors - flat - flat_dimension)
    stiff.krylov.truncate(max(room, len(stiff.vectors)))
    valley = flat_directions(
        finding,
        flat,
        stiff.krylov,
        flat_curvature(stiff.eigenvalues),
        dimension=flat_dimension,
        generator=generator,
        on_product=report,
    )
    vectors = torch.cat([stiff.vectors, valley.vectors]).contiguous()
    stiff.krylov.truncate(0)  # its memory now serves the certification
    top_rows = len(stiff.vectors)
    roomy = max_vectors is None or 2 * top_rows + len(vectors) <= max_vectors
    certification = certify(certifying, vectors, top=top_rows if roomy else 0)
    scale = max(float(stiff.eigenvalues.abs().max()), torch.finfo(torch.float64).tiny)
    names = [f"top_{i + 1:02d}" for i in range(len(stiff.vectors))]
    names += [f"flat_{i + 1:02d}" for i in range(len(valley.vectors))]
    eigenvalues = torch.cat([stiff.eigenvalues, valley.rayleigh_quotients]).tolist()
    spread = (valley.product_norms.square() - valley.rayleigh_quotients.square()).clamp_min(0).sqrt()
    residuals = torch.cat([stiff.residuals, spread / scale]).tolist()
    modes = tuple(
        Mode(
            name=name,
            flat=index >= len(stiff.vectors),
            eigenvalue=eigenvalues[index],
            residual=residuals[index],
            converged=residuals[index] <= tolerance,
            certificate=certification.certificates[index],
            quadrature=valley.quadratures[index - len(stiff.vectors)]
            if index >= len(stiff.vectors)
            else None,
            layer_shares=finding.space.layer_shares(vectors[index]),
        )
        for index, name in enumerate(names)
    )
    return ModeBasis(
        vectors=vectors,
        modes=modes,
        products=stiff.products + valley.products + len(vectors),
        split_half_overlap=certification.split_half_overlap,
        orthogonality=orthogonality(vectors),
        converged=stiff.converged,
        message=stiff.message,
    )
