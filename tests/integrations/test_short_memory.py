"""Memory that the system really refuses: windows take less, one step after the other, and say so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space that is enforced"),
]

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = {"top": 6, "flat": 2, "curvature_batches": 2}
ALL = [*(f"top_{i:02d}" for i in range(1, 7)), "flat_01", "flat_02"]


def train(**given: Any) -> tuple[Any, list[str]]:
    """What the training found, and what the probe said meanwhile."""
    options = {"probed": True, "megabytes": 60, "planned": False, "batch_norm": False, "config": CONFIG}
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.short_memory", json.dumps(options | given)],
        cwd=ROOT,
        # Vectors go back to the system when they are freed; only one arena reserves address space.
        env={
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": str(2**16),
            "MALLOC_ARENA_MAX": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr.splitlines()


@cache
def weights_without() -> str:
    return str(train(probed=False)[0]["weights"])


def test_a_refused_allocation_leads_to_the_next_step_and_another_try() -> None:
    found, said = train()
    assert found["weights"] == weights_without()
    assert found["modes"] == [ALL] and max(found["residuals"][0][:6]) <= 1e-2
    tries = [line for line in said if "memory was short while a window opened" in line]
    assert "can't allocate memory: you tried to allocate" in tries[0]
    assert "from now on graphs are rebuilt for every product" in tries[0]
    assert "Memory was short: graphs are rebuilt for every product, which takes longer." in found["notes"]
    assert not any("switched off" in line for line in said)


def test_a_plan_knows_the_limit_and_nothing_is_refused() -> None:
    found, said = train(planned=True)
    assert found["weights"] == weights_without()
    assert found["modes"] == [ALL]
    assert any("Memory is short: the search restarts with" in line for line in said)
    assert any(note.startswith("Memory was short: the search restarts with") for note in found["notes"])
    assert not any("memory was short while" in line for line in said)


def test_where_nothing_helps_it_gives_up_with_a_sentence() -> None:
    found, said = train(megabytes=3, batch_norm=True)
    assert found["modes"] == []
    assert not any("pieces" in line for line in said), "BatchNorm would make another loss of them"
    (last,) = (line for line in said if "switched off" in line)
    assert "memory is too short for a window, whatever is given up" in last and "`params`" in last
