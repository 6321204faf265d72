"""What layers with a second derivative by hand must keep: third derivatives, torch.func, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from sgd_probe.curvature.by_hand import NotByHandError
from sgd_probe.curvature.quick import QuickSecondDerivatives

LAYERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "batch norm": lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    "batch norm without weights": lambda x, w, b: F.batch_norm(x * w + b, None, None, training=True),
    "layer norm": lambda x, w, b: F.layer_norm(x, (3,), w, b),
    "layer norm without weights": lambda x, w, b: F.layer_norm(x * w + b, (3,)),
    "gelu": lambda x, w, b: F.gelu(x * w + b),
    "gelu by tanh": lambda x, w, b: F.gelu(x * w + b, approximate="tanh"),
    "silu": lambda x, w, b: F.silu(x * w + b),
}
BY_NAME = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


@BY_NAME
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_a_loss_that_holds_derivatives(layer: Callable[..., Tensor], inside: bool) -> None:
    """A gradient penalty: its Hessian takes a third derivative of the layer, and the layer meets itself."""
    found = []
    for ours in (False, True):
        generator = torch.Generator().manual_seed(3)
        x, w, b = (
            torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
            for shape in ((5, 3), (3,), (3,))
        )
        mode = QuickSecondDerivatives() if ours else nullcontext()
        with mode:
            loss = layer(layer(x, w, b).sin(), w, b).pow(3).mean()
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            penalty = loss + slope.square().sum()
            first = torch.autograd.grad(penalty, (w, b), create_graph=True)
        with mode if inside else nullcontext():
            found.append(torch.autograd.grad(first, (x, w, b), [torch.ones_like(one) for one in first]))
    for ordinary, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, ordinary, rtol=1e-8, atol=1e-8)


@BY_NAME
def test_under_the_transforms_of_torch_func(layer: Callable[..., Tensor]) -> None:
    x, w, b = torch.randn(4, 5, 3), torch.randn(3), torch.randn(3)

    def loss(weights: Tensor, rows: Tensor) -> Tensor:
        return layer(rows, weights, b).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    with QuickSecondDerivatives():
        ours = each(w, x)
    torch.testing.assert_close(ours, each(w, x))


@BY_NAME
@pytest.mark.parametrize(
    "make",
    [
        lambda call, x: torch.func.vmap(lambda scale: scale * call(x))(torch.ones(2, dtype=x.dtype)),
        lambda call, x: forward_derivative(call, x),
    ],
    ids=["of other things", "forward"],
)
def test_within_transforms_of_other_tensors(
    layer: Callable[..., Tensor], make: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
) -> None:
    x, w, b = torch.randn(4, 3), torch.randn(3), torch.randn(3)
    ordinary = make(lambda x: layer(x, w, b), x)
    with QuickSecondDerivatives():
        assert torch.equal(make(lambda x: layer(x, w, b), x), ordinary)


def forward_derivative(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))  # type: ignore[no-untyped-call]
        tangent: Tensor = forward_ad.unpack_dual(call(dual)).tangent  # type: ignore[no-untyped-call]
    return tangent


@BY_NAME
@pytest.mark.parametrize("twice", [False, True])
def test_many_gradients_at_once_are_for_autograd(layer: Callable[..., Tensor], twice: bool) -> None:
    """A function of ours would lose its graph there, without a word."""
    x, w, b = torch.randn(4, 3).requires_grad_(), torch.randn(3), torch.randn(3)
    with QuickSecondDerivatives(), pytest.raises(NotByHandError):
        outputs = layer(x, w, b).sum(0)
        if twice:
            (slope,) = torch.autograd.grad(outputs.sin().sum(), x, create_graph=True)
            outputs = slope.sum(0)
        torch.autograd.grad(outputs, x, torch.eye(3), is_grads_batched=True, create_graph=True)


def test_under_checkpoints_that_compute_again() -> None:
    def block() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.BatchNorm1d(4), nn.SiLU())

    products = []
    for again in (False, True):
        module, x = block(), torch.linspace(-1, 1, 15).view(5, 3)
        weights = list(module.parameters())
        with QuickSecondDerivatives():
            value = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False) if again else module(x)
            first = torch.autograd.grad(value.pow(3).mean(), weights, create_graph=True)
            products.append(torch.autograd.grad(first, weights, [torch.ones_like(one) for one in first]))
    for ordinary, mine in zip(*products, strict=True):
        torch.testing.assert_close(mine, ordinary)
