from __future__ import annotations

import threading
import time

import pytest

from sgd_probe.sinks.patience import within


def test_what_is_done_in_time_is_returned() -> None:
    assert within(30, lambda: 7) == 7
    assert within(30, lambda: None) is None


def test_what_fails_raises_here() -> None:
    def refused() -> None:
        raise ConnectionRefusedError("no")

    with pytest.raises(ConnectionRefusedError, match="no"):
        within(30, refused)


def test_what_hangs_is_left_to_itself() -> None:
    release = threading.Event()
    left: list[threading.Thread] = []

    def hang() -> None:
        left.append(threading.current_thread())
        release.wait(60)

    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        within(0.05, hang)
    assert time.monotonic() - begun < 30
    assert left[0].is_alive() and left[0].daemon  # the interpreter does not wait for it either
    release.set()
    left[0].join(30)
