"""Certificates from batches that had no part in finding a direction.

A direction found on few samples is fitted to them: there its eigenvalue is inflated and a flat
direction looks several times flatter than it is. Disjoint batches tell the truth, each with its error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sgd_probe.curvature.hessian import HessianOperator
from sgd_probe.curvature.linear_algebra import inner


@dataclass(frozen=True)
class Certificate:
    """What held-out batches say of one direction v.

    Attributes:
        eigenvalue: v.Hv.
        standard_error: of ``eigenvalue``, from its spread over the batches (NaN for one batch).
        batch_variance: Var(v.H_B v) over batches.
        squared_norm: unbiased estimate of ``||Hv||^2``: products of different batches only. It can
            be negative where the noise of the samples hides it. (One batch has only its own, too large.)
        effective_curvature: ``||Hv||^2 / |v.Hv|``, with which a mixed direction moves where the noise
            follows the curvature; at least |v.Hv|, by Cauchy and Schwarz.
    """

    eigenvalue: float
    standard_error: float
    batch_variance: float
    squared_norm: float
    effective_curvature: float


def certify(operator: HessianOperator, vectors: Tensor) -> list[Certificate]:
    """Certify directions; one product (over all batches of the operator) each.

    Args:
        operator: over batches disjoint from those that found the directions.
        vectors: unit rows, shape (k, size).
    """
    return [_certify(operator, vector) for vector in vectors]


def rayleigh_quotients(operator: HessianOperator, vectors: Tensor) -> list[float]:
    """v.Hv of every row, over all batches of the operator; one product each."""
    return [float(inner(operator.matvec(v).unsqueeze(0), v)) for v in vectors]


def _certify(operator: HessianOperator, vector: Tensor) -> Certificate:
    weights: list[float] = []
    quotients: list[float] = []
    own = 0.0
    total = torch.zeros_like(vector)
    for weight, product in operator.matvec_per_batch(vector):
        along, square = inner(torch.stack([vector, product]), product).tolist()
        weights.append(weight)
        quotients.append(along)
        own += weight**2 * square
        total.add_(product, alpha=weight)
    eigenvalue = sum(w * q for w, q in zip(weights, quotients, strict=True))
    self_weight = sum(w * w for w in weights)
    square = float(inner(total.unsqueeze(0), total))
    if len(weights) > 1:
        spread = sum(w * (q - eigenvalue) ** 2 for w, q in zip(weights, quotients, strict=True))
        variance = spread / (1.0 - self_weight)
        # Unbiased where a batch of n samples has a variance of 1 / n, as means over samples have.
        standard_error = math.sqrt(spread / (len(weights) - 1))
        square = (square - own) / (1.0 - self_weight)
    else:
        variance = standard_error = math.nan
    magnitude = abs(eigenvalue)
    effective = max(square, 0.0) / magnitude if magnitude > 0 else math.inf
    return Certificate(eigenvalue, standard_error, variance, square, max(effective, magnitude))
