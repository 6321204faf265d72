"""The Hessian of a live training loss as a linear operator.

The graph of the gradient is kept, so that each product costs one more backward pass through it and
nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from sgd_probe.curvature.aliased import (
    AliasedLoss,
    CurvatureError,
    Evaluation,
    LossFunction,
    WrongHessianError,
    leaves,
)
from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.linear_algebra import Reduce, whole
from sgd_probe.curvature.microbatches import cut
from sgd_probe.curvature.space import ParameterSpace, part

__all__ = [
    "CurvatureError",
    "GradientCost",
    "HessianOperator",
    "LossFunction",
    "WrongHessianError",
    "gradient_noise_trace",
    "measure_gradient",
]


class Ranks(Protocol):
    """The processes among which the batches are divided; each calls the same things in the same order."""

    @property
    def size(self) -> int:
        """How many there are."""

    def mean(self, work: Callable[[], Tensor]) -> Tensor:
        """Mean over the processes of what each computes: the same bits on all."""

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the processes."""

    def sums(self, parts: Tensor) -> Tensor:
        """The same of a few float64 numbers each."""


@dataclass(frozen=True)
class _Graph:
    """Loss gradient of one batch, or a piece of it, with the graph that leads to it."""

    evaluation: Evaluation
    gradient: tuple[Tensor, ...]


