"""torch.optim.SGD on thousands of replicas at once, written from its documentation alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sgd_probe.theory import MinibatchSampling, SGDDynamics

Array = NDArray[np.float64]
#: The gradient at these weights, the next time it is asked for.
Gradient = Callable[[Array], Array]


class Replicas:
    """Weights that a rule of torch.optim.SGD moves, decoupled decay as AdamW has it.

    Attributes:
        weights: one a replica, or a row a replica.
        buffer: the momentum buffer; None before the first step.
    """

    def __init__(self, weights: Array, dynamics: SGDDynamics) -> None:
        self.weights = weights
        self.buffer: Array | None = None
        self._rule = dynamics

    def step(self, gradient: Array, rate: float | None = None) -> None:
        rule = self._rule
        rate = rule.learning_rate if rate is None else rate
        if rule.decoupled_weight_decay:
            weights = self.weights * (1 - rate * rule.weight_decay)
        else:
            weights, gradient = self.weights, gradient + rule.weight_decay * self.weights
        if rule.momentum:
            if self.buffer is None:
                self.buffer = gradient
            else:
                self.buffer = rule.momentum * self.buffer + (1 - rule.dampening) * gradient
            gradient = gradient + rule.momentum * self.buffer if rule.nesterov else self.buffer
        self.weights = weights - rate * gradient

    def run(self, gradient: Gradient, steps: int, rates: Sequence[float] | None = None) -> Iterator[Array]:
        """The weights after each step."""
        for t in range(steps):
            self.step(gradient(self.weights), None if rates is None else rates[t])
            yield self.weights


def noisy_gradient(
    rng: np.random.Generator,
    eigenvalue: float,
    noise_variance: float,
    hessian_variance: float = 0.0,
    covariance: float = 0.0,
) -> Gradient:
    """``(lambda + h) x + xi`` with skewed noise, so that nothing passes because it is Gaussian."""

    def skewed(size: int) -> Array:
        return np.asarray(rng.exponential(size=size) - 1)

    def gradient(weights: Array) -> Array:
        size = len(weights)
        noise = math.sqrt(noise_variance) * skewed(size)
        if not hessian_variance:
            return eigenvalue * weights + noise
        slope = covariance / noise_variance
        rest = math.sqrt(hessian_variance - covariance**2 / noise_variance)
        return (eigenvalue + slope * noise + rest * rng.standard_normal(size)) * weights + noise

    return gradient


def shuffled_steps(
    sampling: MinibatchSampling, replicas: int, sample_variance: float, rng: np.random.Generator
) -> Iterator[tuple[Array, float]]:
    """(summed noise, number) of the microbatches over A, for each step, epoch after epoch.

    Every replica shuffles the same N samples in its own way, as a DataLoader does.
    """
    assert sampling.samples is not None
    values = rng.exponential(size=sampling.samples)
    values = (values - values.mean()) * math.sqrt(
        sample_variance / values.var(ddof=0 if sampling.replacement else 1)
    )
    size, each = sampling.batch_size, sampling.accumulation
    while True:
        if sampling.replacement:
            order = rng.choice(values, (replicas, sampling.samples))
        else:
            order = rng.permuted(np.broadcast_to(values, (replicas, sampling.samples)), axis=1)
        batches = [order[:, start : start + size] for start in range(0, sampling.samples, size)]
        if sampling.drop_last and batches[-1].shape[1] < size:
            batches.pop()
        fresh = math.sqrt(sampling.fresh * sample_variance)
        kept = math.sqrt(1 - sampling.fresh)
        means = [
            kept * batch.mean(1) + fresh * rng.standard_normal(replicas) / math.sqrt(batch.shape[1])
            for batch in batches
        ]
        for first in range(0, len(means), each):
            step = means[first : first + each]
            yield np.sum(step, axis=0) / each, len(step) / each


def assert_mean_square(samples: Array, expected: float, sigmas: float = 4.0) -> None:
    """The mean square is as expected within so many standard errors of the Monte Carlo, which are small."""
    squares = samples**2
    error = squares.std() / math.sqrt(squares.size)
    found = squares.mean()
    message = f"measured {found:.6g} +- {error:.2g}, theory {expected:.6g}"
    assert error < 0.02 * abs(expected), f"too few replicas: {message}"
    assert abs(found - expected) < sigmas * error, message
