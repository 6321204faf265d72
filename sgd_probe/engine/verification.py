"""Is the user's state what it was? Asked around everything that the probe does, where that is wanted.

The look at the state is another one than isolation's, which puts it back: it also reads what isolation leaves
alone (weights, the optimizer's state, global variables that the user's methods refer to), and knows what is
where.
"""

from __future__ import annotations

import collections
import hashlib
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sgd_probe.isolation import capture, capture_rng, is_framework

#: Of what differs, so many are named.
_NAMED = 5
#: Longer containers, and larger tensors that belong to no module or optimizer, are not looked into.
_MAX_ELEMENTS, _MAX_NUMBERS = 10_000, 2**20

State = Mapping[str, str]


class LeakError(RuntimeError):
    """The probe has changed something of the user's; it has been put back as far as that is possible."""


class Verification:
    """Compares the user's state before and after a piece of the probe's work.

    It takes a copy of the weights, their gradients and the optimizer's state, and reads all of them twice.

    Args:
        module: the user's module.
        optimizer: what moves its weights.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module = module
        self._optimizer = optimizer

    @contextmanager
    def around(self, what: str) -> Iterator[None]:
        """Compare around the body; what differs is put back.

        Args:
            what: the body does, for people.

        Raises:
            LeakError: something differs; the message names it.
        """
        restore = self._capture()
        try:
            before = self._look()
            yield
            changed = _differences(before, self._look())
        finally:
            restore()
        if changed:
            left = _differences(before, self._look()).keys() & changed.keys()
            raise LeakError(_words(what, changed, sorted(left)))

    def _look(self) -> State:
        walk = _Walk()
        walk.random_numbers()
        walk.module("", self._module)
        names = {id(p): name for name, p in self._module.named_parameters()}
        for index, group in enumerate(self._optimizer.param_groups):
            for key, value in group.items():
                if key != "params":
                    walk.visit(f"optimizer.param_groups[{index}][{key!r}]", value)
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                walk.visit(f"optimizer.state[{names.get(id(parameter), index)}]", state)
        walk.run()
        return walk.found

    def _capture(self) -> Callable[[], None]:
        """Remember everything that can be put back."""
        bound = list(_globals_of(self._module))
        weights = [(p, p.detach().clone()) for p in self._module.parameters() if _has_values(p)]
        gradients = [(p.grad, p.grad.clone()) for p, _ in weights if p.grad is not None]
        rng = capture_rng()
        roots = [space[name] for space, name in bound]
        everything = capture(self._module, self._optimizer.state, self._optimizer.param_groups, *roots)

        def restore() -> None:
            everything()
            rng()
            for (space, name), value in zip(bound, roots, strict=True):
                space[name] = value
            for tensor, saved in (*weights, *gradients):
                if not _same_bits(tensor, saved):
                    tensor.data.copy_(saved)

        return restore


def _differences(before: State, after: State) -> dict[str, tuple[str, str]]:
    names = [*before, *(name for name in after if name not in before)]
    absent = "nothing"
    pairs = {name: (before.get(name, absent), after.get(name, absent)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _words(what: str, changed: Mapping[str, tuple[str, str]], left: list[str]) -> str:
    named = [f"{name} ({old} -> {new})" for name, (old, new) in list(changed.items())[:_NAMED]]
    more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
    end = f"could not be put back: {', '.join(left[:_NAMED])}" if left else "all of it has been put back"
    return (
        f"expected {what} to leave the training as it was, found changed: {', '.join(named)}{more}; {end}. "
        "Give the probe a loss_fn that does not write there, or report it"
    )


class _Walk:
    """Goes through the user's objects and writes down, path by path, what is there."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._seen: dict[int, tuple[str, Any]] = {}  # the object is kept: a freed one could hand its id on
        self._pending: list[tuple[str, Any]] = []

    def visit(self, path: str, value: Any) -> None:
        self._pending.append((path, value))

    def module(self, path: str, module: nn.Module) -> None:
        self.visit(path, module)

    def run(self) -> None:
        while self._pending:
            path, value = self._pending.pop()
            self._visit(path, value)

    def random_numbers(self) -> None:
        for name, state in (
            ("python", repr(random.getstate())),
            ("numpy", repr([_plain(part) for part in np.random.get_state()])),
            ("torch", _digest(torch.get_rng_state())),
        ):
            self.found[f"random numbers of {name}"] = _short(state)
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            for index, states in enumerate(torch.cuda.get_rng_state_all()):
                self.found[f"random numbers of cuda:{index}"] = _digest(states)

    def _visit(self, path: str, value: Any) -> None:
        if value is None or isinstance(value, str | bytes | int | float | complex | type):
            text = repr(value)
            self.found[path] = text if len(text) <= 60 else _short(text)
            return
        if type(value) in weakref.ProxyTypes:
            return
        known = self._seen.get(id(value))
        if known is not None:
            self.found[path] = f"the same as {known[0]}"
            return
        self._seen[id(value)] = path, value
        if isinstance(value, Tensor):
            self._tensor(path, value)
        elif isinstance(value, nn.Module):
            self._attributes(path, value)
            self._classes(type(value))
        elif isinstance(value, np.ndarray):
            self.found[path] = _plain(value)
        elif isinstance(value, dict):
            self._container(path, value, ((f"[{_key(key)}]", item) for key, item in value.items()))
        elif isinstance(value, list | tuple | collections.deque):
            self._container(path, value, ((f"[{index}]", item) for index, item in enumerate(value)))
        elif isinstance(value, set | frozenset):
            self.found[path] = _short(repr(sorted(map(repr, value))))
        elif isinstance(value, types.FunctionType):
            self.found[path] = f"function {value.__qualname__}"
            self._function(path, value)
        elif isinstance(value, types.MethodType):
            self.visit(f"{path}.__self__", value.__self__)
        elif isinstance(value, torch.Generator):
            self.found[path] = _digest(value.get_state())
        elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            self.found[path] = _short(repr(value.getstate()))
        elif isinstance(value, np.random.Generator):
            self.found[path] = _short(repr(value.bit_generator.state))
        else:
            self.found[path] = f"a {type(value).__name__}"
            if not is_framework(type(value)) and _root(type(value)) not in sys.stdlib_module_names:
                self._attributes(path, value)

    def _tensor(self, path: str, tensor: Tensor) -> None:
        within = path.partition("[")[0]
        ours = isinstance(tensor, nn.Parameter) or not within.startswith("global ")
        if ours or tensor.numel() <= _MAX_NUMBERS:
            self.found[path] = _digest(tensor)
        if tensor.is_leaf:
            self.found[f"{path}.requires_grad"] = repr(tensor.requires_grad)
            if tensor.requires_grad:
                self.visit(f"{path}.grad", tensor.grad)

    def _container(self, path: str, value: Any, items: Iterator[tuple[str, Any]]) -> None:
        self.found[f"{path} (length)"] = repr(len(value))
        if len(value) <= _MAX_ELEMENTS:
            self._pending.extend((path + name, item) for name, item in items)

    def _attributes(self, path: str, owner: Any) -> None:
        prefix = f"{path}." if path else ""
        for name, item in (vars(owner) if hasattr(owner, "__dict__") else {}).items():
            if isinstance(owner, nn.Module) and name in ("_parameters", "_buffers", "_modules"):
                for inner, part in item.items():
                    self.visit(prefix + inner, part)
            else:
                self.visit(prefix + name, item)
        state = object.__getstate__(owner)
        if isinstance(state, tuple) and isinstance(state[1], dict):
            for name, item in state[1].items():
                self.visit(prefix + name, item)

    def _classes(self, cls: type) -> None:
        for owner in cls.__mro__:
            if is_framework(owner) or _root(owner) in sys.stdlib_module_names or id(owner) in self._seen:
                continue
            self._seen[id(owner)] = owner.__qualname__, owner
            for name, item in vars(owner).items():
                function = _function_of(item)
                if function is not None:
                    self.visit(f"{owner.__qualname__}.{name}", function)
                elif not name.startswith("__") and not callable(item) and not hasattr(item, "__get__"):
                    self.visit(f"{owner.__qualname__}.{name}", item)

    def _function(self, path: str, function: types.FunctionType) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                self.visit(f"variable {name} of {function.__qualname__}", cell.cell_contents)
            except ValueError:  # not bound yet
                continue
        for space, name in _globals_in(function):
            self.visit(f"global {space.get('__name__', '')}.{name}", space[name])


