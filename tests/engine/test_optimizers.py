"""What is read off live optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sgd_probe.engine.optimizers import OptimizerReader, OptimizerState, read_optimizer, read_scales


def parameters(count: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(count)]


def read(**options: Any) -> OptimizerState:
    weights = parameters()
    return read_optimizer(torch.optim.SGD(weights, **{"lr": 0.1, **options}), weights)


@pytest.mark.parametrize(
    ("options", "expected", "effective"),
    [
        ({}, (0.1, 0.0, 0.0, (0.0, 0.0)), 0.1),
        ({"momentum": 0.9}, (0.1, 0.9, 0.0, (0.0, 0.0)), 1.0),
        ({"momentum": 0.9, "nesterov": True}, (0.1, 0.9, 0.0, (0.0, 0.0)), 1.0),
        ({"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01}, (0.1, 0.9, 0.5, (0.01, 0.01)), 0.5),
        ({"dampening": 0.5}, (0.1, 0.0, 0.0, (0.0, 0.0)), 0.1),
        ({"lr": 0.0}, (0.0, 0.0, 0.0, (0.0, 0.0)), 0.0),
        ({"lr": torch.tensor(0.25)}, (0.25, 0.0, 0.0, (0.0, 0.0)), 0.25),
    ],
)
def test_sgd(options: dict[str, Any], expected: tuple[Any, ...], effective: float) -> None:
    found = read(**options)
    assert (found.learning_rate, found.momentum, found.dampening, found.decays) == expected
    assert (found.shares, found.withheld, found.unpredicted) == ((1.0, 1.0), "", "")
    assert found.nesterov == options.get("nesterov", False)
    assert found.plain and found.coordinates == "weights"
    assert found.effective_learning_rate == pytest.approx(effective)


@pytest.mark.parametrize(
    ("options", "word"),
    [
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
    # Effective rates .1 and 5 (.5 at momentum .9): a share of .02, and no one momentum to predict with.
    apart = read_optimizer(optimizer, [first, third])
    assert apart.withheld == "" and "differ in momentum" in apart.unpredicted
    assert apart.shares == pytest.approx((0.02, 1.0))
    assert (apart.momentum, apart.effective_learning_rate) == pytest.approx((0.9, 5.0))
    assert apart.decay_factors == pytest.approx((0.002, 0.0))
    assert read_scales(optimizer, [first, third], apart) == pytest.approx([math.sqrt(0.02), 1.0])
    # Groups without a probed parameter do not matter.
    alone = read_optimizer(optimizer, [third])
    assert (alone.learning_rate, alone.momentum, alone.withheld) == (0.5, 0.9, "")


def test_dampening_without_momentum_makes_no_difference_between_groups() -> None:
    first, second = parameters()
    groups: list[dict[str, Any]] = [{"params": [first], "dampening": 0.5}, {"params": [second]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert read_optimizer(optimizer, [first, second]).withheld == ""


@pytest.mark.parametrize(
    ("kind", "options", "momentum", "effective"),
    [
        (torch.optim.AdamW, {}, 0.9, 0.01),
        (torch.optim.AdamW, {"amsgrad": True, "betas": (0.8, 0.95)}, 0.8, 0.01),
        (torch.optim.Adam, {"eps": 1e-3}, 0.9, 0.01),
        (torch.optim.RMSprop, {}, 0.0, 0.01),
        (torch.optim.RMSprop, {"centered": True}, 0.0, 0.01),
    ],
)
def test_adaptive_optimizers_are_plain_in_their_own_coordinates(
    kind: Any, options: dict[str, Any], momentum: float, effective: float
) -> None:
    """A step of the real optimizer is one of heavy ball in y = S^-1 theta."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": [weights[0]]}, {"params": [weights[1]], "lr": 0.004}]
    optimizer = kind(groups, lr=0.01, weight_decay=0.0, **options)
    before = read_optimizer(optimizer, weights)
    assert before.withheld == before.unpredicted == ""
    with pytest.raises(ValueError, match="to have made a step"):
        read_scales(optimizer, weights, before)
    buffers = [torch.zeros_like(weight) for weight in weights]
    steps = 7
    for _ in range(steps):
        for weight, buffer in zip(weights, buffers, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            taken = weight.grad if kind is torch.optim.RMSprop else (1 - momentum) * weight.grad
            buffer.mul_(momentum).add_(taken)
        old = [weight.detach().clone() for weight in weights]
        optimizer.step()
    found = read_optimizer(optimizer, weights)
    assert (found.momentum, found.effective_learning_rate) == pytest.approx((momentum, effective))
    assert found.shares == pytest.approx((1.0, 0.4)) and found.preconditioned and not found.plain
    scales = read_scales(optimizer, weights, found)
    assert scales is not None
    # Adam divides its buffer by 1 - beta_1^t while that fills.
    bias = 1.0 if kind is torch.optim.RMSprop else 1 - momentum**steps
    for weight, before_step, buffer, scale in zip(weights, old, buffers, scales, strict=True):
        moved = (weight.detach() - before_step) / scale
        torch.testing.assert_close(moved, -found.learning_rate * scale * buffer / bias, rtol=1e-9, atol=0)


def test_the_momentum_of_rmsprop_is_not_dampened() -> None:
    weights = parameters()
    found = read_optimizer(torch.optim.RMSprop(weights, lr=0.01, momentum=0.5), weights)
    assert (found.momentum, found.dampening, found.effective_learning_rate) == (0.5, 0.0, 0.02)


@pytest.mark.parametrize(("kind", "decoupled"), [(torch.optim.AdamW, True), (torch.optim.Adam, False)])
def test_decay_of_adaptive_optimizers(kind: type[torch.optim.Optimizer], decoupled: bool) -> None:
    first, second = parameters()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], "lr": 0.005}]
    found = read_optimizer(kind(groups, lr=0.01, weight_decay=0.1), [first, second])  # type: ignore[call-arg]
    assert found.decoupled == decoupled
    assert found.decay_is_preconditioned == (not decoupled)
    # Decoupled decay goes with each group's rate, coupled decay with S^2, in which the rate is already.
    assert found.decay_factors == pytest.approx((0.1, 0.05) if decoupled else (0.1, 0.1))


