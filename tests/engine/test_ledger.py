"""Seconds and bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from sgd_probe.engine.ledger import Ledger


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


def test_a_part_of_a_piece_of_work_is_charged_once(clock: list[float]) -> None:
    ledger = Ledger()
    with ledger.charge() as whole:
        clock[0] += 1
        with ledger.charge() as part:
            clock[0] += 2
    with ledger.charge():
        clock[0] += 0.5
    assert (whole.seconds, part.seconds, ledger.spent, ledger.longest) == (3, 2, 3.5, 3)
