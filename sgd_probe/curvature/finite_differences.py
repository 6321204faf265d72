"""The Hessian by differences of gradients: the declared second way, for a loss without double backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from sgd_probe.curvature.aliased import CurvatureError, LossFunction
from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.hessian import HessianOperator, Ranks, finite
from sgd_probe.curvature.linear_algebra import norm
from sgd_probe.curvature.space import ParameterSpace

#: Each step over the one before, and how many are tried until two in a row agree.
_RATIO, _STEPS = 0.25, 4


class FiniteDifferenceOperator(HessianOperator):
    """Hessian-vector products as central differences of the loss gradient, at two steps that must agree.

    Four gradients a product (eight at most) and the memory of one; no graph of the gradient is built.
    Nothing chooses it in place of :class:`HessianOperator`: whoever wants it says so
    (``ProbeConfig.second_derivatives``), or has divided the weights among processes, where there is no other
    way. Call it inside :func:`sgd_probe.isolation.isolated`.

    A unit whose input changes sign within the step spoils the difference. Measured in float64: right to
    1e-6 at steps of 1e-8 and below of the weights, wrong by factors on a ResNet-20 with ReLU at 1e-7 and
    above; hence the small default, and smaller ones where two steps do not agree. Measured in float32:
    smooth networks are right to 1e-3, ReLU networks are unreliable at any step.

    Args:
        module: the user's module.
        loss: its training loss.
        batches: the curvature batches, at least one.
        space: the probed parameters.
        dtype: work on copies of weights, buffers and batches in this precision; None takes them as they
            are.
        microbatch: most samples of a graph, as for :class:`HessianOperator`.
        ranks: the processes of a distributed training, likewise.
        home: where vectors are held, likewise.
        relative_step: length of the first step over that of the weights; default: the square root of the
            precision, or in float32 its cube root. Each further step is a quarter of the one before.
        tolerance: largest difference of the two products, over the length of the product (or what rounding
            the gradients makes of a product that is nearly zero); default: 1e-4, or in float32 1e-2.

    Attributes:
        disagreement: the largest such difference so far.
        rounding: the largest length of a product so far that may be rounding.

    Raises:
        CurvatureError: in :meth:`matvec`, where the two products do not agree, and what
            :class:`HessianOperator` raises.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: LossFunction,
        batches: Sequence[CurvatureBatch],
        space: ParameterSpace,
        *,
        dtype: torch.dtype | None = None,
        microbatch: int | None = None,
        ranks: Ranks | None = None,
        home: torch.device | None = None,
        relative_step: float | None = None,
        tolerance: float | None = None,
    ) -> None:
        super().__init__(
            module,
            loss,
            batches,
            space,
            retain_graph=False,
            dtype=dtype,
            microbatch=microbatch,
            ranks=ranks,
            home=home,
        )
        precision, double = torch.finfo(self.space.dtype).eps, self.space.dtype is torch.float64
        self.relative_step = relative_step or precision ** (1 / 2 if double else 1 / 3)
        self.tolerance = tolerance or (1e-4 if double else 1e-2)
        self.disagreement = 0.0
        self.rounding = 0.0

    def slope(self, batch: CurvatureBatch, vector: Tensor) -> tuple[float, float]:
        """Central difference of the loss itself along a vector, and the part of it that may be rounding.

        Kinks disturb it in proportion to the step, rounding in inverse proportion: the step is between.
        (At 6e-6 of the weights it was 1% off on a ResNet-20 with ReLU.)
        """
        step = self.step(vector, torch.finfo(self.space.dtype).eps ** 0.45)
        ahead, behind = (self._value(batch, sign * step * vector) for sign in (1.0, -1.0))
        return (ahead - behind) / (2 * step), self._rounding(abs(ahead), step)

    def _product(self, piece: CurvatureBatch, vector: Tensor) -> Tensor:
        """The product at the first step that agrees with the one before."""
        reduce, whole_step = self.space.reduce, self.step(vector, 1.0)
        coarse, _ = self._difference(piece, vector, whole_step * self.relative_step)
        for attempt in range(1, _STEPS):
            step = whole_step * self.relative_step * _RATIO**attempt
            fine, rounding = self._difference(piece, vector, step)
            apart = norm(coarse - fine, reduce) / max(norm(fine, reduce), rounding / self.tolerance)
            if apart <= self.tolerance:
                self.disagreement = max(self.disagreement, apart)
                self.rounding = max(self.rounding, rounding)
                return fine
            coarse = fine
        raise CurvatureError(
            f"unreliable: expected finite differences at two steps to agree to {self.tolerance:.0e}, found "
            f"them {apart:.0e} apart at {self.relative_step * _RATIO ** (_STEPS - 1):.0e} of the weights' "
            "length, and no closer at longer steps. Kinks (ReLU, max pooling) and rounding do that: use "
            "float64 weights, or double backward"
        )

    def _difference(self, piece: CurvatureBatch, vector: Tensor, step: float) -> tuple[Tensor, float]:
        """Central difference of the gradient, and the length of it that may be rounding."""
        shift = step * vector
        ahead, behind = self._gradient(piece, shift), self._gradient(piece, -shift)
        rounding = self._rounding(norm(ahead, self.space.reduce), step)
        return finite(ahead.sub_(behind).div_(2 * step), self.space.reduce), rounding

    def _rounding(self, value: float, step: float) -> float:
        """What rounding leaves of a difference of two such values, over the step; a generous guess."""
        return 100 * torch.finfo(self.space.dtype).eps * value / step

    def step(self, vector: Tensor, relative: float) -> float:
        """Length of a step in units of the vector; weights that are all zero count as one long."""
        scaling = self.space.scaling
        change = norm(vector if scaling is None else vector * scaling, self.space.reduce)
        return relative * (self._weights_norm or 1.0) / (change or 1.0)

    @cached_property
    def _weights_norm(self) -> float:
        squares = [weights.detach().double().square().sum() for weights in self.space.parts]
        return math.sqrt(float(self.space.reduce(torch.stack(squares).sum())))

    def _gradient(self, piece: CurvatureBatch, shift: Tensor | None = None) -> Tensor:
        """Its gradient with the weights shifted: a new tensor."""
        evaluation = self._evaluation(piece, shift)
        return self.space.flatten(self._aliased.differentiate(evaluation, (evaluation.loss,)))
