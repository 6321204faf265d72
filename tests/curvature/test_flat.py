"""Near-flat directions: as noisy as they may be while they stay flat, and honest about it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgd_probe.curvature.flat import FINDING_SHARE, FlatResult, flat_directions
from sgd_probe.curvature.krylov import KrylovBasis
from sgd_probe.curvature.linear_algebra import orthogonality
from tests.helpers.dense import Symmetric, assert_orthonormal, network_spectrum

NOTHING = torch.empty(0, 300, dtype=torch.float64)


#: Below what any of the spectra here has: asks for the flattest direction there is.
TINY = 1e-12


def basis_of(rows: Tensor) -> KrylovBasis:
    basis = KrylovBasis(rows.new_empty(0), rows.shape[1])
    for row in rows:
        basis.append(row)
    return basis


def find(
    operator: Symmetric,
    count: int,
    top: Tensor,
    *,
    curvature: float = TINY,
    dimension: int = 10,
    seed: int = 0,
) -> FlatResult:
    generator = torch.Generator().manual_seed(seed)
    outside = basis_of(top)
    result = flat_directions(operator, count, outside, curvature, dimension=dimension, generator=generator)
    assert torch.equal(outside.matrix(), torch.cat([top, result.vectors]))
    return result


def effective(result: FlatResult) -> Tensor:
    return result.product_norms.square() / result.rayleigh_quotients


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


def krylov_space(operator: Symmetric, top: Tensor, dimension: int, seed: int) -> Tensor:
    """The space of a search of that seed, built another way: powers on the same first vector."""
    size = operator.size
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).double()
    outside = torch.eye(size, dtype=torch.float64) - top.T @ top
    powers = [outside @ vector]
    for _ in range(dimension - 1):
        powers.append(outside @ operator.matrix @ powers[-1] / powers[-1].norm())
    space: Tensor = torch.linalg.qr(torch.stack(powers, 1)).Q
    return space


def test_nothing_in_its_krylov_space_has_less_effective_curvature() -> None:
    operator = Symmetric.of(network_spectrum(300).abs())
    top = operator.eigenpairs()[1][:3]
    result = find(operator, 1, top, dimension=8, seed=3)
    space = krylov_space(operator, top, 8, seed=3)
    combinations = torch.randn(5000, 8, dtype=torch.float64) @ space.T
    combinations /= combinations.norm(dim=1, keepdim=True)
    quotients = ((combinations @ operator.matrix) * combinations).sum(1)
    others = lengths(operator, combinations).square() / quotients
    assert float(others[quotients > 0].min()) >= float(effective(result)[0]) * (1 - 1e-6)


@pytest.mark.parametrize("curvature", [0.1, 0.3, 1.0])
def test_the_noisiest_direction_below_a_curvature(curvature: float) -> None:
    """The maximiser of v.Hv - ||Hv||^2 / c in its space, so flatter than c where that is positive."""
    operator = Symmetric.of(network_spectrum(300))
    top = operator.eigenpairs()[1][:10]
    result = find(operator, 1, top, curvature=curvature / FINDING_SHARE, dimension=12, seed=2)
    space = krylov_space(operator, top, 12, seed=2)
    projected = space.T @ operator.matrix @ space
    image = operator.matrix @ space
    best = float(torch.linalg.eigvalsh(projected - image.T @ image / curvature)[-1])
    merit = float(result.rayleigh_quotients[0] - result.product_norms[0] ** 2 / curvature)
    assert best > 0, "the case is meant to be within reach"
    assert merit == pytest.approx(best, rel=1e-4)
    assert 0 < float(effective(result)[0]) < curvature
    flattest = find(operator, 1, top, dimension=12, seed=2)
    assert float(result.rayleigh_quotients[0]) > float(flattest.rayleigh_quotients[0])


def test_as_flat_as_wanted_where_it_had_no_part_in_being_found() -> None:
    """Hessians of 1,500 samples, Gauss-Newton without the network: found on each, judged on the truth."""
    spectrum = torch.cat([torch.logspace(0, -1, 10), torch.logspace(-1.5, -5, 290)]).double()
    wanted = 0.01
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(1500, 300, generator=generator, dtype=torch.float64) * spectrum.sqrt()
        operator = Symmetric(drawn.T @ drawn / len(drawn))
        result = find(operator, 4, operator.eigenpairs()[1][:40], curvature=wanted, seed=seed)
        true = (result.vectors.square() @ spectrum.square()) / (result.vectors.square() @ spectrum)
        assert float(effective(result).max()) < FINDING_SHARE * wanted
        assert float(effective(result).median()) < float(true.median()) < wanted


def test_far_flatter_than_random_directions() -> None:
    operator = Symmetric.of(network_spectrum(1000))
    top = operator.eigenpairs()[1][:10]
    result = find(operator, 3, top)
    random = torch.randn(200, 1000, dtype=torch.float64)
    random -= random @ top.T @ top
    random /= random.norm(dim=1, keepdim=True)
    quotients = ((random @ operator.matrix) * random).sum(1).abs()
    others = lengths(operator, random).square() / quotients
    assert 5 * float(effective(result).max()) < float(others.median())
    assert 4 * float(effective(result).max()) < float(others.min())


def test_more_products_make_flatter_directions() -> None:
    operator = Symmetric.of(network_spectrum(300).abs())
    found = [float(effective(find(operator, 1, NOTHING, dimension=d))[0]) for d in (2, 5, 10, 20)]
    assert found == sorted(found, reverse=True)


def test_the_quadrature_is_what_the_direction_is_a_mixture_of() -> None:
    operator = Symmetric.of(network_spectrum(300))
    top = operator.eigenpairs()[1][:10]
    result = find(operator, 3, top, curvature=0.3)
    for quotient, quadrature in zip(result.rayleigh_quotients, result.quadratures, strict=True):
        assert float(quadrature.weights.sum()) == pytest.approx(1.0)
        assert float(quadrature.weights @ quadrature.nodes) == pytest.approx(float(quotient), rel=1e-6)


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
    assert sorted(result.product_norms.tolist()) == pytest.approx([1.0, 2.0, 3.0])
    assert sorted(result.rayleigh_quotients.tolist()) == pytest.approx([-2.0, 1.0, 3.0])


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
    flat_directions(operator, 3, basis_of(NOTHING), TINY, dimension=4, on_product=seen.append)
    assert seen == list(range(1, 13))


def test_long_vectors_without_top_modes() -> None:
    class Long:
        size = 70_000

        def matvec(self, vector: Tensor) -> Tensor:
            return vector * torch.linspace(0, 1, self.size)

    result = flat_directions(Long(), 2, basis_of(torch.empty(0, Long.size)), 0.1, dimension=5)
    assert_orthonormal(result.vectors, 5e-5)  # sums over long pieces in float32


def test_orthogonality() -> None:
    assert orthogonality(torch.eye(3)) == 0.0
    assert orthogonality(torch.eye(3)[:1]) == 0.0
    assert orthogonality(torch.tensor([[1.0, 0.0], [0.6, 0.8]])) == pytest.approx(0.6)
    assert orthogonality(torch.tensor([[1.0, 0.0], [-0.6, 0.8]])) == pytest.approx(0.6)
