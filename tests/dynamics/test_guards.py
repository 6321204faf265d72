"""Guards: the edge of stability, norms that change, directions of a symmetry."""

from __future__ import annotations

import math

import pytest

from sgd_probe.dynamics.guards import along_symmetry, changed_norms, near_stability_edge
from sgd_probe.theory import SGDDynamics
from sgd_probe.theory.closed_forms import stationary_variance


@pytest.mark.parametrize(
    "dynamics",
    [SGDDynamics(0.1), SGDDynamics(0.1, momentum=0.9), SGDDynamics(0.1, momentum=0.9, nesterov=True)],
)
def test_near_the_edge_of_stability(dynamics: SGDDynamics) -> None:
    limit = 2 * (1 + dynamics.momentum) / dynamics.learning_rate
    if dynamics.nesterov:
        limit /= 1 + 2 * dynamics.momentum
    assert near_stability_edge(0.89 * limit, dynamics) == ""
    assert near_stability_edge(0.95 * limit, dynamics).startswith("at 95% of the stability limit")
    assert near_stability_edge(-limit, dynamics) == ""
    # Why: 5% of the eigenvalue change the variance by less than a half below the guard, by more above it.
    safe, edge = (
        stationary_variance(share * 1.05 * limit, 1, dynamics)
        / stationary_variance(share * limit, 1, dynamics)
        for share in (0.85, 0.935)
    )
    assert safe < 1.5 < edge


def test_weight_decay_counts_towards_the_edge() -> None:
    decayed = SGDDynamics(0.1, weight_decay=2.0)
    assert near_stability_edge(17.0, decayed) and not near_stability_edge(17.0, SGDDynamics(0.1))


def test_norms_that_change_are_named() -> None:
    before = {"layer.weight": 10.0, "bias": 1.0, "gone": 1.0, "zero": 0.0}
    (one, other) = changed_norms(before, {"layer.weight": 12.0, "bias": 1.05, "gone": 0.0, "zero": 1.0})
    assert one.startswith("the norm of layer.weight went from 10 to 12") and "0.69 times" in one
    assert other == "the norm of gone went from 1 to 0"
    assert changed_norms(before, before) == ()
    assert changed_norms({"a": 1.0}, {"a": math.nan}) == ()


def test_a_direction_along_the_weights_without_noise_is_a_symmetry() -> None:
    assert along_symmetry(0.9, 0.01, 0.1)
    assert along_symmetry(-0.9, 0.01, 0.1)
    assert not along_symmetry(0.9, 0.5, 0.1)
    assert not along_symmetry(0.3, 0.01, 0.1)
