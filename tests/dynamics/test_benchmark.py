"""benchmarks/verdicts.py: it runs, and sums up in one JSON line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "verdicts.py"


@pytest.mark.slow
def test_summary() -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--json", "--only", "gaussian, T=300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary.keys() == {f"gaussian, T=300, kappa={kappa}" for kappa in (0, 20, 30)}
    for rates in summary.values():
        assert sum(rates.values()) == pytest.approx(1)
    assert summary["gaussian, T=300, kappa=0"]["diffusive"] > 0.8
    assert summary["gaussian, T=300, kappa=30"]["confined"] > 0.97
