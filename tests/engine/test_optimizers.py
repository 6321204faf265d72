"""What is read off live optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sgd_probe.engine.optimizers import OptimizerState, read_optimizer


def parameters(count: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(count)]


def read(**options: Any) -> OptimizerState:
    weights = parameters()
    return read_optimizer(torch.optim.SGD(weights, **{"lr": 0.1, **options}), weights)


@pytest.mark.parametrize(
    ("options", "expected", "effective"),
    [
        ({}, OptimizerState("SGD", 0.1, 0.0, 0.0, (0.0, 0.0), ""), 0.1),
        ({"momentum": 0.9}, OptimizerState("SGD", 0.1, 0.9, 0.0, (0.0, 0.0), ""), 1.0),
        (
            {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01},
            OptimizerState("SGD", 0.1, 0.9, 0.5, (0.01, 0.01), ""),
            0.5,
        ),
        ({"dampening": 0.5}, OptimizerState("SGD", 0.1, 0.0, 0.0, (0.0, 0.0), ""), 0.1),
        ({"lr": 0.0}, OptimizerState("SGD", 0.0, 0.0, 0.0, (0.0, 0.0), ""), 0.0),
        ({"lr": torch.tensor(0.25)}, OptimizerState("SGD", 0.25, 0.0, 0.0, (0.0, 0.0), ""), 0.25),
    ],
)
def test_sgd(options: dict[str, Any], expected: OptimizerState, effective: float) -> None:
    found = read(**options)
    assert found == expected
    assert found.effective_learning_rate == pytest.approx(effective)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"momentum": 0.9, "nesterov": True}, "Nesterov"),
        ({"maximize": True}, "maximises"),
        ({"momentum": 1.0}, "outside"),
        ({"momentum": 0.9, "dampening": 1.0}, "outside"),
        ({"momentum": 0.9, "dampening": -0.5}, "outside"),
    ],
)
def test_what_the_theory_does_not_cover_is_withheld(options: dict[str, Any], word: str) -> None:
    found = read(**options)
    assert word in found.withheld
    assert found.effective_learning_rate > 0  # observing goes on


def test_groups() -> None:
    first, second, third = parameters(3)
    groups: list[dict[str, Any]] = [
        {"params": [first], "weight_decay": 0.1},
        {"params": [second]},
        {"params": [third], "lr": 0.5, "momentum": 0.9},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    # Groups that differ in decay alone are covered; decays come in the order of the parameters.
    assert read_optimizer(optimizer, [second, first]).decays == (0.0, 0.1)
    assert read_optimizer(optimizer, [second, first]).withheld == ""
    assert "groups differ" in read_optimizer(optimizer, [first, third]).withheld
    # Groups without a probed parameter do not matter.
    alone = read_optimizer(optimizer, [third])
    assert (alone.learning_rate, alone.momentum, alone.withheld) == (0.5, 0.9, "")


def test_dampening_without_momentum_makes_no_difference_between_groups() -> None:
    first, second = parameters()
    groups: list[dict[str, Any]] = [{"params": [first], "dampening": 0.5}, {"params": [second]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert read_optimizer(optimizer, [first, second]).withheld == ""


@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_adaptive_optimizers_are_withheld(kind: type[torch.optim.Optimizer]) -> None:
    weights = parameters()
    found = read_optimizer(kind(weights, lr=0.01, weight_decay=0.1), weights)  # type: ignore[call-arg]
    assert found.name == kind.__name__
    assert "not proportional to the gradient" in found.withheld
    # Decoupled decay is no part of the gradient.
    assert (found.learning_rate, found.momentum, found.decays) == (0.01, 0.0, (0.0, 0.0))


def test_a_schedule_is_followed() -> None:
    weights = parameters()
    optimizer = torch.optim.SGD(weights, lr=0.4, momentum=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    rates = []
    for _ in range(3):
        rates.append(read_optimizer(optimizer, weights).learning_rate)
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.4, 0.2, 0.1])
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=10)
    state = read_optimizer(optimizer, weights)
    assert (state.learning_rate, state.momentum) == pytest.approx((0.016, 0.95))
    assert one_cycle.get_last_lr() == [state.learning_rate]


def test_the_dynamics_at_another_rate() -> None:
    state = read(momentum=0.9, dampening=0.5)
    assert state.dynamics().effective_learning_rate == pytest.approx(0.5)
    assert state.dynamics(0.2).effective_learning_rate == pytest.approx(1.0)


def test_one_line_for_people() -> None:
    assert read(momentum=0.9, dampening=0.1, weight_decay=0.01).describe() == (
        "SGD, learning rate 0.1, momentum 0.9, dampening 0.1, weight decay 0.01"
    )
