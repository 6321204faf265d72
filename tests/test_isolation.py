"""Whatever a training step does to a module, and to the generators around it, is undone."""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import random
import shutil
import types
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

from sgd_probe.isolation import IsolationError, capture, isolated, rehearsed, seed_all

torch.set_num_threads(1)


class Meter:
    """A plain object of the user's."""

    def __init__(self) -> None:
        self.total = 0.0
        self.history: list[float] = []
        self.owner: Any = self  # a reference in a circle

    def add(self, value: float) -> None:
        self.total += value
        self.history.append(value)


class Slotted:
    __slots__ = ("__private", "count", "unset")

    def __init__(self) -> None:
        self.count = 0
        self.__private = [0]

    def add(self) -> None:
        self.count += 1
        self.unset = self.count
        self.__private.append(1)

    def state(self) -> tuple[int, list[int], bool]:
        return self.count, list(self.__private), hasattr(self, "unset")


@dataclass(slots=True, frozen=True)
class FrozenRecord:
    values: list[int]


class Network(nn.Module):
    """One of everything."""

    table: Tensor
    wide: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("table", torch.arange(6.0))
        self.register_buffer("wide", torch.zeros(3, 1).expand(3, 4))
        self.count = 0
        self.name = "net"
        self.optional: Any = None
        self.values = [1, 2, 3]
        self.mapping: dict[str, Any] = {"a": 1, "inner": {"b": [1]}}
        self.ordered = OrderedDict(x=1, y=2)
        self.default: defaultdict[str, list[int]] = defaultdict(list)
        self.window: deque[int] = deque([1, 2, 3], maxlen=3)
        self.members = {1, 2}
        self.pair = ([1], {"c": 2})
        self.meter = Meter()
        self.meters: dict[str, Any] = {"train": [Meter()], "set": {Meter()}}
        self.slotted = Slotted()
        self.record = FrozenRecord([1])
        self.space = types.SimpleNamespace(steps=0)
        self.options = argparse.Namespace(steps=0)
        self.user_dict: UserDict[str, int] = UserDict(steps=0)
        self.array = np.arange(4.0)
        self.read_only = np.broadcast_to(np.zeros(3), (2, 3))
        self.tensor = torch.arange(4.0)
        self.tensors: list[Any] = [torch.zeros(2), {"t": torch.ones(2)}]
        self.delta = torch.zeros(2, requires_grad=True)
        self.generator = torch.Generator().manual_seed(1)
        self.numpy_generator = np.random.default_rng(1)
        self.numpy_state = np.random.RandomState(1)
        self.python_generator = random.Random(1)
        self.system = random.SystemRandom()
        self.circle: list[Any] = [1]
        self.circle.append(self.circle)
        self.itself = [self]


