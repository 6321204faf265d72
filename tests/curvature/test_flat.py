"""Near-flat directions: as flat as their Krylov space allows, and honest about it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgd_probe.curvature.flat import FlatResult, flat_directions
from sgd_probe.curvature.linear_algebra import orthogonality
from tests.helpers.dense import Symmetric, assert_orthonormal, network_spectrum

NOTHING = torch.empty(0, 300, dtype=torch.float64)


def find(operator: Symmetric, count: int, top: Tensor, *, dimension: int = 10, seed: int = 0) -> FlatResult:
    generator = torch.Generator().manual_seed(seed)
    return flat_directions(operator, count, top, dimension=dimension, generator=generator)


def lengths(operator: Symmetric, vectors: Tensor) -> Tensor:
    """True ``||Hv||``, row by row."""
    found: Tensor = torch.linalg.vector_norm(vectors.double() @ operator.matrix, dim=1)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tops", [0, 5])
def test_orthonormal_and_measured_truly(dtype: torch.dtype, tops: int) -> None:
    operator = Symmetric.of(network_spectrum(300))
    top = operator.eigenpairs()[1][:tops].to(dtype)
    # Top modes as a solver leaves them: near eigenvectors only.
    top = torch.linalg.qr((top + 0.01 * torch.randn(top.shape, dtype=dtype)).T).Q.T.contiguous()

    result = find(operator, 4, top)

    atol = 1e-12 if dtype == torch.float64 else 1e-5
    assert result.vectors.shape == (4, 300) and result.vectors.dtype == dtype
    assert_orthonormal(torch.cat([top, result.vectors]), atol)
    scale = float(operator.matrix.diagonal().abs().max())
    torch.testing.assert_close(
        result.product_norms, lengths(operator, result.vectors), rtol=1e-3, atol=10 * atol * scale
    )
    quotients = ((result.vectors.double() @ operator.matrix) * result.vectors.double()).sum(1)
    torch.testing.assert_close(result.rayleigh_quotients, quotients, rtol=1e-3, atol=10 * atol * scale)
    assert result.products == operator.products == 40


def test_nothing_in_its_krylov_space_is_flatter() -> None:
    operator = Symmetric.of(network_spectrum(300))
    top = operator.eigenpairs()[1][:3]
    result = find(operator, 1, top, dimension=8, seed=3)

    # The same space, built another way: powers of the projected matrix on the same first vector.
    generator = torch.Generator().manual_seed(3)
    vector = torch.randn(300, generator=generator, dtype=torch.float32).double()
    outside = torch.eye(300, dtype=torch.float64) - top.T @ top
    powers = [outside @ vector]
    for _ in range(7):
        powers.append(outside @ operator.matrix @ powers[-1] / powers[-1].norm())
    basis = torch.linalg.qr(torch.stack(powers, 1)).Q
    best = torch.linalg.svdvals(operator.matrix @ basis).min()
    assert float(result.product_norms[0]) == pytest.approx(float(best), rel=1e-3)
    combinations = torch.randn(2000, 8, dtype=torch.float64) @ basis.T
    combinations /= combinations.norm(dim=1, keepdim=True)
    assert float(lengths(operator, combinations).min()) >= float(result.product_norms[0])


def test_far_flatter_than_random_directions() -> None:
    operator = Symmetric.of(network_spectrum(1000))
    top = operator.eigenpairs()[1][:10]
    result = find(operator, 3, top)
    random = torch.randn(200, 1000, dtype=torch.float64)
    random -= random @ top.T @ top
    random /= random.norm(dim=1, keepdim=True)
    assert 5 * float(result.product_norms.max()) < float(lengths(operator, random).min())


def test_more_products_make_flatter_directions() -> None:
    operator = Symmetric.of(network_spectrum(300))
    found = [float(find(operator, 1, NOTHING, dimension=d).product_norms[0]) for d in (2, 5, 10, 20)]
    assert found == sorted(found, reverse=True)


def test_no_more_directions_than_the_space_has() -> None:
    operator = Symmetric.of([5.0, 4, 3, 2, 1])
    top = operator.eigenpairs()[1][:3]
    result = find(operator, 4, top)
    assert len(result.vectors) == len(result.product_norms) == len(result.rayleigh_quotients) == 2
    assert_orthonormal(torch.cat([top, result.vectors]), 1e-12)
    torch.testing.assert_close(result.product_norms, torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_a_whole_small_space() -> None:
    operator = Symmetric.of([3.0, -2, 1])
    result = find(operator, 3, NOTHING[:, :3])
    torch.testing.assert_close(result.product_norms, torch.tensor([1.0, 2, 3], dtype=torch.float64))
    torch.testing.assert_close(result.rayleigh_quotients, torch.tensor([1.0, -2, 3], dtype=torch.float64))


def test_none_asked_for_and_none_left() -> None:
    operator = Symmetric.of([3.0, 2])
    for count, top in ((0, NOTHING[:, :2]), (2, torch.eye(2, dtype=torch.float64))):
        result = find(operator, count, top)
        assert result.vectors.shape == (0, 2)
        assert result.products == 0 and len(result.product_norms) == 0


def test_where_nothing_curves_everything_is_flat() -> None:
    operator = Symmetric(torch.zeros(50, 50))
    result = find(operator, 3, NOTHING[:, :50])
    assert_orthonormal(result.vectors, 1e-12)
    assert result.product_norms.tolist() == [0, 0, 0]
    assert result.products == 3  # one look each is enough


def test_null_space_of_a_low_rank_operator() -> None:
    operator = Symmetric.of([9.0, 5, -3] + [0.0] * 60)
    result = find(operator, 2, NOTHING[:, :63])
    assert float(lengths(operator, result.vectors).max()) < 1e-10


def test_progress_counts_on() -> None:
    seen: list[int] = []
    operator = Symmetric.of(network_spectrum(300))
    flat_directions(operator, 3, NOTHING, dimension=4, on_product=seen.append)
    assert seen == [4, 8, 12]


def test_long_vectors_without_top_modes() -> None:
    class Long:
        size = 70_000

        def matvec(self, vector: Tensor) -> Tensor:
            return vector * torch.linspace(0, 1, self.size)

    result = flat_directions(Long(), 2, torch.empty(0, Long.size), dimension=5)
    assert_orthonormal(result.vectors, 1e-5)


def test_orthogonality() -> None:
    assert orthogonality(torch.eye(3)) == 0.0
    assert orthogonality(torch.eye(3)[:1]) == 0.0
    assert orthogonality(torch.tensor([[1.0, 0.0], [0.6, 0.8]])) == pytest.approx(0.6)
    assert orthogonality(torch.tensor([[1.0, 0.0], [-0.6, 0.8]])) == pytest.approx(0.6)
