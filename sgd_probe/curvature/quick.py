"""Layers whose second derivative is written by hand: autograd's takes many times as long as its first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sgd_probe.curvature.activations import gelu, silu
from sgd_probe.curvature.batch_norm import batch_norm
from sgd_probe.curvature.layer_norm import layer_norm

_BY_HAND: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: batch_norm,
    F.gelu: gelu,
    F.layer_norm: layer_norm,
    F.silu: silu,
}


class QuickSecondDerivatives(TorchFunctionMode):
    """Within it the layers of this room have their quick second derivatives.

    Values and first derivatives are the same to the bit, second ones to rounding, and what a layer writes is
    written as ever. What is not covered (half precision, subclasses of tensors, a norm by fixed statistics)
    goes the ordinary way.

    Raises:
        NotByHandError: in a backward pass of the loss itself, which needs the ordinary layers.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _BY_HAND.get(function, function)(*args, **(kwargs or {}))
