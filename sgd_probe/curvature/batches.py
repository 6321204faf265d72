"""Frozen clones of training batches: one set finds the modes, a disjoint one certifies them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class CurvatureBatch:
    """A training batch as the loop handed it over, with the seed of its random numbers.

    Attributes:
        content: a clone that nobody else holds.
        index: the batch index that the training step is told.
        samples: number of samples (length of the first tensor), the batch's weight.
        seed: dropout and augmentation draw the same numbers at every evaluation of this batch.
    """

    content: Any
    index: int
    samples: int
    seed: int

    @classmethod
    def freeze(cls, batch: Any, index: int, seed: int) -> CurvatureBatch:
        return cls(clone(batch), index, count_samples(batch), seed)

    def thaw(self, dtype: torch.dtype | None = None) -> Any:
        """A fresh clone: a training step may edit its batch in place. Cast where a ``dtype`` is given."""
        return clone(self.content, dtype)


def clone(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Copy nested data. Views copy their own elements only, not the storage that they look into.

    Args:
        value: tensors and arrays in any nesting.
        dtype: precision of floating-point data in the copy; None keeps it.
    """
    if isinstance(value, Tensor):
        # Of inputs that need a gradient (those of a differential equation), the loss will ask for it.
        return cast_tensor(value.detach().clone(), dtype).requires_grad_(value.requires_grad)
    if isinstance(value, np.ndarray):
        return value.astype(np.float64 if dtype is torch.float64 and value.dtype.kind == "f" else value.dtype)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(clone(item, dtype) for item in value))
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(clone(item, dtype) for item in value)
    if type(value) is dict:
        return {key: clone(item, dtype) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        twin = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(twin, field.name, clone(getattr(value, field.name), dtype))
        return twin
    return _clone_object(value, dtype)


def cast_tensor(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Give real and complex tensors at least this precision; integers, and all where it is None, stay."""
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, dtype))


def _clone_object(value: Any, dtype: torch.dtype | None) -> Any:
    """Deep-copy anything else, with its tensors cloned by value rather than by storage."""
    leaves = _leaves(value, depth=4)  # held until the end: a freed one could hand its id on
    try:
        return copy.deepcopy(value, {id(leaf): clone(leaf, dtype) for leaf in leaves})
    except Exception as error:
        # Passed on as it is, an in-place edit by the loss would reach the user's own batch.
        raise TypeError(
            f"expected a batch that can be copied, found a {type(value).__name__} that cannot ({error}): "
            "give it a __deepcopy__"
        ) from error


def leaves_of(batch: Any) -> list[Tensor | np.ndarray[Any, Any]]:
    """Tensors and arrays in a batch."""
    return _leaves(batch, depth=4)


def _leaves(value: Any, depth: int) -> list[Tensor | np.ndarray[Any, Any]]:
    """Tensors and arrays in nested data."""
    if isinstance(value, Tensor | np.ndarray):
        return [value]
    if depth == 0:
        return []
    if isinstance(value, Mapping):
        children = list(value.values())
    elif isinstance(value, list | tuple):
        children = list(value)
    elif dataclasses.is_dataclass(value):
        children = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    else:
        children = list(vars(value).values()) if hasattr(value, "__dict__") else []
    return [leaf for child in children for leaf in _leaves(child, depth - 1)]


def count_samples(batch: Any) -> int:
    """Length of the first tensor or array with a first dimension; 1 where there is none."""
    leaves = (leaf for leaf in leaves_of(batch) if leaf.ndim > 0)
    # Nested tensors have no length, and no shape as a whole.
    sizes = (leaf.size(0) if isinstance(leaf, Tensor) else len(leaf) for leaf in leaves)
    return max(next(sizes, 1), 1)
