"""The exact recursion of one mode: against closed forms, against simulation, and in its limits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sgd_probe.theory import LangevinMode, MinibatchSampling, SGDDynamics, SGDMode, closed_forms
from tests.theory.simulation import Replicas, assert_mean_square, noisy_gradient

NOISE = 0.49
REPLICAS = 60_000
OPTIMIZERS = [
    SGDDynamics(0.1),
    SGDDynamics(0.1, momentum=0.9),
    SGDDynamics(0.1, momentum=0.6, dampening=0.3),
    SGDDynamics(0.1, momentum=0.8, nesterov=True),
    SGDDynamics(0.1, weight_decay=0.5),
    SGDDynamics(0.1, momentum=0.8, nesterov=True, weight_decay=0.5),
    SGDDynamics(0.1, weight_decay=0.5, decoupled_weight_decay=True),
    SGDDynamics(0.1, momentum=0.9, weight_decay=0.5, decoupled_weight_decay=True),
    SGDDynamics(0.1, momentum=0.9, nesterov=True, weight_decay=0.5, decoupled_weight_decay=True),
]

dynamics_strategy = st.builds(
    SGDDynamics,
    st.floats(1e-4, 1.0),
    st.floats(0.0, 0.95),
    weight_decay=st.floats(0, 0.5),
    decoupled_weight_decay=st.booleans(),
) | st.builds(
    lambda rate, momentum, decay, decoupled: SGDDynamics(rate, momentum, 0.0, True, decay, decoupled),
    st.floats(1e-4, 1.0),
    st.floats(0.01, 0.95),
    st.floats(0, 0.5),
    st.booleans(),
)


def settle(
    dynamics: SGDDynamics, eigenvalue: float, hessian_variance: float = 0.0, covariance: float = 0.0
) -> tuple[Replicas, np.random.Generator, int]:
    """Replicas in their stationary state, and the steps that it took."""
    rng = np.random.default_rng(hash((eigenvalue, dynamics.momentum, hessian_variance)) % 2**32)
    mode = SGDMode(eigenvalue, NOISE, dynamics, hessian_variance=hessian_variance)
    target = mode.stationary_variance()
    steps = next(t for t in itertools.count(20, 20) if abs(mode.variance(t) / target - 1) < 1e-4)
    replicas = Replicas(np.zeros(REPLICAS), dynamics)
    gradient = noisy_gradient(rng, eigenvalue, NOISE, hessian_variance, covariance)
    for _ in replicas.run(gradient, steps):
        pass
    return replicas, rng, steps


@pytest.mark.parametrize("eigenvalue", [1.0, 9.0])
@pytest.mark.parametrize("dynamics", OPTIMIZERS)
def test_stationary_state_by_simulation(dynamics: SGDDynamics, eigenvalue: float) -> None:
    mode = SGDMode(eigenvalue, NOISE, dynamics)
    replicas, rng, _ = settle(dynamics, eigenvalue)
    start = replicas.weights
    assert_mean_square(start, mode.stationary_variance())
    gradient = noisy_gradient(rng, eigenvalue, NOISE)
    for lag, weights in enumerate(replicas.run(gradient, 16), start=1):
        if lag in (1, 2, 5, 16):
            assert_mean_square(weights - start, mode.mean_squared_displacement(lag))


@pytest.mark.parametrize("covariance", [0.0, 0.3])
@pytest.mark.parametrize("dynamics", [OPTIMIZERS[0], OPTIMIZERS[1], OPTIMIZERS[3], OPTIMIZERS[7]])
def test_hessian_noise_by_simulation(dynamics: SGDDynamics, covariance: float) -> None:
    """Stationary, and the transient from a point off the centre, where the covariance counts."""
    eigenvalue, spread = 3.0, 1.0
    mode = SGDMode(eigenvalue, NOISE, dynamics, hessian_variance=spread, covariance=covariance)
    replicas, _, _ = settle(dynamics, eigenvalue, spread, covariance)
    assert_mean_square(replicas.weights, mode.stationary_variance())
    rng = np.random.default_rng(7)
    moving = Replicas(np.full(REPLICAS, 1.5), dynamics)
    gradient = noisy_gradient(rng, eigenvalue, NOISE, spread, covariance)
    moments = mode.moments(12, start=1.5)
    for t, weights in enumerate(moving.run(gradient, 12), start=1):
        assert_mean_square(weights - moments.mean[t], moments.variance[t])
        assert abs(weights.mean() - moments.mean[t]) < 4 * math.sqrt(moments.variance[t] / REPLICAS)


def test_flat_mode_under_hessian_noise_grows_geometrically() -> None:
    dynamics = SGDDynamics(0.1)
    mode = SGDMode(0.0, NOISE, dynamics, hessian_variance=9.0)
    grown = 1 + 0.1**2 * 9.0
    for steps in (1, 5, 40):
        expected = NOISE / 9.0 * (grown**steps - 1)
        assert mode.variance(steps) == pytest.approx(expected, rel=1e-10)
        found = closed_forms.variance_from_point(0.0, NOISE, steps, dynamics, hessian_variance=9.0)
        assert found == pytest.approx(expected, rel=1e-10)
    assert mode.diffusion_coefficient() == math.inf
    moving = Replicas(np.zeros(200_000), dynamics)
    gradient = noisy_gradient(np.random.default_rng(1), 0.0, NOISE, 9.0)
    for t, weights in enumerate(moving.run(gradient, 20), start=1):
        assert_mean_square(weights, mode.variance(t))


@pytest.mark.parametrize("buffer", ["empty", "warm"])
@pytest.mark.parametrize("dynamics", OPTIMIZERS[:4])
def test_flat_mode_with_either_buffer(dynamics: SGDDynamics, buffer: closed_forms.Buffer) -> None:
    mode = SGDMode(0.0, NOISE, dynamics)
    rng = np.random.default_rng(3)
    replicas = Replicas(np.zeros(REPLICAS), dynamics)
    gradient = noisy_gradient(rng, 0.0, NOISE)
    if buffer == "warm":
        for _ in replicas.run(gradient, 150):
            pass
    start = replicas.weights
    for t, weights in enumerate(replicas.run(gradient, 30), start=1):
        expected = closed_forms.free_mean_squared_displacement(NOISE, t, dynamics, buffer)
        assert mode.variance(t, buffer=buffer) == pytest.approx(expected, rel=1e-9)
        if t in (1, 2, 10, 30):
            assert_mean_square(weights - start, expected)
    assert mode.diffusion_coefficient() == pytest.approx(closed_forms.free_diffusion(NOISE, dynamics))


def test_the_undamped_first_buffer_dominates_early() -> None:
    """How far the dampened formula is off without it: ten times after 20 steps, 1.2 times after 500."""
    dynamics = SGDDynamics(0.1, momentum=0.9, dampening=0.9)
    like_it = SGDDynamics(0.01, momentum=0.9)  # the same but for its first step
    for steps, ratio in ((20, 10.1), (500, 1.20)):
        found = SGDMode(0.0, NOISE, dynamics).variance(steps) / SGDMode(0.0, NOISE, like_it).variance(steps)
        assert found == pytest.approx(ratio, rel=0.01)


def test_a_schedule_by_formula_and_simulation() -> None:
    dynamics = SGDDynamics(0.15, weight_decay=0.2)
    rates = (0.15 * 0.5 * (1 + np.cos(np.pi * np.arange(80) / 80))).tolist()
    mode = SGDMode(5.0, NOISE, dynamics)
    found = mode.variance(80, schedule=rates)
    assert found == pytest.approx(closed_forms.scheduled_variance(5.0, NOISE, rates, dynamics), rel=1e-10)
    replicas = Replicas(np.zeros(REPLICAS), dynamics)
    *_, last = replicas.run(noisy_gradient(np.random.default_rng(5), 5.0, NOISE), 80, rates)
    assert_mean_square(last, found)


@settings(deadline=None)
@given(dynamics=dynamics_strategy, share=st.floats(1e-3, 0.999), noise=st.floats(1e-6, 1e6))
def test_the_recursion_settles_at_the_closed_form(dynamics: SGDDynamics, share: float, noise: float) -> None:
    low, high = closed_forms.stability_interval(dynamics)
    mode = SGDMode(low + share * (high - low), noise, dynamics)
    settled = mode._settled
    assert settled is not None
    assert settled[0, 0, 0] == pytest.approx(mode.stationary_variance(), rel=1e-6)


@settings(deadline=None)
@given(dynamics=dynamics_strategy, share=st.floats(-0.1, 1.1), hessian=st.floats(0.0, 10.0))
def test_stability_is_where_the_second_moments_contract(
    dynamics: SGDDynamics, share: float, hessian: float
) -> None:
    """The closed form's interval against the spectral radius of the second-moment map."""
    low, high = closed_forms.stability_interval(dynamics)
    value = low + share * (high - low)
    step = dynamics.linear_step()
    pull = value + dynamics.coupled_decay
    matrix = np.array([[1 - step.decay + step.kick * pull, step.carry], [step.intake * pull, step.memory]])
    kick = np.array([step.kick, step.intake])
    second = np.kron(matrix, matrix)
    second[:, 0] += hessian * np.kron(kick, kick)
    radius = max(abs(np.linalg.eigvals(second)))
    assume(abs(radius - 1) > 1e-6 and min(abs(share), abs(share - 1)) > 1e-9)
    found = SGDMode(value, 1.0, dynamics, hessian_variance=hessian).stability()
    assert found.variance is bool(radius < 1)
    inside = found.variance_limits[0] < value < found.variance_limits[1]
    assert inside is found.variance
    assert found.mean is bool(max(abs(np.linalg.eigvals(matrix))) < 1)


