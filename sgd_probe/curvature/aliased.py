"""The training loss as a function of weights that are not the module's own.

The loss is evaluated on detached aliases of the weights, so that no hook on the user's parameters
fires and no ``grad`` is written; shifted aliases give finite differences, aliases in float64 a more
precise second opinion, and neither touches a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sgd_probe.curvature.batches import CurvatureBatch, cast_tensor
from sgd_probe.curvature.by_hand import NotByHandError
from sgd_probe.curvature.memory import is_out_of_memory
from sgd_probe.curvature.quick import QuickSecondDerivatives
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import rehearsed, seed_all

#: The training loss of a module on one batch; the third argument is the batch index.
LossFunction: TypeAlias = Callable[[nn.Module, Any, int], Tensor]


class CurvatureError(RuntimeError):
    """The loss cannot be probed here and now; training is not concerned."""


class WrongHessianError(CurvatureError):
    """What would be computed is not the Hessian of the loss, now or later."""


@dataclass(frozen=True)
class Evaluation:
    """The loss at some weights.

    Attributes:
        loss: a scalar with its graph.
        aliases: the probed parameters that it is a function of.
        places: where they, and all else that was replaced, stood.
    """

    loss: Tensor
    aliases: list[Tensor]
    places: list[_Place]


class _Place(NamedTuple):
    """An entry of a module's parameters or buffers, and what stands in for it."""

    holder: dict[str, Any]
    name: str
    tensor: Tensor


