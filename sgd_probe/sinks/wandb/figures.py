"""The figures as native Plotly panels while training runs, at a bounded rate."""

from __future__ import annotations

import time
from collections.abc import Callable

from sgd_probe.result import WindowResult
from sgd_probe.sinks.base import RunInfo, Vectors
from sgd_probe.sinks.wandb.run import WandbRun

#: Drawing and logging take at most this share of the time, the first and the last set apart.
FIGURE_SHARE = 0.002
#: Seconds between two sets at the least.
MIN_SECONDS = 30.0
#: Keys of the panels; a figure that is not in this list is logged all the same.
FIGURES = (
    "spectrum",
    "displacement",
    "diffusion",
    "noise",
    "slices",
    "layers",
    "density",
    "autocorrelation",
    "verdicts",
    "lambda_max",
    "edge_of_stability",
    "spectra",
)


class WandbFigures:
    """Logs the figures with the first window, then as their share of the time allows, and at the end.

    Args:
        run: the user's.
        clock: seconds.
    """

    def __init__(self, run: WandbRun, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._clock = clock
        self._name = ""
        self._results: list[WindowResult] = []
        self._shown = 0  # windows when the last set was drawn
        self._due = -float("inf")
        self._defined: set[str] = set()

    def start(self, run: RunInfo) -> None:
        """Take the metric prefix."""
        self._name = run.name

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        """Log a set, if one is due."""
        self._results.append(result)
        if self._clock() >= self._due:
            self._show()

    def finish(self) -> None:
        """Log those of the last window, if they are not there yet."""
        if len(self._results) > self._shown:
            self._show()

    def _show(self) -> None:
        from sgd_probe.report.figures import all_figures

        begun = self._clock()
        values = {figure_key(figure.name, self._name): figure.plot for figure in all_figures(self._results)}
        self._run.define(values.keys() - self._defined)
        self._defined |= values.keys()
        self._run.log(values, self._results[-1])
        self._shown, now = len(self._results), self._clock()
        self._due = now + max(MIN_SECONDS, (now - begun) / FIGURE_SHARE)


def figure_key(figure: str, name: str = "sgd_probe") -> str:
    """The metric name of a figure."""
    return f"{name}/figures/{figure}"
