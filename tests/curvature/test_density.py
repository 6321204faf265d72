"""Quadratures and traces beside dense matrices, whose whole spectrum is known."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe.curvature.density import (
    SeenDensity,
    SpectralDensity,
    TraceEstimate,
    seen_density,
    spectral_density,
    trace,
)
from sgd_probe.curvature.flat import flat_directions
from sgd_probe.curvature.hessian import HessianOperator
from sgd_probe.curvature.krylov import BLOCK_ROWS
from sgd_probe.curvature.lanczos import lanczos
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import isolated
from tests.helpers.dense import Symmetric, dense_hessian, freeze, network_spectrum

DOUBLE = torch.empty(0, dtype=torch.float64)
SINGLE = torch.empty(0, dtype=torch.float32)


class Recording(Symmetric):
    """Keeps the vectors that it is multiplied with."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        self.seen: list[Tensor] = []

    def matvec(self, vector: Tensor) -> Tensor:
        self.seen.append(vector.clone())
        return super().matvec(vector)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def estimate(
    operator: Symmetric, *, probes: int = 6, steps: int = 30, seed: int = 0, like: Tensor = DOUBLE
) -> SpectralDensity:
    """A density whose claims about itself hold."""
    operator.products = 0
    found = spectral_density(operator, like, probes=probes, steps=steps, generator=seeded(seed))
    assert found.products == operator.products <= probes * steps
    assert found.size == operator.size
    assert found.nodes.shape == found.weights.shape == (probes, min(steps, operator.size))
    assert found.nodes.dtype == found.weights.dtype == torch.float64
    assert bool((found.nodes.diff(dim=1) >= 0).all()) and bool((found.weights >= 0).all())
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(probes, dtype=torch.float64))
    return found


def integral(found: SpectralDensity, width: float | None = None) -> float:
    reach = 2 * float(found.nodes.abs().max()) + 8 * (width or 1)
    points = torch.linspace(-reach, reach, 20_001, dtype=torch.float64)
    return float(torch.trapezoid(found.density(points, width), points))


