"""Results in a run folder: plain files that outlive a killed process and load without pickle.

A run folder holds ``run.json`` (what was known when the fit began), ``windows.jsonl`` (one window a
line), ``basis_0000.npz`` ... (the directions of each window) and ``report.html``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sgd_probe.result import WindowResult
from sgd_probe.sinks.base import RunInfo, Vectors

log = logging.getLogger("sgd_probe")

RUN_FILE = "run.json"
WINDOWS_FILE = "windows.jsonl"
REPORT_FILE = "report.html"

#: Fourteen directions of 1.2 million weights; ten such windows take 640 MiB of disk.
DEFAULT_MAX_VECTOR_BYTES = 64 * 2**20


#: Share of a training's time that goes into pages while it runs; and seconds that the first of them may take.
REPORT_SHARE, FIRST_REPORT = 0.002, 0.4


class FolderSink:
    """Writes each window to a run folder as soon as it has closed, and the page as often as it is cheap.

    A folder that already holds a run is continued: windows are appended. Where the disk is full, nothing half
    written stays behind.

    Args:
        path: the run folder; made if absent.
        fresh: the folder is for a run of its own: where there is one already, :func:`fresh_folder` takes a
            numbered one when the run starts.
        max_vector_bytes: directions of one window that would take more are not stored.
    """

    def __init__(
        self, path: Path | str, *, fresh: bool = False, max_vector_bytes: int = DEFAULT_MAX_VECTOR_BYTES
    ) -> None:
        # Absolute, for the user's code may change the working directory during the fit.
        self.path = Path(path).absolute()
        self._fresh = fresh
        self._max_vector_bytes = max_vector_bytes
        self._told_of_size = False
        self._started = 0.0
        self._reporting = 0.0
        self._last_report = FIRST_REPORT

    def start(self, run: RunInfo) -> None:
        """Make the folder and describe the run in it."""
        if self._fresh:
            self.path, self._fresh = fresh_folder(self.path), False
        self.path.mkdir(parents=True, exist_ok=True)
        info = {
            "name": run.name,
            "config": dict(run.config),
            "plan": run.plan,
            "versions": dict(run.versions),
            "parameters": dict(run.parameters),
        }
        with _replacing(self.path / RUN_FILE) as file:
            file.write(json.dumps(info, indent=2, allow_nan=False).encode())
        self._started = time.perf_counter()

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        """Append the window, then store its directions: the small and precious part first."""
        _append_line(self.path / WINDOWS_FILE, json.dumps(result.to_dict(), allow_nan=False))
        if vectors and self._fits(vectors):
            arrays: dict[str, Any] = {name: np.asarray(v, np.float32) for name, v in vectors.items()}
            with _replacing(self.path / f"basis_{result.index:04d}.npz") as file:
                np.savez(file, **arrays)
        affordable = REPORT_SHARE * (time.perf_counter() - self._started)
        if self._reporting + self._last_report <= affordable:
            self._report(running=True)

    def finish(self) -> None:
        """Write the last page."""
        self._report(running=False)

    def _report(self, running: bool) -> None:
        """Write the page; the data are safe without it, so a failure only warns."""
        began = time.perf_counter()
        try:
            from sgd_probe.report.html import write_report

            write_report(self.path, running=running)
        except Exception as error:
            log.warning(
                "sgd_probe: no report could be written (%s: %s). The data in %s are complete.",
                type(error).__name__,
                error,
                self.path,
            )
            log.debug("sgd_probe: where the report failed", exc_info=True)
            self._last_report = math.inf  # once is enough; the last page is tried all the same
        else:
            self._last_report = time.perf_counter() - began
            self._reporting += self._last_report

    def _fits(self, vectors: Vectors) -> bool:
        size = sum(vector.size for vector in vectors.values()) * np.dtype(np.float32).itemsize
        if size > self._max_vector_bytes and not self._told_of_size:
            self._told_of_size = True
            log.warning(
                "sgd_probe: the directions of a window take %d bytes, more than max_vector_bytes=%d; "
                "they are not stored. Everything else is.",
                size,
                self._max_vector_bytes,
            )
        return size <= self._max_vector_bytes


def fresh_folder(base: Path | str) -> Path:
    """Claim a run folder that holds no run yet: ``base``, or the first free ``base_1``, ``base_2`` ...

    The folder is made, with an empty ``windows.jsonl`` in it. Only one of several processes that ask
    for the same base at the same time gets it.

    Raises:
        OSError: the folder cannot be made or written.
    """
    first = Path(os.path.abspath(base))
    for number in itertools.count():
        folder = first.with_name(f"{first.name}_{number}") if number else first
        if any((folder / name).exists() for name in (RUN_FILE, REPORT_FILE)):
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / WINDOWS_FILE).touch(exist_ok=False)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable: the numbers do not end")


def load_vectors(path: Path | str) -> dict[str, NDArray[np.float32]]:
    """Read the directions of one window (``basis_0000.npz``) by mode name."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def read_run(path: Path | str) -> tuple[dict[str, Any], list[WindowResult], str]:
    """Read a run folder: what :class:`RunInfo` held, the windows, and a note on unreadable lines.

    The note is empty when every line could be read. A process killed while it wrote leaves a torn
    line; the windows before and after it are read all the same.

    Raises:
        FileNotFoundError: there is no such folder, or no run in it.
        ValueError: a file is of another schema or not what the probe writes.
    """
    from sgd_probe.report.run_folder import read_run_folder

    run = read_run_folder(Path(path))
    lines = ", ".join(map(str, run.unreadable))
    note = f"unreadable lines of {WINDOWS_FILE}: {lines}" if lines else ""
    return {f.name: getattr(run, f.name) for f in dataclasses.fields(RunInfo)}, list(run.windows), note


def _append_line(path: Path, line: str) -> None:
    """Append one line that survives a crash of the process or of the machine; the whole of it, or nothing."""
    with path.open("ab+", buffering=0) as file:
        size, text = file.seek(0, os.SEEK_END), line.encode() + b"\n"
        if size > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                # A killed process left half a line: end it, or it would swallow this one.
                text = b"\n" + text
        try:
            while text:
                text = text[file.write(text) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)  # a full disk has taken the first half
            raise


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            _sync(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