class AliasedLoss:
    """The training loss of a module, and what is derived from it, on aliases of the module's weights.

    Args:
        module: the user's module.
        loss: its training loss.
        dtype: evaluate on copies of weights, buffers and batches in this precision; None takes them as
            they are.
    """

    def __init__(self, module: nn.Module, loss: LossFunction, dtype: torch.dtype | None = None) -> None:
        self.module = module
        self._loss = loss
        self.dtype = dtype
        self._written: set[nn.Parameter] = set()  # those that the training step itself writes to
        self._layers: Callable[[], AbstractContextManager[object]] = QuickSecondDerivatives

    def evaluate(
        self, space: ParameterSpace, batch: CurvatureBatch, shift: Sequence[Tensor] | None = None
    ) -> Evaluation:
        """The loss as a function of the probed parameters.

        Args:
            space: the probed parameters, in this loss's precision.
            batch: what the loss is evaluated on.
            shift: added to the parameters, one tensor each.

        Raises:
            CurvatureError: the loss is not a finite scalar, does not depend on the parameters, or falls
                back on a lower precision than the one asked for.
        """
        settled = False
        while not settled:
            known = len(self._written)
            values = [self._value(parameter) for parameter in space.parameters]
            if shift is not None:
                values = [value + part for value, part in zip(values, shift, strict=True)]
            own = dict(self.module.named_parameters(remove_duplicate=False))
            replaced: dict[Tensor, Tensor] = {
                own[name]: _alias(value, own[name]) for name, value in zip(space.names, values, strict=True)
            }
            aliases = list(replaced.values())
            # Buffers, and weights that are written to, change on clones: a graph would see them change.
            for parameter in self.module.parameters():
                if parameter not in replaced and (self.dtype is not None or parameter in self._written):
                    replaced[parameter] = _alias(self._value(parameter), parameter)
            replaced |= self._buffers()
            places = _places(self.module, replaced)
            step = partial(self._loss, self.module, batch.thaw(self.dtype), batch.index)
            seed_all(batch.seed)
            try:
                with rehearsed(self.module) as written, self._one_precision(), self._standing_in(places):
                    found = step()
            except NotByHandError:
                self._layers = nullcontext
                continue
            self._written |= written
            settled = known == len(self._written)
        for alias in aliases:
            alias.requires_grad_()  # a step that freezes layers itself has left them out of its graph
        loss = checked(found)
        if self.dtype is not None:
            _check_precision(loss, self.dtype)
        return Evaluation(loss, aliases, places)

    def value_of_own(self, batch: CurvatureBatch) -> float:
        """The loss where the module holds its own weights, as the training meets it."""
        seed_all(batch.seed)
        places = _places(self.module, self._buffers())
        with rehearsed(self.module), self._standing_in(places):
            return float(self._loss(self.module, batch.thaw(self.dtype), batch.index).detach())

    def differentiate(
        self,
        evaluation: Evaluation,
        outputs: Sequence[Tensor],
        vectors: Sequence[Tensor] | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """``torch.autograd.grad`` by the aliases; None where an output does not depend on one.

        The aliases stand in the module's place once more: checkpointing computes its parts again there.

        Raises:
            WrongHessianError: autograd refuses.
        """
        work = partial(
            torch.autograd.grad, outputs, evaluation.aliases, vectors, allow_unused=True, **options
        )
        try:
            with self._one_precision(), self._standing_in(evaluation.places):
                return work()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise WrongHessianError(
                "expected a loss that torch.autograd.grad can differentiate twice, found one that it cannot "
                f"({str(error).strip().splitlines()[0]}). Use what has a second derivative in the training "
                "step (checkpoint with use_reentrant=False, a backward made of torch functions), or give a "
                "loss_fn"
            ) from error

    @contextmanager
    def _standing_in(self, places: Sequence[_Place]) -> Iterator[None]:
        """The aliases stand in the module's place, and layers have their quick second derivatives."""
        before = [holder[name] for holder, name, _ in places]
        try:
            for holder, name, tensor in places:
                holder[name] = tensor
            with self._layers():
                yield
        finally:
            for (holder, name, _), own in zip(places, before, strict=True):
                holder[name] = own

    def _one_precision(self) -> AbstractContextManager[object]:
        """Keep a copy in float64 in float64."""
        return _DoubleThroughout() if self.dtype is torch.float64 else nullcontext()

    def _value(self, parameter: nn.Parameter) -> Tensor:
        value = parameter.detach()
        return self._copy(value) if self.dtype is not None or parameter in self._written else value

    def _buffers(self) -> dict[Tensor, Tensor]:
        return {buffer: self._copy(buffer.detach()) for buffer in self.module.buffers()}

    def _copy(self, tensor: Tensor) -> Tensor:
        return cast_tensor(tensor.clone(), self.dtype)


def _alias(value: Tensor, own: nn.Parameter) -> Tensor:
    """A leaf with a value that looks like a parameter: users' code asks for its class and its attributes."""
    plain = type(value) is Tensor
    alias: Tensor = Tensor._make_subclass(type(own), value) if plain else nn.Parameter(value)
    vars(alias).update(vars(own))
    return alias.requires_grad_(own.requires_grad)


def _places(module: nn.Module, replaced: Mapping[Tensor, Tensor]) -> list[_Place]:
    """Every entry of the module and those below it that holds one of some tensors: of a tied weight, all."""
    return [
        _Place(holder, name, replaced[tensor])
        for part in module.modules()
        for holder in (part._parameters, part._buffers)
        for name, tensor in holder.items()
        if tensor is not None and tensor in replaced
    ]


class _DoubleThroughout(TorchFunctionMode):
    """Where float32 is asked for it is float64.

    Many models (those of transformers, say) compute norms, attention weights and losses in float32 whatever
    they are given; others make constants, draw noise or carry a hidden state in it. A copy in float64 has to
    stay that, or its differences drown in rounding. The numbers that are drawn stay the same.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        named = {n: torch.float64 if v is torch.float32 else v for n, v in (kwargs or {}).items()}
        given = {leaf.dtype for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor)}
        if {torch.float32, torch.float64} <= given and not _writes(func, named):
            args, named = tree_map_only(Tensor, partial(cast_tensor, dtype=torch.float64), (args, named))
        found = func(*args, **named)
        made = not given and isinstance(found, Tensor) and found.dtype is torch.float32
        return found.double() if made else found


def _writes(func: Any, named: dict[str, Any]) -> bool:
    """A function that writes to what it is given."""
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))
    return in_place or named.get("out") is not None


def checked(loss: object) -> Tensor:
    """Pass a loss on.

    Raises:
        CurvatureError: it is no finite scalar, or needs no gradient.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise CurvatureError(
            f"expected a scalar loss from the training step, found {found}: return one, or give a loss_fn"
        )
    if not math.isfinite(float(loss.detach())):
        raise CurvatureError(
            f"expected a finite loss, found {float(loss.detach())}: look at this batch and at these weights"
        )
    if not loss.requires_grad:
        raise CurvatureError(
            "expected a loss that depends on the probed parameters, found one that needs no gradient: choose "
            "parameters that it is a function of with `params`, and compute it without detach and no_grad"
        )
    return loss.reshape(())


def _check_precision(loss: Tensor, dtype: torch.dtype) -> None:
    """Refuse a loss with a step on its way from the weights that is less precise than asked for."""
    for node in _graph(loss):
        for output in node._input_metadata:  # the input of a backward step is the output of the forward one
            if output.dtype.is_floating_point and torch.finfo(output.dtype).eps > torch.finfo(dtype).eps:
                raise CurvatureError(
                    f"a part of the loss is computed in {output.dtype}, whatever the weights are"
                )


def leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that a loss's gradient arrives at."""
    return [node.variable for node in _graph(loss) if hasattr(node, "variable")]


def _graph(loss: Tensor) -> Iterator[Any]:
    """The nodes of a loss's graph."""
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(parent for parent, _ in node.next_functions)