def _globals_of(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Global variables that methods of the user's modules refer to, and functions that those call."""
    pending = [
        function
        for cls in {owner for child in module.modules() for owner in type(child).__mro__}
        if not is_framework(cls) and _root(cls) not in sys.stdlib_module_names
        for item in vars(cls).values()
        if (function := _function_of(item)) is not None
    ]
    seen: set[int] = set()
    while pending:
        function = pending.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        for space, name in _globals_in(function):
            called = _function_of(space[name])
            if called is not None:
                pending.append(called)
            else:
                yield space, name


def _globals_in(function: types.FunctionType) -> Iterator[tuple[dict[str, Any], str]]:
    """Those of a user's function that hold data, or are functions of the user's."""
    if _root(function) in sys.stdlib_module_names or is_framework(function):
        return
    codes, names = [function.__code__], set[str]()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes.extend(part for part in code.co_consts if isinstance(part, types.CodeType))
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        if not isinstance(value, types.ModuleType | type | types.BuiltinFunctionType):
            yield function.__globals__, name


def _function_of(item: Any) -> types.FunctionType | None:
    if isinstance(item, staticmethod | classmethod):
        item = item.__func__
    elif isinstance(item, property):
        item = item.fget
    return item if isinstance(item, types.FunctionType) else None


def _root(value: Any) -> str:
    return str(getattr(value, "__module__", None) or "builtins").partition(".")[0]


def _has_values(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.layout is torch.strided and not is_lazy(tensor)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return _digest(one) == _digest(other)


def _digest(tensor: Tensor) -> str:
    """Of type, shape and every bit of a tensor."""
    if tensor.is_sparse:
        return f"{_digest(tensor._indices())} {_digest(tensor._values())}"
    if not _has_values(tensor):
        return f"{tensor.layout} on {tensor.device}"
    found = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=6)
    bits = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    found.update(bits.view(torch.uint8).numpy().data)
    return f"#{found.hexdigest()}"


def _plain(value: Any) -> str:
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"#{hashlib.blake2b(value.tobytes(), digest_size=6).hexdigest()}"
    return _short(repr(value))


def _key(key: Any) -> str:
    return repr(key) if isinstance(key, str | int | float | bool) else type(key).__name__


def _short(text: str) -> str:
    return f"#{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
