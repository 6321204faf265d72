"""What a live optimizer does to the gradient: rates, momentum, decay; and whether the theory covers it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgd_probe.theory.closed_forms import SGDDynamics


@dataclass(frozen=True)
class OptimizerState:
    """The optimizer as it stands at one step.

    Attributes:
        name: class name.
        learning_rate: of the groups that hold probed parameters (the first one's, if they differ).
        momentum: heavy ball's mu (0 for an optimizer that the theory does not cover).
        dampening: PyTorch's dampening.
        decays: coupled weight decay of every probed parameter.
        withheld: why the theory does not cover it; "" where it does.
    """

    name: str
    learning_rate: float
    momentum: float
    dampening: float
    decays: tuple[float, ...]
    withheld: str

    @property
    def effective_learning_rate(self) -> float:
        """Displacement per unit of constant gradient and step."""
        if not self.learning_rate > 0:
            return 0.0
        return self.dynamics().effective_learning_rate

    def dynamics(self, learning_rate: float | None = None) -> SGDDynamics:
        """The linear dynamics of one mode, at this or another nominal learning rate."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        return SGDDynamics(rate, self.momentum, self.dampening)

    def describe(self) -> str:
        """One line for people."""
        parts = [f"learning rate {self.learning_rate:g}"]
        if self.momentum:
            parts.append(f"momentum {self.momentum:g}")
        if self.dampening:
            parts.append(f"dampening {self.dampening:g}")
        decays = sorted(set(self.decays))
        if any(decays):
            parts.append("weight decay " + "/".join(f"{decay:g}" for decay in decays))
        return f"{self.name}, {', '.join(parts)}"


def read_optimizer(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> OptimizerState:
    """Read the live parameter groups; call it at every step, schedules change them.

    Args:
        optimizer: a torch optimizer.
        parameters: the probed parameters, all of which it moves.
    """
    name = type(optimizer).__name__
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = [group_of[id(parameter)] for parameter in parameters]
    # A subclass with a step of its own may do anything.
    if inspect.unwrap(type(optimizer).step) is not inspect.unwrap(torch.optim.SGD.step):
        why = f"the steps of {name} are not proportional to the gradient, so plain Hessian modes mix"
        return OptimizerState(name, float(groups[0]["lr"]), 0.0, 0.0, (0.0,) * len(groups), why)
    settings = [_Settings.of(group) for group in groups]
    first = settings[0]
    decays = tuple(float(group["weight_decay"]) for group in groups)
    if not (0 <= first.momentum < 1 and 0 <= first.dampening < 1):
        why = "momentum or dampening lies outside [0, 1)"
        return OptimizerState(name, first.learning_rate, 0.0, 0.0, decays, why)
    withheld = ""
    if len(set(settings)) > 1:
        withheld = "parameter groups differ in learning rate or momentum, so Hessian modes do not move alone"
    elif first.nesterov:
        withheld = "Nesterov momentum is not covered yet"
    elif first.maximize:
        withheld = "the optimizer maximises the loss"
    return OptimizerState(name, first.learning_rate, first.momentum, first.dampening, decays, withheld)


class _Settings(NamedTuple):
    """What must agree over the groups of an SGD; without momentum the dampening does nothing."""

    learning_rate: float
    momentum: float
    dampening: float
    nesterov: bool
    maximize: bool

    @classmethod
    def of(cls, group: dict[str, Any]) -> _Settings:
        momentum = float(group["momentum"])
        dampening = float(group["dampening"]) if momentum else 0.0
        return cls(float(group["lr"]), momentum, dampening, bool(group["nesterov"]), bool(group["maximize"]))