def picture(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """All that a value is, as plain data, with the identity of every mutable part."""
    if isinstance(value, str | bytes | int | float | complex | type | None):
        return type(value), value
    if id(value) in seen:
        return "seen", seen.index(id(value))
    seen = (*seen, id(value))
    if isinstance(value, Tensor):
        place = None if isinstance(value, nn.UninitializedParameter) else value.data_ptr()
        grad = None if not value.is_leaf or value.grad is None else picture(value.grad, seen)
        return id(value), place, value.dtype, value.requires_grad, value.is_leaf, value.tolist(), grad
    if isinstance(value, np.ndarray):
        return id(value), value.dtype, value.tolist()
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return id(value), repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return id(value), repr(value.get_state())
    if isinstance(value, random.SystemRandom):
        return id(value)
    if isinstance(value, random.Random):
        return id(value), value.getstate()
    if isinstance(value, dict):
        return id(value), [(picture(k, seen), picture(v, seen)) for k, v in value.items()]
    if isinstance(value, list | tuple | deque):
        return id(value), [picture(item, seen) for item in value]
    if isinstance(value, set | frozenset):
        return id(value), sorted((id(item), repr(picture(item, seen))) for item in value)
    state = object.__getstate__(value)
    if state is None or type(value).__module__ == "builtins":
        return id(value)
    parts = state if isinstance(state, tuple) else (state,)
    return id(value), [[(k, picture(v, seen)) for k, v in (part or {}).items()] for part in parts]


def surroundings() -> Any:
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()


def add_to_everything(m: Network) -> None:
    """One change to every attribute, in the way a training step would make it."""
    m.count += 1
    m.name = m.name + "!"
    m.optional = Meter()
    m.values.append(4)
    m.values[0] = 9
    m.mapping["inner"]["b"].append(2)
    m.mapping["new"] = 1
    del m.mapping["a"]
    m.ordered.move_to_end("x")
    m.default["k"].append(1)
    m.window.append(7)
    m.members.add(3)
    m.pair[0].append(2)
    m.pair[1]["c"] = 3
    m.meter.add(1.0)
    m.meters["train"][0].add(1.0)
    next(iter(m.meters["set"])).add(2.0)
    m.slotted.add()
    m.record.values.append(2)
    m.space.steps += 1
    m.options.steps += 1
    m.user_dict["steps"] += 1
    m.array += 1
    m.tensor.add_(1)
    m.tensors[0].add_(1)
    m.tensors[1]["t"].mul_(3)
    m.circle.append(2)
    m.itself.clear()


def reassign_everything(m: Network) -> None:
    for name in [name for name in vars(m) if not name.startswith("_")]:
        setattr(m, name, 0)
    m.table = m.table + 1
    m.wide = torch.ones(1)


def delete_everything(m: Network) -> None:
    for name in [name for name in vars(m) if not name.startswith("_")] + ["table", "layers"]:
        delattr(m, name)


def edit_buffers(m: Network) -> None:
    m.table.mul_(2)
    m.table.data = torch.zeros(2, dtype=torch.float64)
    m.wide[:, :1].add_(1)
    m.register_buffer("another", torch.ones(1))
    m.layers.train()(torch.randn(6, 4))


def draw_from_generators(m: Network) -> None:
    torch.randn(2, generator=m.generator)
    m.numpy_generator.normal(size=3)
    m.numpy_state.normal(size=3)
    m.python_generator.random()
    m.system.random()
    m.optional = (random.random(), np.random.rand(), torch.randn(1))


def flip_modes(m: Network) -> None:
    m.train(not m.training)
    m.layers[2].p = 0.0
    m.requires_grad_(False)
    m.frozen.requires_grad_(True)
    m.delta.requires_grad_(False)


def write_gradients(m: Network) -> None:
    m.layers[0].weight.grad = torch.ones(5, 4)
    m.layers[0].bias.grad = None
    (m.layers(torch.randn(6, 4)).sum() + m.delta.sum()).backward()
    m.zero_grad(set_to_none=False)


def hook(m: Network) -> None:
    m.register_forward_hook(lambda *_: None)
    m.layers[0].register_full_backward_hook(lambda *_: None)


def rebuild(m: Network) -> None:
    m.extra = nn.Linear(2, 2)
    m.layers.append(nn.Linear(3, 3))
    m.frozen.weight = nn.Parameter(torch.zeros(2, 2))
    m.register_parameter("new", nn.Parameter(torch.ones(1)))
    del m.layers[0].bias


def cast(m: Network) -> None:
    m.wide = m.wide.clone()
    m.double()


def leave_a_graph(m: Network) -> None:
    m.tensor.mul_(m.layers[0].weight.sum())
    m.optional = m.layers(torch.randn(6, 4))


DEEDS: list[Callable[[Network], None]] = [
    add_to_everything,
    reassign_everything,
    delete_everything,
    edit_buffers,
    draw_from_generators,
    flip_modes,
    write_gradients,
    hook,
    rebuild,
    cast,
    leave_a_graph,
]


def network() -> Network:
    torch.manual_seed(0)
    module = Network()
    for parameter in module.layers.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    module.delta.grad = torch.ones(2)
    return module


@pytest.mark.parametrize("raises", [False, True], ids=["", "raises"])
@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_whatever_is_done_is_undone(deed: Callable[[Network], None], raises: bool) -> None:
    module = network()
    before, around = picture(module), surroundings()

    def run() -> None:
        with isolated(module):
            deed(module)
            if raises:
                raise KeyError("from the body")

    if raises:
        with pytest.raises(KeyError, match="from the body"):
            run()
    else:
        run()

    assert picture(module) == before
    assert surroundings() == around


@pytest.mark.parametrize("deeds", list(itertools.pairwise([*DEEDS[:1], *DEEDS[3:], DEEDS[1]])))
def test_windows_may_follow_and_contain_each_other(deeds: tuple[Callable[[Network], None], ...]) -> None:
    module = network()
    before = picture(module)
    with isolated(module):
        deeds[0](module)
        between = picture(module)
        # Not every deed can follow on every other; what it did until it failed counts.
        with suppress(RuntimeError), isolated(module):
            deeds[1](module)
        assert picture(module) == between
    with isolated(module):
        deeds[1](module)
    assert picture(module) == before


def test_gradients_are_set_aside_not_added_to() -> None:
    module = network()
    grads = [parameter.grad for parameter in module.layers.parameters()]
    with isolated(module):
        assert all(parameter.grad is None for parameter in module.parameters())
        module.layers(torch.randn(6, 4)).sum().backward()
    for parameter, grad in zip(module.layers.parameters(), grads, strict=True):
        assert parameter.grad is grad
        assert grad is not None and bool((grad == 2).all())


def test_version_counters_stand_still() -> None:
    module = network()
    before = module.table._version, module.tensor._version
    with isolated(module):
        pass
    assert (module.table._version, module.tensor._version) == before


def test_weights_are_put_back_after_a_rehearsal() -> None:
    module = network()
    before = picture(module)
    linear, frozen = module.layers[0], module.frozen
    with rehearsed(module) as written:
        with torch.no_grad():
            linear.weight[1].mul_(0.5)
            frozen.weight.copy_(torch.zeros(2, 2))
        frozen.bias.data = frozen.bias.data + 1
        torch._foreach_mul_([p.data for p in module.layers[3].parameters()], 0.5)
        torch.optim.SGD(module.layers[1].parameters(), lr=1.0).step()
    assert written == {linear.weight, frozen.weight, frozen.bias, *module.layers.parameters()} - {linear.bias}
    assert picture(module) == before


def test_weights_are_put_back_when_a_rehearsal_raises() -> None:
    module = network()
    before = picture(module)
    with pytest.raises(KeyError), rehearsed(module), torch.no_grad():
        torch.add(module.frozen.bias, 1, out=module.frozen.bias)
        raise KeyError
    assert picture(module) == before


def test_reading_the_weights_is_not_writing() -> None:
    module = network()
    with isolated(module), rehearsed(module) as written:
        gradients = torch.autograd.grad(
            module.layers(torch.randn(6, 4)).sum(), list(module.layers.parameters()), create_graph=True
        )
        sum(gradient.square().sum() for gradient in gradients).backward()  # type: ignore[union-attr]
    assert written == set()


def test_metrics_forget_the_body() -> None:
    module: Any = nn.Module()
    module.accuracy = MulticlassAccuracy(3)
    module.metrics = MetricCollection([MulticlassAccuracy(3), MulticlassRecall(3)])
    everything: tuple[Any, ...] = (module.accuracy, module.metrics)
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(8, 3, generator=generator), torch.randint(0, 3, (8,), generator=generator)

    first, second, intruder = batch(), batch(), batch()
    for metric in everything:
        metric(*first)
    reference = copy.deepcopy(everything)
    before = picture(module)
    for how in ("forward", "update", "compute", "reset"):
        with isolated(module):
            for metric in everything:
                getattr(metric, how)(*(() if how in ("compute", "reset") else intruder))
                metric.compute()
        assert picture(module) == before, how
    for survivor, expected in zip(everything, reference, strict=True):
        survivor(*second)
        expected(*second)
        assert survivor.compute() == expected.compute()


class Tagged(Dataset[int]):
    def __init__(self) -> None:
        self.data = torch.zeros(1000)
        self.reads = 0

    def __getitem__(self, index: int) -> int:
        self.reads += 1
        return index


def clones(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    """Numbers that a capture copies."""
    copied = 0
    original = Tensor.clone

    def clone(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal copied
        copied += self.numel()
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "clone", clone)
        capture(module)
    return copied


def test_what_belongs_to_the_framework_is_neither_copied_nor_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(100, 100)
            self.data = Tagged()
            self.parts = {"sets": [Tagged()]}
            self.wide = torch.zeros(1).expand(100_000)

    model = Model()
    trainer: Any = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    model.trainer = trainer
    trainer.marker = []
    assert clones(model, monkeypatch) <= 10
    with isolated(model):
        model.data[3]
        trainer.marker.append(1)
    assert model.data.reads == 1
    assert trainer.marker == [1]


def test_the_standard_library_is_left_alone() -> None:
    import logging
    from concurrent.futures import ThreadPoolExecutor

    module: Any = nn.Module()
    module.log = logging.getLogger("sgd_probe.test")
    module.pool = ThreadPoolExecutor(1)
    try:
        with isolated(module):
            assert module.pool.submit(int, "3").result() == 3
            module.log.setLevel(logging.ERROR)
        assert module.log.level == logging.ERROR
        assert module.pool.submit(int, "4").result() == 4
    finally:
        module.pool.shutdown()


def test_references_that_have_died() -> None:
    meter = Meter()
    module: Any = nn.Module()
    module.proxy = weakref.proxy(meter)
    module.reference = weakref.ref(meter)
    del meter
    gc.collect()  # the meter refers to itself
    with isolated(module):
        module.count = 1
    assert not hasattr(module, "count")


def test_a_long_chain_of_objects() -> None:
    meters = [Meter() for _ in range(3000)]
    module: Any = nn.Module()
    for meter, following in itertools.pairwise(meters):
        meter.owner = following
    module.first = meters[0]
    with isolated(module):
        meters[-1].add(1.0)
    assert meters[-1].history == []


def test_one_failure_does_not_keep_the_rest_from_being_restored() -> None:
    class Stubborn(dict[str, int]):
        def clear(self) -> None:
            raise TypeError("never")

    module: Any = nn.Module()
    module.first, module.stubborn, module.last = [1], Stubborn(a=1), [1]
    with pytest.raises(TypeError, match="never"), isolated(module):
        module.first.append(2)
        module.stubborn["a"] = 2
        module.last.append(2)
    assert module.first == module.last == [1]


def test_uninitialised_sparse_and_inference_tensors_are_harmless() -> None:
    module: Any = nn.Module()
    module.lazy = nn.LazyLinear(3)
    module.sparse = torch.eye(3).to_sparse()
    module.meta = torch.empty(3, device="meta")
    module.empty = torch.empty(0, 3)
    with torch.inference_mode():
        module.inference = torch.ones(2)
    with isolated(module), rehearsed(module):
        module.count = 1
    assert not hasattr(module, "count")
    assert module.inference.tolist() == [1, 1]


class Shared(nn.Module):
    def __init__(self, tree: Any) -> None:
        super().__init__()
        self.tree = tree


SCALARS = st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3) | st.booleans()


def as_object(values: dict[str, Any]) -> Meter:
    meter = Meter()
    vars(meter).update(values)
    return meter


TREES = st.recursive(
    SCALARS
    | st.lists(st.floats(-9, 9), max_size=3).map(lambda x: torch.tensor(x, dtype=torch.float64))
    | st.lists(st.floats(-9, 9), max_size=3).map(np.array),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(deque),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(as_object),
        st.sets(st.integers(0, 9), max_size=3),
    ),
    max_leaves=12,
)


