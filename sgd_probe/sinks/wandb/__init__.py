"""Results in the Weights & Biases run that the user's own logger writes.

Each of these sinks does one thing, so that one that fails takes nothing else with it. While training runs
they publish only what the client puts into a queue of its own; what asks the server and waits for the answer
(tables, plots and artifacts) is left for the fit's end and given a bounded time there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sgd_probe.sinks.base import Sink
from sgd_probe.sinks.wandb.alerts import WandbAlerts
from sgd_probe.sinks.wandb.directions import WandbDirections
from sgd_probe.sinks.wandb.figures import WandbFigures
from sgd_probe.sinks.wandb.modes import WandbModes
from sgd_probe.sinks.wandb.run import STEP_METRIC, WandbRun
from sgd_probe.sinks.wandb.scalars import WandbSink

__all__ = [
    "STEP_METRIC",
    "WandbAlerts",
    "WandbDirections",
    "WandbFigures",
    "WandbModes",
    "WandbRun",
    "WandbSink",
    "find_wandb_logger",
    "is_wandb_logger",
    "wandb_sinks",
]


def wandb_sinks(run: WandbRun, *, directions: bool = False) -> list[Sink]:
    """Everything that goes into a W&B run.

    Args:
        run: the user's.
        directions: the flagged directions too, as an artifact.
    """
    sinks: list[Sink] = [WandbSink(run), WandbFigures(run), WandbAlerts(run), WandbModes(run)]
    return [*sinks, WandbDirections(run)] if directions else sinks


def is_wandb_logger(logger: object) -> bool:
    """Whether a logger is Lightning's ``WandbLogger`` of either package, or a subclass of it."""
    return any(cls.__name__ == "WandbLogger" for cls in type(logger).__mro__)


def find_wandb_logger(loggers: Iterable[object]) -> Any | None:
    """The first ``WandbLogger`` among a trainer's loggers, or ``None``."""
    return next(filter(is_wandb_logger, loggers), None)
