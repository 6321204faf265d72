"""Where results go: a run folder, Weights & Biases, any other logger, and the trainer's metrics.

Importing this package imports no logger: a sink is handed the object that it feeds.
"""

from sgd_probe.sinks.base import RunInfo, Sink, SinkGroup, Vectors, scalars, verdict_counts
from sgd_probe.sinks.folder import FolderSink, fresh_folder, load_vectors, read_run
from sgd_probe.sinks.loggers import LoggerSink
from sgd_probe.sinks.metrics import CallbackMetricsSink
from sgd_probe.sinks.terminal import TerminalSink
from sgd_probe.sinks.wandb import WandbRun, WandbSink, find_wandb_logger, is_wandb_logger, wandb_sinks

__all__ = [
    "CallbackMetricsSink",
    "FolderSink",
    "LoggerSink",
    "RunInfo",
    "Sink",
    "SinkGroup",
    "TerminalSink",
    "Vectors",
    "WandbRun",
    "WandbSink",
    "find_wandb_logger",
    "fresh_folder",
    "is_wandb_logger",
    "load_vectors",
    "read_run",
    "scalars",
    "verdict_counts",
    "wandb_sinks",
]
