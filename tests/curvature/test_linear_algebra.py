"""Sums over long vectors, around the length of a chunk."""

from __future__ import annotations

import math

import pytest
import torch

from sgd_probe.curvature.krylov import KrylovBasis
from sgd_probe.curvature.linear_algebra import (
    CHUNK,
    dimension,
    dot,
    gram,
    inner,
    norm,
    orthogonality,
    random_unit,
)
from tests.helpers.dense import assert_orthonormal

SIZES = [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 30 * CHUNK + 17]
LIKE = torch.empty(0)


def draw(*shape: int, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) + offset


def basis_of(rows: torch.Tensor) -> KrylovBasis:
    basis = KrylovBasis(LIKE, rows.shape[1])
    for row in rows:
        basis.append(row)
    return basis


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("size", SIZES)
def test_inner_products(size: int, count: int) -> None:
    rows, vector = draw(count, size), draw(size)
    found = inner(rows, vector)
    expected = rows.double() @ vector.double()
    assert found.dtype == torch.float64
    error = (found - expected).abs()
    assert bool((error <= 1e-6 * rows.double().norm(dim=1) * vector.double().norm()).all())


@pytest.mark.parametrize("size", SIZES)
def test_lengths(size: int) -> None:
    vector = draw(size, offset=10.0)  # all of one sign: a float32 sum would drift
    assert norm(vector) == pytest.approx(float(vector.double().norm()), rel=1e-6)


def test_a_long_sum_is_better_than_float32() -> None:
    vector = torch.full((200 * CHUNK,), 0.1)
    exact = float(vector.double().square().sum())
    assert float(inner(vector[None], vector)) == pytest.approx(exact, rel=2e-5)


@pytest.mark.parametrize("size", [50, CHUNK + 1])
def test_orthogonalise(size: int) -> None:
    rows = torch.linalg.qr(draw(size, 8).double()).Q.T.contiguous().float()
    vector = (rows.T @ torch.arange(1.0, 9.0)) + 1e-3 * draw(size)
    original = vector.double()

    coefficients = basis_of(rows).orthogonalise(vector)

    assert float((rows.double() @ vector.double()).abs().max()) < 1e-6
    rebuilt = vector.double() + rows.double().T @ coefficients
    torch.testing.assert_close(rebuilt, original, rtol=1e-5, atol=1e-5)


def test_orthogonal_to_nothing_is_unchanged() -> None:
    vector = draw(2 * CHUNK)
    expected = vector.clone()
    basis_of(torch.empty(0, len(vector))).orthogonalise(vector)
    assert torch.equal(vector, expected)


def test_a_basis_stays_orthonormal_in_float32() -> None:
    size = 20 * CHUNK + 5
    basis = KrylovBasis(LIKE, size)
    generator = torch.Generator().manual_seed(0)
    direction = draw(size)
    for _ in range(20):
        vector = direction + 1e-3 * random_unit(size, LIKE, generator)  # nearly parallel to the others
        basis.orthogonalise(vector)
        basis.append(vector / norm(vector))
    assert_orthonormal(basis.matrix(), atol=1e-6)


def test_random_units() -> None:
    first, again = (random_unit(1000, LIKE, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert math.isclose(norm(first), 1.0, rel_tol=1e-6)
    double = random_unit(1000, LIKE.double(), torch.Generator().manual_seed(4))
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), first)


def test_a_reduction_makes_products_those_of_whole_vectors() -> None:
    """Two processes with the same part each: the whole vector is that part twice."""
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    both = torch.cat([part, part], dim=1)

    def twice(sums: torch.Tensor) -> torch.Tensor:
        return 2 * sums

    torch.testing.assert_close(inner(part, part[0], twice), inner(both, both[0]))
    torch.testing.assert_close(gram(part, twice), gram(both))
    assert norm(part[0], twice) == pytest.approx(norm(both[0]), rel=1e-12)
    assert dot(part[0], part[1], twice) == pytest.approx(dot(both[0], both[1]), rel=1e-6)
    assert dimension(50, twice) == 100
    assert norm(random_unit(50, part, generator, twice), twice) == pytest.approx(1, rel=1e-6)
    unit = both / torch.linalg.vector_norm(both, dim=1, keepdim=True)
    assert orthogonality(unit[:, :50], twice) == pytest.approx(orthogonality(unit), rel=1e-5)
