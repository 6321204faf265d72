"""Directions to watch, each with its curvature and its noise: nothing in them comes from a run of SGD.

Found on one half of the population and certified on the other, as the probe does with its curvature batches;
or the exact eigenvectors of the Hessian of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from estimates import Array
from problems import Problem
from torch import Tensor
from torch.func import vmap


@dataclass(frozen=True, eq=False)
class Directions:
    """Unit vectors v.

    Attributes:
        vectors: as columns, (p, k).
        curvature: v.Hv, (k,).
        error: its standard error; zero where it is exact, (k,).
        deviations: v.g_i of each sample at the minimum, less their mean, (N, k).
    """

    vectors: Tensor
    curvature: Array
    error: Array
    deviations: Array

    @property
    def sample_variance(self) -> Array:
        """S^2 over the population, (k,)."""
        return np.asarray((self.deviations**2).mean(0))

    def resampled_noise(self, batch: int, minibatches: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """sigma^2 = Var(v.g_B) over fresh minibatches at the minimum, and its standard error, (k,) each.

        Args:
            batch: B, samples drawn with replacement.
            minibatches: how many.
            rng: of the draws, apart from those of any run.
        """
        rows = []
        for start in range(0, minibatches, 256):
            drawn = rng.integers(len(self.deviations), size=(min(256, minibatches - start), batch))
            rows.append(self.deviations[drawn].mean(1))
        squares = np.concatenate(rows) ** 2  # the mean is known: it is zero at the minimum
        return np.asarray(squares.mean(0)), np.asarray(squares.std(0) / np.sqrt(minibatches))


def exact(problem: Problem, count: int) -> Directions:
    """The stiffest modes of the population."""
    return Directions(
        problem.vectors[:, :count],
        problem.eigenvalues[:count].numpy(),
        np.zeros(count),
        problem.deviations[:, :count].numpy(),
    )


def both_folds(problem: Problem, count: int) -> tuple[Directions, Directions]:
    """The stiffest eigenvectors of one half, with the curvature that the other gives them, and vice versa."""
    one = problem.on(problem.halves[0])
    other = problem.without(one, problem.halves[0])
    return held_out(problem, one, other, count), held_out(problem, other, one, count)


def held_out(problem: Problem, finding: Problem, measuring: Problem, count: int) -> Directions:
    """The stiffest eigenvectors on some samples, with the curvature on others."""
    vectors, indices = finding.vectors[:, :count], torch.arange(measuring.samples)[:, None]

    def quotients(vector: Tensor) -> Tensor:
        each = vmap(measuring.product, in_dims=(None, None, 0), chunk_size=64)
        rows: Tensor = each(vector, problem.weights, indices)
        return rows @ vector

    each = torch.stack([quotients(vector) for vector in vectors.T], 1).numpy()  # (samples, k)
    deviations = (problem.gradients - problem.gradients.mean(0)) @ vectors
    return Directions(vectors, each.mean(0), each.std(0, ddof=1) / np.sqrt(len(each)), deviations.numpy())
