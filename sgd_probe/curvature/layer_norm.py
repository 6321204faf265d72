"""Layer normalisation whose second derivative is two calls of its first and a few passes beside them.

Differentiated twice by autograd it is a chain of some thirty passes over the activations. With y the
normalised row and r the inverse of its deviation, both derivatives are made of the projection
``P(v) = r (v - mean(v) - y mean(v y))``, for which torch has one fast kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sgd_probe.curvature.by_hand import by_autograd, check_gradients, is_covered

_derivatives = torch.ops.aten.native_layer_norm_backward.default


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.layer_norm`` with the quick second derivative; what is unusual as ever."""
    shape = tuple(normalized_shape)
    quick = (
        is_covered(x, weight, bias)
        and (weight is None) == (bias is None)
        # What the ordinary way refuses is for it to refuse.
        and shape
        and tuple(x.shape[-len(shape) :]) == shape
        and (weight is None or tuple(weight.shape) == shape)
        and x.numel() > 0
    )
    if not quick:
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    normalise: Any = _Normalise.apply  # untyped in torch
    found: Tensor = normalise(x, shape, weight, bias, eps)[0]
    return found


class _Normalise(torch.autograd.Function):
    """The output, and mean and inverse deviation of every row."""

    @staticmethod
    def forward(
        x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.shape, weight, bias, ctx.eps = inputs
        ctx.save_for_backward(x, weight, bias, *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        check_gradients(gradient)
        x, weight, bias, mean, r = ctx.saved_tensors
        first: Any = _First.apply
        # What the statistics owe to the input is in the formulas.
        statistics = mean.detach(), r.detach(), ctx.shape, ctx.eps
        by_input, by_weight, by_bias = first(gradient, x, weight, bias, *statistics)
        affine = (None, None) if weight is None else (by_weight, by_bias)
        return by_input, None, *affine, None


class _First(torch.autograd.Function):
    """Derivatives by input, weight and bias: ``P(w g)``, and the sums over rows of ``g y`` and of g."""

    @staticmethod
    def forward(
        gradient: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        r: Tensor,
        shape: tuple[int, ...],
        eps: float,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        mask = [True, weight is not None, weight is not None]
        by_input, by_weight, by_bias = _derivatives(gradient, x, shape, mean, r, weight, bias, mask)
        return by_input, by_weight, by_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.shape, ctx.eps = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, u: Tensor | None, along_weight: Tensor | None, along_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Derivatives of ``u . by_input + along_weight . by_weight + along_bias . by_bias``.

        The input enters the first two terms through y and r, ``dr = -r^2 mean(y dx)``.
        """
        check_gradients(u, along_weight, along_bias)
        g, x, weight, bias, mean, r = ctx.saved_tensors
        if torch.is_grad_enabled():

            def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return torch.native_layer_norm(x, ctx.shape, weight, bias, ctx.eps)[0]

            directions = u, along_weight, along_bias
            return *by_autograd(function, (x, weight, bias), g, directions), None, None, None, None
        n = math.prod(ctx.shape)
        rows = x.numel() // n
        g_rows, x_rows = g.reshape(rows, n), x.reshape(rows, n)
        mean, r = mean.reshape(rows, 1), r.reshape(rows, 1)
        y = (x_rows - mean).mul_(r)
        w = None if weight is None else weight.reshape(n)
        h = g_rows if w is None else g_rows * w

        def project(values: Tensor) -> Tensor:
            found: Tensor = _derivatives(values, x_rows, (n,), mean, r, None, None, [True, False, False])[0]
            return found

        by_gradient, by_input = torch.zeros_like(y), torch.zeros_like(y)
        by_weight = None if w is None else torch.zeros_like(w)
        through_y = torch.zeros_like(y)  # the derivative by y
        if u is not None:
            u_rows = u.reshape(rows, n)
            along = project(u_rows)  # P is symmetric
            by_gradient = along if w is None else along * w
            by_weight = None if w is None else (along * g_rows).sum(0)
            through_y = (u_rows * (-r * _mean_product(h, y))).addcmul_(h, -r * _mean_product(u_rows, y))
            by_input = y * (-r * _mean_product(along, h))
        if along_weight is not None:
            a = along_weight.reshape(n)
            by_gradient.addcmul_(y, a)
            through_y.addcmul_(g_rows, a)
        by_input += project(through_y)
        if along_bias is not None:
            by_gradient += along_bias.reshape(n)
        weights = by_weight if by_weight is None else by_weight.reshape(ctx.shape)
        return by_gradient.reshape(g.shape), by_input.reshape(x.shape), weights, None, None, None, None, None


def _mean_product(one: Tensor, other: Tensor) -> Tensor:
    """Mean over every row of the products of two, shape (rows, 1)."""
    means: Tensor = torch.linalg.vecdot(one, other).div_(one.shape[1]).unsqueeze(1)
    return means
