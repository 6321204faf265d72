"""An alert when a valley begins to diffuse."""

from __future__ import annotations

import time

from sgd_probe.flags import Flag, onset_message, raise_flags
from sgd_probe.result import WindowResult
from sgd_probe.sinks.base import RunInfo, Vectors
from sgd_probe.sinks.wandb.pace import Clock, Pace
from sgd_probe.sinks.wandb.run import WandbRun

#: Seconds between two alerts at the least; onsets meanwhile are told by the next one, or at the end.
MIN_SECONDS = 300.0
_LONGEST_TITLE = 63


class WandbAlerts:
    """Sends one alert for the onsets of a window (``run.alert``, which does not wait for the server).

    Args:
        run: the user's.
        clock: seconds.
    """

    def __init__(self, run: WandbRun, clock: Clock = time.monotonic) -> None:
        self._run = run
        self._pace = Pace(MIN_SECONDS, clock=clock)
        self._name = ""
        self._before: tuple[Flag, ...] = ()
        self._onsets = 0
        self._texts: list[str] = []

    def start(self, run: RunInfo) -> None:
        """Take the metric prefix."""
        self._name = run.name

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        """Tell of the onsets in this window."""
        self._before = raise_flags(result, self._before)
        text = onset_message(self._before)
        if text:
            self._texts.append(text)
            self._onsets += sum(flag.is_onset for flag in self._before)
        if self._pace.due:
            self._send()

    def finish(self) -> None:
        """Tell of the onsets that were held back."""
        self._send()

    def _send(self) -> None:
        experiment = self._run.experiment
        if not self._texts or experiment is None:
            return
        count = f"{self._onsets} directions diffuse" if self._onsets > 1 else "a direction diffuses"
        title = f"{self._name}: {count}"[:_LONGEST_TITLE]
        # The server drops a second alert of the same title within wait_duration, a minute by default.
        text = "\n\n".join(self._texts)
        self._pace.do(lambda: experiment.alert(title=title, text=text, level="INFO", wait_duration=1))
        self._texts, self._onsets = [], 0
