"""Results in the Weights & Biases run that the user's own ``WandbLogger`` writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sgd_probe.result import WindowResult
from sgd_probe.sinks.base import RunInfo, Vectors, scalars

#: The axis on which ``WandbLogger`` puts the user's own metrics.
STEP_METRIC = "trainer/global_step"


def is_wandb_logger(logger: object) -> bool:
    """Whether a logger is Lightning's ``WandbLogger`` of either package, or a subclass of it."""
    return any(cls.__name__ == "WandbLogger" for cls in type(logger).__mro__)


def find_wandb_logger(loggers: Iterable[object]) -> Any | None:
    """The first ``WandbLogger`` among a trainer's loggers, or ``None``."""
    return next(filter(is_wandb_logger, loggers), None)


class WandbSink:
    """Logs the scalars of each window as one history row on the axis of the user's metrics.

    No table and no ``wandb.plot`` is ever logged: those ask the server synchronously, and a
    training run must not wait for a network.

    Args:
        logger: Lightning's ``WandbLogger``, of either package.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._name = ""
        self._defined: set[str] = set()

    def start(self, run: RunInfo) -> None:
        """Put the probe's configuration under its name in the run's configuration."""
        self._name = run.name
        experiment = self._experiment()
        if experiment is not None:
            experiment.config.update({run.name: dict(run.config)}, allow_val_change=True)

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        """Log every scalar of the window in one row."""
        experiment = self._experiment()
        if experiment is None:
            return
        values = scalars(result, self._name)
        for key in values.keys() - self._defined:
            # Exact names: a glob would also claim metrics that are not ours.
            experiment.define_metric(key, step_metric=STEP_METRIC)
            self._defined.add(key)
        # Lightning numbers the row of the n-th optimizer step n - 1. W&B's own step and commit stay
        # unset: it drops rows whose step= is behind, and commit=False merges ours into the next row.
        experiment.log({**values, STEP_METRIC: result.closed_at_step - 1})

    def finish(self) -> None:
        """Nothing to do: the run belongs to the user, and closing it would block."""

    def _experiment(self) -> Any | None:
        """The W&B run; ``None`` where Lightning hands out its dummy, on every rank but the first."""
        experiment = self._logger.experiment
        return None if type(experiment).__name__ == "_DummyExperiment" else experiment
