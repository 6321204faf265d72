"""Batch normalisation with a second derivative by hand, held against autograd's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe.curvature.quick import QuickSecondDerivatives
from tests.helpers.kernels import passes_of_a_product

SHAPES = [(7, 4), (3, 2, 6), (5, 3, 2, 2), (2, 3, 2, 1, 3)]


def tensors(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    draw = [torch.randn(s, dtype=torch.float64, generator=generator) for s in (shape, shape[1], shape[1])]
    x, weight, bias = (tensor.requires_grad_() for tensor in draw)
    return x, weight, bias


def quick(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **options: Any) -> Tensor:
    with QuickSecondDerivatives():
        return F.batch_norm(x, None, None, weight, bias, training=True, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_derivatives_against_finite_differences(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(quick, tensors(shape))
    assert torch.autograd.gradgradcheck(quick, tensors(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_without_weight_and_bias(shape: tuple[int, ...]) -> None:
    x, *_ = tensors(shape)
    assert torch.autograd.gradgradcheck(quick, (x,))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    given = tensors((6, 3, 2))
    given[frozen].requires_grad_(False)
    moved = [tensor for tensor in given if tensor.requires_grad]
    found = []
    for mode in (nullcontext(), QuickSecondDerivatives()):
        with mode:
            loss = F.batch_norm(given[0], None, None, given[1], given[2], training=True).pow(3).sum()
        first = torch.autograd.grad(loss, moved, create_graph=True)
        total = torch.stack([(one * one).sum() for one in first]).sum()
        found.append(torch.autograd.grad(total, moved))
    for ordinary, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, ordinary, rtol=1e-9, atol=1e-9)


def network(dimensions: int = 2) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    kinds: dict[int, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
        1: (nn.Conv1d, nn.BatchNorm1d),
        2: (nn.Conv2d, nn.BatchNorm2d),
        3: (nn.Conv3d, nn.BatchNorm3d),
    }
    convolution, norm = kinds[dimensions]
    layers = (convolution(2, 4, 3), norm(4), nn.ReLU(), convolution(4, 3, 2), norm(3), nn.Flatten())
    return nn.Sequential(*layers), 5 + torch.randn(6, 2, *[5] * dimensions)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_network_has_the_same_loss_gradient_product_and_buffers(dimensions: int) -> None:
    losses, gradients, products, buffers = [], [], [], []
    for mode in (nullcontext(), QuickSecondDerivatives()):
        module, inputs = network(dimensions)
        weights = list(module.parameters())
        with mode:
            loss = module(inputs).logsumexp(1).mean()
            gradient = torch.autograd.grad(loss, weights, create_graph=True)
            directions = [torch.ones_like(weight) for weight in weights]
            product = torch.autograd.grad(gradient, weights, directions)
        losses.append(loss)
        gradients.append(torch.cat([g.flatten() for g in gradient]))
        products.append(torch.cat([p.flatten() for p in product]))
        buffers.append(torch.cat([b.flatten().double() for b in module.buffers()]))
    assert torch.equal(*losses)
    assert torch.equal(*gradients)
    assert torch.equal(*buffers)
    torch.testing.assert_close(products[1], products[0], rtol=1e-4, atol=1e-5)


def test_it_takes_seven_passes_over_the_activations() -> None:
    """Autograd's own takes more than twenty."""
    passes = []
    for mode in (nullcontext(), QuickSecondDerivatives()):
        x, weight, bias = tensors((8, 3, 4, 4))
        with mode:
            value = F.batch_norm(x, None, None, weight, bias, training=True)
        passes.append(passes_of_a_product(value, x, weight))
    assert passes[1] <= 8
    assert passes[0] > 2 * passes[1]


class Odd(Tensor):
    """A subclass, whose own rules must be kept."""


@pytest.mark.parametrize(
    "call",
    [
        lambda x, c: F.batch_norm(x, torch.zeros(c), torch.ones(c), training=False),
        lambda x, c: F.batch_norm(x.bfloat16(), None, None, training=True),
        lambda x, c: F.batch_norm(x.as_subclass(Odd), None, None, training=True),
        lambda x, c: F.batch_norm(
            x, weight=torch.ones(c), running_mean=None, running_var=None, training=True
        ),
    ],
)
def test_all_else_goes_the_ordinary_way(call: Callable[[Tensor, int], Tensor]) -> None:
    x = torch.randn(6, 3, 4, requires_grad=True)
    ordinary = call(x, 3)
    with QuickSecondDerivatives():
        assert torch.equal(call(x, 3), ordinary)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (1, {}, "more than 1 value per channel"),
        (4, {"eps": 0.0}, "eps must be positive"),
        (4, {"running_mean": torch.zeros(3)}, "both be None"),
    ],
)
def test_what_is_wrong_is_refused_as_ever(rows: int, options: dict[str, Any], message: str) -> None:
    given = {"running_mean": None, "running_var": None, "training": True, **options}
    try:
        F.batch_norm(torch.ones(rows, 3), **given)
    except ValueError as refusal:
        assert message in str(refusal)
    else:
        pytest.skip("this version of torch takes it")
    with QuickSecondDerivatives(), pytest.raises(ValueError, match=message):
        F.batch_norm(torch.ones(rows, 3), **given)
