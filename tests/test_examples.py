"""The examples, as a user runs them: short forms, which assert what they claim, without a network."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgd_probe import WindowResult

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "needs", "windows"),
    [
        ("plain_loop.py", "torch", "windows.jsonl"),
        ("huggingface.py", "transformers", "sgd_probe_run/windows.jsonl"),
    ],
)
def test_an_example_runs_in_its_short_form(name: str, needs: str, windows: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    dead = "http://127.0.0.1:9"
    environment = {**os.environ, "HTTP_PROXY": dead, "HTTPS_PROXY": dead, "HF_HUB_OFFLINE": "1"}
    output = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--quick", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bit for bit" in done.stdout
    assert (output / windows).with_name("report.html").stat().st_size > 100_000
    lines = (output / windows).read_text().splitlines()
    results = [WindowResult.from_dict(json.loads(line)) for line in lines]
    for mode in results[-1].modes:  # the table
        assert sum(line.startswith(mode.name) for line in done.stdout.splitlines()) == 1


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"plain_loop.py", "huggingface.py"}
