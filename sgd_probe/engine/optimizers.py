"""What a live optimizer does to the gradient, and the coordinates in which it is plain SGD.

An optimizer that gives every weight a rate of its own, ``theta' = theta - eta R P g`` with the groups'
relative rates R and a preconditioner P, both diagonal, is plain SGD (with its momentum) in ``y = S^-1
theta``, ``S = (R P)^1/2``: there it moves along the modes of ``S H S``. P of Adam and RMSprop changes slowly;
a window freezes it as it was when the window opened. Momentum of Adam is heavy ball's with a dampening of
beta_1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgd_probe.curvature.space import part
from sgd_probe.theory.closed_forms import SGDDynamics

#: Rates relative to each other may move so far during a window before its coordinates no longer fit.
_SAME_SHARES = 0.05


@dataclass(frozen=True)
class OptimizerState:
    """The optimizer as it stands at one step.

    Attributes:
        name: class name.
        learning_rate: of the fastest group that holds probed parameters.
        momentum: heavy ball's mu, Adam's beta_1; the largest where groups differ (0 for an optimizer that
            the theory does not cover).
        dampening: PyTorch's dampening; beta_1 for Adam.
        nesterov: PyTorch's Nesterov momentum.
        shares: effective learning rate of every probed parameter over the fastest's: the diagonal of R.
        decays: weight decay of every probed parameter.
        decoupled: weight decay shrinks the weights; else it is added to the gradient.
        preconditioned: P is not the identity.
        withheld: why no verdict can be given; "" where one can.
        unpredicted: why the theory makes no prediction though verdicts stand; "" where it does.
    """

    name: str
    learning_rate: float
    momentum: float = 0.0
    dampening: float = 0.0
    decays: tuple[float, ...] = ()
    withheld: str = ""
    nesterov: bool = False
    shares: tuple[float, ...] = field(default=())
    decoupled: bool = False
    preconditioned: bool = False
    unpredicted: str = ""

    @cached_property
    def effective_learning_rate(self) -> float:
        """Displacement per unit of constant gradient and step, of the fastest parameters."""
        if not self.learning_rate > 0:
            return 0.0
        return self.dynamics().effective_learning_rate

    @property
    def plain(self) -> bool:
        """Its coordinates are the weights themselves."""
        return not self.preconditioned and all(share == 1 for share in self.shares)

    @property
    def decay_is_preconditioned(self) -> bool:
        """Decay goes through P, as part of the gradient: on y it is ``S^2`` times as large."""
        return self.preconditioned and not self.decoupled

    @cached_property
    def decay_factors(self) -> tuple[float, ...]:
        """What pulls y back, per unit of y and effective learning rate (beside ``S^2``, see above)."""
        if self.decay_is_preconditioned or self.plain:
            return self.decays
        return tuple(d * share for d, share in zip(self.decays, self.shares, strict=True))

    @property
    def coordinates(self) -> str:
        """What displacements are measured in, in plain words."""
        if self.preconditioned:
            return f"weights in {self.name}'s preconditioned coordinates"
        return "weights" if self.plain else "weights scaled by the learning rates of their groups"

    def dynamics(self, learning_rate: float | None = None) -> SGDDynamics:
        """The linear dynamics of one mode, at this or another nominal learning rate."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        return SGDDynamics(rate, self.momentum, self.dampening, self.nesterov)

    def moves_as(self, other: OptimizerState) -> bool:
        """The relative rates of its parameters are still those of another state."""
        if self.shares == other.shares:
            return True
        pairs = zip(self.shares, other.shares, strict=True)
        return all(math.isclose(a, b, rel_tol=_SAME_SHARES) for a, b in pairs)

    def describe(self) -> str:
        """One line for people."""
        parts = [f"learning rate {self.learning_rate:g}"]
        if len(set(self.shares)) > 1:
            parts[0] = (
                f"learning rates from {min(self.shares) * self.learning_rate:g} to {self.learning_rate:g}"
            )
        if self.momentum and self.preconditioned and self.dampening:
            parts.append(f"beta_1 {self.momentum:g}")
        elif self.momentum:
            parts.append(f"{'Nesterov ' if self.nesterov else ''}momentum {self.momentum:g}")
        if self.dampening and not self.preconditioned:
            parts.append(f"dampening {self.dampening:g}")
        decays = sorted(set(self.decays))
        if any(decays):
            kind = "decoupled weight decay " if self.decoupled else "weight decay "
            parts.append(kind + "/".join(f"{decay:g}" for decay in decays))
        return f"{self.name}, {', '.join(parts)}"


