"""Layer normalisation with a second derivative by hand, held against autograd's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe.curvature.quick import QuickSecondDerivatives
from tests.helpers.kernels import passes_of_a_product

SHAPES = [((4, 5), (5,)), ((2, 3, 4), (4,)), ((2, 3, 4), (3, 4)), ((7,), (7,))]


def tensors(shape: tuple[int, ...], normalised: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    draw = [torch.randn(s, dtype=torch.float64, generator=generator) for s in (shape, normalised, normalised)]
    x, weight, bias = (tensor.requires_grad_() for tensor in draw)
    return x, weight, bias


def quick(normalised: tuple[int, ...]) -> Callable[..., Tensor]:
    def normalise(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        with QuickSecondDerivatives():
            return F.layer_norm(x, normalised, weight, bias)

    return normalise


@pytest.mark.parametrize(("shape", "normalised"), SHAPES)
def test_both_derivatives_against_finite_differences(
    shape: tuple[int, ...], normalised: tuple[int, ...]
) -> None:
    given = tensors(shape, normalised)
    assert torch.autograd.gradcheck(quick(normalised), given)
    assert torch.autograd.gradgradcheck(quick(normalised), given)
    assert torch.autograd.gradgradcheck(quick(normalised), given[:1])


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    given = tensors((6, 3), (3,))
    given[frozen].requires_grad_(False)
    moved = [tensor for tensor in given if tensor.requires_grad]
    found = []
    for mode in (nullcontext(), QuickSecondDerivatives()):
        with mode:
            loss = F.layer_norm(given[0], (3,), given[1], given[2]).pow(3).sum()
        first = torch.autograd.grad(loss, moved, create_graph=True)
        total = torch.stack([(one * one).sum() for one in first]).sum()
        found.append(torch.autograd.grad(total, moved))
    for ordinary, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, ordinary, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("only", [0, 1, 2])
def test_along_one_of_its_derivatives_alone(only: int) -> None:
    found = []
    for mode in (nullcontext(), QuickSecondDerivatives()):
        x, weight, bias = tensors((6, 3), (3,))
        with mode:
            value = F.layer_norm(x, (3,), weight, bias)
        upstream = torch.linspace(-1, 2, 18, dtype=torch.float64).view(6, 3).requires_grad_()
        first = torch.autograd.grad(value, (x, weight, bias), upstream, create_graph=True)[only]
        wanted = (x, weight, upstream)
        found.append(
            torch.autograd.grad(
                first, wanted, torch.ones_like(first), allow_unused=True, materialize_grads=True
            )
        )
    for ordinary, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, ordinary, rtol=1e-9, atol=1e-9)


def test_a_network_has_the_same_loss_gradient_and_product() -> None:
    losses, gradients, products = [], [], []
    for mode in (nullcontext(), QuickSecondDerivatives()):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4))
        inputs = 5 + torch.randn(6, 3)
        weights = list(module.parameters())
        with mode:
            loss = module(inputs).logsumexp(1).mean()
            gradient = torch.autograd.grad(loss, weights, create_graph=True)
            product = torch.autograd.grad(gradient, weights, [torch.ones_like(weight) for weight in weights])
        losses.append(loss)
        gradients.append(torch.cat([g.flatten() for g in gradient]))
        products.append(torch.cat([p.flatten() for p in product]))
    assert torch.equal(*losses)
    assert torch.equal(*gradients)
    torch.testing.assert_close(products[1], products[0], rtol=1e-4, atol=1e-5)


def test_it_takes_little_more_than_half_of_the_passes() -> None:
    passes = []
    for mode in (nullcontext(), QuickSecondDerivatives()):
        x, weight, bias = tensors((8, 3), (3,))
        with mode:
            value = F.layer_norm(x, (3,), weight, bias)
        passes.append(passes_of_a_product(value, x, weight))
    assert passes[1] <= 0.55 * passes[0], passes


class Odd(Tensor):
    """A subclass, whose own rules must be kept."""


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.layer_norm(x.bfloat16(), (3,)),
        lambda x: F.layer_norm(x.as_subclass(Odd), (3,)),
        lambda x: F.layer_norm(x, (3,), torch.ones(3)),
        lambda x: F.layer_norm(x[:0], (3,)),
    ],
)
def test_all_else_goes_the_ordinary_way(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(6, 3, requires_grad=True)
    with QuickSecondDerivatives():
        ours = call(x)
    assert torch.equal(ours, call(x))
    assert type(ours.grad_fn) is type(call(x).grad_fn)


@pytest.mark.parametrize("shape", [(4,), (6, 4), ()])
def test_what_is_wrong_is_refused_as_ever(shape: tuple[int, ...]) -> None:
    with QuickSecondDerivatives(), pytest.raises(RuntimeError, match="normalized_shape"):
        F.layer_norm(torch.ones(6, 3), shape)
