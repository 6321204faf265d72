"""What an SGD optimizer does to one mode, as one linear step of the weight and its momentum buffer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class LinearStep(NamedTuple):
    """One step of ``torch.optim.SGD``.

    ``x' = (1 - decay) x + carry b + kick g`` and ``b' = memory b + intake g``, where ``g`` is the gradient
    with coupled weight decay added.
    """

    decay: float
    carry: float
    kick: float
    memory: float
    intake: float


@dataclass(frozen=True)
class SGDDynamics:
    """What the optimizer does to one mode.

    Attributes:
        learning_rate: eta, positive and finite. Under a schedule the rates go where time does:
            ``SGDMode.moments(schedule=...)``.
        momentum: mu, in [0, 1).
        dampening: d of PyTorch's buffer, in [0, 1); without momentum it does nothing.
        nesterov: PyTorch's Nesterov momentum; needs momentum and no dampening, as PyTorch does.
        weight_decay: wd, not negative.
        decoupled_weight_decay: shrink the weights by ``1 - eta wd`` before the step (AdamW, SGDW), instead
            of adding ``wd`` times the weights to the gradient (``torch.optim.SGD``).

    Raises:
        ValueError: a value is outside its range.
    """

    learning_rate: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"expected a positive, finite learning rate, found {self.learning_rate}")
        for name in ("momentum", "dampening"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected {name} in [0, 1), found {getattr(self, name)}")
        if self.nesterov and (not self.momentum or self.dampening):
            raise ValueError(
                f"expected momentum and no dampening with Nesterov, found momentum {self.momentum} and "
                f"dampening {self.dampening}; PyTorch refuses it too"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"expected a weight decay of at least 0, found {self.weight_decay}")

    @property
    def step(self) -> float:
        """Learning rate times (1 - d) with momentum (PyTorch dampens only the buffer), else the rate."""
        return self.learning_rate * (1 - self.dampening) if self.momentum else self.learning_rate

    @property
    def effective_learning_rate(self) -> float:
        """Displacement per unit of constant gradient and step, once the buffer is warm; Nesterov's too."""
        return self.step / (1 - self.momentum)

    @property
    def coupled_decay(self) -> float:
        """What weight decay adds to every eigenvalue."""
        return 0.0 if self.decoupled_weight_decay else self.weight_decay

    @property
    def shrinkage(self) -> float:
        """Share ``w = eta wd`` of the weights that decoupled decay removes at each step."""
        return self.learning_rate * self.weight_decay if self.decoupled_weight_decay else 0.0

    def relaxation(self, eigenvalue: float) -> float:
        """Share of a displacement that a step takes back, once the buffer is warm: the Langevin rate.

        ``eta_eff (lambda + wd)`` with coupled decay, ``eta_eff lambda + eta wd`` with decoupled decay.
        """
        return self.effective_learning_rate * (eigenvalue + self.coupled_decay) + self.shrinkage

    def linear_step(self, learning_rate: float | None = None, *, first: bool = False) -> LinearStep:
        """The step at this or another learning rate; PyTorch does not dampen the first buffer."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        mu = self.momentum
        decay = rate * self.weight_decay if self.decoupled_weight_decay else 0.0
        if not mu:
            return LinearStep(decay, 0.0, -rate, 0.0, 0.0)
        if self.nesterov:
            return LinearStep(decay, -rate * mu * mu, -rate * (1 + mu), mu, 1.0)
        intake = 1.0 if first else 1 - self.dampening
        return LinearStep(decay, -rate * mu, -rate * intake, mu, intake)
