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
from sgd_probe.curvature.linear_algebra import Reduce, dot, gram, inner

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
        held_out_overlap: the same between the top directions and their images under all batches: how nearly
            they span a subspace that the held-out Hessian leaves alone.
        images: Hv of every direction that is no top one, by each of two halves of the batches: shape (2,
            mixed, size); None for one batch or no such direction.
    """

    certificates: tuple[Certificate, ...]
    split_half_overlap: float
    held_out_overlap: float = math.nan
    images: Tensor | None = None


def certify(
    operator: HessianOperator,
    vectors: Tensor,
    top: int = 0,
    with_overlap: bool = True,
    images: Tensor | None = None,
) -> Certification:
    """Certify directions; one product (over all batches of the operator) each.

    Two more vectors are held meanwhile, two for each direction that is no top one (the images) and, for the
    overlap, two for each top one.

    Args:
        operator: over batches disjoint from those that found the directions.
        vectors: unit rows, shape (k, size).
        top: how many of the first rows are eigenvectors and span the top subspace; the others are mixtures
            whose curvature is weighted by noise.
        with_overlap: ask how well the samples settle the top subspace.
        images: where to leave those, shape (2, mixed, size); in memory of their own by default.
    """
    enough = len(operator.batches) >= MIN_BATCHES
    with_overlap = with_overlap and len(operator.batches) > 1 and top > 0
    halves = [vectors.new_empty((top if with_overlap else 0, vectors.shape[1])) for _ in range(2)]
    mixed = vectors.new_empty((2, len(vectors) - top, vectors.shape[1])) if images is None else images
    seen: list[_Images] = []
    for index, vector in enumerate(vectors):
        image, parts = _images(operator, vector, with_gradients=enough and index >= top)
        seen.append(image)
        if index >= top:
            for half, part in zip(mixed, parts, strict=True):
                half[index - top] = part
        elif with_overlap:
            for half, part in zip(halves, parts, strict=True):
                half[index] = part
    overlap = held_out = math.nan
    if with_overlap:
        overlap = _overlap(halves[0], halves[1], operator.space.reduce)
        held_out = _overlap(vectors[:top], halves[0].add_(halves[1]), operator.space.reduce)
    halves.clear()
    weighted = [(math.nan, math.nan)] * len(vectors)
    if enough and top < len(vectors):
        weighted[top:] = _noise_weighted(operator, seen[top:], mixed)
    certificates = tuple(_certificate(i, *w) for i, w in zip(seen, weighted, strict=True))
    if len(operator.batches) < 2 or top == len(vectors):
        return Certification(certificates, overlap, held_out)
    # From parts of a weighted sum to means.
    even = sum(seen[0].weights[::2])
    mixed[0].div_(even)
    mixed[1].div_(1 - even)
    return Certification(certificates, overlap, held_out, mixed)


@dataclass(frozen=True)
class Revisited:
    """What batches say of directions later on.

    Attributes:
        eigenvalues: v.Hv of each.
        overlap: as :attr:`Certification.held_out_overlap`.
    """

    eigenvalues: tuple[float, ...]
    overlap: float


def revisit(operator: HessianOperator, vectors: Tensor, top: int = 0) -> Revisited:
    """Look at directions again, over all batches of the operator; one product each.

    Args:
        operator: over the batches that certified them.
        vectors: unit rows, shape (k, size).
        top: how many of the first rows span the subspace whose overlap is asked for; as many vectors are held
            meanwhile.
    """
    images = vectors.new_empty((top, vectors.shape[1]))
    quotients = []
    for index, vector in enumerate(vectors):
        product = operator.matvec(vector)
        quotients.append(dot(product, vector, operator.space.reduce))
        if index < top:
            images[index] = product
    overlap = _overlap(vectors[:top], images, operator.space.reduce) if top else math.nan
    return Revisited(tuple(quotients), overlap)


@dataclass(frozen=True)
class _Images:
    """What is needed of H_B v over the batches.

    Attributes:
        weights: of the batches.
        quotients: v.H_B v.
        own_square: sum of the squared weights times ``||H_B v||^2``.
        square: ``||Hv||^2``.
        noise: v.g_B, empty where gradients were not asked for.
        own_pull: (H_B v).g_B likewise.
    """

    weights: list[float]
    quotients: list[float]
    own_square: float
    square: float
    noise: list[float]
    own_pull: list[float]


def _images(
    operator: HessianOperator, vector: Tensor, with_gradients: bool
) -> tuple[_Images, tuple[Tensor, Tensor]]:
    """Also the weighted sums of H_B v over every other batch, which add up to Hv."""
    images = _Images([], [], 0.0, 0.0, [], [])
    halves = (torch.zeros_like(vector), torch.zeros_like(vector))
    own_square, reduce = 0.0, operator.space.reduce
    gradients = operator.gradients() if with_gradients else None
    for index, (weight, product) in enumerate(operator.matvec_per_batch(vector)):
        images.weights.append(weight)
        images.quotients.append(dot(vector, product, reduce))
        own_square += weight**2 * dot(product, product, reduce)
        halves[index % 2].add_(product, alpha=weight)
        if gradients is not None:
            _, gradient = next(gradients)
            images.noise.append(dot(vector, gradient, reduce))
            images.own_pull.append(dot(product, gradient, reduce))
    square = sum(dot(half, half, reduce) for half in halves) + 2 * dot(*halves, reduce)
    return dataclasses.replace(images, own_square=own_square, square=square), halves


def _certificate(images: _Images, weighted: float, weighted_error: float) -> Certificate:
    weights, quotients = images.weights, images.quotients
    eigenvalue = sum(w * q for w, q in zip(weights, quotients, strict=True))
    self_weight = sum(w * w for w in weights)
    square = images.square
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


def _noise_weighted(
    operator: HessianOperator, images: list[_Images], halves: Tensor
) -> list[tuple[float, float]]:
    """Slope of (Hv).g on v.g over the batches' gradients, and its jackknife error, per direction.

    Hv is the sum of two halves, shape (2, directions, size).

    A batch with large errors has both a large gradient and a large Hessian: its own H_B is taken out of
    the H that its gradient meets.
    """
    reduce = operator.space.reduce
    sums = [reduce(inner(halves[0], g) + inner(halves[1], g)) for _, g in operator.gradients()]
    pulls = torch.stack(sums).cpu().T
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


def _overlap(rows: Tensor, others: Tensor, reduce: Reduce) -> float:
    """Mean squared cosine of the principal angles between the two spans."""
    cross = reduce(torch.stack([inner(rows, other) for other in others])).cpu()
    turned = _whitener(others, reduce) @ cross @ _whitener(rows, reduce).T
    return float(turned.square().sum()) / len(rows)


def _whitener(rows: Tensor, reduce: Reduce) -> Tensor:
    """Turns rows into orthonormal ones: float64, shape (rank, k)."""
    values, vectors = torch.linalg.eigh(gram(rows, reduce).cpu())
    kept = values > torch.finfo(torch.float32).eps * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    whitener: Tensor = (vectors[:, kept] / values[kept].sqrt()).T
    return whitener