def test_stability_of_plain_sgd() -> None:
    """``eta (lambda^2 + s^2) < 2 lambda``."""
    eta, hessian = 0.1, 40.0
    limits = closed_forms.stability_interval(SGDDynamics(eta), hessian)
    root = math.sqrt(1 - eta**2 * hessian)
    assert limits == pytest.approx(((1 - root) / eta, (1 + root) / eta), rel=1e-9)
    assert all(map(math.isnan, closed_forms.stability_interval(SGDDynamics(eta), 101.0)))
    assert closed_forms.stability_interval(SGDDynamics(eta)) == pytest.approx((0.0, 20.0))


@settings(deadline=None)
@given(
    dynamics=dynamics_strategy,
    share=st.floats(0.05, 0.95),
    lag=st.integers(1, 60),
)
def test_displacement_by_either_way(dynamics: SGDDynamics, share: float, lag: int) -> None:
    """The recursion with the start marked, and the correlation of the closed form."""
    low, high = closed_forms.stability_interval(dynamics)
    mode = SGDMode(low + share * (high - low), 1.0, dynamics)
    expected = mode.mean_squared_displacement(lag)
    assert recursive(mode).mean_squared_displacement(lag) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("eigenvalue", [-0.7, -1e-3, 0.0])
@pytest.mark.parametrize("dynamics", OPTIMIZERS[:4])
def test_unconfined_displacement_by_either_way(dynamics: SGDDynamics, eigenvalue: float) -> None:
    mode = SGDMode(eigenvalue, 1.0, dynamics)
    for lag in (1, 2, 30):
        expected = mode.mean_squared_displacement(lag)
        assert recursive(mode).mean_squared_displacement(lag) == pytest.approx(expected, rel=1e-9)


