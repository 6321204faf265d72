"""Many seeds of one training at once: what ``torch.optim.SGD`` and ``DataLoader`` do, on stacked weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from problems import Problem
from torch import Tensor
from torch.func import grad, vmap

from sgd_probe.theory import MinibatchSampling, SGDDynamics


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


def draws(samples: int, sampling: MinibatchSampling, seeds: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of one minibatch after another, a row for each seed, (seeds, at most B)."""
    size = sampling.batch_size
    while sampling.replacement:
        yield torch.randint(samples, (seeds, size), generator=generator)
    while True:
        order = torch.rand(seeds, samples, generator=generator).argsort(1)
        for batch in order.split(size, 1):
            if batch.shape[1] == size or not sampling.drop_last:
                yield batch
