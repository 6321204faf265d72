"""A quadratic loss with known modes and known gradient noise, driven through a ProbeEngine step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgd_probe.engine import ProbeConfig, ProbeEngine, Sampling
from sgd_probe.result import WindowResult

BATCH = 8


class Quadratic(nn.Module):
    """``0.5 w.Hw + noise.w``: the coordinates are the modes, the batch is the noise of the gradient.

    Args:
        curvatures: the Hessian's diagonal.
        start: the weights at first, one number for all or one each.
        noise: standard deviation of a minibatch gradient along each coordinate.
    """

    def __init__(
        self,
        curvatures: Sequence[float],
        start: float | Sequence[float] = 0.0,
        noise: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        size = len(curvatures)
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64) + torch.tensor(start))
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)
        self.scale = torch.ones(size, dtype=torch.float64) * torch.tensor(noise)

    def loss(self, batch: Tensor) -> Tensor:
        quadratic = 0.5 * (self.curvatures * self.weight.square()).sum()
        noise: Tensor = batch.mean(0) @ (self.scale * self.weight) * BATCH**0.5
        return quadratic + noise

    def draw(self, generator: torch.Generator) -> Tensor:
        return torch.randn(BATCH, len(self.curvatures), generator=generator, dtype=torch.float64)


def loss(module: nn.Module, batch: Any, index: int) -> Tensor:
    assert isinstance(module, Quadratic)
    return module.loss(batch)


def make_engine(
    module: Quadratic,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    sampling: str = "with_replacement",
    planned_steps: float = float("inf"),
    **config: Any,
) -> ProbeEngine:
    """An engine on a quadratic module; every direction is a top mode unless ``config`` says otherwise."""
    options = {"top": len(module.curvatures), "flat": 0, "curvature_batches": 4, **config}
    return ProbeEngine(
        module,
        loss,
        optimizer or torch.optim.SGD(module.parameters(), lr=0.1),
        ProbeConfig(**options),
        sampling=Sampling(sampling),
        planned_steps=planned_steps,
    )


def run_window(
    engine: ProbeEngine,
    module: Quadratic,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 10**6,
    before_step: Callable[[int], None] = lambda step: None,
    seed: int = 0,
) -> WindowResult:
    """Train until the first window closes, after its planned steps or after ``steps`` of the window.

    Args:
        before_step: called between backward and step with the number of steps in the window so far.
    """
    generator = torch.Generator().manual_seed(seed)
    engine.preflight(module.draw(generator), 0, 0)
    step = 0
    while True:
        batch = module.draw(generator)
        engine.offer(batch, step, step)
        if engine.opening_due(step):
            assert engine.open_window(step) is not None
            opened = step
        optimizer.zero_grad()
        torch.autograd.backward([module.loss(batch)])
        if engine.is_open:
            before_step(step - opened)
        optimizer.step()
        engine.observe()
        step += 1
        if engine.is_open and (engine.closing_due or step - opened >= steps):
            closed = engine.close_window(step)
            assert closed is not None
            return closed[0]
