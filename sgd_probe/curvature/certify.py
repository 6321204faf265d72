"""Certificates from batches that had no part in finding a direction.

A direction found on few samples is fitted to them: there its eigenvalue is inflated and a flat
direction looks several times flatter than it is. Disjoint batches tell the truth, each with its error.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sgd_probe.curvature.hessian import HessianOperator
from sgd_probe.curvature.linear_algebra import gram, inner

#: Fewer minibatches say nothing of a covariance.
MIN_BATCHES = 8


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
        noise_weighted_curvature: ``Cov(v.g_B, (Hv).g_B) / Var(v.g_B)`` over the batches' gradients at
            fixed weights: the same without that assumption, Hv from the other batches each time. NaN
            below :data:`MIN_BATCHES` batches.
        noise_weighted_error: its standard error, by the jackknife.
    """

    eigenvalue: float
    standard_error: float
    batch_variance: float
    squared_norm: float
    effective_curvature: float
    noise_weighted_curvature: float
    noise_weighted_error: float


@dataclass(frozen=True)
class Certification:
    """Certificates of a basis.

    Attributes:
        certificates: one per direction.
        split_half_overlap: mean squared cosine between the images of the top directions under two
            halves of the batches (one step of subspace iteration each): 1 where the samples settle the
            top subspace, its dimension over the number of weights where they say nothing of it. NaN for
            one batch or no top direction.
    """

    certificates: tuple[Certificate, ...]
    split_half_overlap: float


def certify(operator: HessianOperator, vectors: Tensor, top: int = 0) -> Certification:
    """Certify directions; one product (over all batches of the operator) each.

    Args:
        operator: over batches disjoint from those that found the directions.
        vectors: unit rows, shape (k, size).
        top: how many of the first rows span the top subspace; for its overlap, and for the noise of the
            others, their images are held meanwhile.
    """
    enough = len(operator.batches) >= MIN_BATCHES
    images = [_images(operator, v, enough and index >= top) for index, v in enumerate(vectors)]
    several = len(operator.batches) > 1
    overlap = _overlap([i.halves for i in images[:top]]) if several and top else math.nan
    weighted = [(math.nan, math.nan)] * len(vectors)
    if enough:
        weighted[top:] = _noise_weighted(operator, images[top:])
    certificates = tuple(_certificate(i, *w) for i, w in zip(images, weighted, strict=True))
    return Certification(certificates, overlap)


def rayleigh_quotients(operator: HessianOperator, vectors: Tensor) -> list[float]:
    """v.Hv of every row, over all batches of the operator; one product each."""
    return [float(inner(operator.matvec(v).unsqueeze(0), v)) for v in vectors]


@dataclass(frozen=True)
class _Images:
    """H_B v over the batches: what is needed of them one by one, and their sums over two halves.

    Attributes:
        weights: of the batches.
        quotients: v.H_B v.
        own_square: sum of the squared weights times ``||H_B v||^2``.
        halves: weighted sums of H_B v over every other batch.
        noise: v.g_B, empty where gradients were not asked for.
        own_pull: (H_B v).g_B likewise.
    """

    weights: list[float]
    quotients: list[float]
    own_square: float
    halves: tuple[Tensor, Tensor]
    noise: list[float]
    own_pull: list[float]


def _images(operator: HessianOperator, vector: Tensor, with_gradients: bool) -> _Images:
    images = _Images([], [], 0.0, (torch.zeros_like(vector), torch.zeros_like(vector)), [], [])
    own_square = 0.0
    gradients = operator.gradients() if with_gradients else None
    for index, (weight, product) in enumerate(operator.matvec_per_batch(vector)):
        pair = torch.stack([vector, product])
        along, square = inner(pair, product).tolist()
        images.weights.append(weight)
        images.quotients.append(along)
        own_square += weight**2 * square
        images.halves[index % 2].add_(product, alpha=weight)
        if gradients is not None:
            _, gradient = next(gradients)
            noise, pull = inner(pair, gradient).tolist()
            images.noise.append(noise)
            images.own_pull.append(pull)
    return dataclasses.replace(images, own_square=own_square)


def _certificate(images: _Images, weighted: float, weighted_error: float) -> Certificate:
    weights, quotients = images.weights, images.quotients
    eigenvalue = sum(w * q for w, q in zip(weights, quotients, strict=True))
    self_weight = sum(w * w for w in weights)
    total = images.halves[0] + images.halves[1]
    square = float(inner(total.unsqueeze(0), total))
    if len(weights) > 1:
        spread = sum(w * (q - eigenvalue) ** 2 for w, q in zip(weights, quotients, strict=True))
        variance = spread / (1.0 - self_weight)
        # Unbiased where a batch of n samples has a variance of 1 / n, as means over samples have.
        standard_error = math.sqrt(spread / (len(weights) - 1))
        square = (square - images.own_square) / (1.0 - self_weight)
    else:
        variance = standard_error = math.nan
    magnitude = abs(eigenvalue)
    if magnitude > 0:
        effective = max(max(square, 0.0) / magnitude, magnitude)
    else:
        effective = math.inf if square > 0 else 0.0
    return Certificate(eigenvalue, standard_error, variance, square, effective, weighted, weighted_error)


def _noise_weighted(operator: HessianOperator, images: list[_Images]) -> list[tuple[float, float]]:
    """Slope of (Hv).g on v.g over the batches' gradients, and its jackknife error, per direction.

    A batch with large errors has both a large gradient and a large Hessian: its own H_B is taken out of
    the H that its gradient meets.
    """
    if not images:
        return []
    totals = torch.stack([i.halves[0] + i.halves[1] for i in images])
    pulls = torch.stack([inner(totals, gradient).cpu() for _, gradient in operator.gradients()]).T
    weights = torch.tensor(images[0].weights, dtype=torch.float64)
    found = []
    for image, pull in zip(images, pulls, strict=True):
        own = torch.tensor(image.own_pull, dtype=torch.float64)
        noise = torch.tensor(image.noise, dtype=torch.float64)
        found.append(_jackknifed(noise, (pull - weights * own) / (1 - weights)))
    return found


def _jackknifed(noise: Tensor, pull: Tensor) -> tuple[float, float]:
    count = len(noise)
    kept = [torch.arange(count) != i for i in range(count)]
    without = torch.tensor([_slope(noise[k], pull[k]) for k in kept], dtype=torch.float64)
    error = math.sqrt((count - 1) / count * float((without - without.mean()).square().sum()))
    return _slope(noise, pull), error


def _slope(noise: Tensor, pull: Tensor) -> float:
    centred = noise - noise.mean()
    variance = float(centred @ centred)
    return float(centred @ pull) / variance if variance > 0 else math.nan


def _overlap(halves: list[tuple[Tensor, Tensor]]) -> float:
    """Mean squared cosine of the principal angles between the two spans."""
    rows, others = (torch.stack(half) for half in zip(*halves, strict=True))
    cross = torch.stack([inner(rows, other) for other in others]).cpu()
    turned = _whitener(others) @ cross @ _whitener(rows).T
    return float(turned.square().sum()) / len(halves)


def _whitener(rows: Tensor) -> Tensor:
    """Turns rows into orthonormal ones: float64, shape (rank, k)."""
    values, vectors = torch.linalg.eigh(gram(rows).cpu())
    kept = values > torch.finfo(torch.float32).eps * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    whitener: Tensor = (vectors[:, kept] / values[kept].sqrt()).T
    return whitener
