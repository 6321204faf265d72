"""All modes at once: one mode as a special case, simulation, and the heat that flat modes give off."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.linalg import solve_discrete_lyapunov, sqrtm

from sgd_probe.theory import QuadraticEnsemble, SGDDynamics, SGDMode, closed_forms
from tests.theory.simulation import Array, Replicas

OPTIMIZERS = [
    SGDDynamics(0.1),
    SGDDynamics(0.05, momentum=0.8),
    SGDDynamics(0.05, momentum=0.8, nesterov=True, weight_decay=0.2),
    SGDDynamics(0.1, momentum=0.5, dampening=0.5, weight_decay=0.2, decoupled_weight_decay=True),
]


def ensemble(dynamics: SGDDynamics, noise: float = 0.6, seed: int = 0) -> QuadraticEnsemble:
    """A stiff, a soft and a nearly flat mode under 24 noisy Hessians."""
    rng = np.random.default_rng(seed)
    hessians = noise * rng.standard_normal((24, 3, 3))
    hessians = (hessians + hessians.transpose(0, 2, 1)) / 2
    hessians += np.diag([6.0, 2.0, 0.8]) - hessians.mean(0)
    gradients = rng.standard_normal((24, 3))
    return QuadraticEnsemble(hessians, gradients - gradients.mean(0), dynamics)


def simulate(quadratics: QuadraticEnsemble, steps: int, replicas: int, start: Array) -> Array:
    rng = np.random.default_rng(1)
    moving = Replicas(np.tile(start, (replicas, 1)), quadratics.dynamics)
    for _ in range(steps):
        drawn = rng.integers(len(quadratics.hessians), size=replicas)
        pulled = np.einsum("bij,bj->bi", quadratics.hessians[drawn], moving.weights)
        moving.step(pulled + quadratics.gradients[drawn])
    return moving.weights


def assert_covariance(samples: Array, expected: Array) -> None:
    centred = samples - samples.mean(0)
    products = np.einsum("bi,bj->bij", centred, centred)
    errors = products.std(0) / math.sqrt(len(samples))
    assert (abs(products.mean(0) - expected) < 4 * errors).all()
    assert (np.diag(errors) < 0.02 * np.diag(expected)).all(), "too few replicas"


@pytest.mark.parametrize("dynamics", OPTIMIZERS)
def test_transient_and_stationary_state_by_simulation(dynamics: SGDDynamics) -> None:
    quadratics = ensemble(dynamics)
    start = np.array([0.5, -1.0, 1.0])
    mean, covariance = quadratics.moments(9, start)
    samples = simulate(quadratics, 9, 40_000, start)
    np.testing.assert_allclose(samples.mean(0), mean, atol=4 * math.sqrt(np.diag(covariance).max() / 40_000))
    assert_covariance(samples, covariance)
    mean, covariance = quadratics.stationary()
    np.testing.assert_allclose(mean, 0, atol=0.2)
    samples = simulate(quadratics, 300, 40_000, np.zeros(3))
    assert_covariance(samples, covariance)


@pytest.mark.parametrize("dynamics", OPTIMIZERS)
def test_one_mode_is_a_special_case(dynamics: SGDDynamics) -> None:
    rng = np.random.default_rng(2)
    slopes, kicks = rng.standard_normal((2, 10))
    slopes, kicks = slopes - slopes.mean(), kicks - kicks.mean()
    quadratics = QuadraticEnsemble((3.0 + slopes)[:, None, None], kicks[:, None], dynamics)
    mode = SGDMode(
        3.0,
        float(kicks.var()),
        dynamics,
        hessian_variance=float(slopes.var()),
        covariance=float((slopes * kicks).mean()),
    )
    found = quadratics.stationary()[1][0, 0]
    assert found == pytest.approx(mode.stationary_variance(), rel=1e-9)
    assert (quadratics.variance_radius < 1) is mode.stability().variance
    mean, covariance = quadratics.moments(7, np.array([1.2]))
    expected = mode.moments(7, start=1.2)
    assert mean[0] == pytest.approx(expected.mean[-1], rel=1e-9)
    assert covariance[0, 0] == pytest.approx(expected.variance[-1], rel=1e-9)


def test_flat_modes_heat_stiff_ones() -> None:
    """Through Hessian noise off the diagonal, the flat one's spread adds to the stiff one's noise."""
    eta, stiff, flat, mixing = 0.1, 4.0, 0.05, 0.5
    hessians = np.zeros((4, 2, 2))
    hessians[:, 0, 0], hessians[:, 1, 1] = stiff, flat
    hessians[:, 0, 1] = hessians[:, 1, 0] = mixing * np.array([1, 1, -1, -1])
    gradients = np.array([[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
    covariance = QuadraticEnsemble(hessians, gradients, SGDDynamics(eta)).stationary()[1]
    for here, there, value in ((0, 1, stiff), (1, 0, flat)):
        # Heat of the other mode adds to the gradient noise of this one.
        noise = 1.0 + mixing**2 * covariance[there, there]
        expected = closed_forms.stationary_variance(value, noise, SGDDynamics(eta))
        assert covariance[here, here] == pytest.approx(expected, rel=1e-9)
    alone = closed_forms.stationary_variance(stiff, 1.0, SGDDynamics(eta))
    assert covariance[0, 0] > 1.2 * alone


def test_adam_with_a_frozen_preconditioner() -> None:
    """Modes of ``P^1/2 H P^1/2`` follow heavy ball with ``mu = d = beta_1``; those of H do not."""
    rng = np.random.default_rng(3)
    beta, eta = 0.9, 0.02
    root = rng.standard_normal((3, 3))
    hessian, noise = root @ root.T + np.eye(3), np.diag([1.0, 0.5, 2.0])
    precondition = np.diag([1.0, 4.0, 0.25])
    half = np.asarray(sqrtm(precondition).real)
    # Adam by itself, no modes: m' = beta m + (1 - beta) g, theta' = theta - eta P m'.
    kick = np.vstack([-eta * (1 - beta) * precondition, (1 - beta) * np.eye(3)])
    carry = np.vstack(
        [np.hstack([np.eye(3), -eta * beta * precondition]), np.hstack([np.zeros((3, 3)), beta * np.eye(3)])]
    )
    matrix = carry + np.hstack([kick @ hessian, np.zeros((6, 3))])
    theta = solve_discrete_lyapunov(matrix, kick @ noise @ kick.T)[:3, :3]
    values, modes = np.linalg.eigh(half @ hessian @ half)
    dynamics = SGDDynamics(eta, beta, beta)
    for value, mode in zip(values, modes.T, strict=True):
        projection = np.linalg.solve(half, mode)
        kicked = float(mode @ half @ noise @ half @ mode)
        expected = closed_forms.stationary_variance(float(value), kicked, dynamics)
        assert float(projection @ theta @ projection) == pytest.approx(expected, rel=1e-9)
    value, plain = (each[..., -1] for each in np.linalg.eigh(hessian))
    wrong = closed_forms.stationary_variance(float(value), float(plain @ noise @ plain), dynamics)
    assert abs(float(plain @ theta @ plain) / wrong - 1) > 0.05


def test_an_unstable_ensemble_is_refused() -> None:
    quadratics = ensemble(SGDDynamics(0.1), noise=12.0)
    assert quadratics.variance_radius > 1
    with pytest.raises(ValueError, match="variance radius"):
        quadratics.stationary()


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="expected Hessians"):
        QuadraticEnsemble(np.zeros((4, 2, 2)), np.zeros((4, 3)), SGDDynamics(0.1))
    with pytest.raises(ValueError, match="expected Hessians"):
        QuadraticEnsemble(np.zeros((4, 2, 2)), np.zeros(4), SGDDynamics(0.1))