def recursive(mode: SGDMode) -> SGDMode:
    """The same mode, but no closed form: its sampling is not told to be independent."""

    class Unmarked(MinibatchSampling):
        @property
        def is_independent(self) -> bool:
            return False

    return SGDMode(mode.eigenvalue, mode.noise_variance, mode.dynamics, Unmarked())


@settings(deadline=None)
@given(dynamics=dynamics_strategy, eigenvalue=st.floats(0.1, 10.0))
def test_small_rates_join_the_langevin_equation(dynamics: SGDDynamics, eigenvalue: float) -> None:
    """At a relaxation of 1e-4 a step, in variance, displacement and transient."""
    small = 1e-4 * dynamics.learning_rate / dynamics.relaxation(eigenvalue)
    slow = SGDDynamics(
        small,
        dynamics.momentum,
        0.0,
        dynamics.nesterov,
        dynamics.weight_decay,
        dynamics.decoupled_weight_decay,
    )
    mode = SGDMode(eigenvalue, 1.0, slow, hessian_variance=0.5)
    langevin = mode.langevin()
    assert mode.stationary_variance() == pytest.approx(langevin.stationary_variance(), rel=1e-2)
    lag = 5_000
    found = SGDMode(eigenvalue, 1.0, slow).mean_squared_displacement(lag)
    expected = SGDMode(eigenvalue, 1.0, slow).langevin().mean_squared_displacement(lag)
    assert found == pytest.approx(expected, rel=2e-2)


