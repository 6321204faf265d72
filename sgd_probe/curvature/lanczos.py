"""Lanczos with full reorthogonalisation for the eigenvalues of largest magnitude.

Residuals alone stop on a wrong set, all small before the last outlier has appeared. So the values must
have stood still twice, to much less than the residuals' bound (an eigenvalue's error is the square of its
residual, and a value that still moves has company on its way), and no further pair in sight may be able
to overtake those that were asked for; or they have stood still for long, because just after a restart some
pair always might. What no stop sees from one starting vector are the further copies
of an exactly multiple eigenvalue; those appear late, if at all.

Where memory bounds the basis, it is restarted with the best Ritz vectors kept (thick restart).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sgd_probe.curvature.krylov import KrylovBasis
from sgd_probe.curvature.linear_algebra import Reduce, dimension, norm, orthogonality, random_unit, whole

#: Pairs kept in sight beyond those that were asked for.
_EXTRA_PAIRS = 2
#: Values stand still to the tolerance to this power, and to no more than this share of |lambda_1|. On the
#: dense Hessians of small networks and on spectra like those of networks, 1 or 2 in 1,000 searches at
#: tolerances of 1e-2 and 1e-3 then stop on a wrong set; without the second, up to 8 in 100 at 1e-2.
_STILL = 1.5
_MOST_STILL = 1e-4
#: How many residuals a value may still move. By theory one; two cost few products more.
_REACH = 2.0
#: Fewest vectors beside the watched pairs that a restart can work with.
_MIN_FREE_VECTORS = 4
#: Share of noise in a given first vector: one that is orthogonal to an eigenvector never finds it.
_NOISE = 0.1


class LinearOperator(Protocol):
    """A symmetric operator on vectors of one length, or on this process's parts of longer ones."""

    @property
    def size(self) -> int: ...

    def matvec(self, vector: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LanczosResult:
    """Eigenpairs of largest |eigenvalue|, in descending order of it.

    Attributes:
        eigenvalues: float64, shape (k,).
        vectors: orthonormal rows, shape (k, size): a view into ``krylov``.
        residuals: ``||Hv - lambda v|| / |lambda_1|`` per pair, float64, shape (k,).
        orthogonality: largest |v_i . v_j| of two different rows.
        products: matrix-vector products used.
        krylov: all Ritz vectors that the search has left behind, those above first: what is not worth
            the name of an eigenvector still holds the stiff part of the space.
        ritz_values: of all those vectors, float64, shape (len(krylov),).
        ritz_residuals: theirs, as ``residuals``.
        restarts: how often the basis had to be restarted.
        seconds: wall time.
        converged: every pair reached the tolerance and the set was stable.
        message: why it stopped.
    """

    eigenvalues: Tensor
    vectors: Tensor
    residuals: Tensor
    orthogonality: float
    products: int
    krylov: KrylovBasis
    ritz_values: Tensor
    ritz_residuals: Tensor
    restarts: int
    seconds: float
    converged: bool
    message: str


def smallest_basis(count: int) -> int:
    """Fewest vectors with which ``count`` pairs can be found."""
    return count + _EXTRA_PAIRS + _MIN_FREE_VECTORS


def most_products(count: int) -> int:
    """Products after which the search for ``count`` pairs gives up, where memory does not bound it."""
    return 3 * count + 40


def lanczos(
    operator: LinearOperator,
    count: int,
    like: Tensor,
    *,
    tolerance: float = 1e-2,
    max_products: int | None = None,
    max_vectors: int | None = None,
    beside: int = 0,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_product: Callable[[int], None] | None = None,
    reduce: Reduce = whole,
) -> LanczosResult:
    """Find the eigenpairs of largest |eigenvalue| at both ends of the spectrum.

    Args:
        operator: symmetric.
        count: number of pairs; fewer are returned where the space is smaller.
        like: any tensor of the dtype and device to work in.
        tolerance: bound on ``||Hv - lambda v|| / |lambda_1|``.
        max_products: products after which it gives up, and says so; default :func:`most_products`, and
            three times that where memory makes it restart.
        max_vectors: vectors held at once; unbounded by default.
        beside: rows to leave room for behind the pairs, in one matrix with them (the first block of
            ``krylov``), once they are known.
        start: first vector (the sum of an earlier basis, say), to which noise is added; random if None.
        generator: source of random vectors (CPU).
        on_product: called with the number of products so far, for progress.
        reduce: of vectors that are divided among processes; each has a generator of another seed then.

    Returns:
        The pairs found, converged or not: look at ``residuals`` and ``message``.

    Raises:
        ValueError: ``max_vectors`` is too small for ``count`` pairs.
    """
    started = time.perf_counter()
    space = dimension(operator.size, reduce)
    count = min(count, space)
    limit = max_products or most_products(count)
    if max_vectors is None or max_vectors >= min(limit, space):
        max_vectors = limit
    elif max_vectors < smallest_basis(count):
        raise ValueError(
            f"expected room for at least {smallest_basis(count)} vectors, found {max_vectors}: "
            "ask for fewer modes or allow more memory"
        )
    elif max_products is None:
        limit *= 3
    generator = generator or torch.Generator().manual_seed(0)
    first = random_unit(operator.size, like, generator, reduce)
    if start is not None:
        first.mul_(_NOISE * norm(start, reduce)).add_(start.to(like))
        first /= norm(first, reduce)
    basis = KrylovBasis(like, operator.size, count + beside, reduce)
    state = _Search(operator, space, count, like, tolerance, generator, basis)
    state.basis.append(first)
    del first  # the basis has copied it; a vector that a name still holds is memory
    message, restarts = f"stopped at the limit of {limit} products", 0
    for done in range(1, limit + 1):
        following = state.extend()
        if on_product is not None:
            on_product(done)
        if state.exhausted:
            message = "the basis spans the whole space"
            break
        if state.settled():
            message = f"converged after {done} products"
            break
        if done < limit:
            if len(state.basis) >= max_vectors:
                state.restart()
                restarts += 1
            state.basis.append(following, state.length)
        del following
    state.resolve()
    basis.rotate(state.vectors)
    vectors = basis.matrix(stop=count)
    residuals = state.errors / state.values.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return LanczosResult(
        eigenvalues=state.values[:count],
        vectors=vectors,
        residuals=residuals[:count],
        orthogonality=orthogonality(vectors, reduce),
        products=done,
        krylov=basis,
        ritz_values=state.values,
        ritz_residuals=residuals,
        restarts=restarts,
        seconds=time.perf_counter() - started,
        converged=message.startswith(("converged", "the basis spans")),
        message=message,
    )


@dataclass
class _Search:
    """The Krylov space so far and its Ritz pairs, by descending magnitude."""

    operator: LinearOperator
    dimension: int  # of the space that the operator acts on
    count: int
    like: Tensor
    tolerance: float
    generator: torch.Generator
    basis: KrylovBasis
    projected: Tensor = field(default_factory=lambda: torch.zeros((0, 0), dtype=torch.float64))
    values: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    vectors: Tensor = field(default_factory=lambda: torch.zeros((0, 0), dtype=torch.float64))
    errors: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    length: float = 1.0  # of the vector that comes next
    coupling: float = 0.0  # of that vector with the space
    scale: float = 0.0
    chain: int = 0  # products since the space was last left
    looked: bool = False  # the complement of an invariant space has been looked into
    coupled_to_last_two: bool = True  # not so for the first product after a restart
    previous: Tensor | None = None
    still: int = 0  # products in a row that have not moved the values
    safe: int = 0  # of those, how many in a row have seen no pair that could overtake

    @property
    def exhausted(self) -> bool:
        return len(self.basis) == self.dimension

    def extend(self) -> Tensor:
        """Apply the operator to the last vector; returns the next one, of some length."""
        following = self.operator.matvec(self.basis[len(self.basis) - 1])
        column = self.basis.orthogonalise(following, recurrence=self.coupled_to_last_two)
        self.chain += 1
        self.coupled_to_last_two = True
        length, reduce = len(self.basis), self.basis.reduce
        grown = torch.zeros((length, length), dtype=torch.float64)
        grown[:-1, :-1] = self.projected
        grown[:, -1] = grown[-1, :] = column
        self.projected = grown
        self.length = self.coupling = norm(following, reduce)
        self.scale = max(self.scale, float(column.abs().max()), self.coupling)
        # An invariant space has zero residuals whatever it misses: look into its complement first. All of
        # that is known when a random vector of it turns out to be an eigenvector.
        self.looked = self.chain > self.count + _EXTRA_PAIRS
        negligible = max(10 * torch.finfo(self.like.dtype).eps, 1e-3 * self.tolerance)
        if self.coupling <= negligible * self.scale or self.exhausted:
            # Go on in the complement, uncoupled from the space so far.
            self.looked = self.chain == 1
            self.coupling, self.chain = 0.0, 0
            if not self.exhausted:
                following = random_unit(self.operator.size, self.like, self.generator, reduce)
                self.basis.orthogonalise(following)
                self.length = norm(following, reduce)
        return following

    def resolve(self) -> None:
        """Renew the Ritz pairs."""
        values, vectors = torch.linalg.eigh(self.projected)
        order = values.abs().argsort(descending=True)
        self.values, self.vectors = values[order], vectors[:, order]
        self.errors = (self.coupling * self.vectors[-1]).abs()

    def settled(self) -> bool:
        """Small residuals, values that stand still, and no other pair that could overtake: twice.

        Or without the last for as many products as there are pairs in sight.
        """
        if len(self.basis) < self.count + _EXTRA_PAIRS:
            return False
        self.resolve()
        magnitudes = self.values.abs()
        wanted, others = magnitudes[: self.count], magnitudes[self.count :]
        bound = self.tolerance * magnitudes[0]
        small = bool((self.errors[: self.count] <= bound).all())
        reach = others + _REACH * self.errors[self.count :]
        ahead = bool((reach <= wanted[-1] + bound).all())
        rounding = 10 * torch.finfo(self.like.dtype).eps
        still = max(min(self.tolerance**_STILL, _MOST_STILL), rounding) * magnitudes[0]
        stable = self.previous is not None and bool(((wanted - self.previous).abs() <= still).all())
        self.previous = wanted
        self.still = self.still + 1 if self.looked and small and stable else 0
        self.safe = self.safe + 1 if self.still and ahead else 0
        return self.safe == 2 or self.still == self.count + _EXTRA_PAIRS

    def restart(self) -> None:
        """Keep the watched Ritz vectors and half of the room beside them."""
        watched = self.count + _EXTRA_PAIRS
        keep = watched + (len(self.basis) - watched) // 2
        self.basis.rotate(self.vectors[:, :keep])
        self.projected = torch.diag(self.values[:keep])
        self.coupled_to_last_two = False