class HessianOperator:
    """Mean Hessian over curvature batches, weighted by their number of samples.

    Call it inside :func:`sgd_probe.isolation.isolated`. ``close()`` (or leaving the ``with`` block)
    frees the graphs.

    Args:
        module: the user's module.
        loss: its training loss.
        batches: the curvature batches, at least one.
        space: the probed parameters.
        retain_graph: keep every batch's graph (a product costs about 2 gradients) or rebuild it for
            each product (about 3.2, and the memory of one graph).
        dtype: work on copies of weights, buffers and batches in this precision; None takes them as they
            are.
        microbatch: most samples of a graph; None takes batches whole. It is right where the mean over a
            batch's pieces is its loss: ask :func:`~sgd_probe.curvature.microbatches.check_pieces` first.
        home: where vectors are held that go in and come out, if not with the weights.
        ranks: the processes of a distributed training, each with as many batches of its own. A batch is then
            what all of them hold at that place, its loss the mean of theirs: what a step of the training is
            made of. Every result is the same on all.

    Raises:
        CurvatureError: the loss is not a finite scalar, or does not depend on the parameters; a batch
            cannot be cut.
        WrongHessianError: it cannot be differentiated twice, or reaches weights by a way around the module.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: LossFunction,
        batches: Sequence[CurvatureBatch],
        space: ParameterSpace,
        retain_graph: bool = True,
        dtype: torch.dtype | None = None,
        microbatch: int | None = None,
        ranks: Ranks | None = None,
        home: torch.device | None = None,
    ) -> None:
        if not batches:
            raise ValueError("expected at least one curvature batch, found none")
        self.space = space if dtype is None else space.cast(dtype)
        self.batches = tuple(batches)
        self.products = 0
        self.module = module
        self.loss = loss
        self._aliased = AliasedLoss(module, loss, dtype)
        self._retain = retain_graph
        # Graphs are of pieces. To the outside there are batches only: theirs is the noise of the training.
        self._pieces = tuple(cut(batch, microbatch) for batch in self.batches)
        self._graphs: dict[int, _Graph] = {}  # by the id of the piece, which lives as long
        self._ranks = ranks
        self.home = home or self.space.device
        counts = [float(batch.samples) for batch in self.batches]
        if ranks is not None:
            counts = ranks.total(counts)
        self._samples = round(sum(counts))
        self._weights = [count / self._samples for count in counts]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Length of the vectors it takes."""
        return self.space.size

    @property
    def samples(self) -> int:
        """Number of samples behind it, on all processes."""
        return self._samples

    def close(self) -> None:
        """Free the graphs."""
        self._graphs.clear()

    def matvec(self, vector: Tensor) -> Tensor:
        """Hessian times vector.

        Args:
            vector: shape (size,), of the space's dtype, at home.

        Returns:
            A new tensor of the same shape.

        Raises:
            CurvatureError: the product is not finite.
        """
        self.products += 1
        vector = vector.to(self.space.device)
        product = partial(self._product, vector=vector)
        if self._ranks is not None:
            return self._over_ranks(partial(self._weighted, product)).to(self.home)
        # Over the pieces of all batches at once: a mean of means would hold one vector more.
        return _mean(tuple(chain.from_iterable(self._pieces)), product).to(self.home)

    def matvec_per_batch(self, vector: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Weight and product of every batch in turn; the weights add up to one.

        Raises:
            CurvatureError: a product is not finite.
        """
        self.products += 1
        return self._per_batch(partial(self._product, vector=vector.to(self.space.device)))

    def gradients(self) -> Iterator[tuple[float, Tensor]]:
        """Weight and flat gradient of every batch in turn."""
        return self._per_batch(self._gradient)

    def losses(self, vectors: Tensor, offsets: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
        """Weight of every batch in turn, and its losses along lines through the weights.

        Args:
            vectors: directions of the lines, shape (k, size).
            offsets: multiples of them.

        Returns:
            With each weight a tensor of shape (1 + k * len(offsets),): the loss at the weights, then how far
            it rises above that at every offset of the first line, of the second and so on. A graph is built
            for each and dropped.

        Raises:
            CurvatureError: a loss is not finite.
        """
        vectors = vectors.to(self.space.device)
        return self._per_batch(partial(self._losses, vectors=vectors, offsets=offsets))

    def _losses(self, piece: CurvatureBatch, vectors: Tensor, offsets: Sequence[float]) -> Tensor:
        here = self._value(piece)
        shifts = (offset * vector for vector in vectors for offset in offsets)
        rises = [self._value(piece, shift) - here for shift in shifts]
        return torch.tensor([here, *rises], dtype=self.space.dtype, device=self.space.device)

    def _value(self, piece: CurvatureBatch, shift: Tensor | None = None) -> float:
        """Its loss, with the weights shifted."""
        return float(self._evaluation(piece, shift).loss.detach())

    def _evaluation(self, piece: CurvatureBatch, shift: Tensor | None = None) -> Evaluation:
        """Its loss as a function of the weights, shifted, where it reaches them by the module alone."""
        parts = None if shift is None else self.space.split(shift)
        evaluation = self._aliased.evaluate(self.space, piece, parts)
        self._check_reach(evaluation.loss)
        return evaluation

    def losses_on_aliases_and_weights(self) -> tuple[float, float] | None:
        """The loss of the first piece twice: on aliases, and where the module holds its own weights.

        None where the work is done on copies in another precision.
        """
        if self._aliased.dtype is not None:
            return None
        piece = self._pieces[0][0]
        return self._value(piece), self._aliased.value_of_own(piece)

    @property
    def parts_of_batch(self) -> int:
        """Independent minibatches that a batch is made of, each with a gradient of its own: one a process."""
        return 1 if self._ranks is None else self._ranks.size

    def own_gradients(self) -> Iterator[Tensor]:
        """Flat gradient of this process's part of every batch in turn; nothing is reduced."""
        return (_mean(pieces, self._gradient).to(self.home) for pieces in self._pieces)

    def _per_batch(self, value: Callable[[CurvatureBatch], Tensor]) -> Iterator[tuple[float, Tensor]]:
        for weight, pieces in zip(self._weights, self._pieces, strict=True):
            work = partial(_mean, pieces, value)
            yield weight, self._over_ranks(work).to(self.home)

    def mean_and_total(self, vector: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of each process's vector, and sum of each one's number, over what a batch is made of."""
        if self._ranks is None or self.parts_of_batch == 1:
            return vector, number
        mean = self._ranks.mean(lambda: vector.to(self.space.device))
        return mean.to(self.home), self._ranks.sums(number)

    def _over_ranks(self, work: Callable[[], Tensor]) -> Tensor:
        """Mean of what each process computes from its own batches."""
        return work() if self._ranks is None else self._ranks.mean(work)

    def _weighted(self, value: Callable[[CurvatureBatch], Tensor]) -> Tensor:
        """This process's part of a mean over batches that all processes hold."""
        total = _mean(self._pieces[0], value).mul_(self._weights[0])
        for weight, pieces in zip(self._weights[1:], self._pieces[1:], strict=True):
            total.add_(_mean(pieces, value), alpha=weight)
        return total

    def _product(self, piece: CurvatureBatch, vector: Tensor) -> Tensor:
        """Its Hessian times a vector: a new tensor."""
        graph, parts = self._graph(piece), self.space.split(vector)
        pairs = [(g, v) for g, v in zip(graph.gradient, parts, strict=True) if g.requires_grad]
        if not pairs:  # a loss that is linear in the weights
            return torch.zeros_like(vector)
        outputs, vectors = zip(*pairs, strict=True)
        product = self._aliased.differentiate(graph.evaluation, outputs, vectors, retain_graph=self._retain)
        return finite(self.space.flatten(product))

    def _gradient(self, piece: CurvatureBatch) -> Tensor:
        """Its flat gradient: a new tensor."""
        return self.space.flatten(self._graph(piece).gradient)

    def _graph(self, piece: CurvatureBatch) -> _Graph:
        graph = self._graphs.get(id(piece)) or self._build(piece)
        if self._retain:
            self._graphs[id(piece)] = graph
        return graph

    def _build(self, piece: CurvatureBatch) -> _Graph:
        evaluation = self._evaluation(piece)
        gradient = self._aliased.differentiate(
            evaluation, (evaluation.loss,), create_graph=True, materialize_grads=True
        )
        return _Graph(evaluation, gradient)

    def _check_reach(self, loss: Tensor) -> None:
        """Refuse a loss that reaches a probed weight by another way than the aliases."""
        live = dict(zip(map(id, self.space.parameters), self.space.names, strict=True))
        around = [live[id(leaf)] for leaf in leaves(loss) if id(leaf) in live]
        if around:
            raise WrongHessianError(
                f"expected the loss to reach {around[0]} through the module's attributes, found another "
                "way to it (a list of parameters, an optimizer's groups): its part of the Hessian would be "
                "missing. Use the attribute in the training step, or give a loss_fn"
            )


def _mean(pieces: Sequence[CurvatureBatch], value: Callable[[CurvatureBatch], Tensor]) -> Tensor:
    """Mean over samples of what is a mean over the samples of each piece; every value is ours to change."""
    if len(pieces) == 1:
        return value(pieces[0])
    samples = sum(piece.samples for piece in pieces)
    total = value(pieces[0]).mul_(pieces[0].samples / samples)
    for piece in pieces[1:]:
        total.add_(value(piece), alpha=piece.samples / samples)
    return total


def finite(product: Tensor, reduce: Reduce = whole) -> Tensor:
    """Pass a Hessian-vector product on.

    Raises:
        CurvatureError: it is not finite.
    """
    # The sum sees every inf and nan in one pass; what it may do beside that is to overflow.
    if not math.isfinite(float(reduce(product.sum()))) and float(reduce((~product.isfinite()).sum())):
        raise CurvatureError(
            "expected a finite Hessian-vector product, found inf or nan: the loss overflows in its second "
            "derivative at these weights"
        )
    return product


def gradient_noise_trace(operator: HessianOperator) -> float:
    """Trace of the covariance of a batch's gradient, from the operator's own batches.

    Where a batch is made of the minibatches of several processes, their differences count as well: a batch's
    gradient is the mean of theirs.

    Returns:
        Unbiased sum over all weights of the variance of a batch's gradient at fixed weights (squared gradient
        units); zero where the gradients differ by rounding only; NaN for fewer than two minibatches.
    """
    count = len(operator.batches) * operator.parts_of_batch
    if count < 2:
        return math.nan
    mean = torch.zeros(operator.size, dtype=operator.space.dtype, device=operator.home)
    squares = mean.new_zeros((), dtype=torch.float64)
    for gradient in operator.own_gradients():
        squares += gradient.double().square().sum()
        mean.add_(gradient, alpha=1.0 / len(operator.batches))
    mean, squares = operator.mean_and_total(mean, squares)
    spread = squares - count * mean.double().square().sum()
    left, total = operator.space.reduce(torch.stack([spread, squares])).tolist()
    # The mean of equal gradients is theirs but for its last digits.
    if left <= count * torch.finfo(mean.dtype).eps * total:
        return 0.0
    return float(left) / (count - 1) / operator.parts_of_batch


@dataclass(frozen=True)
class GradientCost:
    """What the gradient of one batch costs.

    Attributes:
        seconds: of the whole batch.
        graph_bytes: of one graph that is kept for products, of the batch or of a piece of it, with the
            gradient that it leads to.
        graphs: of one batch.
    """

    seconds: float
    graph_bytes: int
    graphs: int


def measure_gradient(
    module: nn.Module,
    loss: LossFunction,
    batch: CurvatureBatch,
    space: ParameterSpace,
    microbatch: int | None = None,
    kind: Callable[..., HessianOperator] = HessianOperator,
    dtype: torch.dtype | None = None,
) -> GradientCost:
    """Build one batch's graph and see what it takes; also the first sign that the loss can be probed.

    Call it inside :func:`sgd_probe.isolation.isolated`.

    Args:
        module: the user's module.
        loss: its training loss.
        batch: any.
        space: the probed parameters.
        microbatch: most samples of a graph.
        kind: what will take the products, and decides what of a graph is kept.
        dtype: of copies to work on, as for the operator.

    Raises:
        CurvatureError: the loss cannot be probed.
    """
    own = {part(parameter).untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    pieces = cut(batch, microbatch)  # the first is the largest
    operator = kind(module, loss, pieces[:1], space, dtype=dtype)
    with operator, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        next(operator.gradients())
    # The first call pays for lazy initialisation; of the next ones the fastest was disturbed least.
    fastest = math.inf
    for _ in range(3):
        started = time.perf_counter()
        for piece in pieces:
            with kind(module, loss, [piece], space, dtype=dtype) as operator:
                next(operator.gradients())
        fastest = min(fastest, time.perf_counter() - started)
    gradient = space.size * (dtype or space.dtype).itemsize
    return GradientCost(fastest, sum(kept.values()) + gradient, len(pieces))
