"""Fifty windows in one training: nothing piles up, and the training is the same to the last bit."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from sgd_probe import ProbeConfig, SGDProbe
from tests.helpers.memory import measurable, open_files, resident_megabytes
from tests.integrations.harness import PACKAGES, RecordingDataset, fit, loader, mlp

WINDOWS, PERIOD = 50, 50
#: Room for the results of forty windows, which the callback keeps, and their rows in the test's own logger:
#: about 0.07 MB a window.
SLACK_MEGABYTES = 5.0


def data() -> Any:
    return loader(RecordingDataset((6,)), replacement=True)


class Books(PACKAGES["pytorch_lightning"].Callback):  # type: ignore[misc]
    """Resident memory, threads and open files, once a period.

    Attributes:
        megabytes: one entry a period.
        threads: alive, likewise.
        files: open, likewise.
    """

    def __init__(self) -> None:
        self.megabytes: list[float] = []
        self.threads: list[int] = []
        self.files: list[set[str]] = []

    @property
    def growth(self) -> float:
        """Megabytes from the tenth period to the fiftieth."""
        return self.megabytes[WINDOWS - 1] - self.megabytes[9]

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step % PERIOD == 0:
            self.megabytes.append(resident_megabytes())
            self.threads.append(threading.active_count())
            self.files.append(open_files())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not measurable(), reason="resident memory is read from Linux's own books")
def test_fifty_windows_leave_nothing_behind(tmp_path: Path) -> None:
    # The last window opens once its batches are there, so the run goes on for a window more.
    steps = (WINDOWS + 2) * PERIOD
    plain, books = Books(), Books()
    without, _ = fit("pytorch_lightning", mlp, data, [plain], tmp_path / "without", steps=steps)
    before = threading.active_count(), open_files()

    def make_probe() -> SGDProbe:
        # Slices of the loss are most of a window's evaluations here, and leave nothing of their own.
        config = ProbeConfig(top=3, flat=2, window=50, curvature_batches=2, slices=False)
        return SGDProbe(every_n_steps=PERIOD, strict=True, config=config)

    # The first page of a process loads what draws figures, whenever that falls due.
    fit("pytorch_lightning", mlp, data, [make_probe()], tmp_path / "first", steps=2 * PERIOD)
    probe = make_probe()
    with_probe, _ = fit("pytorch_lightning", mlp, data, [probe, books], tmp_path / "with", steps=steps)

    closed = [result for result in probe.results if result.complete]
    assert len(closed) >= WINDOWS
    assert all(result.steps == PERIOD for result in closed)
    without.assert_equal(with_probe)

    grown = f"grew by {books.growth:.1f} MB, without the probe by {plain.growth:.1f} MB"
    assert books.growth - plain.growth < SLACK_MEGABYTES, grown
    assert books.threads[9] == books.threads[WINDOWS - 1]
    assert books.files[9] == books.files[WINDOWS - 1]
    assert (threading.active_count(), open_files()) == before