def read_optimizer(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> OptimizerState:
    """Read the live parameter groups; call it at every step, schedules change them.

    Args:
        optimizer: a torch optimizer.
        parameters: the probed parameters, all of which it moves.
    """
    name = type(optimizer).__name__
    groups = _groups(optimizer, parameters)
    family = _family(optimizer)
    if family is None:
        why = (
            f"how a step of {name} depends on the gradient is not known here, so plain Hessian modes may mix"
        )
        count = len(groups)
        return OptimizerState(name, float(groups[0]["lr"]), 0, 0, (0.0,) * count, why, shares=(1.0,) * count)
    # Groups are few and parameters many: this is read at every step.
    read = {id(group): family.settings(group) for group in optimizer.param_groups}
    indices = [id(group) for group in groups]
    settings = [read[index] for index in dict.fromkeys(indices)]
    fastest = max(settings, key=lambda s: s.effective)
    same = len({(s.momentum, s.dampening, s.nesterov) for s in settings}) == 1
    top = fastest.effective
    share = {index: s.effective / top if top > 0 else 1.0 for index, s in read.items()}
    shares = tuple([share[index] for index in indices])
    withheld = unpredicted = ""
    if any(s.maximize for s in settings):
        withheld = "the optimizer maximises the loss"
    elif not all(0 <= s.momentum < 1 and 0 <= s.dampening < 1 for s in settings):
        withheld = "momentum or dampening lies outside [0, 1)"
    elif min(shares) <= 0:
        withheld = "a parameter group has no learning rate while others have; leave it out with `params`"
    elif not same:
        unpredicted = "parameter groups differ in momentum"
    momentum, dampening = fastest.momentum, fastest.dampening
    rate = fastest.learning_rate
    if withheld:
        momentum, dampening = 0.0, 0.0
    elif not same:
        # The slowest memory decides how long a window must be; the rate is such that the effective one stays.
        momentum, dampening = max(s.momentum for s in settings), 0.0
        rate = top * (1 - momentum)
    return OptimizerState(
        name=name,
        learning_rate=rate,
        momentum=momentum,
        dampening=dampening,
        decays=tuple([read[index].decay for index in indices]),
        withheld=withheld,
        nesterov=same and fastest.nesterov and not withheld,
        shares=shares,
        decoupled=any(s.decoupled for s in settings),
        preconditioned=family.denominator is not None,
        unpredicted=unpredicted,
    )


class OptimizerReader:
    """Reads the same optimizer at every step, and works out what it says only where it has changed.

    Args:
        optimizer: a torch optimizer.
        parameters: the probed parameters, all of which it moves.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        family = _family(optimizer)
        self._settings = _unknown if family is None else family.settings
        self._said: list[Any] = []
        self._state: OptimizerState | None = None

    def read(self) -> OptimizerState:
        """What :func:`read_optimizer` finds."""
        groups = self._optimizer.param_groups
        said = [(self._settings(group), list(map(id, group["params"]))) for group in groups]
        if self._state is None or said != self._said:
            self._said, self._state = said, read_optimizer(self._optimizer, self._parameters)
        return self._state


def read_scales(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], state: OptimizerState
) -> list[Tensor | float] | None:
    """The diagonal of S at each parameter, as the optimizer stands: a new tensor of its shape, or a number.

    Of a parameter that is divided among processes, of this process's part.

    Returns:
        None where S is the identity.

    Raises:
        ValueError: the optimizer has not made a step yet, so that its preconditioner is not there.
    """
    family = _family(optimizer)
    if family is None or state.plain:
        return None
    scales: list[Tensor | float] = []
    groups = _groups(optimizer, parameters)
    if family.denominator is None:
        return [math.sqrt(share) for share in state.shares]
    if not any(optimizer.state.get(parameter) for parameter in parameters):
        raise ValueError(
            f"expected {state.name} to have made a step, so that its preconditioner is known, found none"
        )
    for parameter, group, share in zip(parameters, groups, state.shares, strict=True):
        memory = optimizer.state.get(parameter)
        if not memory:  # it never had a gradient: whatever its scale, it does not move
            scales.append(1.0)
            continue
        denominator = part(family.denominator(memory, group))
        scales.append(denominator.detach().to(parameter.dtype).reciprocal_().mul_(share).sqrt_())
    return scales


def _groups(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    lost = sum(id(parameter) not in group_of for parameter in parameters)
    if lost:
        raise ValueError(
            f"expected {type(optimizer).__name__} to hold all probed parameters, found {lost} of "
            f"{len(parameters)} no longer there: give it new ones between fits"
        )
    return [group_of[id(parameter)] for parameter in parameters]


class _Settings(NamedTuple):
    """What a group says; without momentum the dampening does nothing."""

    learning_rate: float
    momentum: float
    dampening: float
    nesterov: bool
    maximize: bool
    decay: float
    decoupled: bool

    @property
    def effective(self) -> float:
        if not (0 <= self.momentum < 1):
            return self.learning_rate
        return self.learning_rate * (1 - self.dampening) / (1 - self.momentum)


class _Family(NamedTuple):
    """Optimizers of one rule: how its groups read, and the denominator of its preconditioner."""

    settings: Callable[[dict[str, Any]], _Settings]
    denominator: Callable[[dict[str, Any], dict[str, Any]], Tensor] | None


def _unknown(group: dict[str, Any]) -> _Settings:
    return _Settings(float(group["lr"]), 0.0, 0.0, nesterov=False, maximize=False, decay=0.0, decoupled=False)


def _sgd(group: dict[str, Any]) -> _Settings:
    momentum = float(group["momentum"])
    return _Settings(
        learning_rate=float(group["lr"]),
        momentum=momentum,
        dampening=float(group["dampening"]) if momentum else 0.0,
        nesterov=bool(group["nesterov"]),
        maximize=bool(group["maximize"]),
        decay=float(group["weight_decay"]),
        decoupled=False,
    )


def _adam(group: dict[str, Any]) -> _Settings:
    first = float(group["betas"][0])
    return _Settings(
        learning_rate=float(group["lr"]),
        momentum=first,
        dampening=first,
        nesterov=False,
        maximize=bool(group["maximize"]),
        decay=float(group["weight_decay"]),
        decoupled=bool(group.get("decoupled_weight_decay", False)),
    )


def _adamw(group: dict[str, Any]) -> _Settings:
    return _adam(group)._replace(decoupled=True)


def _rmsprop(group: dict[str, Any]) -> _Settings:
    return _Settings(
        learning_rate=float(group["lr"]),
        momentum=float(group["momentum"]),
        dampening=0.0,
        nesterov=False,
        maximize=bool(group.get("maximize", False)),
        decay=float(group["weight_decay"]),
        decoupled=False,
    )


def _adam_denominator(memory: dict[str, Any], group: dict[str, Any]) -> Tensor:
    second = memory["max_exp_avg_sq"] if group["amsgrad"] else memory["exp_avg_sq"]
    correction = 1 - float(group["betas"][1]) ** float(memory["step"])
    root: Tensor = (second / correction).sqrt_().add_(float(group["eps"]))
    return root


def _rmsprop_denominator(memory: dict[str, Any], group: dict[str, Any]) -> Tensor:
    square = memory["square_avg"]
    if group["centered"]:
        square = (square - memory["grad_avg"].square()).clamp_min_(0.0)
    root: Tensor = square.sqrt().add_(float(group["eps"]))
    return root


_FAMILIES: dict[type[torch.optim.Optimizer], _Family] = {
    torch.optim.SGD: _Family(_sgd, None),
    torch.optim.AdamW: _Family(_adamw, _adam_denominator),
    torch.optim.Adam: _Family(_adam, _adam_denominator),
    torch.optim.RMSprop: _Family(_rmsprop, _rmsprop_denominator),
}


def _family(optimizer: torch.optim.Optimizer) -> _Family | None:
    """The rule by which it steps; a subclass with a step of its own may do anything."""
    step = inspect.unwrap(type(optimizer).step)
    for kind, family in _FAMILIES.items():
        if isinstance(optimizer, kind) and step is inspect.unwrap(kind.step):
            return family
    return None
