"""Batch normalisation whose second derivative costs about as much as its first.

Differentiated twice by autograd it is a chain of some thirty passes over the activations, a third of a
Hessian-vector product of a residual network. By hand it takes seven: but for sums over channels, every
derivative is a combination of the input, the gradient of the output and the direction, channel by channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sgd_probe.curvature.by_hand import by_autograd, check_gradients, is_covered

_derivatives = torch.ops.aten.native_batch_norm_backward.default


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm``, by a batch's own statistics with the quick second derivative.

    Running statistics are written as ever; all else goes the ordinary way.
    """
    quick = (
        training
        and is_covered(x, running_mean, running_var, weight, bias)
        and (weight is None) == (bias is None)
        # What the ordinary way refuses is for it to refuse.
        and (running_mean is None) == (running_var is None)
        and x.numel() > x.shape[1]
        and eps > 0
    )
    if not quick:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    normalise: Any = _Normalise.apply  # untyped in torch
    found: Tensor = normalise(x, weight, bias, running_mean, running_var, momentum, eps)[0]
    return found


class _Normalise(torch.autograd.Function):
    """The output, and the mean and inverse standard deviation of every channel."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, *_, ctx.eps = inputs
        _, mean, deviation = output
        ctx.save_for_backward(x, weight, bias, mean, deviation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        check_gradients(gradient)
        x, weight, bias, mean, deviation = ctx.saved_tensors
        first: Any = _First.apply
        # What the statistics owe to the input is in the formulas. (Not marked as without derivative: autograd
        # would then take them for float32.)
        statistics = mean.detach(), deviation.detach(), ctx.eps
        by_input, by_weight, by_bias = first(gradient, x, weight, bias, *statistics)
        affine = (None, None) if weight is None else (by_weight, by_bias)
        return by_input, *affine, None, None, None, None


class _First(torch.autograd.Function):
    """Derivatives by the input, the weight and the bias. ``deviation`` is the inverse of a deviation."""

    @staticmethod
    def forward(
        gradient: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        deviation: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = _derivatives(gradient, x, weight, None, None, mean, deviation, True, 0.0, [True] * 3)
        by_input, by_weight, by_bias = found
        return by_input, by_weight, by_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, u: Tensor | None, along_weight: Tensor | None, along_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Derivatives of ``u . by_input + along_weight . by_weight + along_bias . by_bias``.

        With y the normalised input, r the inverse deviation, S sums over a channel of n values and w the
        weight, ``by_input = w r (g - S(g) / n - y S(gy) / n)``, ``by_weight = S(gy)``, ``by_bias = S(g)``.
        The input enters through y and r, ``dr = -r^2 y dx / n``.
        """
        check_gradients(u, along_weight, along_bias)
        g, x, weight, bias, mean, r, sum_gy, sum_g = ctx.saved_tensors
        if torch.is_grad_enabled():

            def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, ctx.eps)[0]

            directions = u, along_weight, along_bias
            return *by_autograd(function, (x, weight, bias), g, directions), None, None, None
        w = torch.ones_like(r) if weight is None else weight
        n, zero = x.numel() / len(r), torch.zeros_like(r)
        if u is None:
            u, sum_uy, sum_u, sum_ug = torch.zeros_like(g), zero, zero, zero
        else:
            # Reductions of the first derivative's own kernel: they read two arrays and write none.
            _, sum_uy, sum_u = _derivatives(u, x, None, None, None, mean, r, True, 0.0, [False, True, True])
            ones = torch.ones_like(r)
            _, sum_ug, _ = _derivatives(u, g, None, None, None, zero, ones, True, 0.0, [False, True, False])
        along_weight = zero if along_weight is None else along_weight
        along_bias = zero if along_bias is None else along_bias

        def combine(of_y: Tensor, constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
            """``of_y * y + constant`` and further terms, factors by channel."""
            total = torch.addcmul(_wide(constant - of_y * r * mean, x), x, _wide(of_y * r, x))
            for values, factor in terms:
                total.addcmul_(values, _wide(factor, x))
            return total

        inner = sum_ug - (sum_u * sum_g + sum_uy * sum_gy) / n
        by_gradient = combine(along_weight - w * r * sum_uy / n, along_bias - w * r * sum_u / n, (u, w * r))
        of_u, of_g = -w * r * sum_gy / n, along_weight - w * r * sum_uy / n
        by_input = combine(
            -r * (of_u * sum_uy + of_g * sum_gy + w * r * inner) / n,
            -r * (of_u * sum_u + of_g * sum_g) / n,
            (u, r * of_u),
            (g, r * of_g),
        )
        return by_gradient, by_input, None if weight is None else r * inner, None, None, None, None


def _wide(channels: Tensor, like: Tensor) -> Tensor:
    """One number a channel, as it broadcasts over activations."""
    return channels.view(1, -1, *[1] * (like.dim() - 2))
