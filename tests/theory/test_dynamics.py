"""The linear step against the real torch.optim, by its response to unit inputs: no noise, no tolerance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sgd_probe.theory import SGDDynamics, SGDMode, closed_forms
from tests.theory.simulation import Replicas

STEPS = 60
SIGMA = 0.7
OPTIMIZERS = [
    SGDDynamics(0.1),
    SGDDynamics(0.1, dampening=0.5),  # PyTorch: no buffer, nothing to dampen
    SGDDynamics(0.1, momentum=0.9),
    SGDDynamics(0.1, momentum=0.9, dampening=0.9),
    SGDDynamics(0.1, momentum=0.8, nesterov=True),
    SGDDynamics(0.1, weight_decay=0.3),
    SGDDynamics(0.1, momentum=0.7, dampening=0.2, weight_decay=0.3),
    SGDDynamics(0.1, momentum=0.8, nesterov=True, weight_decay=0.3),
    SGDDynamics(0.1, weight_decay=0.4, decoupled_weight_decay=True),
    SGDDynamics(0.1, momentum=0.9, weight_decay=0.4, decoupled_weight_decay=True),
    SGDDynamics(0.1, momentum=0.9, nesterov=True, weight_decay=0.4, decoupled_weight_decay=True),
]
RATES = (0.1 * (1 + np.cos(np.linspace(0, 3, STEPS)))).tolist()


def responses(dynamics: SGDDynamics, eigenvalue: float, rates: list[float]) -> NDArray[np.float64]:
    """Weights after every step, (steps, 1 + steps): of a unit start, and of a unit kick at each step."""
    weights = torch.zeros(1 + len(rates), dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        weights[0] = 1.0
    optimizer = torch.optim.SGD(
        [weights],
        lr=1.0,
        momentum=dynamics.momentum,
        dampening=dynamics.dampening,
        nesterov=dynamics.nesterov,
        weight_decay=dynamics.coupled_decay,
    )
    path = []
    for t, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        weights.grad = eigenvalue * weights.detach().clone()
        weights.grad[1 + t] += 1.0
        if dynamics.decoupled_weight_decay:
            with torch.no_grad():
                weights.mul_(1 - rate * dynamics.weight_decay)
        optimizer.step()
        path.append(weights.detach().numpy().copy())
    return np.array(path)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("eigenvalue", [-0.5, 0.0, 1.0, 9.0])
@pytest.mark.parametrize("dynamics", OPTIMIZERS)
def test_moments_are_those_of_torch(dynamics: SGDDynamics, eigenvalue: float, scheduled: bool) -> None:
    rates = RATES if scheduled else [dynamics.learning_rate] * STEPS
    path = responses(dynamics, eigenvalue, rates)
    mode = SGDMode(eigenvalue, SIGMA**2, dynamics)
    found = mode.moments(STEPS, start=3.0, schedule=rates if scheduled else None)
    np.testing.assert_allclose(found.mean[1:], 3.0 * path[:, 0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.variance[1:], SIGMA**2 * (path[:, 1:] ** 2).sum(1), rtol=1e-9)


@pytest.mark.parametrize("dynamics", OPTIMIZERS)
def test_the_simulation_is_torch(dynamics: SGDDynamics) -> None:
    replicas = Replicas(np.eye(1 + STEPS)[0], dynamics)
    path = responses(dynamics, 2.0, RATES)
    for t, rate in enumerate(RATES):
        kick = np.eye(1 + STEPS)[1 + t]
        replicas.step(2.0 * replicas.weights + kick, rate)
        np.testing.assert_allclose(replicas.weights, path[t], rtol=1e-9, atol=1e-12)


def test_decoupled_decay_is_that_of_adamw() -> None:
    """An epsilon that swamps AdamW's second moment makes it a heavy ball with dampening beta_1."""
    steps, decay, huge = 800, 0.3, 1e9
    weights = torch.zeros(steps, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=0.1 * huge, eps=huge, weight_decay=decay / huge)
    for t in range(steps):
        weights.grad = 2.0 * weights.detach().clone()
        weights.grad[t] += 1.0
        optimizer.step()
    dynamics = SGDDynamics(0.1, 0.9, 0.9, weight_decay=decay, decoupled_weight_decay=True)
    found = float((weights.detach() ** 2).sum())
    assert found == pytest.approx(closed_forms.stationary_variance(2.0, 1.0, dynamics), rel=1e-6)


@pytest.mark.parametrize("dynamics", OPTIMIZERS)
def test_the_effective_rate_is_the_displacement_under_a_constant_gradient(dynamics: SGDDynamics) -> None:
    free = SGDDynamics(dynamics.learning_rate, dynamics.momentum, dynamics.dampening, dynamics.nesterov)
    replicas = Replicas(np.zeros(1), free)
    path = list(replicas.run(lambda weights: np.ones(1), 400))
    assert path[-2][0] - path[-1][0] == pytest.approx(free.effective_learning_rate, rel=1e-9)


@pytest.mark.parametrize("dynamics", OPTIMIZERS)
def test_slow_modes_relax_at_the_rate_that_it_says(dynamics: SGDDynamics) -> None:
    """The Langevin rate is the eigenvalue of the linear step nearest to one, to first order."""
    weak = SGDDynamics(
        dynamics.learning_rate,
        dynamics.momentum,
        dynamics.dampening,
        dynamics.nesterov,
        1e-5 * dynamics.weight_decay,
        dynamics.decoupled_weight_decay,
    )
    step, value = weak.linear_step(), 1e-5 + weak.coupled_decay
    matrix = [[1 - step.decay + step.kick * value, step.carry], [step.intake * value, step.memory]]
    slowest = max(np.linalg.eigvals(np.array(matrix)).real)
    assert 1 - slowest == pytest.approx(weak.relaxation(1e-5), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"nesterov": True}, "Nesterov"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov"),
        ({"weight_decay": -0.1}, "weight decay"),
        ({"weight_decay": math.nan}, "weight decay"),
    ],
)
def test_impossible_optimizers_are_refused(options: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SGDDynamics(0.1, **options)  # type: ignore[arg-type]
