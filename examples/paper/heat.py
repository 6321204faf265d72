"""The variances of all modes together: deviations of minibatch Hessians make modes heat each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from estimates import Array
from problems import Problem
from torch import Tensor
from torch.func import jvp, vmap


def predict_together(
    problem: Problem,
    rate: float,
    batch: int,
    records: Sequence[int],
    generator: torch.Generator,
    every: int = 5,
) -> Array:
    """Variance of all modes after some steps from the minimum, (records, p); plain SGD with replacement.

    ``V_k' = (1 - eta lambda_k)^2 V_k + (eta^2 / B) (S_k^2 + Var_i(v_k.H_i z))``, H_i the Hessian of one
    sample and z a draw of the weights with these variances, uncorrelated. The last term is a Monte Carlo over
    all samples, one z each, renewed every few steps. Every sample's loss is still quadratic.
    """
    weights, vectors = problem.weights.float(), problem.vectors.float()
    values, noise = problem.eigenvalues.float(), problem.sample_variance.float()
    indices = torch.arange(problem.samples)[:, None]

    def product(vector: Tensor, index: Tensor) -> Tensor:
        found: Tensor = jvp(lambda there: problem.gradient(there, index), (weights,), (vector,))[1]
        return found

    each = vmap(product, chunk_size=256)
    variance, heat, kept = torch.zeros_like(values), torch.zeros_like(values), []
    for t in range(1, max(records) + 1):
        if t % every == 1 % every:
            drawn = variance.sqrt() * torch.randn(problem.samples, len(values), generator=generator)
            rows = each(drawn @ vectors.T, indices)
            heat = (rows @ vectors - values * drawn).square().mean(0)
        variance = (1 - rate * values) ** 2 * variance + rate**2 / batch * (noise + heat)
        if t in records:
            kept.append(variance.double().numpy())
    return np.stack(kept)
