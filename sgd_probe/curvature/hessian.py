"""The Hessian of a live training loss as a linear operator.

The graph of the gradient is kept, so that each product costs one more backward pass through it and
nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

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
from sgd_probe.curvature.space import ParameterSpace

__all__ = [
    "CurvatureError",
    "GradientCost",
    "HessianOperator",
    "LossFunction",
    "WrongHessianError",
    "gradient_noise_trace",
    "measure_gradient",
]


@dataclass(frozen=True)
class _Graph:
    """Loss gradient of one batch with the graph that leads to it."""

    evaluation: Evaluation
    gradient: tuple[Tensor, ...]
    weight: float


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

    Raises:
        CurvatureError: the loss is not a finite scalar, or does not depend on the parameters.
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
        self._graphs: list[_Graph | None] = [None] * len(self.batches)
        self._samples = sum(batch.samples for batch in self.batches)

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
        """Number of samples behind it."""
        return self._samples

    def close(self) -> None:
        """Free the graphs."""
        self._graphs = [None] * len(self.batches)

    def matvec(self, vector: Tensor) -> Tensor:
        """Hessian times vector.

        Args:
            vector: shape (size,), of the space's dtype and device.

        Returns:
            A new tensor of the same shape.

        Raises:
            CurvatureError: the product is not finite.
        """
        total: Tensor | None = None
        for weight, product in self.matvec_per_batch(vector):  # every product is ours to change
            total = product.mul_(weight) if total is None else total.add_(product, alpha=weight)
        assert total is not None
        return total

    def matvec_per_batch(self, vector: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Weight and product of every batch in turn; the weights add up to one.

        Raises:
            CurvatureError: a product is not finite.
        """
        self.products += 1
        pieces = self.space.split(vector)
        for index in range(len(self.batches)):
            graph = self._graph(index)
            pairs = [(g, v) for g, v in zip(graph.gradient, pieces, strict=True) if g.requires_grad]
            if pairs:
                outputs, vectors = zip(*pairs, strict=True)
                product = self._aliased.differentiate(
                    graph.evaluation, outputs, vectors, retain_graph=self._retain
                )
                yield graph.weight, finite(self.space.flatten(product))
            else:  # a loss that is linear in the weights
                yield graph.weight, torch.zeros_like(vector)

    def gradients(self) -> Iterator[tuple[float, Tensor]]:
        """Weight and flat gradient of every batch in turn."""
        for index in range(len(self.batches)):
            graph = self._graph(index)
            yield graph.weight, self.space.flatten(graph.gradient)

    def _graph(self, index: int) -> _Graph:
        graph = self._graphs[index]
        if graph is None:
            graph = self._build(self.batches[index])
            if self._retain:
                self._graphs[index] = graph
        return graph

    def _build(self, batch: CurvatureBatch) -> _Graph:
        evaluation = self._aliased.evaluate(self.space, batch)
        self._check_reach(evaluation.loss)
        gradient = self._aliased.differentiate(
            evaluation, (evaluation.loss,), create_graph=True, materialize_grads=True
        )
        return _Graph(evaluation, gradient, batch.samples / self._samples)

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


def finite(product: Tensor) -> Tensor:
    """Pass a Hessian-vector product on.

    Raises:
        CurvatureError: it is not finite.
    """
    # The sum sees every inf and nan in one pass; what it may do beside that is to overflow.
    if not math.isfinite(float(product.sum())) and not bool(torch.isfinite(product).all()):
        raise CurvatureError(
            "expected a finite Hessian-vector product, found inf or nan: the loss overflows in its second "
            "derivative at these weights"
        )
    return product


def gradient_noise_trace(operator: HessianOperator) -> float:
    """Trace of the minibatch gradients' covariance from the operator's own batches.

    Returns:
        Unbiased sum over all weights of the variance of a minibatch gradient at fixed weights
        (squared gradient units); NaN for fewer than two batches.
    """
    count = len(operator.batches)
    if count < 2:
        return math.nan
    mean = torch.zeros(operator.size, dtype=operator.space.dtype, device=operator.space.device)
    squares = 0.0
    for _, gradient in operator.gradients():
        squares += float(gradient.double().square().sum())
        mean.add_(gradient, alpha=1.0 / count)
    return (squares - count * float(mean.double().square().sum())) / (count - 1)


@dataclass(frozen=True)
class GradientCost:
    """What the gradient of one batch costs: seconds, and bytes of the graph that is kept for products."""

    seconds: float
    graph_bytes: int


def measure_gradient(
    module: nn.Module, loss: LossFunction, batch: CurvatureBatch, space: ParameterSpace
) -> GradientCost:
    """Build one batch's graph and see what it takes; also the first sign that the loss can be probed.

    Call it inside :func:`sgd_probe.isolation.isolated`.

    Raises:
        CurvatureError: the loss cannot be probed.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    operator = HessianOperator(module, loss, [batch], space)
    with operator, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        next(operator.gradients())
    # The first call pays for lazy initialisation; of the next ones the fastest was disturbed least.
    fastest = math.inf
    for _ in range(3):
        started = time.perf_counter()
        with HessianOperator(module, loss, [batch], space) as operator:
            next(operator.gradients())
        fastest = min(fastest, time.perf_counter() - started)
    return GradientCost(fastest, sum(kept.values()))
