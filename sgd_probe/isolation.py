"""The one place that touches the user's state, and puts it back exactly.

Anything that evaluates the user's model for our own ends runs inside :func:`isolated`. On exit,
however it comes, the module's attributes, buffers, modes, gradients and metric states, and every
random number generator that the program can be expected to use, are what they were.
"""

from __future__ import annotations

import collections
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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
#: Longer containers are restored as a whole; their elements are not looked into one by one.
_MAX_ELEMENTS = 10_000


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Let the body evaluate ``module`` as it likes; afterwards nothing of it is left.

    Gradients are enabled, compiled parts run eagerly and attention takes the mathematical kernel,
    because double backward goes through neither compiled code nor fused attention.
    """
    restores = [capture_rng(), capture_module(module)]
    with ExitStack() as stack:
        for restore in restores:
            stack.callback(restore)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Importing dynamo takes seconds; where nobody has, there is nothing compiled to bypass.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch, so that a loss evaluated twice draws the same numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


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


def capture_module(module: nn.Module) -> Restore:
    """Remember all that a forward pass or a training step can change on a module.

    That is, for it and every submodule: its attributes (containers, counters, generators and plain
    objects are looked into; metric states are attributes), buffers with their values, parameters
    with their ``grad`` and ``requires_grad``, the mode flag and the hooks. Values of parameters are
    not copied: probes evaluate on aliases and never write to them.
    """
    return _Capture().module(module)


class _Capture:
    """Walks an object graph once; every visit yields a function that restores what was visited."""

    def __init__(self) -> None:
        self._restores: list[Restore] = []
        self._seen: dict[int, Any] = {}  # the object is kept: a freed one could hand its id on

    def module(self, module: nn.Module) -> Restore:
        self._visit(module)
        return self._restore

    def _restore(self) -> None:
        for restore in self._restores:
            restore()

    def _visit(self, value: Any) -> None:
        if isinstance(value, str | bytes | int | float | complex | type | None) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, nn.Parameter):
            self._parameter(value)
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            self._attributes(value)
        elif isinstance(value, np.ndarray):
            saved = value.copy()
            self._restores.append(lambda: np.copyto(value, saved))
        elif isinstance(value, dict):
            self._dict(value)
        elif isinstance(value, list | collections.deque):
            self._sequence(value)
        elif isinstance(value, set):
            self._set(value)
        elif isinstance(value, tuple):
            self._elements(value)
        elif not self._generator(value) and _is_users(value):
            self._attributes(value)

    def _parameter(self, parameter: nn.Parameter) -> None:
        grad, requires_grad = parameter.grad, parameter.requires_grad

        def restore() -> None:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad

        self._restores.append(restore)

    def _tensor(self, tensor: Tensor) -> None:
        if tensor.is_inference() or tensor.layout is not torch.strided or tensor.device.type == "meta":
            return
        saved = tensor.detach().clone()
        # Through .data: the user's autograd bookkeeping (version counters) stays as it was.
        self._restores.append(lambda: tensor.data.copy_(saved))  # type: ignore[arg-type]

    def _dict(self, mapping: dict[Any, Any]) -> None:
        saved = list(mapping.items())

        def restore() -> None:
            now = list(mapping.items())
            if len(now) != len(saved) or any(
                a is not c or b is not d for (a, b), (c, d) in zip(now, saved, strict=True)
            ):
                mapping.clear()
                mapping.update(saved)

        self._restores.append(restore)
        self._elements(value for _, value in saved[: _MAX_ELEMENTS + 1])

    def _set(self, value: set[Any]) -> None:
        members = set(value)

        def restore() -> None:
            if value != members:
                value.clear()
                value.update(members)

        self._restores.append(restore)

    def _sequence(self, sequence: Any) -> None:
        saved = list(sequence)

        def restore() -> None:
            if len(sequence) != len(saved) or any(a is not b for a, b in zip(sequence, saved, strict=True)):
                sequence.clear()
                sequence.extend(saved)

        self._restores.append(restore)
        self._elements(saved[: _MAX_ELEMENTS + 1])

    def _elements(self, values: Any) -> None:
        values = list(values)
        if len(values) <= _MAX_ELEMENTS:
            for value in values:
                self._visit(value)

    def _attributes(self, owner: Any) -> None:
        self._dict(vars(owner))
        # Restoring a module's tables in place keeps the very dict objects that others may hold.
        for value in list(vars(owner).values()):
            self._visit(value)

    def _generator(self, value: Any) -> bool:
        if isinstance(value, torch.Generator):
            torch_state = value.get_state()
            self._restores.append(lambda: value.set_state(torch_state))  # type: ignore[arg-type]
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


def _is_users(value: Any) -> bool:
    """A plain object of the user's (an average meter, an augmentation), not a framework's or Python's.

    What derives from a framework's class (a dataset, a data module, an optimizer) is not state of the
    training step, and may be large.
    """
    if not hasattr(value, "__dict__") or type(value).__module__ in sys.stdlib_module_names:
        return False
    roots = {base.__module__.partition(".")[0] for base in type(value).__mro__}
    return not roots & _FRAMEWORKS
