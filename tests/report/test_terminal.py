"""A window on the terminal: plain, by Rich, and beside the progress bars that trainers draw."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import textwrap
from pathlib import Path

import pytest

from sgd_probe.report.terminal import places, window_summary
from sgd_probe.result import Verdict
from sgd_probe.sinks.base import RunInfo
from sgd_probe.sinks.folder import FolderSink
from sgd_probe.sinks.terminal import TerminalSink
from tests.helpers.results import make_mode, make_window, without_numbers

RUN = RunInfo(name="sgd_probe", config={}, plan=(), versions={})
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def test_plain_text_has_the_modes_the_counts_the_horizon_the_cost_and_the_warnings() -> None:
    window = make_window(epochs=2.5)
    text = window_summary(window, rich=False, width=120)
    lines = text.splitlines()
    for mode in window.modes:
        (row,) = (line for line in lines if line.startswith(mode.name))
        assert len(row) <= 100
    (row,) = (line for line in lines if line.startswith("top_01"))
    assert "confined" in row and "18.0\u00a0±\u00a01.1" in row and "[0.0017,\u00a00.0029]" in row
    assert "7 confined, 1 sampling-confined, 2 diffusive" in text
    assert "0.4 of its flags are expected to be wrong" in text
    assert "Verdicts hold over 1,000 steps (2.5 epochs)." in text
    assert "6.4 s, 3.56% of the 180.0 s of training" in text
    assert f"Warning: {window.warnings[0]}" in text


def test_a_narrow_terminal_gets_the_columns_that_matter_most() -> None:
    wide, narrow = (window_summary(make_window(), rich=False, width=width) for width in (100, 80))
    assert "relaxations" in wide and "relaxations" not in narrow
    (row,) = (line for line in narrow.splitlines() if line.startswith("top_01"))
    assert "confined" in row and "18.0" in row and "0.0022 [0.0017" in row and len(row) < 80


def test_numbers_that_are_missing_are_unknown_and_undermined_verdicts_are_marked() -> None:
    mode = dataclasses.replace(without_numbers(make_mode()), undermined=True)
    text = window_summary(make_window(modes=(mode,), expected_false_flags=math.nan), rich=False)
    assert "confined !" in text and "unknown" in text and "nan" not in text
    assert "takes the ground from under" in text and "expected to be wrong" not in text
    assert "over 1,000 steps (1 epoch)." in window_summary(make_window(epochs=1.0))
    assert "No modes" in window_summary(make_window(modes=()), rich=False)


@pytest.mark.parametrize("width", [80, 120])
def test_rich_draws_the_same_table_in_colour_within_the_width(width: int) -> None:
    modes = (make_mode(detail="[bold]moving[/bold] centre"), make_mode("flat_01", verdict=Verdict.DIFFUSIVE))
    text = window_summary(make_window(modes=modes), rich=True, width=width)
    assert "\x1b[" in text
    lines = ESCAPES.sub("", text).splitlines()
    table = [line for line in lines if line.lstrip().startswith(("top", "flat"))]
    assert [line.split()[0] for line in table] == ["top_01", "flat_01"]
    assert all(len(line) <= width for line in table)
    assert "[bold]" in text and "[/bold]" in text  # a run's words, not markup


def test_the_text_is_plain_where_nobody_sees_colours() -> None:
    assert "\x1b" not in window_summary(make_window())  # pytest listens, no terminal


@pytest.mark.parametrize(("when", "shown"), [("off", [0, 0, 0]), ("end", [0, 0, 1]), ("windows", [1, 2, 3])])
def test_windows_are_printed_when_they_are_wanted(when: str, shown: list[int], tmp_path: Path) -> None:
    told: list[str] = []
    sink = TerminalSink(told.append, when, FolderSink(tmp_path))  # type: ignore[arg-type]
    sink.start(RUN)
    counts = []
    for index in range(2):
        sink.write(make_window(index), {})
        counts.append(len(told))
    sink.finish()
    assert [*counts, len(told)] == shown
    if when != "off":
        assert "2 windows closed" in told[-1] and str(tmp_path) in told[-1]
        assert sum("window 1, optimizer steps" in text for text in told) == 1


def test_a_probe_with_a_name_of_its_own_says_whose_window_it_is(tmp_path: Path) -> None:
    told: list[str] = []
    sink = TerminalSink(told.append, folder=FolderSink(tmp_path))
    sink.start(dataclasses.replace(RUN, name="generator"))
    sink.write(make_window(), {})
    sink.finish()
    assert told[0].startswith("sgd_probe generator: window 0")
    assert "sgd_probe generator: 1 window closed." in told[0]


def test_without_a_window_or_a_folder_it_says_what_there_is() -> None:
    told: list[str] = []
    sink = TerminalSink(told.append)
    sink.start(RUN)
    sink.finish()
    assert told == []
    assert "1 window closed. `probe.results` holds them" in places(1, None)


def test_a_terminal_without_superscripts_gets_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    sink = TerminalSink(told.append)
    with monkeypatch.context() as patch, open(os.devnull, "w", encoding="ascii") as stream:
        patch.setattr(sys, "stdout", stream)
        sink.write(make_window(), {})
        sink.finish()
    assert told[0].isascii() and "top_01" in told[0] and "?" in told[0]


FIT = textwrap.dedent(
    """
    import sys, warnings, logging
    warnings.filterwarnings("ignore"); logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    import torch, pytorch_lightning as pl
    from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
    from torch.utils.data import DataLoader, RandomSampler, TensorDataset
    from sgd_probe import ProbeConfig, SGDProbe

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 3)
        def training_step(self, batch, _):
            return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(256, 6), torch.randint(3, (256,)))
    for bar in (RichProgressBar(), TQDMProgressBar()):
        loader = DataLoader(data, 16, sampler=RandomSampler(data, replacement=True, num_samples=256))
        config = ProbeConfig(
            top=3, flat=1, window=50, every_n_steps=60, curvature_batches=2, summary="windows"
        )
        pl.Trainer(
            max_steps=130, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_model_summary=False, callbacks=[SGDProbe(run_dir=sys.argv[1], config=config), bar],
        ).fit(Module(), loader)
        print("NEXT", flush=True)
    """
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_tables_and_progress_bars_leave_each_other_alone(tmp_path: Path) -> None:
    """Real fits on a real terminal: every row of a table stands on a line of its own."""
    import fcntl
    import pty
    import struct
    import subprocess
    import termios

    ours, theirs = pty.openpty()
    # A terminal of no size gets no bar.
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    command = [sys.executable, "-c", FIT, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    screen = b""
    while True:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        screen += part
    os.close(ours)
    assert process.wait(60) == 0, screen.decode(errors="replace")[-2000:]
    for number, fit in enumerate(screen.decode().split("NEXT")[:2]):
        assert "it/s" in fit and "\x1b[" in fit  # there was a bar, and colour
        lines = [ESCAPES.sub("", line).split("\r")[-1] for line in fit.replace("\r\n", "\n").splitlines()]
        rows = [line for line in lines if "top_01" in line and "±" in line]  # a flag names it, too
        assert len(rows) == 2, (number, lines)
        for row in rows:
            assert row.lstrip().startswith("top_01"), row
            assert ("it/s" not in row and "Epoch" not in row and "×" in row) or "±" in row
        assert sum("2 windows closed. Results in" in line for line in lines) == 1
