"""Keeping what an evaluation of the loss says to itself: what it prints, and what it logs."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any


def active_wandb_run() -> Any | None:
    """The W&B run of this process, if there is one; whoever has not imported wandb has none."""
    return getattr(sys.modules.get("wandb"), "run", None)


@contextmanager
def silenced() -> Iterator[None]:
    """Close the ways in which any loss prints or logs: standard output, and a W&B run."""
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        run = active_wandb_run()
        if run is not None:
            stack.enter_context(shadowed(sys.modules["wandb"], "log", nothing))
            for name in ("log", "_log"):  # wandb.watch takes the second
                stack.enter_context(shadowed(run, name, nothing))
        yield


@contextmanager
def shadowed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Shadow an attribute on the instance for a while."""
    own = vars(owner)
    missing = name not in own
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if missing:
            own.pop(name, None)
        else:
            own[name] = before


@contextmanager
def unchanged(owner: Any) -> Iterator[None]:
    """Bind the attributes of a plain object to what they were."""
    own = vars(owner)
    before = dict(own)
    try:
        yield
    finally:
        if own.keys() != before.keys() or any(own[name] is not value for name, value in before.items()):
            own.clear()
            own.update(before)


def nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""
