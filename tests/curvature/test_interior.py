"""Directions between the stiff and the flat ones: at their levels, and honest about what they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sgd_probe.curvature.interior import INTERIOR_PRODUCTS, InteriorResult, choose, interior_directions
from sgd_probe.curvature.lanczos import LanczosResult, lanczos
from sgd_probe.theory.closed_forms import SGDDynamics, growth_ratio
from tests.helpers.dense import Symmetric, assert_orthonormal, network_spectrum

TOLERANCE = 1e-2


def take(
    operator: Symmetric,
    count: int,
    *,
    top: int = 5,
    dtype: torch.dtype = torch.float64,
    max_vectors: int | None = None,
    max_products: int | None = None,
    room: int | None = None,
) -> tuple[LanczosResult, InteriorResult]:
    generator = torch.Generator().manual_seed(0)
    like = torch.empty(0, dtype=dtype)
    stiff = lanczos(
        operator,
        top,
        like,
        tolerance=TOLERANCE,
        max_vectors=max_vectors,
        max_products=max_products,
        generator=generator,
    )
    return stiff, interior_directions(operator, stiff, count, tolerance=TOLERANCE, room=room)


def descending(*sizes: float) -> Tensor:
    return torch.tensor(sizes, dtype=torch.float64)


class TestChoice:
    def test_the_nearest_to_log_spaced_levels(self) -> None:
        values = descending(9, 8, 0.9, -0.5, 0.12, 0.1, -0.011, 0.0079, 0.003, 0.001)
        exact = torch.zeros(len(values))
        # From 8 down to 0.001: levels 0.4, 0.02 and 0.001, and 0.4 is nearer to 0.5 than to 0.12.
        assert choose(values, exact, 2, 3) == [3, 6, 9]
        assert choose(values, exact, 2, 1) == [9]

    @pytest.mark.parametrize("count", [1, 2, 5, 30, 100])
    def test_distinct_below_the_top_and_close_to_their_levels(self, count: int) -> None:
        values = torch.logspace(1, -2, 40, dtype=torch.float64)
        chosen = choose(values, torch.zeros(40), 10, count)
        assert len(chosen) == min(count, 30)
        assert chosen == sorted(set(chosen)) and chosen[0] >= 10 and chosen[-1] == 39
        if count <= 5:
            logs, start = values.log(), float(values[9].log())
            levels = torch.linspace(start, float(logs[-1]), count + 1, dtype=torch.float64)[1:]
            spacing = float(logs[0] - logs[1])
            assert float((logs[chosen] - levels).abs().max()) <= spacing / 2 + 1e-9

    def test_a_value_within_its_own_residual_is_not_told_from_zero(self) -> None:
        values = descending(10, 1, 0.5, -0.2, 0.1)
        residuals = descending(0, 0, 0.049, 0.021, 0.0099)  # of 10
        assert choose(values, residuals, 1, 9) == [1, 2, 4]

    def test_nor_is_rounding_an_eigenvalue(self) -> None:
        assert choose(descending(1, 1e-3, 1e-5), torch.zeros(3), 1, 2) == [1]

    def test_nothing_to_choose_from(self) -> None:
        assert choose(descending(3, 2), torch.zeros(2), 2, 4) == []
        assert choose(descending(3, 2), torch.zeros(2), 1, 0) == []
        assert choose(torch.zeros(4), torch.zeros(4), 1, 2) == []

    def test_of_equal_values_each_is_taken_once(self) -> None:
        assert choose(descending(1, 1, 1, 1), torch.zeros(4), 1, 2) == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("max_vectors", [None, 15])
def test_what_is_said_of_each_is_true(dtype: torch.dtype, max_vectors: int | None) -> None:
    """Restarts change nothing: what was found last is still a Krylov space."""
    operator = Symmetric.of(network_spectrum(300))
    stiff, found = take(operator, 4, top=8, dtype=dtype, max_vectors=max_vectors)
    assert (stiff.restarts > 0) == (max_vectors is not None)
    rows, scale = found.vectors.double(), 20.0
    assert found.vectors.dtype == dtype and len(rows) == 4
    assert_orthonormal(torch.cat([stiff.vectors.double(), rows]), 1e-5 if dtype == torch.float32 else 1e-10)
    images = rows @ operator.matrix
    torch.testing.assert_close(found.ritz_values, (images * rows).sum(1), rtol=0, atol=1e-5 * scale)
    residuals = (images - found.ritz_values[:, None] * rows).norm(dim=1) / scale
    torch.testing.assert_close(found.residuals, residuals, rtol=0.01, atol=1e-6)
    sizes = found.ritz_values.abs()
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
    assert float(sizes[0]) <= float(stiff.eigenvalues.abs()[-1]) * (1 + 1e-6)
    assert bool((sizes > found.residuals * scale).all())


def test_converged_ones_are_eigenvectors_and_only_those_are_called_so() -> None:
    """With gaps that a search for the largest resolves, and a bulk that it does not."""
    outliers = torch.tensor([20.0, 15, 12, 9, 7, 5, -4, 3])
    operator = Symmetric.of(torch.cat([outliers, torch.linspace(0.8, -0.4, 292)]))
    # A few products later the edge of the bulk is known to a tenth, though none of its eigenvectors is.
    _, found = take(operator, 8, max_products=12)
    assert True in found.converged.tolist() and False in found.converged.tolist()
    values, vectors = operator.eigenpairs()
    for value, row, converged, mixture in zip(
        found.ritz_values, found.vectors, found.converged.tolist(), found.quadratures, strict=True
    ):
        nearest = int((values - value).abs().argmin())
        cosine = abs(float(vectors[nearest] @ row))
        assert (mixture is None) == converged
        if converged:
            assert float(values[nearest]) == pytest.approx(float(value), rel=0.01)
            assert cosine > 0.99
        else:
            assert cosine < 0.95


def test_small_beside_the_largest_is_not_small_beside_its_own() -> None:
    """A bulk at a hundredth of the largest eigenvalue is within the tolerance as a whole."""
    operator = Symmetric.of(torch.cat([torch.tensor([100.0, 80, 60, 50, 40]), torch.linspace(1, 0.1, 295)]))
    _, found = take(operator, 4)
    assert bool((found.residuals <= TOLERANCE).all())
    own = found.residuals * 100 / found.ritz_values
    assert found.converged.tolist() == (own <= 0.1).tolist()
    assert False in found.converged.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("max_vectors", [None, 15])
def test_mixtures_have_the_moments_of_their_spectra(dtype: torch.dtype, max_vectors: int | None) -> None:
    operator = Symmetric.of(network_spectrum(300))
    stiff, found = take(operator, 6, top=8, dtype=dtype, max_vectors=max_vectors)
    mixed = [i for i, quadrature in enumerate(found.quadratures) if quadrature is not None]
    assert mixed and mixed == [i for i, c in enumerate(found.converged.tolist()) if not c]
    assert found.products == INTERIOR_PRODUCTS
    assert operator.products == stiff.products + INTERIOR_PRODUCTS
    for index in mixed:
        quadrature, row = found.quadratures[index], found.vectors[index].double()
        assert quadrature is not None
        image = row
        for power in range(4):
            exact = float(row @ image)
            moment = float(quadrature.weights @ quadrature.nodes**power)
            assert moment == pytest.approx(exact, rel=2e-3, abs=1e-6 * 20**power)
            image = operator.matrix @ image


def test_mixtures_predict_the_growth_that_a_single_eigenvalue_misses() -> None:
    """Variance of a direction after a window from a point, with noise proportional to |curvature|."""
    operator = Symmetric.of(network_spectrum(300))
    _, found = take(operator, 8)
    values, vectors = operator.eigenpairs()
    dynamics, steps = SGDDynamics(0.05), 200

    def growth(nodes: Tensor, weights: Tensor) -> float:
        noise = nodes.abs() * weights
        ratios = torch.tensor([growth_ratio(float(node), steps, dynamics) for node in nodes])
        return float(noise @ ratios.double() / noise.sum())

    compared = 0
    for row, value, quadrature in zip(found.vectors, found.ritz_values, found.quadratures, strict=True):
        if quadrature is not None:
            exact = growth(values, (vectors @ row).square())
            mixture = growth(quadrature.nodes, quadrature.weights)
            single = growth_ratio(float(value), steps, dynamics)
            assert abs(math.log(mixture / exact)) < abs(math.log(single / exact))
            compared += 1
    assert compared >= 4


def test_room_is_kept_to_but_for_what_was_taken() -> None:
    stiff, found = take(Symmetric.of(network_spectrum(300)), 4, room=3)
    assert len(stiff.krylov) == 5 + 4
    assert torch.equal(stiff.krylov.matrix(), torch.cat([stiff.vectors, found.vectors]))


def test_the_rest_of_the_space_is_still_there() -> None:
    operator = Symmetric.of(network_spectrum(300))
    stiff, found = take(operator, 4)
    assert len(stiff.krylov) == len(stiff.ritz_values) > 9
    assert torch.equal(stiff.krylov.matrix(stop=9), torch.cat([stiff.vectors, found.vectors]))
    assert_orthonormal(stiff.krylov.matrix(), 1e-10)
    quotients = (stiff.krylov.matrix() @ operator.matrix * stiff.krylov.matrix()).sum(1)
    torch.testing.assert_close(
        quotients.sort().values, stiff.ritz_values.sort().values, rtol=0, atol=1e-9 * 20
    )


def test_asking_for_none_costs_nothing() -> None:
    operator = Symmetric.of(network_spectrum(300))
    stiff, found = take(operator, 0)
    assert found.vectors.shape == (0, 300) and found.quadratures == () and found.products == 0
    assert operator.products == stiff.products


def test_where_the_search_has_seen_the_whole_space_all_are_eigenvectors() -> None:
    operator = Symmetric.of([5.0, 4, 3, 2, 1, 0.5, -0.25])
    stiff, found = take(operator, 9, top=2)
    assert len(stiff.krylov) == 7
    torch.testing.assert_close(found.ritz_values, descending(3, 2, 1, 0.5, -0.25))
    assert found.converged.all() and found.products == 0
