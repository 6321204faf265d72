"""Many seeds of one training at once: what ``torch.optim.SGD`` and ``DataLoader`` do, on stacked weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from problems import Problem
from torch import Tensor
from torch.func import grad, vmap

from sgd_probe.theory import MinibatchSampling, SGDDynamics

#: Minibatches that fill AdamW's first moment before its weights may move.
WARM = 40


class Step(NamedTuple):
    """One optimizer step of all seeds, float32.

    Attributes:
        before: theta_t - theta_0, (seeds, p).
        gradient: of each seed's minibatch there, L2 term included, (seeds, p).
        after: theta_{t+1} - theta_0, (seeds, p).
        size: samples of the minibatch.
    """

    before: Tensor
    gradient: Tensor
    after: Tensor
    size: int


def descend(
    problem: Problem,
    dynamics: SGDDynamics,
    sampling: MinibatchSampling,
    seeds: int,
    steps: int,
    generator: torch.Generator,
) -> Iterator[Step]:
    """SGD from the minimum, its first epoch beginning with the first step, the momentum buffer empty."""
    moved, buffer = torch.zeros(seeds, problem.size), torch.zeros(seeds, problem.size)
    gradients = minibatch_gradients(problem)
    batches = draws(problem.samples, sampling, seeds, generator)
    for t in range(steps):
        drawn = next(batches)
        gradient = gradients(moved, drawn)
        rates = dynamics.linear_step(first=t == 0)
        after = (1 - rates.decay) * moved + rates.carry * buffer + rates.kick * gradient
        buffer = rates.memory * buffer + rates.intake * gradient
        yield Step(moved, gradient, after, drawn.shape[1])
        moved = after


@dataclass(frozen=True)
class AdamW:
    """Arguments of ``torch.optim.AdamW``."""

    learning_rate: float
    decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class minibatch_gradients:
    """Gradients of stacked minibatches at stacked displacements from the minimum, float32."""

    def __init__(self, problem: Problem) -> None:
        weights = problem.weights.float()
        self.inputs, self.targets = problem.inputs.float(), problem.targets
        self.each = vmap(grad(lambda moved, x, y: problem.loss_of(weights + moved, x, y)))

    def __call__(self, moved: Tensor, drawn: Tensor) -> Tensor:
        """Of displacements (seeds, p) and indices (seeds, B): (seeds, p)."""
        found: Tensor = self.each(moved, self.inputs[drawn], self.targets[drawn])
        return found


def draws(
    samples: int, sampling: MinibatchSampling, seeds: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Indices of one minibatch after another, a row for each seed, (seeds, at most B)."""
    size = sampling.batch_size
    while sampling.replacement:
        yield torch.randint(samples, (seeds, size), generator=generator)
    while True:
        order = torch.rand(seeds, samples, generator=generator).argsort(1)
        for batch in torch.split(order, size, 1):
            if batch.shape[1] == size or not sampling.drop_last:
                yield batch


def descend_adamw(
    problem: Problem, adam: AdamW, batch: int, seeds: int, steps: int, generator: torch.Generator
) -> Iterator[Step]:
    """``torch.optim.AdamW`` long after its start, from the minimum, minibatches drawn with replacement.

    Both moments begin as they would be had it stayed at the minimum: the first from minibatches seen there,
    the second at its expectation. Bias corrections are those of a late step, which are none. The optimizer's
    own decay pulls on the whole weights, not on displacements.
    """
    origin = problem.weights.float()
    moved, first = torch.zeros(seeds, problem.size), torch.zeros(seeds, problem.size)
    second = second_moments(problem, batch).float().repeat(seeds, 1)
    gradients = minibatch_gradients(problem)
    batches = draws(problem.samples, MinibatchSampling(batch_size=batch), seeds, generator)
    for _ in range(WARM):
        first = adam.betas[0] * first + (1 - adam.betas[0]) * gradients(moved, next(batches))
    for _ in range(steps):
        gradient = gradients(moved, next(batches))
        first = adam.betas[0] * first + (1 - adam.betas[0]) * gradient
        second = adam.betas[1] * second + (1 - adam.betas[1]) * gradient**2
        shrunk = moved - adam.learning_rate * adam.decay * (origin + moved)
        after = shrunk - adam.learning_rate * first / (second.sqrt() + adam.eps)
        yield Step(moved, gradient, after, batch)
        moved = after


def second_moments(problem: Problem, batch: int) -> Tensor:
    """E g^2 of each weight's minibatch gradient at the minimum, (p,)."""
    return (problem.gradients - problem.gradients.mean(0)).square().mean(0) / batch
