"""A table of the modes on the terminal, above whatever progress bar is there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal

from sgd_probe.report.terminal import places, window_summary
from sgd_probe.result import WindowResult
from sgd_probe.sinks.base import RunInfo, Vectors, speaker
from sgd_probe.sinks.folder import FolderSink


class TerminalSink:
    """Prints the last window when the training ends, or every window when it closes.

    Args:
        show: prints a text of several lines; a progress bar's own way of printing leaves the bar alone.
        when: "end", "windows" or "off".
        folder: writes the results where they lie, if anywhere; it may find that place when the run starts.
    """

    def __init__(
        self,
        show: Callable[[str], None],
        when: Literal["end", "windows", "off"] = "end",
        folder: FolderSink | None = None,
    ) -> None:
        self._show = show
        self._when = when
        self._folder = folder
        self._last: WindowResult | None = None
        self._windows = 0
        self._speaker = speaker()

    def start(self, run: RunInfo) -> None:
        """Learn whose windows they are."""
        self._speaker = speaker(run.name)

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        """Print the window, where every one is wanted."""
        self._last = result
        self._windows += 1
        if self._when == "windows":
            self._say(window_summary(result, speaker=self._speaker))

    def finish(self) -> None:
        """Print what the training has not shown yet, and where the results lie."""
        if self._when == "off" or self._last is None:
            return
        table = window_summary(self._last, speaker=self._speaker) + "\n" if self._when == "end" else ""
        folder = None if self._folder is None else self._folder.path
        self._say(table + places(self._windows, folder, self._speaker))

    def _say(self, text: str) -> None:
        # A terminal that knows no superscripts gets question marks in their place, not an exception.
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        self._show(text.encode(encoding, "replace").decode(encoding))
