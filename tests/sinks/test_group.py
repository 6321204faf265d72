from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from sgd_probe.sinks import FolderSink, RunInfo, SinkGroup, read_run
from tests.sinks.conftest import MakeWindow, warnings_of


def broken_sink(tmp_path: Path) -> FolderSink:
    """A real sink that cannot start: its folder is a file."""
    (tmp_path / "file").write_text("")
    return FolderSink(tmp_path / "file")


def test_a_failing_sink_is_warned_of_once_and_the_others_go_on(
    tmp_path: Path, run_info: RunInfo, window: MakeWindow, caplog: pytest.LogCaptureFixture
) -> None:
    group = SinkGroup([broken_sink(tmp_path), FolderSink(tmp_path / "run")])
    with caplog.at_level(logging.WARNING, "sgd_probe"):
        group.start(run_info)
        group.write(window(index=0), {})
        group.write(window(index=1), {})
    (warning,) = warnings_of(caplog)
    assert warning.startswith("sgd_probe: FolderSink failed in start (FileExistsError")
    assert len(read_run(tmp_path / "run")[1]) == 2


def test_strict_raises(tmp_path: Path, run_info: RunInfo) -> None:
    with pytest.raises(FileExistsError):
        SinkGroup([broken_sink(tmp_path)], strict=True).start(run_info)


def test_importing_the_sinks_imports_no_logger() -> None:
    code = (
        "import sys, sgd_probe.sinks\n"
        "heavy = {'wandb', 'plotly', 'lightning', 'pytorch_lightning', 'lightning_fabric', 'tensorboard'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
