"""How many kernels an operation takes over whole activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts kernels that read whole activations."""

    size, count = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [arg for arg in args if isinstance(arg, Tensor) and arg.numel() == self.size]
        aliases = any(
            value.alias_info and not value.alias_info.is_write for value in function._schema.returns
        )
        self.count += bool(read) and not aliases
        return function(*args, **(kwargs or {}))


def passes_of_a_product(value: Tensor, x: Tensor, weight: Tensor) -> int:
    """Passes over the activations x that the second derivative of a layer's value takes, in one direction."""
    upstream = torch.randn_like(value).requires_grad_()
    (first,) = torch.autograd.grad(value, x, upstream, create_graph=True)
    direction = torch.randn_like(first)
    with Calls() as calls:  # type: ignore[no-untyped-call]
        calls.size = x.numel()
        torch.autograd.grad(first, (x, weight, upstream), direction)
    count: int = calls.count
    return count
