"""The one place that touches the user's state, and puts it back exactly.

Anything that evaluates the user's model for our own ends runs inside :func:`isolated`. On exit,
however it comes, the module's attributes, buffers, modes, gradients and metric states, and every
random number generator that the program can be expected to use, are what they were.
"""

from __future__ import annotations

import argparse
import array
import collections
import functools
import queue
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Restore = Callable[[], None]

#: Attributes whose types come from these packages belong to the framework, not to the user's step.
_FRAMEWORKS = frozenset(
    {
        "torch",
        "lightning",
        "pytorch_lightning",
        "lightning_fabric",
        "lightning_utilities",
        "wandb",
        "sgd_probe",
    }
)
#: Python's own classes that people keep their own state in.
_PLAIN = (
    types.SimpleNamespace,
    argparse.Namespace,
    collections.UserDict,
    collections.UserList,
    functools.partial,
    queue.Queue,
)
#: What cannot change, and is looked into by nobody.
_CONSTANTS = frozenset({bool, bytes, complex, float, int, str, type(None)})
#: Longer containers are restored as a whole; their elements are not looked into one by one.
_MAX_ELEMENTS = 10_000


#: Tensors and arrays at the top of a file are data sets rather than state from so many bytes on.
_MAX_BYTES = 2**24


class IsolationError(RuntimeError):
    """The user's code uses something that cannot be put back, so it cannot be evaluated twice."""