@settings(deadline=None)
@given(rate=st.floats(1e-3, 1.0), pull=st.floats(1e-3, 1.99))
def test_the_modified_equation_lies_between(rate: float, pull: float) -> None:
    eigenvalue, dynamics = pull / rate, SGDDynamics(rate)
    langevin = closed_forms.langevin_stationary_variance(eigenvalue, 1.0, dynamics)
    modified = closed_forms.modified_stationary_variance(eigenvalue, 1.0, dynamics)
    discrete = closed_forms.stationary_variance(eigenvalue, 1.0, dynamics)
    assert langevin < modified < discrete
    # With the drift corrected and the diffusion not, it would lie on the other side.
    assert rate / (eigenvalue * (2 + pull)) < langevin


def test_orders_of_the_stationary_variance() -> None:
    """Relative errors for small ``e = eta lambda``: e / 2 for Langevin, e^2 / 2 for the modified equation."""
    for pull in (1e-2, 1e-3):
        eigenvalue, dynamics = pull / 0.1, SGDDynamics(0.1)
        discrete = closed_forms.stationary_variance(eigenvalue, 1.0, dynamics)
        langevin = closed_forms.langevin_stationary_variance(eigenvalue, 1.0, dynamics)
        modified = closed_forms.modified_stationary_variance(eigenvalue, 1.0, dynamics)
        assert discrete / langevin - 1 == pytest.approx(pull / 2, rel=2 * pull)
        assert discrete / modified - 1 == pytest.approx(pull**2 / 2, rel=2 * pull)


