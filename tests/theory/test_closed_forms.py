"""Every closed form against a simulation of torch.optim.SGD's own update.

Tolerances are in standard errors of the Monte Carlo: four of them, at fixed seeds.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sgd_probe.theory import closed_forms as theory
from sgd_probe.theory.closed_forms import SGDDynamics
from tests.helpers.simulation import HeavyBall

REPLICAS = 20_000
NOISE_VARIANCE = 0.49
SIGMAS = 4.0

# eta * lambda is eta * eigenvalue: from overdamped to beyond what plain SGD could bear.
CONFINED = [
    (SGDDynamics(0.1), 1.0),
    (SGDDynamics(0.1), 10.0),
    (SGDDynamics(0.1), 17.0),
    (SGDDynamics(0.02, momentum=0.9), 0.5),
    (SGDDynamics(0.1, momentum=0.9), 10.0),
    (SGDDynamics(0.1, momentum=0.9), 30.0),
    (SGDDynamics(0.1, momentum=0.5, dampening=0.3), 8.0),
    (SGDDynamics(0.2, momentum=0.9, dampening=0.5), 3.0),
    (SGDDynamics(0.1, momentum=0.0, dampening=0.5), 5.0),  # PyTorch: no buffer, nothing to dampen
]
FLAT = [SGDDynamics(0.1), SGDDynamics(0.1, momentum=0.9), SGDDynamics(0.3, momentum=0.7, dampening=0.6)]


def simulate(
    dynamics: SGDDynamics, eigenvalue: float, steps: int, ball: HeavyBall, seed: int = 0
) -> NDArray[np.float64]:
    """Positions after each of so many steps, shape (steps, replicas)."""
    rng = np.random.default_rng(seed)
    path = []
    for _ in range(steps):
        noise = math.sqrt(NOISE_VARIANCE) * rng.standard_normal(ball.position.shape)
        ball.step(eigenvalue * ball.position + noise, dynamics.learning_rate)
        path.append(ball.position)
    return np.array(path)


def new_ball(dynamics: SGDDynamics, replicas: int = REPLICAS) -> HeavyBall:
    return HeavyBall(np.zeros(replicas), dynamics.momentum, dynamics.dampening)


def settling_steps(dynamics: SGDDynamics, eigenvalue: float) -> int:
    """Steps after which the transient, PyTorch's undamped first buffer included, is under 1e-5."""
    turn = 1 + dynamics.momentum - dynamics.step * eigenvalue
    slowest = max(*abs(np.roots([1.0, -turn, dynamics.momentum])), 0.1)
    return math.ceil(math.log(1e-5) / math.log(slowest))


def assert_mean_square(samples: NDArray[np.float64], expected: float) -> None:
    squares = samples**2
    error = squares.std() / math.sqrt(len(squares))
    assert abs(squares.mean() - expected) < SIGMAS * error, (
        f"measured {squares.mean():.6g} +- {error:.2g}, theory {expected:.6g}"
    )


