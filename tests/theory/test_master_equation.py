"""Densities in one dimension: conservation, exact moments, and direct simulation on two landscapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from sgd_probe.theory import SGDDynamics, SGDMode, closed_forms
from sgd_probe.theory.master_equation import (
    Array,
    FluctuatingLoss,
    Grid,
    discrete_fokker_planck,
    euler_maruyama,
    evolve,
    langevin_propagator,
    master_equation,
    modified_equation,
)

ALL: list[Callable[[FluctuatingLoss, float], Any]] = [
    master_equation,
    discrete_fokker_planck,
    euler_maruyama,
    langevin_propagator,
    modified_equation,
]
POSITIVE = [each for each in ALL if each is not discrete_fokker_planck]
#: Those that take a step of SGD's own two moments.
EXACT = [discrete_fokker_planck, euler_maruyama]


class Landscape:
    """A set of minibatch losses that can be evaluated anywhere."""

    def __init__(
        self, slope: Callable[[Array], Array], hessian_noise: float = 0.0, *, symmetric: bool = False
    ) -> None:
        rng = np.random.default_rng(0)
        kicks = norm.ppf((np.arange(60) + 0.5) / 60) if symmetric else rng.exponential(size=60)
        self.kicks = (kicks - kicks.mean()) / kicks.std()
        wobbles = rng.standard_normal(60)
        self.wobbles = hessian_noise * (wobbles - wobbles.mean())
        self.slope = slope

    def gradient(self, weights: Array, batch: Any) -> Array:
        return np.asarray(self.slope(weights) + self.kicks[batch] + self.wobbles[batch] * np.sin(weights))

    def on(self, grid: Grid) -> FluctuatingLoss:
        batches = np.arange(len(self.kicks))[:, None]
        return FluctuatingLoss(grid, self.gradient(grid.centres[None], batches))

    def simulate(self, weights: Array, learning_rate: float, steps: int) -> Array:
        rng = np.random.default_rng(1)
        for _ in range(steps):
            drawn = rng.integers(len(self.kicks), size=len(weights))
            weights = weights - learning_rate * self.gradient(weights, drawn)
        return weights


QUADRATIC = Landscape(lambda x: x)
DOUBLE_WELL = Landscape(lambda x: x**3 - x, hessian_noise=0.2)
SYMMETRIC_WELL = Landscape(lambda x: x**3 - x, hessian_noise=0.2, symmetric=True)
GRID = Grid(-5.0, 5.0, 501)
WELLS = Grid(-3.0, 3.0, 501)


def dense(matrix: Any) -> Array:
    return np.asarray(matrix.todense() if hasattr(matrix, "todense") else matrix)


@pytest.mark.parametrize("equation", ALL)
@pytest.mark.parametrize(("landscape", "grid"), [(QUADRATIC, GRID), (DOUBLE_WELL, WELLS)])
def test_probability_is_conserved(
    equation: Callable[[FluctuatingLoss, float], Any], landscape: Landscape, grid: Grid
) -> None:
    matrix = dense(equation(landscape.on(grid), 0.1))
    scale = abs(matrix).sum(0).max()
    np.testing.assert_allclose(matrix.sum(0), 1.0, atol=1e-12 * scale)
    if equation in POSITIVE:
        assert matrix.min() >= 0


@pytest.mark.parametrize("learning_rate", [0.1, 0.5])
@pytest.mark.parametrize("cells", [301, 601])
@pytest.mark.parametrize(("landscape", "start"), [(QUADRATIC, 0.7), (DOUBLE_WELL, -0.4)])
def test_one_step_changes_two_moments_exactly(
    landscape: Landscape, start: float, cells: int, learning_rate: float
) -> None:
    """The sharp one: any loss, state-dependent noise, large steps; the Langevin equation cannot do it."""
    grid = Grid(-4.0, 4.0, cells)
    loss = landscape.on(grid)
    before = grid.gaussian(start, 0.25)
    moved = grid.centres - learning_rate * loss.gradients
    expected = [float((moved**order @ before).mean()) for order in (1, 2)]
    for equation in EXACT:
        after = equation(loss, learning_rate) @ before
        tolerance = 1e-11 if equation is discrete_fokker_planck else 1e-8  # a Gaussian feels the edges
        assert grid.moment(after) == pytest.approx(expected[0], abs=tolerance)
        assert grid.moment(after, 2) == pytest.approx(expected[1], abs=tolerance)
    exact = master_equation(loss, learning_rate) @ before
    assert grid.moment(exact) == pytest.approx(expected[0], abs=1e-12)
    assert 0 <= grid.moment(exact, 2) - expected[1] <= grid.width**2 / 4
    langevin = langevin_propagator(loss, learning_rate) @ before
    assert abs(grid.moment(langevin, 2) - expected[1]) > 2e-4


def test_langevin_in_a_quadratic_is_its_propagator() -> None:
    loss, learning_rate, before = QUADRATIC.on(GRID), 0.5, GRID.gaussian(1.0, 0.4)
    mode = SGDMode(1.0, 1.0, SGDDynamics(learning_rate)).langevin()
    after = langevin_propagator(loss, learning_rate) @ before
    assert GRID.moment(after) == pytest.approx(math.exp(-0.5), rel=1e-3)
    held = math.exp(-2 * mode.relaxation)
    assert GRID.variance(after) == pytest.approx(0.4**2 * held + mode.variance(1), rel=1e-3)


def test_stationary_variances_of_a_quadratic() -> None:
    learning_rate, dynamics = 0.5, SGDDynamics(0.5)
    loss, start = QUADRATIC.on(GRID), GRID.gaussian(0.0, 0.5)
    discrete = closed_forms.stationary_variance(1.0, 1.0, dynamics)
    expected = {
        master_equation: discrete,
        euler_maruyama: discrete,
        langevin_propagator: closed_forms.langevin_stationary_variance(1.0, 1.0, dynamics),
        modified_equation: closed_forms.modified_stationary_variance(1.0, 1.0, dynamics),
    }
    for equation, variance in expected.items():
        settled = evolve(equation(loss, learning_rate), start, 60)
        assert GRID.variance(settled) == pytest.approx(variance, rel=2e-3), equation
        assert GRID.edge(settled) < 1e-6


def test_the_discrete_equation_settles_at_the_exact_variance_on_coarse_cells() -> None:
    """Cells no narrower than a kick: the central scheme can be iterated, and its variance is exact."""
    learning_rate = 0.05
    grid = Grid(-13 * 0.07, 13 * 0.07, 27)
    loss = QUADRATIC.on(grid)
    settled = evolve(discrete_fokker_planck(loss, learning_rate), grid.gaussian(0.0, 0.2), 800)
    expected = closed_forms.stationary_variance(1.0, 1.0, SGDDynamics(learning_rate))
    assert grid.variance(settled) == pytest.approx(expected, rel=1e-5)
    langevin = closed_forms.langevin_stationary_variance(1.0, 1.0, SGDDynamics(learning_rate))
    assert abs(grid.variance(settled) - langevin) > 0.02 * langevin


@pytest.mark.parametrize("landscape", [QUADRATIC, DOUBLE_WELL])
def test_the_modified_equation_is_the_better_one(landscape: Landscape) -> None:
    """A step's second moment, with state-dependent noise or without: error eta^3 instead of eta^2."""
    grid, learning_rate = Grid(-3.0, 3.0, 601), 0.1
    loss, before = landscape.on(grid), grid.gaussian(-0.8, 0.15)
    expected = float((((grid.centres - learning_rate * loss.gradients) ** 2) @ before).mean())
    langevin, modified = (
        abs(grid.moment(equation(loss, learning_rate) @ before, 2) - expected)
        for equation in (langevin_propagator, modified_equation)
    )
    assert modified < langevin / 5


