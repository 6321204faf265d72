"""Results as metrics that the trainer's other callbacks can monitor."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Protocol

import torch

from sgd_probe.result import WindowResult
from sgd_probe.sinks.base import RunInfo, Vectors, scalars, verdict_counts


class HasCallbackMetrics(Protocol):
    """What is used of a trainer, of either package."""

    @property
    def callback_metrics(self) -> MutableMapping[str, torch.Tensor]:
        """The metrics that ``EarlyStopping`` and ``ModelCheckpoint`` look at."""


class CallbackMetricsSink:
    """Keeps the scalars of the last window in ``trainer.callback_metrics``.

    Lightning merges its own metrics into that dict and never clears it between the start of training
    and its end, so a value stays until the next window. It does clear it around the sanity check:
    call :meth:`start` after that, in ``on_train_start``. With several ranks every rank needs this
    sink and the same values, since the callbacks read their own rank's dict.

    A quantity that a window could not measure keeps the value of an earlier window: without its key
    the callbacks raise, and on a NaN ``EarlyStopping`` ends the run.

    Args:
        trainer: a Lightning trainer.
    """

    def __init__(self, trainer: HasCallbackMetrics) -> None:
        self._trainer = trainer
        self._name = ""

    def start(self, run: RunInfo) -> None:
        """Publish zero verdicts, so that a count can be monitored before any window has closed."""
        self._name = run.name
        self.publish(verdict_counts({}, run.name))

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        """Publish every scalar of the window."""
        self.publish(scalars(result, self._name))

    def publish(self, values: Mapping[str, float]) -> None:
        """Publish metrics, by full name, as soon as they are known (``lambda_max`` when a window opens)."""
        self._trainer.callback_metrics.update(
            {key: torch.tensor(value, dtype=torch.float32, device="cpu") for key, value in values.items()}
        )

    def finish(self) -> None:
        """Leave the last values, as Lightning leaves its own."""
