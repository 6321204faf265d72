"""Results as metrics of any Lightning logger other than Weights & Biases."""

from __future__ import annotations

from typing import Protocol

from sgd_probe.result import WindowResult
from sgd_probe.sinks.base import RunInfo, Vectors, scalars


class MetricLogger(Protocol):
    """What is used of a Lightning logger, of either package."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> object:
        """Log metrics at a step."""


class LoggerSink:
    """Logs the scalars of each window in the row of the step that closed it.

    The hyperparameters are left alone: logging ours would change the user's.

    Args:
        logger: a Lightning logger (CSV, TensorBoard, custom ...).
    """

    def __init__(self, logger: MetricLogger) -> None:
        self._logger = logger
        self._name = ""

    def start(self, run: RunInfo) -> None:
        """Take the metric prefix."""
        self._name = run.name

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        """Log every scalar of the window at Lightning's number of its last step."""
        # Lightning numbers the row of the n-th optimizer step n - 1.
        self._logger.log_metrics(scalars(result, self._name), step=result.closed_at_step - 1)

    def finish(self) -> None:
        """Nothing to do: the trainer closes its own loggers."""
