"""What no test can do better: the Neyman-Pearson test between a flat mode and one of known curvature.

It is told what the rule has to find out: the curvature to look for, the noise variance, that the mode has
settled, and the optimizer's buffer at the window's start. Its share of confined modes at a given share of
flat ones is the most that any rule can have with Gaussian noise.
"""

from __future__ import annotations

import math

import numpy as np
from _replicas import RATE, Array, Truth
from scipy.linalg import solve_discrete_lyapunov


def most_confined(truth: Truth, false_confined: float, replicas: int, seed: int) -> float:
    """Largest share of confined modes that can be told, where so many flat ones may be called confined.

    Args:
        truth: Gaussian independent noise; its curvature is that of the confined modes.
        false_confined: share of flat modes called confined.
        replicas: windows of each kind.
        seed: of the noise.
    """
    rng = np.random.default_rng([seed, 1])
    settled = _settled(truth)
    flat, confined = (
        _log_likelihood_ratio(truth, settled, *_window(truth, settled, curvature, replicas, rng))
        for curvature in (0.0, truth.curvature)
    )
    return float((confined >= np.quantile(flat, 1 - false_confined)).mean())


def _settled(truth: Truth) -> Array:
    """Covariance of position and buffer of a mode that has settled, at unit noise."""
    curvature, momentum = truth.curvature, truth.momentum
    step = np.array([[1 - RATE * curvature, -RATE * momentum], [curvature, momentum]])
    kick = np.array([-RATE, 1.0])
    return np.asarray(solve_discrete_lyapunov(step, np.outer(kick, kick)))


def _window(
    truth: Truth, settled: Array, curvature: float, count: int, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """Buffer at the start, displacement and gradient of every step."""
    momentum = truth.momentum
    if curvature:
        position, buffer = rng.multivariate_normal([0, 0], settled, size=count).T.copy()
    else:
        position, buffer = np.zeros(count), rng.standard_normal(count) / math.sqrt(1 - momentum**2)
    origin, first, displacements, gradients = position, buffer, [], []
    for rate in truth.rates:
        gradient = curvature * position + rng.standard_normal(count)
        displacements.append(position - origin)
        gradients.append(gradient)
        buffer = momentum * buffer + gradient
        position = position - rate * buffer
    return first, np.array(displacements), np.array(gradients)


def _log_likelihood_ratio(truth: Truth, settled: Array, buffer: Array, x: Array, g: Array) -> Array:
    """Of the confined mode over the flat one; the unknown centre is integrated out.

    Given the buffer, displacements follow from the gradients: g_t is all that is drawn. A flat mode has
    g = xi, the confined one g = lambda (x + x_0) + xi with a Gaussian x_0 that the buffer tells something of.
    """
    curvature, variance = truth.curvature, settled[1, 1]
    free = 1 / (1 - truth.momentum**2)
    started = -0.5 * (buffer**2 * (1 / variance - 1 / free) + math.log(variance / free))
    expected = curvature * settled[0, 1] / variance * buffer
    spread = curvature**2 * (settled[0, 0] - settled[0, 1] ** 2 / variance)
    rest = g - curvature * x - expected
    shared = 1 + spread * len(g)
    fit = (rest**2).sum(0) - spread * rest.sum(0) ** 2 / shared
    return np.asarray(started - 0.5 * (fit + math.log(shared) - (g**2).sum(0)))
