"""The space that the probe works in: chosen parameters, laid out as one flat vector.

A diagonal scaling S makes it the space of ``y = S^-1 theta``. An optimizer that moves every weight at a
rate of its own, ``theta' = theta - eta P g``, takes plain steps there with ``S = P^1/2``: there the
gradient is ``S g`` and the Hessian ``S H S``, whose modes, not those of H, are the ones that it moves along.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

#: Globs on parameter names, a compiled pattern, or a rule on (name, parameter); None takes all.
ParameterFilter: TypeAlias = (
    "str | Sequence[str] | re.Pattern[str] | Callable[[str, nn.Parameter], bool] | None"
)


@dataclass(frozen=True)
class ParameterSpace:
    """Named parameters and where each lies in the flat vector.

    Attributes:
        names: parameter names as the module spells them.
        parameters: the live parameters, never written to.
        slices: where each parameter lies in a vector of length :attr:`size`.
        scaling: the diagonal of S, positive, shape (size,); None is the identity.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    slices: tuple[slice, ...]
    scaling: Tensor | None = None

    @classmethod
    def of(
        cls,
        module: nn.Module,
        chosen: ParameterFilter = None,
        among: Iterable[nn.Parameter] | None = None,
    ) -> ParameterSpace:
        """Collect the trainable parameters of a module (tied ones once).

        Args:
            module: where names come from.
            chosen: which of them; None takes all.
            among: keep only these (those that an optimizer moves, say).

        Raises:
            ValueError: nothing is left, a parameter has no shape yet or is complex, or they differ in dtype
                or device.
        """
        allowed = None if among is None else {id(parameter) for parameter in among}
        accept = _rule(chosen)
        names: list[str] = []
        parameters: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            live = parameter.requires_grad and (allowed is None or id(parameter) in allowed)
            if live and accept(name, parameter):
                names.append(name)
                parameters.append(parameter)
        if not parameters:
            what = (
                "no trainable parameter"
                if chosen is None
                else f"no trainable parameter that matches {chosen!r}"
            )
            raise ValueError(f"expected parameters to probe, found {what}: check requires_grad and `params`")
        lazy = [name for name, parameter in zip(names, parameters, strict=True) if is_lazy(parameter)]
        if lazy:
            raise ValueError(
                f"expected initialised parameters, found {lazy[0]} without a shape: run a batch through lazy "
                "layers before the training begins"
            )
        if parameters[0].is_complex():
            raise ValueError(
                f"expected real parameters, found {names[0]} complex: hold its real and imaginary parts, of "
                "which torch.view_as_complex makes one in the forward pass"
            )
        kinds = sorted({f"{p.dtype} on {p.device}" for p in parameters})
        if len(kinds) > 1:
            raise ValueError(
                f"expected parameters of one dtype on one device, found {', '.join(kinds)}: "
                "choose a part of the model with `params`"
            )
        offsets = [0]
        for parameter in parameters:
            offsets.append(offsets[-1] + parameter.numel())
        slices = tuple(slice(a, b) for a, b in itertools.pairwise(offsets))
        return cls(tuple(names), tuple(parameters), slices)

    @property
    def size(self) -> int:
        """Number of weights in the space."""
        return int(self.slices[-1].stop)

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def cast(self, dtype: torch.dtype) -> ParameterSpace:
        """The same space in another precision; its parameters are copies."""
        copies = (nn.Parameter(p.detach().to(dtype, copy=True)) for p in self.parameters)
        scaling = None if self.scaling is None else self.scaling.to(dtype)
        return dataclasses.replace(self, parameters=tuple(copies), scaling=scaling)

    def scaled(self, scales: Sequence[Tensor | float]) -> ParameterSpace:
        """The same parameters in the coordinates ``y = S^-1 theta``.

        Args:
            scales: the diagonal of S at each parameter: of its shape, or one number for all of it.

        Raises:
            ValueError: a scale is not positive and finite, or has another shape than its parameter.
        """
        if len(scales) != len(self.parameters):
            raise ValueError(
                f"expected one scale for each of {len(self.parameters)} parameters, found {len(scales)}"
            )
        pieces = []
        for name, parameter, scale in zip(self.names, self.parameters, scales, strict=True):
            piece = torch.as_tensor(scale, dtype=self.dtype, device=self.device).detach()
            shape = tuple(parameter.shape)
            if piece.ndim and tuple(piece.shape) != shape:
                raise ValueError(f"expected a scale of shape {shape} for {name}, found {tuple(piece.shape)}")
            if not bool(((piece > 0) & piece.isfinite()).all()):
                raise ValueError(f"expected positive, finite scales for {name}, found others")
            pieces.append(piece.expand(shape).reshape(-1))
        return dataclasses.replace(self, scaling=torch.cat(pieces))

    def split(self, vector: Tensor) -> list[Tensor]:
        """The change of each parameter, in its shape, along a vector of shape (size,): a view, or scaled."""
        if self.scaling is not None:
            vector = vector * self.scaling
        return [
            vector[where].view(parameter.shape)
            for where, parameter in zip(self.slices, self.parameters, strict=True)
        ]

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Lay gradients, one tensor per parameter, out as a vector of shape (size,); None reads as zeros."""
        pieces = []
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            if tensor is None:
                pieces.append(torch.zeros(parameter.numel(), dtype=self.dtype, device=self.device))
            else:
                dense = tensor.to_dense() if tensor.is_sparse else tensor
                pieces.append(dense.detach().reshape(-1).to(self.dtype))
        flat = torch.cat(pieces)
        return flat if self.scaling is None else flat.mul_(self.scaling)

    def layer_shares(self, vector: Tensor, most: int = 8) -> Mapping[str, float]:
        """Share of each parameter in the squared length of a vector, the largest ``most`` of them."""
        squares = {
            name: float(vector[where].double().square().sum())
            for name, where in zip(self.names, self.slices, strict=True)
        }
        total = sum(squares.values()) or 1.0
        largest = sorted(squares, key=squares.__getitem__, reverse=True)[:most]
        return {name: squares[name] / total for name in largest}


def _rule(chosen: ParameterFilter) -> Callable[[str, nn.Parameter], bool]:
    if chosen is None:
        return lambda name, parameter: True
    if isinstance(chosen, re.Pattern):
        return lambda name, parameter: chosen.search(name) is not None
    if callable(chosen):
        return chosen
    globs = [chosen] if isinstance(chosen, str) else list(chosen)
    return lambda name, parameter: any(fnmatchcase(name, glob) for glob in globs)
