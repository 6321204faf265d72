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

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
#: What each needs beside the probe, and where in its output the runs of its probes lie.
RUNS = {
    "char_transformer.py": ("torch", ["."]),
    "ddp.py": ("sklearn", ["."]),
    "finetune_adamw.py": ("torch", ["all", "last"]),
    "gan.py": ("torch", ["generator", "discriminator"]),
    "huggingface.py": ("transformers", ["sgd_probe_run"]),
    "mnist_convnet.py": ("sklearn", ["."]),
    "plain_loop.py": ("torch", ["."]),
    "resnet20.py": ("sklearn", ["."]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs_in_its_short_form(name: str, tmp_path: Path) -> None:
    needs, folders = RUNS[name]
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
    tables = [line.partition(" ")[0] for line in done.stdout.splitlines()]
    for folder in folders:
        assert (output / folder / "report.html").stat().st_size > 100_000
        last = (output / folder / "windows.jsonl").read_text().splitlines()[-1]
        modes = WindowResult.from_dict(json.loads(last)).modes
        assert [tables.count(mode.name) for mode in modes] == [len(folders)] * len(modes)


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("[!_]*.py")} == RUNS.keys()
