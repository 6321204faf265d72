"""The figures as native Plotly panels while training runs, at a bounded rate."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from sgd_probe.result import WindowResult
from sgd_probe.sinks.base import RunInfo, Vectors
from sgd_probe.sinks.wandb.pace import Clock, Pace
from sgd_probe.sinks.wandb.run import WandbRun

if TYPE_CHECKING:
    from sgd_probe.report.figures import Drawing, Figure

#: Drawing and logging take at most this share of the time, the first and the last set apart.
FIGURE_SHARE = 0.002
#: Seconds between two sets at the least.
MIN_SECONDS = 60.0
#: Of a run with more windows, the last ones are drawn.
RESULTS_DRAWN = 100
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

    def __init__(self, run: WandbRun, clock: Clock = time.monotonic) -> None:
        self._run = run
        self._pace = Pace(MIN_SECONDS, FIGURE_SHARE, clock)
        self._name = ""
        self._results: deque[WindowResult] = deque(maxlen=RESULTS_DRAWN)
        self._shown: WindowResult | None = None  # the last window of the last set
        self._defined: set[str] = set()

    def start(self, run: RunInfo) -> None:
        """Take the metric prefix."""
        self._name = run.name

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        """Log a set, if one is due."""
        self._results.append(result)
        if self._pace.due:
            self._pace.do(self._show)

    def finish(self) -> None:
        """Log those of the last window, if they are not there yet."""
        if self._results and self._results[-1] is not self._shown:
            self._show()

    def _show(self) -> None:
        from sgd_probe.report.figures import all_figures

        figures = all_figures(list(self._results))
        values = {figure_key(figure.name, self._name): _panel(figure) for figure in figures}
        self._run.define(values.keys() - self._defined)
        self._defined |= values.keys()
        self._run.log(values, self._results[-1])
        self._shown = self._results[-1]


def figure_key(figure: str, name: str = "sgd_probe") -> str:
    """The metric name of a figure."""
    return f"{name}/figures/{figure}"


def _panel(figure: Figure) -> Any:
    """The figure as W&B logs it, without Plotly's checks, which take ten times as long as all the rest."""
    import wandb

    try:
        return wandb.Plotly(_Unchecked(figure.drawing))
    except Exception:  # a client that asks for more than the name of a type and its JSON
        return wandb.Plotly(figure.plot)


class _Unchecked:
    """What W&B's client reads of a Plotly figure, which it knows by its type's name: its plain data."""

    def __init__(self, drawing: Drawing) -> None:
        self.to_plotly_json = drawing.to_plotly_json


_Unchecked.__module__, _Unchecked.__name__ = "plotly.graph_objs", "Figure"
