"""Curvature batches in pieces: they bound the memory of a graph, where the loss is a mean over samples.

Where one sample sees another, or the loss is no mean over samples, the mean over the pieces is the loss of
another training. So what the pieces say is compared with the whole batch before they are used.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from sgd_probe.curvature.aliased import AliasedLoss, CurvatureError, LossFunction
from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.linear_algebra import norm
from sgd_probe.curvature.space import ParameterSpace

#: Largest tolerated gap between a batch and its pieces, in units of the root of the precision that the loss
#: is computed in: 1e-3 in float32. Rounding leaves a thousandth of that.
_TOLERANCE = 3.0
#: And never more: of what is computed in bfloat16, its root would let anything pass.
_MOST = 1e-2
#: What has no samples of its own.
_PLAIN = (str, bytes, bool, int, float, complex, np.generic, type(None))
_WAY_OUT = "Leave `microbatch=None`: batches are then taken whole"


def cut(batch: CurvatureBatch, size: int | None) -> tuple[CurvatureBatch, ...]:
    """Cut a batch into pieces along the first dimension of its tensors.

    Args:
        batch: nested tensors and arrays, each with as many entries as the batch has samples; scalars go
            into every piece, and so do plain values, unless a list or tuple has one for every sample.
        size: most samples of a piece; None leaves the batch whole.

    Returns:
        The pieces in order, views of the batch; each draws random numbers of its own. A batch that is
        small enough is its only piece.

    Raises:
        CurvatureError: a part of the batch cannot be divided among its samples.
    """
    if size is None or batch.samples <= size:
        return (batch,)
    pieces = []
    for number, start in enumerate(range(0, batch.samples, size)):
        samples = min(size, batch.samples - start)
        part = _Part(batch.samples, slice(start, start + samples))
        seed = int(np.random.SeedSequence((batch.seed, number)).generate_state(1)[0])
        pieces.append(CurvatureBatch(part.of(batch.content, "batch"), batch.index, samples, seed))
    return tuple(pieces)


def check_pieces(
    module: nn.Module,
    loss: LossFunction,
    batch: CurvatureBatch,
    space: ParameterSpace,
    size: int,
    dtype: torch.dtype | None = None,
) -> float | None:
    """Compare the loss and the gradient of a whole batch with the means over its pieces.

    Dropout is quiet meanwhile: it draws other numbers for other shapes. The gradients' gap is taken over
    the mean length of the pieces' own, because their mean may cancel. It costs two gradients of the batch,
    and the memory of a training step. Call it inside :func:`sgd_probe.isolation.isolated`.

    Args:
        module: the user's module.
        loss: its training loss.
        batch: to be cut.
        space: the probed parameters.
        size: most samples of a piece.
        dtype: of copies to work on, as for the operator.

    Returns:
        The larger of the two relative gaps; None where the batch has one piece, so that nothing was learnt.

    Raises:
        CurvatureError: they are apart by more than rounding, or normalisation over the batch makes them so.
    """
    pieces = cut(batch, size)
    if len(pieces) == 1:
        return None
    _refuse_batch_norm(module)
    aliased, space = AliasedLoss(module, loss, dtype), space if dtype is None else space.cast(dtype)
    with _quiet_dropout(module):
        value, gradient, precision = _value_and_gradient(aliased, space, batch)
        loss_scale = gradient_scale = 0.0
        for piece in pieces:
            share = piece.samples / batch.samples
            part, slope, _ = _value_and_gradient(aliased, space, piece)
            value -= share * part
            gradient.sub_(slope, alpha=share)
            loss_scale += share * abs(part)
            gradient_scale += share * norm(slope)
    gap = max(_ratio(abs(value), loss_scale), _ratio(norm(gradient), gradient_scale))
    if not gap <= min(_TOLERANCE * precision**0.5, _MOST):
        raise CurvatureError(
            f"expected loss and gradient of a batch to be the means over its pieces of {size} samples, found "
            f"them apart by {gap:.0e}: the loss is no mean over samples (a sum, a mean over real tokens), "
            "one sample sees another (contrastive losses, statistics of the batch), or the training step "
            f"draws random numbers beside those of dropout layers. {_WAY_OUT}"
        )
    return gap


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some of a batch's samples.

    Attributes:
        samples: of the whole batch.
        where: those in question.
    """

    samples: int
    where: slice

    def of(self, value: Any, name: str) -> Any:
        """What nested data holds of them: the same nesting, views of its tensors."""
        if isinstance(value, Tensor | np.ndarray):
            return self._entries(value, name)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            pairs = zip(value._fields, value, strict=True)
            return type(value)(*(self.of(item, f"{name}.{field}") for field, item in pairs))
        if type(value) in (list, tuple):
            if len(value) == self.samples and all(isinstance(item, _PLAIN) for item in value):
                return value[self.where]
            return type(value)(self.of(item, f"{name}[{index}]") for index, item in enumerate(value))
        if isinstance(value, MutableMapping):
            mapping = copy.copy(value)
            for key, item in value.items():
                mapping[key] = self.of(item, f"{name}[{key!r}]")
            return mapping
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            twin = copy.copy(value)
            for field in dataclasses.fields(value):
                object.__setattr__(
                    twin, field.name, self.of(getattr(value, field.name), f"{name}.{field.name}")
                )
            return twin
        if isinstance(value, _PLAIN):
            return value
        raise CurvatureError(
            "expected a batch of tensors in tuples, lists, dicts or dataclasses, found "
            f"{name} to be a {type(value).__name__}, which cannot be cut into pieces. {_WAY_OUT}"
        )

    def _entries(self, value: Any, name: str) -> Any:
        if value.ndim == 0:
            return value
        if len(value) != self.samples:
            raise CurvatureError(
                f"expected the batch's {self.samples} samples in the first dimension of all its tensors, "
                f"found {name} of shape {tuple(value.shape)}. {_WAY_OUT}"
            )
        return value[self.where]


def _refuse_batch_norm(module: nn.Module) -> None:
    """Statistics over a piece are not those over the batch."""
    for name, child in module.named_modules():
        if isinstance(child, _BatchNorm) and (child.training or child.running_mean is None):
            raise CurvatureError(
                "expected a loss in which no sample sees another, found statistics over the batch in "
                f"`{name or type(child).__name__}` ({type(child).__name__}): those of a piece make another "
                f"loss. {_WAY_OUT}"
            )


@contextmanager
def _quiet_dropout(module: nn.Module) -> Iterator[None]:
    """Let no dropout layer drop anything, and put all of them back."""
    with ExitStack() as stack:
        for child in module.modules():
            if isinstance(child, _DropoutNd):
                stack.callback(setattr, child, "training", child.training)
                child.training = False
            elif isinstance(child, nn.MultiheadAttention | nn.RNNBase):
                stack.callback(setattr, child, "dropout", child.dropout)
                child.dropout = 0.0
        yield


def _value_and_gradient(
    aliased: AliasedLoss, space: ParameterSpace, batch: CurvatureBatch
) -> tuple[float, Tensor, float]:
    """Loss, flat gradient, and the coarsest precision among what the backward pass keeps."""
    precision = torch.finfo(space.dtype).eps

    def look(tensor: Tensor) -> Tensor:
        nonlocal precision
        if tensor.is_floating_point():
            precision = max(precision, torch.finfo(tensor.dtype).eps)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        evaluation = aliased.evaluate(space, batch)
    gradient = aliased.differentiate(evaluation, (evaluation.loss,))
    return float(evaluation.loss.detach()), space.flatten(gradient), precision


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else part
