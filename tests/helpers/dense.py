"""Dense references: the whole Hessian of a small module, symmetric matrices with a spectrum of our choice."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.hessian import LossFunction
from sgd_probe.isolation import seed_all


def freeze(contents: Sequence[Any], seed: int = 7) -> list[CurvatureBatch]:
    """Curvature batches with a seed each."""
    return [CurvatureBatch.freeze(content, index, seed + index) for index, content in enumerate(contents)]


def dense_hessian(
    module: nn.Module, loss: LossFunction, batches: Sequence[CurvatureBatch], names: Sequence[str]
) -> Tensor:
    """Hessian in float64, row by row, on copies of the module: none of the package's own machinery.

    Args:
        module: left as it is.
        loss: of a module on one batch.
        batches: weighted by their samples.
        names: of the parameters, in the order of rows and columns.

    Returns:
        Shape (size, size).
    """
    samples = sum(batch.samples for batch in batches)
    total: Tensor | float = 0.0
    for batch in batches:
        twin = copy.deepcopy(module).double()
        parameters = [twin.get_parameter(name) for name in names]
        seed_all(batch.seed)
        value = loss(twin, to_double(batch.thaw()), batch.index)
        gradient = _flat(
            torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True), parameters
        )
        rows = [
            _flat(torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True), parameters)
            if entry.requires_grad
            else torch.zeros(len(gradient), dtype=torch.float64)
            for entry in gradient.unbind()
        ]
        total = total + batch.samples / samples * torch.stack(rows).detach()
    assert isinstance(total, Tensor)
    return total


def to_double(value: Any) -> Any:
    """Floating-point tensors of nested data in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(to_double(item) for item in value)
    if isinstance(value, dict):
        return {key: to_double(item) for key, item in value.items()}
    return value


def _flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    pairs = zip(tensors, like, strict=True)
    return torch.cat([torch.zeros_like(p).reshape(-1) if t is None else t.reshape(-1) for t, p in pairs])


class Symmetric:
    """A dense symmetric operator that counts its products.

    Attributes:
        matrix: shape (size, size), float64.
        products: matrix-vector products so far.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.double()
        self.products = 0

    @classmethod
    def of(cls, spectrum: Tensor | Sequence[float], seed: int = 0) -> Symmetric:
        """With these eigenvalues and random eigenvectors."""
        values = torch.as_tensor(spectrum, dtype=torch.float64)
        return cls(rotation(len(values), seed) @ torch.diag(values) @ rotation(len(values), seed).T)

    @property
    def size(self) -> int:
        return len(self.matrix)

    def matvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        return (self.matrix.to(vector.dtype)) @ vector

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """By descending |eigenvalue|; eigenvectors are rows."""
        values, vectors = torch.linalg.eigh(self.matrix)
        order = values.abs().argsort(descending=True)
        return values[order], vectors.T[order]


def rotation(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    orthogonal: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return orthogonal


def network_spectrum(size: int) -> Tensor:
    """Eigenvalues like a network's: a few outliers, a bulk that falls over decades, some negative ones."""
    outliers = torch.tensor([20.0, 15, 12, 9, 7, 5, 4, 3.5, 3, 2.5])
    negative = -torch.logspace(-0.5, -3, size // 20)
    return torch.cat([outliers, torch.logspace(0, -6, size - len(outliers) - len(negative)), negative])


def assert_orthonormal(rows: Tensor, atol: float) -> None:
    """Compare the Gram matrix of the rows with the identity."""
    gram = rows.double() @ rows.double().T
    torch.testing.assert_close(gram, torch.eye(len(rows), dtype=torch.float64), rtol=0.0, atol=atol)


def largest_angle(rows: Tensor, others: Tensor) -> float:
    """Sine of the largest principal angle between the spans of two sets of orthonormal rows."""
    outside = rows.double() - rows.double() @ others.double().T @ others.double()
    return float(torch.linalg.matrix_norm(outside, 2))