def vandalise(value: Any, draw: random.Random, depth: int = 6) -> None:
    """Change a random part of everything that can be changed."""
    if depth == 0:
        return
    if isinstance(value, Tensor | np.ndarray):
        value *= 2
        value += 1
    elif isinstance(value, set):
        value.symmetric_difference_update({draw.randrange(10), -1})
    elif isinstance(value, list | deque | tuple):
        for item in list(value):
            vandalise(item, draw, depth - 1)
        if not isinstance(value, tuple):
            change: Callable[[], None] = draw.choice([value.reverse, value.clear, lambda: value.append(1)])
            change()
    elif isinstance(value, dict):
        for item in list(value.values()):
            vandalise(item, draw, depth - 1)
        if value and draw.random() < 0.5:
            value.pop(draw.choice(list(value)))
        value[f"new {draw.random()}"] = [1]
    elif isinstance(value, Meter):
        vandalise(vars(value), draw, depth - 1)


@given(tree=TREES, seed=st.integers(0, 999))
@settings(max_examples=150, deadline=None)
def test_any_state_is_restored_exactly(tree: Any, seed: int) -> None:
    module = Shared(tree)
    before = picture(module)
    with isolated(module):
        vandalise(module.tree, random.Random(seed))
        module.tree = None
    assert picture(module) == before