def test_a_parameter_without_a_gradient_yet_has_a_scale() -> None:
    first, second = parameters()
    optimizer = torch.optim.Adam([first, second], lr=0.1)
    first.grad = torch.ones(2)
    optimizer.step()
    scales = read_scales(optimizer, [first, second], read_optimizer(optimizer, [first, second]))
    assert scales is not None and scales[1] == 1.0


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.NAdam])
def test_optimizers_of_another_rule_are_withheld(kind: type[torch.optim.Optimizer]) -> None:
    weights = parameters()
    found = read_optimizer(kind(weights, lr=0.01), weights)  # type: ignore[call-arg]
    assert found.name == kind.__name__
    assert "is not known" in found.withheld
    assert (found.learning_rate, found.momentum, found.decays) == (0.01, 0.0, (0.0, 0.0))


def test_a_subclass_with_a_step_of_its_own_is_withheld() -> None:
    class Strange(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    weights = parameters()
    assert "is not known" in read_optimizer(Strange(weights), weights).withheld
    assert read_optimizer(type("Named", (torch.optim.AdamW,), {})(weights), weights).withheld == ""


def test_rates_that_part_are_seen() -> None:
    first, second = parameters()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    before = read_optimizer(optimizer, [first, second])
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    assert read_optimizer(optimizer, [first, second]).moves_as(before)
    optimizer.param_groups[0]["lr"] *= 0.5
    assert not read_optimizer(optimizer, [first, second]).moves_as(before)


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


def test_a_reader_follows_what_the_optimizer_says() -> None:
    """Schedules, settings, a group that is added and a parameter that changes its group."""
    weights = parameters(3)
    optimizer = torch.optim.SGD([{"params": weights[:2]}, {"params": weights[2:]}], lr=0.1, momentum=0.9)
    reader = OptimizerReader(optimizer, weights)
    first, second = optimizer.param_groups

    def move() -> None:
        second["params"].append(first["params"].pop())

    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: first.update(lr=0.05),
        lambda: second.update(lr=torch.tensor(0.2)),
        lambda: second["lr"].mul_(2),
        lambda: second.update(weight_decay=0.3),
        lambda: first.update(momentum=0.5),
        move,
        lambda: optimizer.add_param_group({"params": parameters(1)}),
    ]
    for change in changes:
        change()
        found = reader.read()
        assert found == read_optimizer(optimizer, weights)
        assert reader.read() is found


def test_a_reader_of_an_optimizer_that_nobody_knows() -> None:
    weights = parameters()
    optimizer = torch.optim.Adagrad(weights, lr=0.1)
    reader = OptimizerReader(optimizer, weights)
    assert reader.read() == read_optimizer(optimizer, weights)
    optimizer.param_groups[0]["lr"] = 0.2
    assert reader.read().learning_rate == 0.2