@pytest.mark.parametrize("eigenvalue", [-2.0, 0.0, 2.0, 12.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_weak_momentum_joins_plain_sgd(eigenvalue: float, nesterov: bool) -> None:
    plain, weak = SGDDynamics(0.1), SGDDynamics(0.1, momentum=1e-9, nesterov=nesterov)
    modes = [SGDMode(eigenvalue, NOISE, each) for each in (weak, plain)]
    assert modes[0].variance(9, start=1.0) == pytest.approx(modes[1].variance(9, start=1.0), rel=1e-6)
    assert modes[0].stationary_variance() == pytest.approx(modes[1].stationary_variance(), rel=1e-6)
    found, expected = (mode.mean_squared_displacement(7) for mode in modes)
    assert found == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(dynamics=dynamics_strategy, decay=st.floats(0.01, 1.0), eigenvalue=st.floats(0.0, 0.5))
def test_coupled_decay_adds_to_the_eigenvalue(dynamics: SGDDynamics, decay: float, eigenvalue: float) -> None:
    bare = SGDDynamics(dynamics.learning_rate, dynamics.momentum, 0.0, dynamics.nesterov)
    decayed = SGDDynamics(dynamics.learning_rate, dynamics.momentum, 0.0, dynamics.nesterov, decay)
    for quantity in ("stationary_variance", "diffusion_coefficient"):
        found, expected = (
            getattr(SGDMode(value, 1.0, each), quantity)()
            for value, each in ((eigenvalue, decayed), (eigenvalue + decay, bare))
        )
        assert found == pytest.approx(expected, rel=1e-9)
    found, expected = (
        SGDMode(value, 1.0, each).variance(20, start=1.0)
        for value, each in ((eigenvalue, decayed), (eigenvalue + decay, bare))
    )
    assert found == pytest.approx(expected, rel=1e-9)


def test_accumulation_averages_microbatches() -> None:
    """One step of A microbatches has the noise of the average: sigma^2 / A."""
    micro, gathered = MinibatchSampling(), MinibatchSampling(accumulation=4)
    assert gathered.noise_variance(1.0) == micro.noise_variance(1.0) / 4
    modes = [
        SGDMode(2.0, each.noise_variance(1.0), SGDDynamics(0.1, 0.9), each) for each in (micro, gathered)
    ]
    assert modes[1].variance(30) == pytest.approx(modes[0].variance(30) / 4, rel=1e-12)
    assert modes[1].stationary_variance() == pytest.approx(modes[0].stationary_variance() / 4, rel=1e-12)


def langevin_by_fine_steps(mode: LangevinMode, steps: int, start: float) -> tuple[float, float]:
    """Mean and variance by the midpoint rule, a thousand parts a step."""
    part, mean, second = 1e-3, start, start**2

    def slope(mean: float, second: float) -> tuple[float, float]:
        noise = mode.kick_variance + 2 * mode.covariance * mean + mode.relaxation_variance * second
        return -mode.relaxation * mean, -2 * mode.relaxation * second + noise

    for _ in range(round(steps / part)):
        half = slope(mean, second)
        full = slope(mean + part / 2 * half[0], second + part / 2 * half[1])
        mean, second = mean + part * full[0], second + part * full[1]
    return mean, second - mean**2


@pytest.mark.parametrize(
    "mode",
    [
        LangevinMode(0.3, 0.2),
        LangevinMode(0.3, 0.2, 0.1, 0.1),
        LangevinMode(0.2, 0.2, 0.2, -0.15),  # the covariance's share decays as fast as the mean
        LangevinMode(0.0, 0.2, 0.1),
        LangevinMode(-0.1, 0.2),
        LangevinMode(0.0, 0.2),
    ],
)
def test_langevin_moments_by_fine_steps(mode: LangevinMode) -> None:
    for start in (0.0, 1.3):
        mean, variance = langevin_by_fine_steps(mode, 6, start)
        found = mode.moments(6, start=start)
        assert found.mean[-1] == pytest.approx(mean, rel=1e-6)
        assert found.variance[-1] == pytest.approx(variance, rel=1e-5)
    scheduled = mode.variance(6, schedule=[1.0] * 6)
    assert scheduled == pytest.approx(mode.variance(6), rel=1e-12)
    if not math.isfinite(mode.stationary_variance()):  # from the critical point
        assert mode.mean_squared_displacement(6) == pytest.approx(mode.variance(6), rel=1e-9)


def test_the_counterpart_agrees_with_the_langevin_formulas() -> None:
    for dynamics, eigenvalue in itertools.product(OPTIMIZERS, (-0.8, 0.0, 2.0)):
        found = SGDMode(eigenvalue, NOISE, dynamics).langevin()
        expected = closed_forms.langevin_stationary_variance(eigenvalue, NOISE, dynamics)
        assert found.stationary_variance() == pytest.approx(expected, rel=1e-12)
        for lag in (1, 10):
            expected = closed_forms.langevin_mean_squared_displacement(eigenvalue, NOISE, lag, dynamics)
            assert found.mean_squared_displacement(lag) == pytest.approx(expected, rel=1e-12)


def test_diffusion_is_the_late_slope_of_the_displacement() -> None:
    for dynamics in OPTIMIZERS[:4]:
        for eigenvalue, limit in ((0.0, closed_forms.free_diffusion(NOISE, dynamics)), (1.0, 0.0)):
            mode = SGDMode(eigenvalue, NOISE, dynamics)
            late = mode.mean_squared_displacement(4000) - mode.mean_squared_displacement(2000)
            assert late / 4000 == pytest.approx(limit, rel=1e-6, abs=1e-12)
            assert mode.diffusion_coefficient() == pytest.approx(limit)
            flat = mode.langevin().diffusion_coefficient()
            assert flat == pytest.approx(limit)
        assert SGDMode(-1.0, NOISE, dynamics).diffusion_coefficient() == math.inf
        assert SGDMode(-1.0, NOISE, dynamics).langevin().diffusion_coefficient() == math.inf


def test_what_overflows_is_infinite() -> None:
    mode = SGDMode(-50.0, NOISE, SGDDynamics(0.1, 0.9))
    assert mode.variance(2000) == math.inf
    assert recursive(mode).mean_squared_displacement(2000) == math.inf
    assert SGDMode(1000.0, NOISE, SGDDynamics(0.1)).stationary_variance() == math.inf
    far = SGDMode(-1e4, NOISE, SGDDynamics(0.1)).langevin()
    assert far.variance(3) == far.mean_squared_displacement(3) == math.inf
    assert far.moments(3).mean.tolist() == [0.0] * 4
    assert closed_forms.modified_stationary_variance(0.0, NOISE, SGDDynamics(0.1)) == math.inf
    assert recursive(SGDMode(1000.0, NOISE, SGDDynamics(0.1))).stationary_variance() == math.inf
    assert recursive(SGDMode(1000.0, NOISE, SGDDynamics(0.1))).mean_squared_displacement(2) == math.inf


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eigenvalue": math.nan}, "eigenvalue"),
        ({"noise_variance": -1.0}, "noise_variance"),
        ({"hessian_variance": math.inf}, "hessian_variance"),
        ({"hessian_variance": 1.0, "covariance": 1.1}, "covariance"),
        ({"sampling": MinibatchSampling(4, 4, False)}, "two steps"),
        ({"sampling": MinibatchSampling(8, 4, False), "hessian_variance": 1.0}, "Hessian noise"),
    ],
)
def test_impossible_modes_are_refused(options: dict[str, float], named: str) -> None:
    settings = {"eigenvalue": 1.0, "noise_variance": 1.0, "dynamics": SGDDynamics(0.1), **options}
    with pytest.raises(ValueError, match=named):
        SGDMode(**settings)  # type: ignore[arg-type]


def test_formulas_refuse_what_they_do_not_hold_for() -> None:
    ball, shrunk = SGDDynamics(0.1, 0.9), SGDDynamics(0.1, weight_decay=0.1, decoupled_weight_decay=True)
    for dynamics in (ball, shrunk):
        with pytest.raises(ValueError, match="plain SGD"):
            closed_forms.modified_stationary_variance(1.0, 1.0, dynamics)
        with pytest.raises(ValueError, match="plain SGD"):
            closed_forms.scheduled_variance(1.0, 1.0, [0.1], dynamics)
    with pytest.raises(ValueError, match="plain SGD"):
        closed_forms.variance_from_point(1.0, 1.0, 3, ball)
    with pytest.raises(ValueError, match="Hessian noise"):
        closed_forms.mean_squared_displacement(0.0, 1.0, 3, ball, hessian_variance=1.0)
    with pytest.raises(ValueError, match="learning rate for each of 3 steps"):
        SGDMode(1.0, 1.0, ball).moments(3, schedule=[0.1])
