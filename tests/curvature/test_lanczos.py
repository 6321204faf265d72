"""The Krylov solver on matrices whose spectrum is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sgd_probe.curvature.hessian import CurvatureError
from sgd_probe.curvature.krylov import KrylovBasis
from sgd_probe.curvature.lanczos import LanczosResult, lanczos, smallest_basis
from tests.helpers.dense import Symmetric, assert_orthonormal, largest_angle, network_spectrum

DOUBLE = torch.empty(0, dtype=torch.float64)
SINGLE = torch.empty(0, dtype=torch.float32)


def solve(
    operator: Symmetric,
    count: int,
    *,
    seed: int = 0,
    tolerance: float = 1e-8,
    like: Tensor = DOUBLE,
    max_products: int | None = 400,
    start: Tensor | None = None,
) -> LanczosResult:
    generator = torch.Generator().manual_seed(seed)
    result = lanczos(
        operator,
        count,
        like,
        tolerance=tolerance,
        max_products=max_products,
        start=start,
        generator=generator,
    )
    assert result.products == operator.products
    check_claims(operator, result, like.dtype, tolerance)
    return result


def check_claims(operator: Symmetric, result: LanczosResult, dtype: torch.dtype, tolerance: float) -> None:
    """What a result says of itself holds, whether it has converged or not."""
    vectors = result.vectors.double()
    eps = torch.finfo(dtype).eps
    scale = float(result.eigenvalues.abs().max().clamp_min(1e-300))
    true = (vectors @ operator.matrix - result.eigenvalues[:, None] * vectors).norm(dim=1) / scale
    floor = 100 * eps + 1e-3 * tolerance
    assert bool((true <= 1.5 * result.residuals + floor).all()), (true, result.residuals)
    assert bool((result.residuals <= 1.5 * true + floor).all()), (true, result.residuals)
    assert_orthonormal(vectors, atol=50 * eps)
    assert result.orthogonality <= 50 * eps
    magnitudes = result.eigenvalues.abs().tolist()
    assert magnitudes == sorted(magnitudes, reverse=True)
    assert result.vectors.dtype == dtype and result.eigenvalues.dtype == torch.float64


def assert_finds_the_top(operator: Symmetric, result: LanczosResult, rtol: float) -> None:
    values, _ = operator.eigenpairs()
    count = len(result.eigenvalues)
    scale = float(values[0].abs().clamp_min(1e-300))
    assert result.converged, result.message
    wrong = (result.eigenvalues.abs() - values[:count].abs()).abs() / scale
    assert float(wrong.max()) <= rtol, (result.eigenvalues, values[:count])


SPECTRA: dict[str, Tensor] = {
    "outliers": torch.cat([torch.arange(10.0, 0, -1), torch.linspace(-0.05, 0.05, 110)]),
    "both ends": torch.cat([torch.tensor([5.0, -4.5, 4, -3, 2.5, -2]), torch.linspace(-0.3, 0.3, 100)]),
    "negative": -network_spectrum(120),
    "network": network_spectrum(150),
    "no gap": torch.linspace(0.0, 1.0, 100),
    "huge": 1e12 * network_spectrum(100),
    "tiny": 1e-12 * network_spectrum(100),
}


@pytest.mark.parametrize("count", [1, 4, 10])
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenpairs_in_float64(name: str, count: int) -> None:
    operator = Symmetric.of(SPECTRA[name], seed=count)
    values, vectors = operator.eigenpairs()

    result = solve(operator, count)

    assert_finds_the_top(operator, result, rtol=1e-8)
    assert float(result.residuals.max()) <= 1e-8
    gap = float((values[:count, None] - values[None, count:]).abs().min() / values[0].abs())
    assert largest_angle(result.vectors, vectors[:count]) <= 1e-8 * count**0.5 / gap + 1e-12


@given(
    spectrum=st.lists(st.floats(-100, 100).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=30),
    count=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_spectrum(spectrum: list[float], count: int, seed: int) -> None:
    operator = Symmetric.of(spectrum, seed)
    result = solve(operator, count, seed=seed)
    assert len(result.eigenvalues) == min(count, len(spectrum))
    assert result.products <= len(spectrum)
    assert result.converged, result.message
    true, found = torch.tensor(spectrum, dtype=torch.float64), result.eigenvalues
    scale = float(true.abs().max())
    # Copies apart, which one starting vector need not see, none is passed over and none is made up.
    assert float((found[:, None] - true).abs().amin(dim=1).max()) <= 1e-7 * scale
    larger = true[true.abs() > found.abs().min() + 1e-6 * scale]
    assert not len(larger) or float((larger[:, None] - found).abs().amin(dim=1).max()) <= 1e-6 * scale


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["outliers", "both ends", "network"])
def test_float32_at_the_default_tolerance(name: str, seed: int) -> None:
    operator = Symmetric.of(SPECTRA[name], seed)
    result = solve(operator, 6, seed=seed, tolerance=1e-2, like=SINGLE, max_products=None)
    values, _ = operator.eigenpairs()
    assert result.converged
    bound = result.residuals * values[0].abs() + 1e-5 * values[0].abs()
    assert bool(((result.eigenvalues - values[:6]).abs() <= bound).all())
    assert result.products < 40


def test_costs_no_more_products_than_it_did() -> None:
    counts = []
    for seed in range(8):
        operator = Symmetric.of(network_spectrum(600), seed)
        result = solve(operator, 10, seed=seed, tolerance=1e-3, like=SINGLE, max_products=None)
        assert_finds_the_top(operator, result, rtol=1e-3)
        counts.append(result.products)
    assert max(counts) <= 22
    assert sum(counts) / len(counts) <= 20


@pytest.mark.parametrize("seed", range(20))
def test_a_late_outlier_is_not_missed(seed: int) -> None:
    # Ten equal-looking values have small residuals well before the rare eleventh shows itself.
    spectrum = torch.cat([torch.linspace(0.999, 1.0, 300), torch.tensor([1.3, -1.2])])
    operator = Symmetric.of(spectrum, seed)
    result = solve(operator, 2, seed=seed, tolerance=1e-2, like=SINGLE, max_products=None)
    assert_finds_the_top(operator, result, rtol=0.02)


class Diagonal(Symmetric):
    """Large and cheap."""

    def __init__(self, spectrum: Tensor) -> None:
        super().__init__(spectrum)

    def matvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix.to(vector) * vector


def like_a_trained_mlp(size: int) -> Tensor:
    outliers = [1, 0.37, 0.3, 0.22, 0.2, 0.15, 0.12, 0.1, 0.08, 0.063, 0.049, 0.044, 0.04, 0.035]
    bulk = 0.025 * torch.rand(size - len(outliers), generator=torch.Generator().manual_seed(0)) ** 4
    return torch.cat([torch.tensor(outliers), bulk])


def crowded_below_twelve_outliers(size: int) -> Tensor:
    outliers = torch.tensor([1.3, -1.2, *(1.05 + 0.02 * i for i in range(10))])
    return torch.cat([torch.linspace(0.9, 1.0, size - len(outliers)), outliers])


def like_a_small_cnn(size: int) -> Tensor:
    outliers = [1, 0.728, 0.464, 0.429, 0.37, 0.327, 0.289, 0.263, 0.243, 0.237, 0.216, 0.204, 0.197, 0.188]
    bulk = 0.175 * torch.rand(size - len(outliers), generator=torch.Generator().manual_seed(0)) ** 30
    return torch.cat([torch.tensor(outliers), bulk])


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
@pytest.mark.parametrize(
    "spectrum",
    [
        network_spectrum(4_000),
        like_a_trained_mlp(4_000),
        like_a_small_cnn(4_000),
        crowded_below_twelve_outliers(4_000),
        torch.arange(1, 4_001) ** -1.0 * torch.tensor([1.0, -1.0]).repeat(2_000),
        torch.arange(1, 4_001) ** -1.5,
    ],
    ids=["network", "mlp", "cnn", "crowded", "power 1", "power 1.5"],
)
def test_a_wrong_set_is_rare(spectrum: Tensor, tolerance: float) -> None:
    # Residuals alone would have stopped on one in a tenth of these searches.
    magnitudes = spectrum.abs().sort(descending=True).values[:10].double()
    wrong = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        result = lanczos(Diagonal(spectrum), 10, SINGLE, tolerance=tolerance, generator=generator)
        assert result.converged
        error = (result.eigenvalues.abs() - magnitudes).abs().max() / magnitudes[0]
        wrong += float(error) > 2 * tolerance
    assert wrong <= 2


@pytest.mark.parametrize("like", [DOUBLE, SINGLE], ids=["float64", "float32"])
@pytest.mark.parametrize("seed", range(5))
def test_a_start_orthogonal_to_the_top_does_not_hide_it(seed: int, like: Tensor) -> None:
    operator = Symmetric.of(SPECTRA["outliers"], seed)
    _, vectors = operator.eigenpairs()
    for start in (vectors[1:].sum(0), vectors[5], vectors[1:10].sum(0), 1e-9 * vectors[3], 1e9 * vectors[3]):
        operator.products = 0
        result = solve(operator, 3, seed=seed, tolerance=1e-3, like=like, start=start)
        assert_finds_the_top(operator, result, rtol=1e-3)


def test_a_start_on_the_axes_of_a_diagonal_matrix() -> None:
    # In exact arithmetic the Krylov space of an eigenvector is that eigenvector.
    operator = Symmetric(torch.diag(SPECTRA["outliers"]))
    start = torch.eye(operator.size, dtype=torch.float64)[7]
    assert_finds_the_top(operator, solve(operator, 4, start=start), rtol=1e-8)


def test_the_start_is_not_written_to() -> None:
    operator = Symmetric.of(SPECTRA["outliers"])
    start = torch.full((operator.size,), 2.0, dtype=torch.float64)
    solve(operator, 2, start=start)
    assert bool((start == 2).all())


@pytest.mark.parametrize(
    ("spectrum", "count"),
    [
        ([3.0] * 40, 4),  # the identity
        ([0.0] * 40, 4),  # nothing at all
        ([5.0, 3, -2] + [0.0] * 40, 6),  # rank below the number asked for
        ([10.0] * 5 + [1.0] * 60, 10),
        ([10.0, 10, 9, 8, 7, 6, 5, 5, 5] + [0.0] * 60, 3),
        ([10.0, 10, 10, -9, -9, 8, 8, 7, 7, 6, 6, 5, 5] + [1.0] * 60, 5),
        ([2.0, -2] * 20, 3),
        ([1.0], 1),
        ([1.0], 5),
        ([-3.0, 2], 5),
        ([3.0, 2, 1, 0.5], 3),
        ([3.0, 2, 1, 0.5, 0.2, 0.1], 3),
        ([0.0], 2),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_multiple_eigenvalues_low_ranks_and_small_spaces(
    spectrum: list[float], count: int, seed: int
) -> None:
    operator = Symmetric.of(spectrum, seed)
    result = solve(operator, count, seed=seed, tolerance=1e-3)
    assert len(result.eigenvalues) == min(count, len(spectrum))
    assert_finds_the_top(operator, result, rtol=1e-9)


def test_of_an_exactly_double_outlier_one_copy_is_found() -> None:
    # The known limit of a single starting vector: what is returned are eigenpairs, the copy may be missing.
    operator = Symmetric.of(torch.cat([torch.tensor([10.0, 10, 9, 8]), torch.linspace(-0.5, 0.5, 150)]))
    result = solve(operator, 3, tolerance=1e-3)
    assert result.eigenvalues[0].item() == pytest.approx(10, rel=1e-6)
    for value in result.eigenvalues.tolist():
        assert min(abs(value - true) for true in (10, 9, 8)) < 1e-2


def test_the_limit_is_a_limit_and_is_admitted() -> None:
    operator = Symmetric.of(torch.linspace(0, 1, 500))
    result = solve(operator, 10, max_products=15, tolerance=1e-6)
    assert result.products == 15
    assert not result.converged
    assert "limit of 15" in result.message
    assert float(result.residuals.max()) > 1e-6


def test_fewer_products_than_pairs() -> None:
    result = solve(Symmetric.of(network_spectrum(60)), 10, max_products=4)
    assert len(result.eigenvalues) == len(result.vectors) == len(result.residuals) == 4
    assert not result.converged


def test_same_seed_same_answer() -> None:
    first, second = (solve(Symmetric.of(SPECTRA["network"]), 3, seed=5, tolerance=1e-2) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.eigenvalues, second.eigenvalues)


def test_progress_is_reported_product_by_product() -> None:
    seen: list[int] = []
    result = lanczos(Symmetric.of(SPECTRA["outliers"]), 3, DOUBLE, on_product=seen.append)
    assert seen == list(range(1, result.products + 1))


class Broken(Symmetric):
    """Turns bad after a few products."""

    def __init__(self, how: str) -> None:
        super().__init__(Symmetric.of(SPECTRA["outliers"]).matrix)
        self.how = how

    def matvec(self, vector: Tensor) -> Tensor:
        product = super().matvec(vector)
        if self.products == 5:
            if self.how == "raise":
                raise CurvatureError("expected a finite Hessian-vector product, found inf or nan")
            product[3] = float(self.how)
        return product


@pytest.mark.parametrize("how", ["raise", "nan", "inf", "-inf"])
def test_products_that_are_not_finite_end_in_an_error_that_says_so(how: str) -> None:
    operator = Broken(how)
    with pytest.raises(CurvatureError, match="expected a finite"):
        lanczos(operator, 3, DOUBLE)
    assert operator.products == 5  # at once


@pytest.mark.parametrize("sign", [1, -1])
def test_scale_and_sign_change_nothing_else(sign: int) -> None:
    spectrum = SPECTRA["both ends"]
    reference = solve(Symmetric.of(spectrum), 5)
    other = solve(Symmetric.of(sign * 1e6 * spectrum), 5)
    torch.testing.assert_close(other.eigenvalues, sign * 1e6 * reference.eigenvalues)
    assert largest_angle(other.vectors, reference.vectors) < 1e-6
    for a, b in itertools.pairwise(other.eigenvalues.abs().tolist()):
        assert a >= b


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vectors", [16, 18, 20])
def test_a_restarted_basis_finds_the_same_pairs(vectors: int, seed: int) -> None:
    operator = Symmetric.of(network_spectrum(300), seed=seed)
    free = lanczos(operator, 10, DOUBLE, tolerance=1e-8, max_products=400)
    operator = Symmetric.of(network_spectrum(300), seed=seed)
    bound = lanczos(operator, 10, DOUBLE, tolerance=1e-8, max_products=2_000, max_vectors=vectors)
    assert_orthonormal(bound.vectors, atol=1e-12)  # every restart rounds once more
    assert bound.converged, bound.message
    assert bound.restarts > 0
    torch.testing.assert_close(bound.eigenvalues, free.eigenvalues, atol=1e-7, rtol=0)
    assert largest_angle(bound.vectors, free.vectors) < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_basis_knows_when_it_is_done(seed: int) -> None:
    # Two new vectors from restart to restart are too few to say that nothing else is on its way.
    outliers = [
        1,
        0.266,
        0.188,
        -0.138,
        -0.104,
        0.097,
        0.084,
        0.071,
        0.069,
        -0.068,
        0.067,
        0.065,
        -0.063,
        0.062,
    ]
    operator = Symmetric.of(torch.cat([torch.tensor(outliers), torch.linspace(-0.03, 0.06, 900)]), seed)
    result = lanczos(operator, 10, DOUBLE, tolerance=1e-3, max_vectors=smallest_basis(10))
    assert_finds_the_top(operator, result, rtol=1e-6)
    assert result.restarts > 0


def test_too_small_a_basis_is_refused() -> None:
    operator = Symmetric.of(network_spectrum(300))
    with pytest.raises(ValueError, match="room for at least 16 vectors, found 15"):
        lanczos(operator, 10, DOUBLE, max_vectors=15)


@pytest.mark.parametrize("size", [7, 8, 9, 65_536, 70_001])
def test_a_krylov_basis_rotates_in_place_and_lets_go_of_the_rest(size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.linalg.qr(torch.randn(size, min(size, 19), generator=generator, dtype=torch.float64)).Q.T
    basis = KrylovBasis(DOUBLE, size)
    for row in rows:
        basis.append(row)
    assert torch.equal(basis.matrix(), rows)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    left = vector.clone()
    taken = basis.orthogonalise(left)
    torch.testing.assert_close(taken, rows @ vector)
    torch.testing.assert_close(left, vector - rows.T @ (rows @ vector), atol=1e-10, rtol=0)
    turn = torch.linalg.qr(torch.randn(len(rows), 3, generator=generator, dtype=torch.float64)).Q
    basis.rotate(turn)
    assert len(basis) == 3
    torch.testing.assert_close(basis.matrix(), turn.T @ rows)
    assert basis.rows_held <= 8
