"""The loss along a line through the present weights: what a valley and its wall look like."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sgd_probe.curvature.hessian import HessianOperator

#: Points on each side of the weights.
SIDE_POINTS = 3
#: More batches would say little more.
MOST_BATCHES = 8


@dataclass(frozen=True)
class Slice:
    """The loss along a direction.

    Attributes:
        offsets: displacements along it in the coordinates of the space, ascending, zero in the middle.
        rises: loss there minus the loss at zero, mean over the samples of all batches.
        errors: standard errors of the rises over batches; NaN for one batch.
        loss: at zero.
    """

    offsets: tuple[float, ...]
    rises: tuple[float, ...]
    errors: tuple[float, ...]
    loss: float


def loss_slices(operator: HessianOperator, vectors: Tensor, reach: float) -> list[Slice]:
    """Evaluate the loss on both sides of the weights, along each direction; no weight is written to.

    It costs ``1 + 2 k SIDE_POINTS`` losses of each batch and the memory of one graph. Call it inside
    :func:`sgd_probe.isolation.isolated`.

    Args:
        operator: its batches say what the loss is; best such as did not find the directions.
        vectors: unit rows, shape (k, size).
        reach: largest displacement, positive.

    Raises:
        CurvatureError: the loss is not finite somewhere.
        ValueError: the reach is not positive and finite.
    """
    if not 0 < reach < math.inf:
        raise ValueError(f"expected a positive, finite reach, found {reach}")
    steps = [reach * step / SIDE_POINTS for step in range(1, SIDE_POINTS + 1)]
    offsets = [*(-step for step in reversed(steps)), *steps]
    weights, rows = zip(*operator.losses(vectors, offsets), strict=True)
    values = torch.stack(rows).double().cpu()
    shares = torch.tensor(weights, dtype=torch.float64)
    means = shares @ values
    # Paired: every batch is compared with itself at zero.
    spread = shares @ (values - means).square()
    errors = (spread / (len(rows) - 1)).sqrt() if len(rows) > 1 else torch.full_like(means, math.nan)
    loss, sides = float(means[0]), len(offsets)
    return [
        Slice(
            offsets=_with_zero(offsets),
            rises=_with_zero(means[1 + line * sides : 1 + (line + 1) * sides].tolist()),
            errors=_with_zero(errors[1 + line * sides : 1 + (line + 1) * sides].tolist()),
            loss=loss,
        )
        for line in range(len(vectors))
    ]


def _with_zero(values: list[float]) -> tuple[float, ...]:
    """What is measured on both sides, and nothing in the middle."""
    return (*values[:SIDE_POINTS], 0.0, *values[SIDE_POINTS:])
