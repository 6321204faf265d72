"""Activations with a second derivative by hand, held against autograd's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sgd_probe.curvature.quick import QuickSecondDerivatives

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu by tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
BY_NAME = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


def quick(activation: Activation, x: Tensor) -> Tensor:
    with QuickSecondDerivatives():
        return activation(x)


@BY_NAME
def test_both_derivatives_against_finite_differences(activation: Activation) -> None:
    x = torch.linspace(-4, 4, 17, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(quick, activation), (x,))
    assert torch.autograd.gradgradcheck(partial(quick, activation), (x,))


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_has_the_same_loss_gradient_and_products(
    activation: Activation, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    first, second = (nn.Linear(5, 5, dtype=dtype) for _ in range(2))
    weights = [*first.parameters(), *second.parameters()]
    inputs = 3 * torch.randn(9, 5, dtype=dtype)
    found: list[list[Tensor]] = []
    for act in (activation, partial(quick, activation)):
        loss = act(second(act(first(inputs)))).logsumexp(1).mean()
        # The gradient of a training. (SiLU's own has another formula where it shall be differentiated again.)
        plain = torch.autograd.grad(loss, weights, retain_graph=True)
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
        products = [
            torch.autograd.grad(
                gradient, weights, [scale * torch.ones_like(w) for w in weights], retain_graph=True
            )
            for scale in (1.0, -2.0)  # the second meets what the first has kept
        ]
        if act is not activation:
            assert all(map(torch.equal, plain, gradient))
        found.append([loss, *plain, *(p for product in products for p in product)])
    exact = 1 + len(weights)
    for index, (ordinary, ours) in enumerate(zip(*found, strict=True)):
        if index < exact:
            assert torch.equal(ordinary, ours)
        else:
            tolerance = 1e-5 if dtype is torch.float32 else 1e-12
            torch.testing.assert_close(ours, ordinary, rtol=tolerance, atol=tolerance)


@BY_NAME
def test_two_gradients_of_one_graph_are_apart(activation: Activation) -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    ordinary, ours = activation(x), quick(activation, x)
    for scale in (1.0, 3.0, -1.0):
        upstream = torch.full_like(x, scale)
        found = []
        for value in (ordinary, ours):
            (first,) = torch.autograd.grad(value, x, upstream, create_graph=True)
            found.append(torch.autograd.grad(first, x, torch.ones_like(x), retain_graph=True)[0])
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts kernels."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(isinstance(arg, Tensor) and arg.numel() > 1 for arg in args)
        return function(*args, **(kwargs or {}))


@BY_NAME
def test_a_further_product_takes_two_passes(activation: Activation) -> None:
    x = torch.randn(6, requires_grad=True)
    upstream = torch.randn(6, requires_grad=True)
    (first,) = torch.autograd.grad(quick(activation, x), x, upstream, create_graph=True)
    counts = []
    for _ in range(2):
        with Calls() as calls:  # type: ignore[no-untyped-call]
            torch.autograd.grad(first, (x, upstream), torch.ones(6), retain_graph=True)
        counts.append(calls.count)
    assert counts[1] == 2 < counts[0]


class Odd(Tensor):
    """A subclass, whose own rules must be kept."""


@BY_NAME
@pytest.mark.parametrize(
    "make", [Tensor.bfloat16, lambda x: x.as_subclass(Odd)], ids=["bfloat16", "subclass"]
)
def test_all_else_goes_the_ordinary_way(activation: Activation, make: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(6, requires_grad=True)
    ours = quick(activation, make(x))
    assert torch.equal(ours, activation(make(x)))
    assert "Activate" not in type(ours.grad_fn).__name__


@BY_NAME
def test_the_input_given_by_its_name(activation: Activation) -> None:
    x = torch.randn(6)
    with QuickSecondDerivatives():
        named = activation(input=x)  # type: ignore[call-arg]
    assert torch.equal(named, activation(x))


def test_in_place_stays_in_place() -> None:
    with QuickSecondDerivatives():
        x = torch.randn(6)
        assert F.silu(x, inplace=True) is x


def test_an_unknown_approximation_is_refused_as_ever() -> None:
    with QuickSecondDerivatives(), pytest.raises(RuntimeError, match="approximate"):
        F.gelu(torch.ones(2), approximate="sigmoid")
