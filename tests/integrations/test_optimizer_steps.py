"""Every step of an optimizer is told of once, whatever its class makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sgd_probe.integrations.session import observe_steps


class Careful(torch.optim.SGD):
    """Calls the step of its base class, where the gradient is finite."""

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            super().step(closure)
        return None


class Twice(Careful):
    """Goes through two base classes."""

    def step(self, closure: Any = None) -> Any:
        if any(bool(p.grad.sum() < -1e6) for group in self.param_groups for p in group["params"]):
            raise RuntimeError("too large")
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Careful, Twice])
def test_a_step_that_calls_the_step_of_its_base_class_is_one_step(kind: type[torch.optim.SGD]) -> None:
    torch.optim.SGD(
        [torch.zeros(1, requires_grad=True)]
    )  # from now on torch has SGD's own step tell of itself
    weight = torch.zeros(3, requires_grad=True)
    optimizer, steps = kind([weight], lr=0.1), 0

    def observe() -> None:
        nonlocal steps
        steps += 1

    handle = observe_steps(optimizer, observe)
    for value in (1.0, 2.0, float("inf"), 3.0):
        weight.grad = torch.full((3,), value)
        if kind is Twice and value == 3.0:
            weight.grad.mul_(-1e6)
            with pytest.raises(RuntimeError, match="too large"):
                optimizer.step()
            weight.grad.mul_(-1e-6)
        optimizer.step()
    assert steps == 4
    handle.remove()
    optimizer.step()
    assert steps == 4