def test_gradients_are_enabled_inside() -> None:
    module = nn.Linear(2, 2)
    with torch.inference_mode(), isolated(module):
        assert not torch.is_inference_mode_enabled()
        assert module(torch.ones(1, 2)).requires_grad
    with torch.no_grad():
        with isolated(module):
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()


def test_attention_can_be_differentiated_twice_inside() -> None:
    query = torch.randn(1, 1, 4, 8, requires_grad=True)
    with isolated(nn.Module()):
        loss = nn.functional.scaled_dot_product_attention(query, query, query).square().sum()
        (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), query)
    assert bool(torch.isfinite(second).all())


def test_a_seed_seeds_every_generator_and_leaves_nothing_behind() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    around, queued = surroundings(), len(torch.cuda._queued_calls)
    tracker = repr(torch.cuda._lazy_seed_tracker.get_calls())
    with isolated(nn.Module()):
        seed_all(2**40 + 5)
        first = draw()
        seed_all(2**40 + 5)
        assert draw() == first
        seed_all(6)
        assert draw() != first
    assert surroundings() == around
    # A seed that waits for CUDA would reach the training once CUDA starts.
    assert len(torch.cuda._queued_calls) == queued
    assert repr(torch.cuda._lazy_seed_tracker.get_calls()) == tracker


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_modules_run_eagerly_inside() -> None:
    # A compiler of one's own sees whether compiled code runs, without compiling any.
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            runs.append(1)
            return graph.forward(*arguments)

        return run

    module: Any = torch.compile(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), backend=backend)
    x = torch.randn(4, 2)
    expected = module(x)
    assert len(runs) == 1
    with isolated(module):
        inside = module(x)
        weights = list(module.parameters())
        gradients = torch.autograd.grad(inside.sum(), weights, create_graph=True)
        seconds = torch.autograd.grad(gradients[0].square().sum(), weights[:1])
    assert len(runs) == 1
    torch.testing.assert_close(inside, expected)
    assert bool(torch.isfinite(seconds[0]).all())
    module(x)
    assert len(runs) == 2


