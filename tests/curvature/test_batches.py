"""Clones of batches: complete, independent, and no larger than what they show."""

from __future__ import annotations

from collections import OrderedDict, UserDict, UserList, defaultdict, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from sgd_probe.curvature.batches import CurvatureBatch, clone, count_samples

Pair = namedtuple("Pair", ["x", "y"])


class Encoding(UserDict[str, Any]):
    """Like a tokenizer's output: a mapping that is no dict, whose items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getstate__(self) -> Any:
        return {"data": self.data}

    def __setstate__(self, state: Any) -> None:
        self.data = state["data"]


@dataclass
class Sample:
    x: Any
    note: str = "text"
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Frozen:
    x: Any


@dataclass(slots=True)
class Slotted:
    x: Any


class Graph:
    """An object of the user's, with a reference to itself."""

    def __init__(self, x: Any) -> None:
        self.x = x
        self.me = self


class Named(dict[str, Any]):
    pass


class Computed(Mapping[str, Tensor]):
    """Gives a new tensor at every look."""

    def __init__(self) -> None:
        self.scale = torch.tensor([2.0])
        self.names = ["a", "b", "c"]

    def __getitem__(self, key: str) -> Tensor:
        return self.scale * self.names.index(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


WRAPPERS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, 1, "text", None),
    "list": lambda x: [x],
    "dict": lambda x: {"x": x},
    "nested": lambda x: {"a": [({"b": x},)]},
    "named tuple": lambda x: Pair(x, [x]),
    "ordered": lambda x: OrderedDict(x=x),
    "default": lambda x: defaultdict(list, x=x),
    "dict subclass": lambda x: Named(x=x),
    "encoding": lambda x: Encoding(x=x),
    "user list": lambda x: UserList([x]),
    "dataclass": lambda x: Sample(x, extra={"x": x}),
    "frozen dataclass": Frozen,
    "slotted dataclass": Slotted,
    "object": Graph,
}


def leaves(value: Any) -> list[Any]:
    """Every tensor and array, found in another way than the package finds them."""
    found: list[Any] = []
    seen: list[Any] = []

    def look(item: Any) -> None:
        if any(item is other for other in seen):
            return
        seen.append(item)
        if isinstance(item, Tensor | np.ndarray):
            found.append(item)
        elif isinstance(item, Mapping):
            for key in item:
                look(item[key])
        elif isinstance(item, list | tuple | UserList):
            for part in item:
                look(part)
        elif isinstance(item, Slotted):
            look(item.x)
        elif hasattr(item, "__dict__"):
            for part in vars(item).values():
                look(part)

    look(value)
    return found


@pytest.mark.parametrize("name", WRAPPERS)
def test_tensors_in_anything(name: str) -> None:
    storage = torch.arange(100_000.0)
    view = storage[10:14]
    original = WRAPPERS[name](view)

    twin = clone(original)

    assert type(twin) is type(original)
    found = leaves(twin)
    assert found
    for tensor in found:
        assert tensor.tolist() == [10, 11, 12, 13]
        assert tensor.untyped_storage().nbytes() == 4 * 4  # not the storage that the view looks into
    view.zero_()
    assert all(tensor.tolist() == [10, 11, 12, 13] for tensor in found)
    assert count_samples(original) == 4


@pytest.mark.parametrize("name", WRAPPERS)
def test_arrays_in_anything(name: str) -> None:
    view = np.arange(100.0)[10:14]
    original = WRAPPERS[name](view)
    twin = clone(original)
    view[:] = 0
    assert type(twin) is type(original)
    for array in leaves(twin):
        assert array.tolist() == [10, 11, 12, 13]
    assert count_samples(original) == 4


def test_other_items_survive() -> None:
    batch = {"text": ["a", "b"], "n": 3, "none": None, "set": {1, 2}, "f": len}
    twin = clone(batch)
    assert twin == batch
    assert twin["text"] is not batch["text"]


def test_an_object_keeps_its_shape() -> None:
    twin = clone(Graph(torch.ones(2)))
    assert twin.me is twin


def test_no_graph_is_cloned() -> None:
    leaf = torch.ones(3, requires_grad=True)
    twin = clone({"x": leaf * 2, "y": torch.ones(3)})
    assert twin["x"].grad_fn is None
    # A loss that differentiates by its inputs goes on doing so.
    assert twin["x"].requires_grad and not twin["y"].requires_grad


def test_packed_sequences() -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.zeros(2, 2)])
    twin = clone(packed)
    assert isinstance(twin, PackedSequence)
    assert torch.equal(twin.data, packed.data) and twin.data is not packed.data
    assert torch.equal(twin.batch_sizes, packed.batch_sizes)


def test_a_mapping_that_makes_its_tensors_up() -> None:
    for _ in range(20):
        twin = clone(Computed())
        assert twin.names == ["a", "b", "c"]
        assert [float(twin[key]) for key in twin] == [0, 2, 4]


def test_what_cannot_be_copied_is_refused_by_name() -> None:
    stream = iter([1, 2])
    batch = {"x": torch.ones(2), "stream": (item for item in stream)}
    with pytest.raises(TypeError, match="found a generator that cannot"):
        clone(batch)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(5, 3), 5),
        ((None, torch.tensor(1.0), torch.zeros(7)), 7),
        ({"id": "text", "x": np.zeros((6, 2))}, 6),
        (torch.tensor(3.0), 1),
        (torch.zeros(0, 3), 1),
        ("text", 1),
        (None, 1),
        ([], 1),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), 2),
    ],
)
def test_number_of_samples(batch: Any, samples: int) -> None:
    assert count_samples(batch) == samples


def test_frozen_batches_thaw_anew_every_time() -> None:
    content = [torch.ones(3), torch.zeros(3)]
    batch = CurvatureBatch.freeze(content, index=4, seed=9)
    content[0].zero_()
    first = batch.thaw()
    first[0].mul_(5)
    first.pop()
    again = batch.thaw()
    assert [tensor.tolist() for tensor in again] == [[1, 1, 1], [0, 0, 0]]
    assert (batch.index, batch.seed, batch.samples) == (4, 9, 3)
