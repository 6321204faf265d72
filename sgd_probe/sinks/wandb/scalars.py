"""The scalars of each window as one history row, and what the run's configuration says of the probe."""

from __future__ import annotations

from sgd_probe.result import WindowResult
from sgd_probe.sinks.base import RunInfo, Vectors, scalars
from sgd_probe.sinks.wandb.run import WandbRun

#: Marks runs in which the probe took part.
TAG = "sgd_probe"


class WandbSink:
    """Logs the scalars of each window as one history row on the axis of the user's metrics.

    Args:
        run: the user's.
    """

    def __init__(self, run: WandbRun) -> None:
        self._run = run
        self._name = ""
        self._defined: set[str] = set()

    def start(self, run: RunInfo) -> None:
        """Put the probe's configuration under its name in the run's configuration, and tag the run."""
        self._name = run.name
        experiment = self._run.experiment
        if experiment is not None:
            experiment.config.update({run.name: dict(run.config)}, allow_val_change=True)
            tags = tuple(experiment.tags or ())
            if TAG not in tags:
                experiment.tags = (*tags, TAG)

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        """Log every scalar of the window in one row."""
        values = scalars(result, self._name)
        self._run.define(values.keys() - self._defined)
        self._defined |= values.keys()
        self._run.log(values, result)

    def finish(self) -> None:
        """Nothing to do: the run belongs to the user, and closing it would block."""
