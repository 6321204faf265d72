"""The engine against torch.optim.SGD itself: what it takes for the gradient is what moved the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sgd_probe.dynamics import projection
from sgd_probe.dynamics.statistics import WindowStatistics
from tests.helpers.quadratic import Quadratic, make_engine, run_window

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """One step as the statistics were told of it."""

    x: Array
    g: Array
    x_after: Array
    learning_rate: float
    effective_learning_rate: float


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Seen]]:
    """Every step that reaches the statistics."""
    steps: list[Seen] = []
    update = WindowStatistics.update

    def spy(self: WindowStatistics, *arguments: Any, **named: Any) -> WindowStatistics:
        steps.append(Seen(*arguments))
        return update(self, *arguments, **named)

    monkeypatch.setattr(WindowStatistics, "update", spy)
    yield steps


class TwoGroups(Quadratic):
    """A quadratic with a second parameter, so that groups can differ."""

    def __init__(self) -> None:
        super().__init__((6.0, 3.0, 1.0, 0.1), start=2.0)
        self.bias = torch.nn.Parameter(torch.full((3,), 1.5, dtype=torch.float64))

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        coupling = (self.weight[:3] * self.bias).sum()
        return super().loss(batch) + self.bias.square().sum() + 0.3 * coupling + batch.mean(0)[:3] @ self.bias


@pytest.mark.parametrize("dampening", [0.0, 0.4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.05, 0.05), (0.3, 0.0)])
def test_the_observed_gradient_drives_the_momentum_buffer(
    seen: list[Seen], momentum: float, dampening: float, decays: tuple[float, float]
) -> None:
    module = TwoGroups()
    groups = [
        {"params": [module.weight], "weight_decay": decays[0]},
        {"params": [module.bias], "weight_decay": decays[1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=momentum, dampening=dampening)
    engine = make_engine(module, optimizer, top=5, window=60)
    buffers: list[Array] = []

    def before_step(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + 0.01 * step)
        if step == 0 and momentum:  # the buffer that the window inherits
            state = [optimizer.state[p]["momentum_buffer"] for p in (module.weight, module.bias)]
            assert engine.basis is not None
            buffers.append((engine.basis.vectors @ torch.cat(state)).numpy())

    result = run_window(engine, module, optimizer, before_step=before_step)
    assert result.steps == len(seen) == 60
    position = np.zeros(5)
    buffer = buffers[0] if momentum else np.zeros(5)
    for step, now in enumerate(seen):
        rate = 0.02 / (1 + 0.01 * step)
        assert now.learning_rate == rate
        assert now.effective_learning_rate == pytest.approx(
            rate * (1 - dampening if momentum else 1) / (1 - momentum)
        )
        np.testing.assert_allclose(now.x, position, rtol=1e-9, atol=1e-12)
        buffer = momentum * buffer + (1 - dampening) * now.g if momentum else now.g
        position = position - rate * buffer
        np.testing.assert_allclose(now.x_after, position, rtol=1e-9, atol=1e-12)


def test_clipping_is_seen(seen: list[Seen]) -> None:
    module = Quadratic((6.0, 3.0), start=5.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    engine = make_engine(module, optimizer, window=60)

    def clip(step: int) -> None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)

    run_window(engine, module, optimizer, before_step=clip)
    for now in seen:
        assert np.linalg.norm(now.g) <= 0.5 + 1e-6
        np.testing.assert_allclose(now.x_after, now.x - 0.02 * now.g, atol=1e-12)


def test_steps_that_are_not_finite_are_left_out(seen: list[Seen]) -> None:
    module = Quadratic((6.0, 3.0))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    engine = make_engine(module, optimizer, window=60)

    def before_step(step: int) -> None:
        grad = module.weight.grad
        assert grad is not None
        if step in (10, 20):  # what a gradient scaler makes of an overflow: no gradient, no step
            module.weight.grad = None
        if step == 30:
            optimizer.param_groups[0]["lr"] = 0.0
            grad[0] = torch.inf
        if step == 31:
            optimizer.param_groups[0]["lr"] = 0.02

    # A rate of zero times infinity is NaN: the weights are gone from there on.
    result = run_window(engine, module, optimizer, before_step=before_step)
    assert (result.steps, result.skipped_steps) == (28, 32)
    assert all(np.isfinite(now.x_after).all() for now in seen)
    assert any("32 steps were left out" in warning for warning in result.warnings)


def test_a_changed_weight_decay_costs_one_step(seen: list[Seen]) -> None:
    module = Quadratic((6.0, 3.0), start=2.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, weight_decay=0.5)
    engine = make_engine(module, optimizer, window=60)

    def before_step(step: int) -> None:
        optimizer.param_groups[0]["weight_decay"] = 0.5 if step < 20 else 0.1

    result = run_window(engine, module, optimizer, before_step=before_step)
    assert (result.steps, result.skipped_steps) == (59, 1)
    for now in seen:
        np.testing.assert_allclose(now.x_after, now.x - 0.02 * now.g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [60, 45])
def test_steps_projected_together_count_as_they_would_alone(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Through a decay that changes, a step without gradients, and a window that closes while steps wait."""

    def result(together: int) -> Any:
        monkeypatch.setattr(projection, "MOST_STEPS", together)
        module = TwoGroups()
        groups: list[dict[str, Any]] = [{"params": [p], "weight_decay": 0.0} for p in module.parameters()]
        groups[0]["weight_decay"] = 0.1
        optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.5)
        engine = make_engine(module, optimizer, top=5, window=60)

        def before_step(step: int) -> None:
            if step == 7:
                optimizer.param_groups[0]["weight_decay"] = 0.2
            if step == 20:
                module.weight.grad = module.bias.grad = None

        return run_window(engine, module, optimizer, steps=steps, before_step=before_step)

    one, several = result(1), result(16)
    # Left out: the step of the new decay and the one without gradients.
    assert one.steps == several.steps == steps - 2
    assert one.confinement_clock == several.confinement_clock
    for ours, theirs in zip(several.modes, one.modes, strict=True):
        for name in ("noise_kurtosis", "noise_share", "t_level", "t_trend", "drift_z", "end_eigenvalue"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-7, err_msg=name)