@contextmanager
def isolated(module: nn.Module, *others: Any) -> Iterator[None]:
    """Let the body evaluate ``module`` as it likes; afterwards nothing of it is left.

    Gradients are enabled, compiled parts run eagerly, attention takes the mathematical kernel and
    recurrent layers theirs, because double backward goes through none of the faster ones.

    Args:
        module: the user's module.
        others: containers to put back as well (the settings of an optimizer, say).

    Raises:
        IsolationError: in the body, where it uses an iterator or an open file of the module's.
    """
    restores = [capture_rng(), capture(module, *others)]
    with ExitStack() as stack:
        for restore in restores:
            stack.callback(restore)
        for parameter in module.parameters():
            parameter.grad = None  # set aside: a backward pass in the body would add into it
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(child, nn.RNNBase) for child in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        # Importing dynamo takes seconds; where nobody has, there is nothing compiled to bypass.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def rehearsed(module: nn.Module) -> Iterator[set[nn.Parameter]]:
    """Let the body run the user's code once; what it does to ``module``, weights included, is undone.

    Weights are copied just before the first write to them (a teacher that follows its student,
    prototypes that are normalised), so those that nobody writes to cost nothing.

    Yields:
        The parameters that the body wrote to: complete on exit.
    """
    restore, guard = capture(module), _WriteGuard(module.parameters())
    try:
        with guard:
            yield guard.written
    finally:
        guard.restore()
        restore()


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch, so that a loss evaluated twice draws the same numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: before CUDA is in use that leaves the seed behind for when it will be.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def capture_rng() -> Restore:
    """Remember the state of the global generators of python, numpy and torch (all devices)."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)

    return restore


def capture(*roots: Any) -> Restore:
    """Remember all that a forward pass or a training step can change on a module or a container.

    That is, for a module and every submodule: its attributes (containers, counters, generators and plain
    objects are looked into; metric states are attributes), buffers with their values, parameters
    with their ``grad`` and ``requires_grad``, the mode flag and the hooks. Of the classes of modules, and of
    functions: what their code names at the top of a file of the user's own. Values of parameters are
    not copied: see :func:`rehearsed`. Iterators and open files cannot be rewound: until the state is
    restored, something that refuses to be used stands in their place.
    """
    return _Capture().capture(roots)


class _Capture:
    """Walks an object graph once; every visit yields a function that restores what was visited."""

    def __init__(self) -> None:
        self._restores: list[Restore] = []
        self._seen: dict[int, Any] = {}  # the object is kept: a freed one could hand its id on
        self._scopes: set[tuple[int, frozenset[str]]] = set()
        self._pending: list[Any] = []

    def capture(self, roots: Iterable[Any]) -> Restore:
        self._pending.extend(roots)
        while self._pending:
            self._visit(self._pending.pop())
        return self._restore

    def _restore(self) -> None:
        failures: list[BaseException] = []
        for restore in reversed(self._restores):  # all of them, also where one fails or Ctrl-C comes
            try:
                restore()
            except BaseException as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _visit(self, value: Any) -> None:
        if type(value) in weakref.ProxyTypes or id(value) in self._seen:
            return
        if isinstance(value, str | bytes | int | float | complex | type | types.ModuleType | None):
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            self._attributes(value)
            self._classes(type(value))
        elif isinstance(value, types.FunctionType):
            self._closure(value)
        elif isinstance(value, types.MethodType):
            self._pending.append(value.__self__)
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif isinstance(value, dict):
            self._dict(value)
        elif isinstance(value, list | collections.deque):
            self._sequence(value)
        elif isinstance(value, bytearray | array.array):
            self._bytes(value)
        elif isinstance(value, set):
            self._set(value)
        elif isinstance(value, tuple | frozenset):
            self._elements(value)
        elif not self._generator(value) and _is_users(value):
            self._attributes(value)

    def _tensor(self, tensor: Tensor) -> None:
        if tensor.is_leaf:
            self._leaf(tensor)
        if not _is_plain(tensor):
            return
        # Through .data: the user's autograd bookkeeping (version counters) stays as it was.
        home = tensor.data
        written = home[tuple(slice(None) if stride else slice(1) for stride in home.stride())]
        saved = None if isinstance(tensor, nn.Parameter) else written.clone()

        def restore() -> None:
            if not tensor.is_set_to(home):
                tensor.data = home
            if saved is not None:
                written.copy_(saved)

        self._restores.append(restore)

    def _leaf(self, tensor: Tensor) -> None:
        grad, requires_grad = tensor.grad, tensor.requires_grad
        if grad is not None and not isinstance(tensor, nn.Parameter):
            self._pending.append(grad)

        def restore() -> None:
            if not tensor.is_leaf:
                tensor.detach_()  # written to in place by what needs a gradient
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.grad is not grad:
                tensor.grad = grad

        self._restores.append(restore)

    def _array(self, array: np.ndarray[Any, Any]) -> None:
        if array.flags.writeable:
            saved = array.copy()
            self._restores.append(lambda: np.copyto(array, saved))

    def _dict(self, mapping: dict[Any, Any]) -> None:
        if not mapping:  # as most of a module's hooks are
            self._restores.append(lambda: mapping.clear() if mapping else None)
            return
        saved = list(mapping.items())

        def restore() -> None:
            now = list(mapping.items())
            if len(now) != len(saved) or any(
                a is not c or b is not d for (a, b), (c, d) in zip(now, saved, strict=True)
            ):
                mapping.clear()
                mapping.update(saved)

        self._restores.append(restore)
        for key, value in saved:
            if type(value) not in _CONSTANTS and _runs_out(value):
                mapping[key] = _Untouchable(key, value)
        self._elements([value for _, value in saved])

    def _set(self, value: set[Any]) -> None:
        members = set(value)

        def restore() -> None:
            if value != members:
                value.clear()
                value.update(members)

        self._restores.append(restore)
        self._elements(members)

    def _sequence(self, sequence: Any) -> None:
        saved = list(sequence)

        def restore() -> None:
            if len(sequence) != len(saved) or any(a is not b for a, b in zip(sequence, saved, strict=True)):
                sequence.clear()
                sequence.extend(saved)

        self._restores.append(restore)
        for index, value in enumerate(saved[:_MAX_ELEMENTS]):
            if type(value) not in _CONSTANTS and _runs_out(value):
                sequence[index] = _Untouchable(f"element {index}", value)
        self._elements(saved)

    def _bytes(self, values: Any) -> None:
        saved = values[:]

        def restore() -> None:
            values[:] = saved

        self._restores.append(restore)

    def _classes(self, cls: type) -> None:
        """Counters and containers that people keep on the class of their module."""
        for owner in cls.__mro__:
            if not _is_users_class(owner) or id(owner) in self._seen:
                continue
            self._seen[id(owner)] = owner
            saved = {k: v for k, v in vars(owner).items() if not k.startswith("__") and _is_data(v)}
            self._restores.append(functools.partial(_rebind, owner, saved))
            self._elements(list(saved.values()))
            methods = (getattr(value, "__func__", value) for value in vars(owner).values())
            self._pending.extend(
                value
                for value in methods
                if isinstance(value, types.FunctionType) and _is_own(value.__globals__)
            )

    def _closure(self, function: types.FunctionType) -> None:
        """What a hook or a local function keeps in the variables around it."""
        # The hooks of wandb.watch count the steps between their rows in such variables.
        root = (function.__module__ or "torch").partition(".")[0]
        if root in _FRAMEWORKS and root != "wandb":
            return
        if _is_own(function.__globals__):
            self._globals(function.__globals__, _names(function.__code__))
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not bound yet
                continue
            self._restores.append(functools.partial(setattr, cell, "cell_contents", content))
            self._pending.append(content)

    def _globals(self, scope: dict[str, Any], names: frozenset[str]) -> None:
        """Counters, containers and generators at the top of a file, as far as a function names them.

        Args:
            scope: of the file.
            names: that the function uses.
        """
        if (id(scope), names) in self._scopes:
            return
        self._scopes.add((id(scope), names))
        missing = [name for name in names if name not in scope]
        named = {name: scope[name] for name in names if name in scope}
        saved = {name: value for name, value in named.items() if _is_data(value)}

        def restore() -> None:
            scope.update(saved)
            for name in missing:
                scope.pop(name, None)

        self._restores.append(restore)
        for name, value in named.items():
            if _runs_out(value):
                scope[name] = _Untouchable(name, value)
            elif isinstance(value, type):
                self._classes(value)
            elif isinstance(value, types.ModuleType):
                if _is_own(vars(value)):
                    self._globals(vars(value), names)
            elif not _is_large(value):
                self._pending.append(value)

    def _elements(self, values: Any) -> None:
        if len(values) <= _MAX_ELEMENTS:
            # Histories of numbers are the longest lists that people keep.
            self._pending.extend([value for value in values if type(value) not in _CONSTANTS])

    def _attributes(self, owner: Any) -> None:
        if hasattr(owner, "__dict__"):
            # Restoring a module's tables in place keeps the very dict objects that others may hold.
            self._dict(vars(owner))
        saved = _slots(owner)

        def restore() -> None:
            now = _slots(owner)
            for name in now.keys() - saved.keys():
                object.__delattr__(owner, name)
            for name, value in saved.items():
                if name not in now or now[name] is not value:
                    object.__setattr__(owner, name, value)

        if saved:
            self._restores.append(restore)
            self._elements(saved.values())

    def _generator(self, value: Any) -> bool:
        if isinstance(value, torch.Generator):
            torch_state = value.get_state()
            self._restores.append(lambda: value.set_state(torch_state))  # type: ignore[arg-type]
        elif isinstance(value, random.SystemRandom):
            pass  # the one generator without a state
        elif isinstance(value, random.Random):
            python_state = value.getstate()
            self._restores.append(lambda: value.setstate(python_state))
        elif isinstance(value, np.random.RandomState):
            numpy_state = value.get_state()
            self._restores.append(lambda: value.set_state(numpy_state))
        elif isinstance(value, np.random.Generator):
            bits, state = value.bit_generator, value.bit_generator.state
            self._restores.append(lambda: setattr(bits, "state", state))
        else:
            return False
        return True


class _WriteGuard(TorchDispatchMode):
    """Sees every operator that writes in place, and keeps what a parameter was before the first one."""

    supports_higher_order_operators = True

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[nn.Parameter] = set()
        self._homes = {p: p.data for p in parameters if _is_plain(p)}
        self._saved: dict[nn.Parameter, Tensor] = {}
        self._owners: dict[int, list[nn.Parameter]] = {}
        for parameter, home in self._homes.items():
            self._owners.setdefault(home.untyped_storage().data_ptr(), []).append(parameter)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            for argument in schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._keep(tree_leaves(named.get(argument.name)))
        return func(*args, **kwargs)

    def _keep(self, targets: Iterable[Any]) -> None:
        for target in targets:
            if isinstance(target, Tensor) and _is_plain(target):
                for parameter in self._owners.get(target.untyped_storage().data_ptr(), ()):
                    if parameter not in self._saved:
                        self._saved[parameter] = self._homes[parameter].clone()
                        self.written.add(parameter)

    def restore(self) -> None:
        for parameter, home in self._homes.items():
            if not parameter.is_set_to(home):
                parameter.data = home
                self.written.add(parameter)
        for parameter, saved in self._saved.items():
            self._homes[parameter].copy_(saved)


def _is_plain(tensor: Tensor) -> bool:
    """A tensor with values of its own that can be written to; a DTensor has them in another one."""
    strided = tensor.layout is torch.strided and tensor.device.type != "meta"
    return strided and not hasattr(tensor, "to_local") and not is_lazy(tensor) and not tensor.is_inference()


def _slots(owner: Any) -> dict[str, Any]:
    """Attributes that an object keeps outside of its ``__dict__``."""
    state = object.__getstate__(owner)
    return state[1] if isinstance(state, tuple) else {}


def _rebind(owner: type, saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        if vars(owner).get(name) is not value:
            setattr(owner, name, value)


def _is_data(value: Any) -> bool:
    return not (callable(value) or hasattr(value, "__get__"))


def _runs_out(value: Any) -> bool:
    """An iterator or an open file: what Python or a framework keeps of its state is out of reach."""
    if type(value) in weakref.ProxyTypes or isinstance(value, nn.Module):
        return False
    return isinstance(value, Iterator) and not _is_users(value)


class _Untouchable:
    """Stands in for what would run out."""

    def __init__(self, name: object, value: Any) -> None:
        vars(self)["words"] = f"`{name}` ({type(value).__name__})"

    def _refuse(self, *_: object) -> NoReturn:
        raise IsolationError(
            "expected a training step that can be evaluated once more, found it using "
            f"{vars(self)['words']}, which cannot be rewound: give the probe a loss_fn that does without it"
        )

    __iter__ = __next__ = __getattr__ = __setattr__ = __call__ = __enter__ = _refuse


def is_framework(owner: Any) -> bool:
    """Whether a class or a function belongs to the framework, not to the user."""
    return str(getattr(owner, "__module__", "")).partition(".")[0] in _FRAMEWORKS


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """Names that a function may read or bind outside of itself, those within it included."""
    inner = (_names(value) for value in code.co_consts if isinstance(value, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.nbytes > _MAX_BYTES


def _is_own(scope: dict[str, Any]) -> bool:
    """The file with these globals is of the user's project, not installed."""
    file = scope.get("__file__") or ""
    root = str(scope.get("__name__", "")).partition(".")[0]
    installed = "site-packages" in file or "dist-packages" in file
    return not installed and root not in _FRAMEWORKS and root not in sys.stdlib_module_names


def _is_users_class(cls: type) -> bool:
    root = cls.__module__.partition(".")[0]
    return root not in _FRAMEWORKS and root not in sys.stdlib_module_names


def _is_users(value: Any) -> bool:
    """A plain object of the user's (an average meter, an augmentation), not a framework's or Python's.

    What derives from a framework's class (a dataset, a data module, an optimizer) is not state of the
    training step, and may be large.
    """
    roots = [base.__module__.partition(".")[0] for base in type(value).__mro__]
    if roots[0] in sys.stdlib_module_names:
        return isinstance(value, _PLAIN)
    return _FRAMEWORKS.isdisjoint(roots)
