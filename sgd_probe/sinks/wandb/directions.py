"""The flagged directions as an artifact, on request."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from sgd_probe.flags import Flag, raise_flags
from sgd_probe.result import WindowResult
from sgd_probe.sinks.base import RunInfo, Vectors
from sgd_probe.sinks.patience import within
from sgd_probe.sinks.wandb.modes import PATIENCE
from sgd_probe.sinks.wandb.run import WandbRun

#: The type of the artifact.
ARTIFACT_TYPE = "sgd-probe-directions"


class WandbDirections:
    """Collects the flagged directions of every window on disk, and logs them once, when the fit has ended.

    The artifact holds ``window_0003.npz`` for each window with flags (arrays by mode name, read without
    pickle), ``flags.json``, and ``parameters.json``: names and sizes in the order of the arrays.

    Args:
        run: the user's.
        patience: seconds to wait for the server at most.
    """

    def __init__(self, run: WandbRun, patience: float = PATIENCE) -> None:
        self._run = run
        self._patience = patience
        self._name = ""
        self._parameters: dict[str, int] = {}
        self._before: tuple[Flag, ...] = ()
        self._flags: list[Flag] = []
        self._artifact: Any = None

    def start(self, run: RunInfo) -> None:
        """Take the metric prefix and the parameters' names."""
        self._name, self._parameters = run.name, dict(run.parameters)

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        """Add this window's file; nothing is sent."""
        self._before = raise_flags(result, self._before)
        flagged: dict[str, Any] = {f.mode: vectors[f.mode] for f in self._before if f.mode in vectors}
        experiment = self._run.experiment
        if not flagged or experiment is None:
            return
        self._flags += [flag for flag in self._before if flag.mode in flagged]
        if self._artifact is None:
            import wandb

            self._artifact = wandb.Artifact(f"{self._name}-directions-{experiment.id}", ARTIFACT_TYPE)
        with self._artifact.new_file(f"window_{result.index:04d}.npz", mode="wb") as file:
            np.savez(file, **flagged)

    def finish(self) -> None:
        """Log the artifact.

        Raises:
            TimeoutError: the server does not answer.
        """
        experiment, artifact = self._run.experiment if self._artifact is not None else None, self._artifact
        if experiment is None:
            return
        flags = [_plain(flag) for flag in self._flags]
        for name, content in (("flags.json", flags), ("parameters.json", self._parameters)):
            with artifact.new_file(name) as file:
                json.dump(content, file, indent=2, allow_nan=False)
        within(self._patience, lambda: experiment.log_artifact(artifact))


def _plain(flag: Flag) -> Any:
    """Strict JSON types: what is not finite becomes ``None``."""
    return json.loads(json.dumps(dataclasses.asdict(flag)), parse_constant=lambda _: None)