@pytest.mark.parametrize("dampening", [0.0, 0.4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_simulation_is_torch_sgd(momentum: float, dampening: float) -> None:
    rng = np.random.default_rng(0)
    start, kicks = rng.standard_normal(5), rng.standard_normal((60, 5))
    rates = np.linspace(0.2, 0.01, 60).tolist()
    curvature = np.linspace(-0.2, 3.0, 5)
    ball = HeavyBall(start.copy(), momentum, dampening)
    weights = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=1.0, momentum=momentum, dampening=dampening)
    for rate, kick in zip(rates, kicks, strict=True):
        ball.step(curvature * ball.position + kick, rate)
        optimizer.param_groups[0]["lr"] = rate
        weights.grad = torch.tensor(curvature) * weights.detach() + torch.tensor(kick)
        optimizer.step()
    np.testing.assert_allclose(weights.detach().numpy(), ball.position, rtol=1e-10)


@pytest.mark.parametrize(("dynamics", "eigenvalue"), CONFINED)
def test_stationary_variance_and_displacement(dynamics: SGDDynamics, eigenvalue: float) -> None:
    ball = new_ball(dynamics)
    simulate(dynamics, eigenvalue, settling_steps(dynamics, eigenvalue), ball, seed=1)
    start = ball.position
    assert_mean_square(start, theory.stationary_variance(eigenvalue, NOISE_VARIANCE, dynamics))
    path = simulate(dynamics, eigenvalue, 40, ball, seed=2)
    for lag in (1, 2, 3, 7, 16, 40):
        expected = theory.mean_squared_displacement(eigenvalue, NOISE_VARIANCE, lag, dynamics)
        assert_mean_square(path[lag - 1] - start, expected)


@pytest.mark.parametrize("dynamics", FLAT)
def test_free_displacement_with_a_warm_buffer(dynamics: SGDDynamics) -> None:
    ball = new_ball(dynamics)
    simulate(dynamics, 0.0, 0 if not dynamics.momentum else 200, ball, seed=3)
    start = ball.position
    path = simulate(dynamics, 0.0, 64, ball, seed=4)
    for lag in (1, 2, 5, 20, 64):
        expected = theory.free_mean_squared_displacement(NOISE_VARIANCE, lag, dynamics)
        assert_mean_square(path[lag - 1] - start, expected)
        assert theory.mean_squared_displacement(0.0, NOISE_VARIANCE, lag, dynamics) == expected


@pytest.mark.parametrize("dynamics", FLAT)
@pytest.mark.parametrize("pull", [-0.02, -0.4])
def test_growth_from_a_point_under_negative_curvature(dynamics: SGDDynamics, pull: float) -> None:
    """The buffer is warm with noise and the mode sits on its critical point when it starts."""
    eigenvalue = pull / dynamics.effective_learning_rate
    ball = new_ball(dynamics)
    simulate(dynamics, 0.0, 200, ball, seed=5)
    ball.position = np.zeros(REPLICAS)
    path = simulate(dynamics, eigenvalue, 30, ball, seed=6)
    for lag in (1, 2, 5, 30):
        expected = theory.mean_squared_displacement(eigenvalue, NOISE_VARIANCE, lag, dynamics)
        assert_mean_square(path[lag - 1], expected)


def test_growth_without_momentum_is_the_geometric_sum() -> None:
    dynamics, eigenvalue, lag = SGDDynamics(0.1), -2.0, 25
    grown = 1 + 0.1 * 2.0
    expected = 0.1**2 * NOISE_VARIANCE * (grown ** (2 * lag) - 1) / (grown**2 - 1)
    found = theory.mean_squared_displacement(eigenvalue, NOISE_VARIANCE, lag, dynamics)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dynamics", [SGDDynamics(0.1), SGDDynamics(0.1, 0.9), SGDDynamics(0.1, 0.6, 0.3)])
def test_langevin_equation_by_its_own_propagator(dynamics: SGDDynamics) -> None:
    """dx = -lambda x dt + sqrt(eta) sigma dW in steps of eta_eff, composed a hundred times finer."""
    eta = dynamics.effective_learning_rate
    for pull in (-0.15, 0.0, 0.07, 0.6):
        eigenvalue, variance, fine, lag = pull / eta, 0.0, eta / 100, 8
        for _ in range(100 * lag):  # midpoint rule for the variance from a point
            middle = variance + 0.5 * fine * (eta * NOISE_VARIANCE - 2 * eigenvalue * variance)
            variance += fine * (eta * NOISE_VARIANCE - 2 * eigenvalue * middle)
        if eigenvalue > 0:  # stationary: the start's own spread relaxes too
            held = math.exp(-eigenvalue * eta * lag)
            stationary = theory.langevin_stationary_variance(eigenvalue, NOISE_VARIANCE, dynamics)
            assert variance == pytest.approx(stationary * (1 - held**2), rel=1e-3)
            variance += stationary * (1 - held) ** 2
        found = theory.langevin_mean_squared_displacement(eigenvalue, NOISE_VARIANCE, lag, dynamics)
        assert found == pytest.approx(variance, rel=1e-3)


@pytest.mark.parametrize("pull", [1e-3, 0.5, 1.0, 1.9])
def test_discrete_over_langevin_variance(pull: float) -> None:
    dynamics = SGDDynamics(0.05)
    discrete = theory.stationary_variance(pull / 0.05, NOISE_VARIANCE, dynamics)
    langevin = theory.langevin_stationary_variance(pull / 0.05, NOISE_VARIANCE, dynamics)
    assert discrete / langevin == pytest.approx(2 / (2 - pull), rel=1e-12)


@pytest.mark.parametrize("dynamics", FLAT)
@pytest.mark.parametrize("eigenvalue", [1e-9, 1e-14, 1e-20, 1e-60])
def test_weak_curvature_joins_the_flat_mode(dynamics: SGDDynamics, eigenvalue: float) -> None:
    for lag in (1, 2, 10, 500):
        flat = theory.free_mean_squared_displacement(NOISE_VARIANCE, lag, dynamics)
        langevin_flat = 2 * lag * theory.free_diffusion(NOISE_VARIANCE, dynamics)
        for value in (eigenvalue, -eigenvalue):
            found = theory.mean_squared_displacement(value, NOISE_VARIANCE, lag, dynamics)
            assert found == pytest.approx(flat, rel=1e-5)
            langevin = theory.langevin_mean_squared_displacement(value, NOISE_VARIANCE, lag, dynamics)
            assert langevin == pytest.approx(langevin_flat, rel=1e-5)


@pytest.mark.parametrize("eigenvalue", [-3.0, 0.0, 2.0, 12.0])
@pytest.mark.parametrize("lag", [1, 4, 30])
def test_weak_momentum_joins_plain_sgd(eigenvalue: float, lag: int) -> None:
    plain, weak = SGDDynamics(0.1), SGDDynamics(0.1, momentum=1e-9)
    for formula in (theory.mean_squared_displacement, theory.langevin_mean_squared_displacement):
        found, expected = (formula(eigenvalue, NOISE_VARIANCE, lag, each) for each in (weak, plain))
        assert found == pytest.approx(expected, rel=1e-6)


@given(
    pull=st.floats(1e-6, 3.9), momentum=st.floats(0.0, 0.99), lag=st.integers(1, 300), noise=st.floats(0, 1e6)
)
def test_displacement_is_bounded_by_four_variances(
    pull: float, momentum: float, lag: int, noise: float
) -> None:
    dynamics = SGDDynamics(0.1, momentum)
    variance = theory.stationary_variance(pull / 0.1, noise, dynamics)
    found = theory.mean_squared_displacement(pull / 0.1, noise, lag, dynamics)
    if pull >= 2 * (1 + momentum):
        assert math.isinf(variance) and math.isinf(found)
    else:
        assert 0 <= found <= 4 * variance * (1 + 1e-9)


def test_the_stability_limit_is_where_the_recursion_turns_unstable() -> None:
    for dynamics in (SGDDynamics(0.1), SGDDynamics(0.1, 0.9), SGDDynamics(0.1, 0.9, 0.5)):
        for share, stable in ((0.999, True), (1.001, False)):
            pull = share * theory.stability_limit(dynamics) * dynamics.step
            roots = np.roots([1.0, -(1 + dynamics.momentum - pull), dynamics.momentum])
            assert bool(max(abs(roots)) < 1) is stable


@pytest.mark.parametrize("dynamics", FLAT)
def test_no_stationary_state_is_infinity(dynamics: SGDDynamics) -> None:
    limit = theory.stability_limit(dynamics)
    for eigenvalue in (0.0, -1.0, limit, 1.01 * limit, math.inf):
        assert theory.stationary_variance(eigenvalue, NOISE_VARIANCE, dynamics) == math.inf
    assert theory.mean_squared_displacement(1.01 * limit, NOISE_VARIANCE, 3, dynamics) == math.inf
    assert theory.langevin_stationary_variance(-1.0, NOISE_VARIANCE, dynamics) == math.inf


@pytest.mark.parametrize("dynamics", FLAT)
@pytest.mark.parametrize("lag", [2**14, 2**17])
def test_long_lags_neither_overflow_nor_lose_the_limit(dynamics: SGDDynamics, lag: int) -> None:
    for formula in (theory.mean_squared_displacement, theory.langevin_mean_squared_displacement):
        assert formula(-1.0, NOISE_VARIANCE, lag, dynamics) == math.inf
    variance = theory.stationary_variance(1.0, NOISE_VARIANCE, dynamics)
    settled = theory.mean_squared_displacement(1.0, NOISE_VARIANCE, lag, dynamics)
    assert settled == pytest.approx(2 * variance, rel=1e-9)
    langevin = theory.langevin_mean_squared_displacement(1.0, NOISE_VARIANCE, lag, dynamics)
    assert langevin == pytest.approx(
        2 * theory.langevin_stationary_variance(1.0, NOISE_VARIANCE, dynamics), rel=1e-9
    )


@pytest.mark.parametrize("eigenvalue", [-2.0, 0.0, 2.0])
def test_without_noise_nothing_moves(eigenvalue: float) -> None:
    for lag in (1, 64):
        assert theory.mean_squared_displacement(eigenvalue, 0.0, lag, SGDDynamics(0.1, 0.9)) == 0
        assert theory.langevin_mean_squared_displacement(eigenvalue, 0.0, lag, SGDDynamics(0.1)) == 0


def test_free_diffusion_with_momentum() -> None:
    dynamics = SGDDynamics(0.1, momentum=0.9, dampening=0.5)
    assert dynamics.effective_learning_rate == pytest.approx(0.5)
    assert theory.free_diffusion(2.0, dynamics) == pytest.approx(0.25)
    assert theory.momentum_kernel(1, 0.0) == 1.0
    assert theory.momentum_kernel(10**6, 0.9) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0.0,), "learning rate"),
        ((-0.1,), "learning rate"),
        ((math.nan,), "learning rate"),
        ((math.inf,), "learning rate"),
        ((0.1, 1.0), "momentum"),
        ((0.1, -0.1), "momentum"),
        ((0.1, math.nan), "momentum"),
        ((0.1, 0.9, 1.0), "dampening"),
        ((0.1, 0.9, -0.5), "dampening"),
    ],
)
def test_impossible_dynamics_are_refused(arguments: tuple[float, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SGDDynamics(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("eigenvalue", [-0.05, -1e-9, 0.0, 1e-9, 0.003, 0.4, 10.0, 15.0])
@pytest.mark.parametrize("steps", [1, 7, 500])
def test_growth_ratio_is_the_sum_of_what_is_left_of_each_kick(eigenvalue: float, steps: int) -> None:
    dynamics = SGDDynamics(0.1)
    left = [(1 - 0.1 * eigenvalue) ** (2 * age) for age in range(steps)]
    ratio = theory.growth_ratio(eigenvalue, steps, dynamics)
    assert ratio == pytest.approx(sum(left) / steps, rel=1e-6)