@pytest.fixture(scope="module")
def network() -> tuple[Symmetric, SpectralDensity, TraceEstimate]:
    """A network's dense Hessian, and what its operator yields."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    batches = freeze([(torch.randn(33, 6).double(), torch.randint(0, 3, (33,)))])
    space = ParameterSpace.of(module)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    dense = Symmetric(dense_hessian(module, loss, batches, space.names))
    with isolated(module), HessianOperator(module, loss, batches, space) as operator:
        density = spectral_density(operator, DOUBLE, probes=100, steps=25, generator=seeded(1))
        traced = trace(operator, DOUBLE, probes=200, generator=seeded(2))
        assert operator.products == density.products + 200
    return dense, density, traced


def test_moments_of_a_network_within_their_standard_errors(
    network: tuple[Symmetric, SpectralDensity, TraceEstimate],
) -> None:
    dense, found, traced = network
    true, square = float(dense.matrix.trace()), float(dense.matrix.square().sum())
    assert abs(found.trace - true) <= 3.5 * found.trace_standard_error <= 0.3 * true
    assert abs(found.squared_norm - square) <= 3.5 * found.squared_norm_standard_error <= 0.5 * square
    assert abs(traced.value - true) <= 3.5 * traced.standard_error <= 0.25 * true


def test_density_of_a_network_is_that_of_its_eigenvalues(
    network: tuple[Symmetric, SpectralDensity, TraceEstimate],
) -> None:
    dense, found, _ = network
    values = dense.eigenpairs()[0]
    assert float(values.min()) < -0.01 * float(values.max())  # a spectrum with two sides
    every = SpectralDensity(values[None], torch.full((1, len(values)), 1 / len(values)).double(), 0, 0)
    points = torch.linspace(-1, 3, 2_001, dtype=torch.float64)
    for width in (0.02, 0.1):
        difference = (found.density(points, width) - every.density(points, width)).abs()
        assert float(torch.trapezoid(difference, points)) < 0.1  # of a total of one
    negative = float(found.weights[found.nodes < -1e-3].sum()) / len(found.nodes)
    assert negative == pytest.approx(float((values < -1e-3).double().mean()), abs=0.05)


@pytest.mark.parametrize("steps", [2, 5, 9])
def test_a_quadrature_of_m_nodes_is_exact_up_to_the_power_2m_minus_1(steps: int) -> None:
    operator = Recording(Symmetric.of(torch.linspace(-1, 1.5, 40).double(), seed=4).matrix)
    found = estimate(operator, probes=3, steps=steps)
    for probe, (nodes, weights) in enumerate(zip(found.nodes, found.weights, strict=True)):
        power = first = operator.seen[probe * steps]
        for degree in range(2 * steps):
            moment = float((weights * nodes**degree).sum())
            assert moment == pytest.approx(float(first @ power), rel=1e-9, abs=1e-12)
            power = operator.matrix @ power


def test_with_all_steps_nodes_are_eigenvalues_and_weights_are_overlaps() -> None:
    operator = Recording(Symmetric.of(torch.linspace(-2, 3, 25), seed=1).matrix)
    values, vectors = torch.linalg.eigh(operator.matrix)
    found = estimate(operator, probes=2, steps=100)
    for probe in range(2):
        torch.testing.assert_close(found.nodes[probe], values, rtol=0, atol=1e-10)
        overlaps = (operator.seen[25 * probe] @ vectors).square()
        torch.testing.assert_close(found.weights[probe], overlaps, rtol=0, atol=1e-10)


def test_standard_errors_are_what_they_say() -> None:
    operator = Symmetric.of(network_spectrum(60), seed=2)
    matrix = operator.matrix
    true = torch.stack([matrix.trace(), matrix.square().sum()])
    found = [estimate(operator, probes=12, steps=3, seed=seed) for seed in range(150)]
    values = torch.tensor([[f.trace, f.squared_norm] for f in found]).double()
    errors = torch.tensor([[f.trace_standard_error, f.squared_norm_standard_error] for f in found]).double()
    scores = (values - true) / errors
    assert bool((scores.mean(0).abs() < 0.5).all())
    assert bool((scores.abs() < 2.2).double().mean(0).ge(0.88).all())  # Student's t, 11 degrees: 0.95
    off_diagonal = matrix - torch.diag(matrix.diagonal())
    exact = math.sqrt(2 * float(off_diagonal.square().sum()) / 12)
    assert float(values[:, 0].std()) == pytest.approx(exact, rel=0.2)


@given(
    spectrum=st.lists(st.floats(-100, 100), min_size=1, max_size=20),
    steps=st.integers(2, 25),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_spectrum(spectrum: list[float], steps: int, seed: int) -> None:
    operator = Symmetric.of(spectrum, seed)
    found = estimate(operator, probes=2, steps=steps, seed=seed)
    largest = max(map(abs, spectrum)) + 1e-12
    assert float(found.nodes.abs().max()) <= largest * (1 + 1e-9)
    expected = trace(operator, DOUBLE, probes=2, generator=seeded(seed))  # of the very same probes
    assert found.trace == pytest.approx(expected.value, abs=1e-9 * largest * len(spectrum))


@pytest.mark.parametrize("like", [DOUBLE, SINGLE], ids=["float64", "float32"])
@pytest.mark.parametrize("spectrum", [[3.0] * 40, [0.0] * 40, [5.0, -3, 2] + [0.0] * 40, [1e-12, -1e-12] * 9])
def test_invariant_spaces_end_a_probe_early_and_lose_nothing(spectrum: list[float], like: Tensor) -> None:
    operator = Symmetric.of(spectrum, seed=3)
    found = estimate(operator, probes=4, steps=20, like=like)
    distinct = sorted(set(spectrum))
    tolerance = 1e3 * torch.finfo(like.dtype).eps * max(map(abs, spectrum))
    if like is DOUBLE:
        assert found.products <= 4 * (len(distinct) + 1)  # rounding may start one more
    heavy = found.nodes[found.weights > 1e-6]
    nearest = (heavy[:, None] - torch.tensor(distinct, dtype=torch.float64)).abs().min(dim=1).values
    assert float(nearest.max()) <= tolerance
    if len(distinct) == 1:
        assert found.trace == pytest.approx(sum(spectrum), abs=40 * tolerance)
        assert found.trace_standard_error <= 40 * tolerance


@pytest.mark.parametrize("value", [0.0, 2.0, -3e-7])
def test_a_space_of_one_weight(value: float) -> None:
    found = estimate(Symmetric(torch.tensor([[value]])), probes=2)
    assert found.trace == pytest.approx(value)
    assert found.squared_norm == pytest.approx(value**2)
    assert found.trace_standard_error == 0


def test_float32_is_as_good_as_float32_can_be() -> None:
    operator = Symmetric.of(network_spectrum(300), seed=5)
    single, double = (estimate(operator, steps=40, like=like) for like in (SINGLE, DOUBLE))
    assert single.trace == pytest.approx(double.trace, rel=1e-5)
    assert single.squared_norm == pytest.approx(double.squared_norm, rel=1e-5)
    torch.testing.assert_close(single.nodes[:, -5:], double.nodes[:, -5:], rtol=1e-4, atol=0)


def test_a_diagonal_has_an_exact_trace() -> None:
    operator = Symmetric(torch.diag(torch.linspace(-1, 5, 50).double()))
    found = trace(operator, DOUBLE, probes=3)
    assert operator.products == len(found.samples) == 3
    assert found.value == pytest.approx(100)
    assert found.standard_error < 1e-10


@pytest.mark.parametrize("spectrum", [network_spectrum(80), [0.0] * 5, [-4.0, -3]])
@pytest.mark.parametrize("width", [None, 0.3])
def test_density_integrates_to_one(spectrum: Tensor | list[float], width: float | None) -> None:
    found = estimate(Symmetric.of(spectrum), steps=20)
    assert integral(found, width) == pytest.approx(1.0, abs=1e-6)


def test_density_takes_points_of_any_shape_and_has_its_mass_where_the_eigenvalues_are() -> None:
    found = estimate(Symmetric.of([-4.0] * 10 + [6.0] * 30), probes=100)
    assert found.density(torch.zeros(2, 3, dtype=torch.float32)).shape == (2, 3)
    assert found.density(torch.tensor(6)).shape == ()
    left = torch.linspace(-8, 0, 4_001)
    share = float(torch.trapezoid(found.density(left, width=0.2), left.double()))
    assert share == pytest.approx(0.25, abs=0.03)


def test_one_probe_has_no_standard_error() -> None:
    found = estimate(Symmetric.of(network_spectrum(40)), probes=1)
    assert math.isfinite(found.trace) and math.isnan(found.trace_standard_error)
    assert math.isnan(found.squared_norm_standard_error)
    assert math.isnan(trace(Symmetric.of([1.0, 2]), DOUBLE, probes=1).standard_error)


def test_same_seed_same_answer_and_the_global_generator_is_left_alone() -> None:
    operator = Symmetric.of(network_spectrum(40))
    state = torch.get_rng_state()
    first, second, other = (estimate(operator, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.nodes, second.nodes) and torch.equal(first.weights, second.weights)
    assert not torch.equal(first.nodes, other.nodes)
    assert spectral_density(operator, DOUBLE).trace == spectral_density(operator, DOUBLE).trace
    assert trace(operator, DOUBLE).value == trace(operator, DOUBLE).value
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("probes", "steps"), [(0, 10), (3, 1), (-1, 2)])
def test_too_little_is_refused(probes: int, steps: int) -> None:
    with pytest.raises(ValueError, match=f"found {probes} and {steps}"):
        spectral_density(Symmetric.of([1.0, 2]), DOUBLE, probes=probes, steps=steps)


def test_no_probe_and_no_width_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 probe, found 0"):
        trace(Symmetric.of([1.0, 2]), DOUBLE, probes=0)
    with pytest.raises(ValueError, match="positive width, found 0"):
        estimate(Symmetric.of([1.0, 2])).density(DOUBLE, width=0)


class Diagonal:
    """Large, and sees how much is held while it multiplies."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.diagonal = torch.linspace(-1, 1, size)
        self.most = 0.0

    def matvec(self, vector: Tensor) -> Tensor:
        storages = {
            held.untyped_storage().data_ptr(): held.untyped_storage().nbytes()
            for held in gc.get_objects()
            if type(held) is Tensor
        }
        vectors = sum(held for held in storages.values() if held >= vector.nbytes) / vector.nbytes
        self.most = max(self.most, vectors)
        return self.diagonal * vector


