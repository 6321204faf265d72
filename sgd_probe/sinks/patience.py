"""Work that may hang, done so that nobody waits for it longer than a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def within(seconds: float, work: Callable[[], _T]) -> _T:
    """What ``work`` returns, if it does so in time; it goes on alone, in a daemon thread, if it does not.

    Args:
        seconds: to wait at most.
        work: must hold no lock that the caller needs.

    Raises:
        TimeoutError: it took longer.
        Exception: what ``work`` raised.
    """
    done: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # handed to the caller, if it is still there
            failed.append(error)

    thread = threading.Thread(target=run, name="sgd_probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return done[0]
