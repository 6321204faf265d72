"""Spectral density, trace and Frobenius norm of an operator that is known by its products only.

A random vector weighs every eigenvalue alike on average. Lanczos turns what one such vector sees of the
spectrum into a quadrature, a few nodes with weights (stochastic Lanczos quadrature), and what several see
into means with standard errors.

The random vectors have entries +-1 (Rademacher): ``z.Hz`` then has the variance
``2 (||H||^2 - sum_i H_ii^2)``, and of a random direction ``2n/(n+2) (||H||^2 - tr(H)^2/n)``, which is
never less but for the factor ``n/(n+2)``, and far more where the diagonal carries the spectrum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sgd_probe.curvature.flat import Quadrature
from sgd_probe.curvature.krylov import KrylovBasis
from sgd_probe.curvature.lanczos import LinearOperator
from sgd_probe.curvature.linear_algebra import dot, norm

#: Width of the Gaussians that broaden a density, in units of its largest |node|.
_RELATIVE_WIDTH = 0.01


@dataclass(frozen=True)
class SpectralDensity:
    """What random vectors see of a spectrum; eigenvalues and nodes are in units of the loss per weight^2.

    Attributes:
        nodes: float64, shape (probes, steps), ascending. A probe whose Krylov space is complete sooner
            repeats its last node at no weight.
        weights: share of the spectrum at each node, float64, the same shape; each row adds up to one.
        size: dimension of the operator.
        products: matrix-vector products used.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    products: int

    @property
    def trace(self) -> float:
        """Sum of the eigenvalues: the probes' mean, unbiased."""
        return float(self._moments(1).mean())

    @property
    def trace_standard_error(self) -> float:
        """Of :attr:`trace`, from the scatter between probes; NaN for a single one."""
        return standard_error(self._moments(1))

    @property
    def squared_norm(self) -> float:
        """Sum of the squared eigenvalues (Frobenius norm squared): the probes' mean, unbiased."""
        return float(self._moments(2).mean())

    @property
    def squared_norm_standard_error(self) -> float:
        """Of :attr:`squared_norm`, from the scatter between probes; NaN for a single one."""
        return standard_error(self._moments(2))

    def density(self, points: Tensor, width: float | None = None) -> Tensor:
        """Share of the eigenvalues per unit of eigenvalue, each node broadened to a Gaussian.

        Args:
            points: eigenvalues at which it is wanted, any shape.
            width: standard deviation of the Gaussians; default a hundredth of the largest |node|, or
                of one where all are zero.

        Returns:
            float64, the shape of ``points``; over the whole axis it integrates to one.

        Raises:
            ValueError: the width is not positive.
        """
        if width is None:
            width = _RELATIVE_WIDTH * (float(self.nodes.abs().max()) or 1.0)
        if not width > 0:
            raise ValueError(f"expected a positive width, found {width}")
        distances = (points.to(self.nodes)[..., None] - self.nodes.flatten()) / width
        heights = torch.exp(-0.5 * distances.square()) / (width * math.sqrt(2 * math.pi))
        return heights @ self.weights.flatten() / len(self.nodes)

    def _moments(self, power: int) -> Tensor:
        """Every probe's estimate of the trace of a power of the operator.

        Quadratures of m nodes are exact up to the power 2m-1: only the choice of probes is uncertain.
        """
        return self.size * (self.weights * self.nodes**power).sum(dim=1)


@dataclass(frozen=True)
class TraceEstimate:
    """Trace of an operator by Hutchinson's estimator; for a Hessian in units of the loss per weight^2.

    Attributes:
        samples: one unbiased estimate per product, float64, shape (probes,).
    """

    samples: Tensor

    @property
    def value(self) -> float:
        """The samples' mean."""
        return float(self.samples.mean())

    @property
    def standard_error(self) -> float:
        """Of :attr:`value`; NaN for a single sample."""
        return standard_error(self.samples)


