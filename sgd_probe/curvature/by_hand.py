"""What second derivatives that are written by hand have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


class NotByHandError(Exception):
    """A loss takes a derivative that a form by hand does not have: autograd's own layers are needed."""


def is_covered(*tensors: Tensor | None) -> bool:
    """Ordinary tensors of one precision, float32 or float64, whose graph is nobody else's.

    Subclasses keep rules of their own, and the transforms of torch know no function of ours. What a
    checkpoint computes again, in a backward pass and wherever that runs, must meet the same functions there.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        all(type(tensor) in (Tensor, nn.Parameter) for tensor in given)
        and len({tensor.dtype for tensor in given}) == 1
        and given[0].dtype in (torch.float32, torch.float64)
        and not _is_transformed(*given)
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def check_gradients(*gradients: Tensor | None) -> None:
    """Ask of what arrives in a backward pass whether it can be taken by hand.

    Raises:
        NotByHandError: the loss takes many gradients at once (``is_grads_batched``, vmap), or a derivative
            forward. There a function of ours would fail, or lose its graph without a word.
    """
    if _is_transformed(*(gradient for gradient in gradients if gradient is not None)):
        raise NotByHandError


def _is_transformed(*tensors: Tensor) -> bool:
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))
    )


def by_autograd(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    gradient: Tensor,
    directions: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The second derivative as autograd has it, which can be differentiated again.

    A loss that holds derivatives itself (a gradient penalty, a differential equation) needs more than two.

    Args:
        function: of the inputs; one of torch's own, or it would come back here.
        inputs: None where it is not given.
        gradient: of the function's value.
        directions: of the first derivatives by the inputs; None is zero.

    Returns:
        Derivatives of the sum of ``direction . first derivative``, by the gradient and by each input.
    """
    with torch.enable_grad():
        # New names: the gradient may come from the inputs on another way, which is not this function's.
        mine, named = _renamed(gradient), [None if one is None else _renamed(one) for one in inputs]
        present = [one for one in named if one is not None]
        firsts = iter(torch.autograd.grad(function(*named), present, mine, create_graph=True))
        pairs = [
            (next(firsts), direction)
            for one, direction in zip(named, directions, strict=True)
            if one is not None
        ]
        outputs, along = zip(*[pair for pair in pairs if pair[1] is not None], strict=True)
        seconds = iter(
            torch.autograd.grad(
                outputs, [mine, *present], along, create_graph=True, allow_unused=True, materialize_grads=True
            )
        )
        return next(seconds), *(None if one is None else next(seconds) for one in named)


def _renamed(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
