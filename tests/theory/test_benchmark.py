"""benchmarks/theory.py and docs/theory.md: formulas against simulation, and an example that runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "theory.py"


@pytest.mark.slow
def test_every_formula_within_its_error() -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["formulas"] >= 40
    assert summary["largest_deviation"] < 4.5, done.stdout  # of about 40, at a fixed seed


def test_the_page_s_example_runs() -> None:
    page = (SCRIPT.parent.parent / "docs" / "theory.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["mode"].stationary_variance() > names["mode"].langevin().stationary_variance() > 0
    assert names["shuffled"].diffusion_ratio() == pytest.approx(0.374, abs=5e-4)
