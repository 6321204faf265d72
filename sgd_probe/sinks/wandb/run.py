"""The user's W&B run, and where its rows lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sgd_probe.result import WindowResult

#: The axis on which ``WandbLogger`` puts the user's own metrics.
STEP_METRIC = "trainer/global_step"


@dataclass(frozen=True)
class WandbRun:
    """A W&B run with its axis.

    Attributes:
        logger: has the run as ``experiment``, as Lightning's ``WandbLogger`` of either package does.
        axis: the metric that the user's own rows lie on.
        first_step: the number that this axis gives to the first optimizer step.
    """

    logger: Any
    axis: str = STEP_METRIC
    first_step: int = 0

    @property
    def experiment(self) -> Any | None:
        """The run; ``None`` where Lightning hands out its dummy, on every rank but the first."""
        experiment = self.logger.experiment
        return None if type(experiment).__name__ == "_DummyExperiment" else experiment

    def define(self, names: Iterable[str]) -> None:
        """Put metrics on the axis, by exact names: a glob would also claim metrics that are not ours."""
        experiment = self.experiment
        if experiment is not None:
            for name in names:
                experiment.define_metric(name, step_metric=self.axis)

    def log(self, values: Mapping[str, Any], result: WindowResult) -> None:
        """Log one row at the step that closed a window.

        W&B's own step and commit stay unset: it drops rows whose ``step=`` is behind, and ``commit=False``
        merges ours into the next row of the user's.
        """
        experiment = self.experiment
        if experiment is not None and values:
            experiment.log({**values, self.axis: result.closed_at_step - 1 + self.first_step})