def spectral_density(
    operator: LinearOperator,
    like: Tensor,
    *,
    probes: int = 8,
    steps: int = 64,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Estimate the density of an operator's spectrum by stochastic Lanczos quadrature.

    It costs ``probes * steps`` products, and the memory of ``steps`` vectors (rounded up to whole blocks)
    and of two besides what a product takes. Both ends of the spectrum, where a few eigenvalues lie apart,
    are resolved first; inside the bulk, structure finer than about the spectrum's extent over ``steps`` is
    not.

    Args:
        operator: symmetric.
        like: any tensor of the dtype and device to work in.
        probes: random vectors; standard errors fall with the root of their number.
        steps: nodes per probe; fewer where the space is smaller.
        generator: source of random vectors (CPU).

    Returns:
        The quadratures of all probes.

    Raises:
        ValueError: no probe, or fewer than the two steps that a squared norm needs.
    """
    if probes < 1 or steps < 2:
        raise ValueError(f"expected at least 1 probe and 2 steps, found {probes} and {steps}")
    generator = generator or torch.Generator().manual_seed(0)
    steps = min(steps, operator.size)
    nodes = torch.empty((probes, steps), dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    products = 0
    for probe in range(probes):
        values, shares = _quadrature(operator, _signs(operator.size, like, generator), steps)
        found = len(values)
        nodes[probe] = F.pad(values, (0, steps - found), value=float(values[-1]))
        weights[probe, :found] = shares
        products += found
    return SpectralDensity(nodes, weights, operator.size, products)


@dataclass(frozen=True)
class SeenDensity:
    """A spectrum as a search for stiff and flat directions has seen it.

    Attributes:
        nodes: eigenvalues that stand for all of them, float64, shape (m,).
        weights: share of the spectrum that each stands for, adding up to one, shape (m,).
        widths: that share lies within so much of the node: zero for a Ritz value, half of the way between its
            neighbours for a node of a quadrature, shape (m,).
        size: dimension of the operator.
    """

    nodes: Tensor
    weights: Tensor
    widths: Tensor
    size: int

    @property
    def trace(self) -> float:
        """Sum of the eigenvalues, unbiased."""
        return self.size * float(self.weights @ self.nodes)


def seen_density(
    known: Tensor, taken: Sequence[float], seen: Sequence[Quadrature], size: int
) -> SeenDensity | None:
    """The density that a search for stiff and flat directions has seen on its way, at no product.

    In an orthonormal basis that begins with the known vectors, their Rayleigh quotients and the trace of the
    operator between the other vectors add up to its trace. The known part, which holds what is stiff, is
    exact; of the rest, random vectors outside it see what such vectors see.

    Args:
        known: Rayleigh quotients of the vectors that the random starts stayed away from, shape (k,).
        taken: those of the directions that were found one by one, from one start each: a start stayed away
            from the directions before its own.
        seen: what each start saw outside.
        size: dimension of the operator.

    Returns:
        None where there was no start.
    """
    if not seen:
        return None
    starts = len(seen)
    before = torch.tensor(list(taken[: starts - 1]), dtype=torch.float64)
    # A direction counts for the starts that came after it.
    counted = torch.arange(starts - 1, 0, -1, dtype=torch.float64) / starts
    parts = [
        (known, torch.full_like(known, 1 / size), torch.zeros_like(known)),
        (before, counted / size, torch.zeros_like(before)),
    ]
    for index, quadrature in enumerate(seen):
        outside = 1 - (len(known) + index) / size
        parts.append((quadrature.nodes, outside / starts * quadrature.weights, _widths(quadrature.nodes)))
    nodes, weights, widths = (torch.cat(columns) for columns in zip(*parts, strict=True))
    order = nodes.argsort()
    return SeenDensity(nodes[order], weights[order], widths[order], size)


def _widths(nodes: Tensor) -> Tensor:
    """Half of the way between the neighbours of each of some ascending nodes."""
    gaps = nodes.diff()
    if not len(gaps):
        return torch.zeros_like(nodes)
    return (torch.cat([gaps[:1], gaps]) + torch.cat([gaps, gaps[-1:]])) / 4


def trace(
    operator: LinearOperator,
    like: Tensor,
    *,
    probes: int = 100,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    """Estimate the trace of an operator, at one product per probe and the memory of two vectors.

    Args:
        operator: symmetric.
        like: any tensor of the dtype and device to work in.
        probes: random vectors; the standard error falls with the root of their number.
        generator: source of random vectors (CPU).

    Returns:
        The mean with its standard error.

    Raises:
        ValueError: no probe.
    """
    if probes < 1:
        raise ValueError(f"expected at least 1 probe, found {probes}")
    samples = trace_samples(operator, like, generator or torch.Generator().manual_seed(0))
    return TraceEstimate(torch.tensor(list(itertools.islice(samples, probes)), dtype=torch.float64))


def trace_samples(operator: LinearOperator, like: Tensor, generator: torch.Generator) -> Iterator[float]:
    """Unbiased estimates of the trace, one product each, without end."""
    while True:
        signs = _signs(operator.size, like, generator)
        yield dot(signs, operator.matvec(signs))


def standard_error(samples: Tensor) -> float:
    """Of the mean of independent samples; NaN for a single one."""
    return float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan


def _signs(size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs, drawn on the CPU so that they are the same on every device."""
    return torch.empty(size).bernoulli_(0.5, generator=generator).mul_(2).sub_(1).to(like)


def _quadrature(operator: LinearOperator, first: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of what one vector sees of the spectrum.

    Returns:
        Two float64 tensors, as long as the Krylov space goes, at most ``steps``.
    """
    basis = KrylovBasis(first, operator.size)
    projected = torch.zeros((steps, steps), dtype=torch.float64)
    negligible = 10 * torch.finfo(first.dtype).eps
    scale = 0.0
    following = first / norm(first)
    for step in range(steps):
        basis.append(following)
        following = operator.matvec(basis[step])
        projected[step, : step + 1] = basis.orthogonalise(following)
        coupling = norm(following)
        scale = max(scale, coupling, float(projected[step].abs().max()))
        # The space is invariant: nothing of the vector lies outside, so that these nodes say it all.
        if coupling <= negligible * scale:
            break
        following /= coupling
    dimension = len(basis)
    # From the lower triangle, where the rows are. Of each Ritz vector the first vector's share is asked.
    nodes, vectors = torch.linalg.eigh(projected[:dimension, :dimension])
    return nodes, vectors[0].square()