def test_memory_is_that_of_the_steps() -> None:
    operator = Diagonal(200_000)
    spectral_density(operator, SINGLE, probes=3, steps=2 * BLOCK_ROWS)
    assert operator.most <= 2 * BLOCK_ROWS + 2 + 1  # and its own diagonal


class TestWhatASearchHasSeen:
    """The density that falls off a search for stiff and flat directions."""

    spectrum = torch.cat(
        [torch.tensor([50.0, 30.0, 20.0, 10.0, 8.0, 5.0, -3.0]), 0.5 * torch.linspace(0, 1, 293) ** 4]
    ).double()

    def searched(self, flat: int, max_vectors: int | None = None) -> SeenDensity | None:
        operator = Symmetric.of(self.spectrum)
        stiff = lanczos(operator, 5, DOUBLE, beside=flat, max_vectors=max_vectors)
        valley = flat_directions(operator, flat, stiff.krylov, 0.05, dimension=12)
        return seen_density(stiff.ritz_values, valley.rayleigh_quotients.tolist(), valley.seen, 300)

    @pytest.mark.parametrize("max_vectors", [None, 12], ids=["once", "restarted"])
    def test_it_has_the_trace_and_the_masses_of_the_spectrum(self, max_vectors: int | None) -> None:
        spectrum, found = self.spectrum, self.searched(6, max_vectors)
        assert found is not None
        assert torch.equal(found.nodes, found.nodes.sort().values)
        assert float(found.weights.sum()) == pytest.approx(1.0)
        assert found.trace == pytest.approx(float(spectrum.sum()), rel=0.04)
        for value in spectrum[:7].tolist():
            near = (found.nodes - value).abs() < 0.05
            assert float(found.weights[near].sum()) == pytest.approx(1 / 300, rel=0.05)
            assert bool((found.widths[near & (found.weights > 1 / 400)] == 0).all())
        for level in (0.02, 0.1, 0.3):
            share = float((spectrum < level).double().mean())
            # Each share lies evenly within its width.
            low, high = found.nodes - found.widths, found.nodes + found.widths
            below = ((level - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
            assert float(found.weights @ below) == pytest.approx(share, abs=0.08)

    def test_one_start_is_enough_and_none_has_seen_nothing_of_the_bulk(self) -> None:
        found = self.searched(1)
        assert found is not None and float(found.weights.sum()) == pytest.approx(1.0)
        assert self.searched(0) is None
