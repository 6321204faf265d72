"""SGD of many seeds at once from a minimum, its linearised twin, and verdicts on what both did.

Verdicts come from the package's own sums and rule, fed with x = v.(theta_t - theta_0) and the gradient used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from descent import minibatch_gradients
from estimates import Array
from numpy.typing import NDArray
from problems import Problem
from torch import Tensor

from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.dynamics.verdict import judge, weigh


@dataclass(frozen=True, eq=False)
class Paths:
    """Motion along directions.

    Attributes:
        rates: learning rate of each step, (steps,).
        x: displacement before each step and after the last, shape (steps + 1, seeds, directions).
        g: gradient used by each step, shape (steps, seeds, directions).
    """

    rates: Array
    x: Array
    g: Array

    @property
    def steps(self) -> int:
        return len(self.g)

    def __getitem__(self, directions: Any) -> Paths:
        """Some of the directions."""
        return Paths(self.rates, self.x[..., directions], self.g[..., directions])

    def between(self, first: int, last: int) -> Paths:
        """The steps of a window, displacements counted from its start."""
        return Paths(self.rates[first:last], self.x[first : last + 1] - self.x[first], self.g[first:last])

    def statistics(self) -> WindowStatistics:
        """The package's running sums, one mode for each seed and direction."""
        x, g = self.x.reshape(self.steps + 1, -1), self.g.reshape(self.steps, -1)
        sums = WindowStatistics.empty(x.shape[1], self.steps)
        for t, rate in enumerate(self.rates.tolist()):
            sums = sums.update(x[t], g[t], x[t + 1], rate, rate)
        return sums

    def verdicts(self) -> NDArray[np.str_]:
        """The package's verdict on each seed and direction, shape (seeds, directions)."""
        found = [judge(evidence).verdict.value for evidence in weigh(self.statistics(), 0.0)]
        return np.array(found).reshape(self.g.shape[1:])

    def flipped(self, rng: np.random.Generator) -> Paths:
        """Centred increments with random signs: the same sizes of steps, and no restoring force.

        The gradient of a step is what would have made it.
        """
        centred = self.g - self.g.mean(0)
        g = centred * rng.choice([-1.0, 1.0], size=self.g.shape)
        x = np.concatenate([np.zeros_like(self.x[:1]), -(self.rates[:, None, None] * g).cumsum(0)])
        return Paths(self.rates, x, g)


def descend(problem: Problem, rates: float | Array, drawn: Tensor, directions: Tensor) -> Paths:
    """Plain SGD on stacked weights, in float32: what ``torch.optim.SGD`` does, for all seeds at once.

    Args:
        problem: all seeds start at its minimum theta_0.
        rates: learning rate, or that of each step, (steps,).
        drawn: samples of each minibatch, shape (steps, seeds, samples).
        directions: columns, shape (weights, k).
    """
    gradient, along = minibatch_gradients(problem), directions.float()
    moved = torch.zeros(drawn.shape[1], problem.size)
    x, g = [moved @ along], []
    rates = np.broadcast_to(rates, len(drawn))
    for rate, rows in zip(rates.tolist(), drawn, strict=True):
        used = gradient(moved, rows)
        moved = moved - rate * used
        g.append(used @ along)
        x.append(moved @ along)
    return Paths(rates, torch.stack(x).double().numpy(), torch.stack(g).double().numpy())


def twin(problem: Problem, rate: float, drawn: Tensor, directions: Tensor) -> Paths:
    """The linearised twin: the Hessian of theta_0 for good, and the same minibatches' gradients at theta_0.

    ``z' = z - rate (H z + g_B(theta_0))``, in the modes of H, in float64. Arguments as for
    :func:`descend`.
    """
    values, rows = problem.eigenvalues, problem.gradients @ problem.vectors
    mixing = problem.vectors.T @ directions
    z = torch.zeros(drawn.shape[1], len(values), dtype=torch.float64)
    x, g = [z @ mixing], []
    for now in drawn:
        used = values * z + rows[now].mean(1)
        z = z - rate * used
        g.append(used @ mixing)
        x.append(z @ mixing)
    return Paths(np.full(len(drawn), rate), torch.stack(x).numpy(), torch.stack(g).numpy())


def effective_curvature(problem: Problem, directions: Tensor) -> Array:
    """What decides how a direction v moves, known from H and the noise covariance C: ``v.CHv / v.Cv``, (k,).

    An eigenvalue for an eigenvector.
    """
    mixing = problem.vectors.T @ directions
    noise = problem.deviations.T @ (problem.deviations @ mixing) / problem.samples
    return np.asarray(
        ((noise * problem.eigenvalues[:, None] * mixing).sum(0) / (noise * mixing).sum(0)).numpy()
    )


def draw(problem: Problem, steps: int, seeds: int, batch: int, seed: int) -> Tensor:
    """Samples of minibatches, with replacement, shape (steps, seeds, batch)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(problem.samples, (steps, seeds, batch), generator=generator)