def test_counters_of_hooks_that_wandb_watch_registers_stand_still() -> None:
    module = network()
    counts = [0]

    def count(*_: Any) -> None:
        counts[0] += 1

    count.__module__ = "wandb.integration.torch.wandb_torch"
    module.layers.register_forward_hook(count)
    with isolated(module):
        module.layers(torch.randn(6, 4))
        assert counts == [1]
    assert counts == [0]


STEPS = 0
STREAM = itertools.cycle([1.0, 2.0])
LARGE = np.zeros(2**21 + 1)


class Tally:
    """A class of a project that counts for all."""

    count = 0


def counted(x: Tensor) -> Tensor:
    global STEPS, FRESH
    STEPS += 1
    FRESH = STEPS  # type: ignore[name-defined]
    Tally.count += 1
    return x * STEPS


class UsesGlobals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        LARGE[0] += 1
        return counted(self.layer(x))


def test_globals_of_a_project_are_put_back_where_its_functions_name_them() -> None:
    module = UsesGlobals()
    LARGE[0] = 0
    with isolated(module):
        module(torch.ones(1, 2))
        assert (STEPS, Tally.count) == (1, 1)
    assert (STEPS, Tally.count) == (0, 0)
    assert "FRESH" not in globals()
    assert LARGE[0] == 1  # a data set rather than state


def test_a_global_that_runs_out_is_refused() -> None:
    class Draws(UsesGlobals):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * next(STREAM)

    module = Draws()
    with isolated(module), pytest.raises(IsolationError, match="`STREAM`"):
        module(torch.ones(1, 2))
    assert next(STREAM) == 1.0
