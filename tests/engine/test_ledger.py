"""Seconds and bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from sgd_probe.engine.ledger import Ledger, free_memory


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that stands still until the test moves it."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    yield now


def test_wall_time_is_split(clock: list[float]) -> None:
    ledger = Ledger()
    clock[0] += 7
    with ledger.charge() as charge:
        clock[0] += 2
    clock[0] += 1
    assert charge.seconds == 2
    assert (ledger.spent, ledger.training) == (2, 8)


def test_failed_work_is_charged_too(clock: list[float]) -> None:
    ledger = Ledger()
    with pytest.raises(RuntimeError), ledger.charge() as charge:
        clock[0] += 3
        raise RuntimeError
    assert charge.seconds == ledger.spent == 3
    assert ledger.training == 0


def test_free_memory() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**60
    assert free_memory(torch.device("meta")) is None