@pytest.mark.parametrize(
    ("landscape", "grid", "start", "learning_rate", "steps"),
    [
        (QUADRATIC, GRID, 1.0, 0.5, 5),
        (QUADRATIC, Grid(-10.0, 10.0, 1001), 0.0, 1.2, 12),
        (DOUBLE_WELL, WELLS, -1.0, 0.3, 40),
    ],
)
def test_the_master_equation_is_the_histogram_of_many_runs(
    landscape: Landscape, grid: Grid, start: float, learning_rate: float, steps: int
) -> None:
    runs = 100_000
    weights = np.random.default_rng(2).normal(start, 0.3, runs)
    weights = landscape.simulate(weights, learning_rate, steps)
    after = evolve(master_equation(landscape.on(grid), learning_rate), grid.gaussian(start, 0.3), steps)
    blocks = 20
    edges = grid.centres[0] - grid.width / 2 + grid.width * blocks * np.arange(grid.cells // blocks + 1)
    counts = np.histogram(weights, edges)[0]
    expected = after[: (len(edges) - 1) * blocks].reshape(-1, blocks).sum(1)
    if learning_rate < 1:  # beyond, the density falls into bumps narrower than a block
        errors = np.sqrt(expected * (1 - expected) / runs)
        seen = expected > 1e-3
        # Five standard errors and 3% of a block: cells have a width.
        assert (abs(counts / runs - expected)[seen] < 5 * errors[seen] + 0.03 * expected[seen]).all()
    for frequency in (1.0, 2.0, 5.0):
        waves = np.exp(1j * frequency * weights)
        error = math.sqrt((1 - abs(waves.mean()) ** 2) / runs)
        assert abs(waves.mean() - np.exp(1j * frequency * grid.centres) @ after) < 4 * error + 1e-3
    error = weights.std() / math.sqrt(runs)
    assert abs(grid.moment(after) - weights.mean()) < 4 * error
    squares = weights**2
    assert abs(grid.moment(after, 2) - squares.mean()) < 4 * squares.std() / math.sqrt(runs) + 1e-3
    assert grid.edge(after) < 1e-6


def test_langevin_misjudges_how_often_wells_are_changed() -> None:
    """At ``eta U'' = 0.6``, with symmetric noise: two right moments a step do better than Langevin's."""
    learning_rate, steps = 0.3, 40
    weights = SYMMETRIC_WELL.simulate(np.full(100_000, -1.0), learning_rate, steps)
    found = (weights > 0).mean()
    error = math.sqrt(found * (1 - found) / len(weights))
    loss, start = SYMMETRIC_WELL.on(WELLS), WELLS.gaussian(-1.0, 0.02)
    shares = {
        equation: float(evolve(equation(loss, learning_rate), start, steps)[WELLS.centres > 0].sum())
        for equation in POSITIVE
    }
    assert abs(shares[master_equation] - found) < 4 * error + 0.01 * found
    assert abs(shares[euler_maruyama] - found) < 0.03 * found
    assert shares[langevin_propagator] < 0.9 * found


def test_what_cannot_be_computed_is_refused() -> None:
    still = FluctuatingLoss(GRID, np.tile(GRID.centres, (2, 1)))
    with pytest.raises(ValueError, match="at least one cell"):
        euler_maruyama(still, 0.1)
    assert GRID.moment(master_equation(still, 0.1) @ GRID.gaussian(1.0, 0.1)) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="one row a batch"):
        FluctuatingLoss(GRID, np.zeros(GRID.cells))
    with pytest.raises(ValueError, match="at least 3 cells"):
        Grid(1.0, 0.0, 10)
    barrier = FluctuatingLoss(WELLS, np.stack([-5 * WELLS.centres + 1, -5 * WELLS.centres - 1]))
    with pytest.raises(ValueError, match="corrected diffusion"):
        modified_equation(barrier, 0.5)
