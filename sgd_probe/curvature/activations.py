"""GELU and SiLU whose second derivative costs three passes.

Differentiated twice by autograd, either is a chain of some twenty passes over the activations, a seventh of a
Hessian-vector product of a transformer. But ``f'(x)``, and ``f''(x)`` times the gradient that arrives, are
the same for every product with one graph: they are worked out at the first and kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sgd_probe.curvature.by_hand import by_autograd, check_gradients, is_covered

_CUBE = 0.044715  # of GELU's approximation by tanh


@dataclass(frozen=True)
class _Activation:
    """A function of every number by itself.

    Attributes:
        value: f.
        derivative: from the gradient of the output, and x, to that of the input.
        curvature: f''.
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``torch.nn.functional.gelu``, whose argument people also give by its name."""
    known = _GELU.get(approximate)
    return _activate(input, known) if known and is_covered(input) else F.gelu(input, approximate=approximate)


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.silu``."""
    return F.silu(x, inplace) if inplace or not is_covered(x) else _activate(x, _SILU)


def _activate(x: Tensor, activation: _Activation) -> Tensor:
    activate: Any = _Activate.apply  # untyped in torch
    found: Tensor = activate(x, activation)
    return found


@dataclass
class _Slope:
    """f'(x), once a product has asked for it."""

    value: Tensor | None = None


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, activation: _Activation) -> Tensor:
        return activation.value(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Activation], output: Tensor) -> None:
        x, ctx.activation = inputs
        ctx.save_for_backward(x)
        ctx.slope = _Slope()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        check_gradients(gradient)
        if ctx.slope.value is not None and not torch.is_grad_enabled():
            return gradient * ctx.slope.value, None
        first: Any = _First.apply
        return first(gradient, *ctx.saved_tensors, ctx.activation, ctx.slope), None


class _First(torch.autograd.Function):
    """``gradient * f'(x)``."""

    @staticmethod
    def forward(gradient: Tensor, x: Tensor, activation: _Activation, slope: _Slope) -> Tensor:
        return activation.derivative(gradient, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, _Activation, _Slope], output: Tensor) -> None:
        gradient, x, ctx.activation, ctx.slope = inputs
        ctx.save_for_backward(gradient, x)
        ctx.bend = None

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        check_gradients(u)
        gradient, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *by_autograd(ctx.activation.value, (x,), gradient, (u,)), None, None
        if ctx.bend is None:
            ctx.bend = ctx.activation.curvature(x).mul_(gradient)
            ctx.slope.value = ctx.activation.derivative(torch.ones_like(x), x)
        return u * ctx.slope.value, u * ctx.bend, None, None


def _gelu_curvature(x: Tensor) -> Tensor:
    """``phi(x) (2 - x^2)``, phi the density of a standard Gaussian."""
    square = x * x
    density = torch.exp(-0.5 * square).div_(math.sqrt(2 * math.pi))
    return density.mul_(2 - square)


def _gelu_tanh_curvature(x: Tensor) -> Tensor:
    """Of ``x (1 + tanh(k)) / 2`` with ``k = sqrt(2 / pi) (x + c x^3)``."""
    scale = math.sqrt(2 / math.pi)
    square = x * x
    tanh = torch.tanh(scale * x * (1 + _CUBE * square))
    slope, bend = scale * (1 + 3 * _CUBE * square), scale * 6 * _CUBE * x
    return (1 - tanh * tanh) * (slope + 0.5 * x * (bend - 2 * tanh * slope * slope))


def _silu_curvature(x: Tensor) -> Tensor:
    """``s (1 - s) (2 + x (1 - 2 s))``, s the logistic function of x."""
    s = torch.sigmoid(x)
    return (s * (1 - s)).mul_(2 + x * (1 - 2 * s))


def _of_gelu(approximate: str, curvature: Callable[[Tensor], Tensor]) -> _Activation:
    def value(x: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten.gelu.default(x, approximate=approximate)
        return found

    def derivative(gradient: Tensor, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten.gelu_backward.default(gradient, x, approximate=approximate)
        return found

    return _Activation(value, derivative, curvature)


def _silu_value(x: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.silu.default(x)
    return found


def _silu_derivative(gradient: Tensor, x: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.silu_backward.default(gradient, x)
    return found


_GELU = {"none": _of_gelu("none", _gelu_curvature), "tanh": _of_gelu("tanh", _gelu_tanh_curvature)}
_SILU = _Activation(_silu_value, _silu_derivative, _silu_curvature)
