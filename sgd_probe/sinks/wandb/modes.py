"""One table of all modes of all windows, and W&B plots of it, when the fit has ended."""

from __future__ import annotations

import math
from typing import Any

from sgd_probe.flags import Flag, raise_flags
from sgd_probe.result import ModeResult, WindowResult
from sgd_probe.sinks.base import RunInfo, Vectors
from sgd_probe.sinks.patience import within
from sgd_probe.sinks.wandb.run import WandbRun

#: Seconds that the end of a fit waits for a server that is down or slow.
PATIENCE = 10.0
#: Rows that W&B shows of a table; of longer ones the latest are logged.
MAX_ROWS = 10_000
#: Keys of a run's table and plots, after its prefix.
MODES, DIFFUSION_PLOT, NOISE_PLOT = "modes", "plots/diffusion", "plots/noise"

_CURVATURE, _DIFFUSION, _NOISE = "log10 curvature", "log10 D", "log10 noise variance"


class WandbModes:
    """Logs a ``wandb.Table`` and two plots of it once, when the fit has ended.

    They ask the server and wait for its answer, which a training must never do.

    Args:
        run: the user's.
        patience: seconds to wait at most.
    """

    def __init__(self, run: WandbRun, patience: float = PATIENCE) -> None:
        self._run = run
        self._patience = patience
        self._name = ""
        self._rows: list[dict[str, Any]] = []
        self._flags: tuple[Flag, ...] = ()
        self._last: WindowResult | None = None

    def start(self, run: RunInfo) -> None:
        """Take the metric prefix."""
        self._name = run.name

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        """Keep the rows."""
        self._flags = raise_flags(result, self._flags)
        self._rows = [*self._rows, *mode_rows(result, self._flags)][-MAX_ROWS:]
        self._last = result

    def finish(self) -> None:
        """Log them.

        Raises:
            TimeoutError: the server does not answer.
        """
        last = self._last
        if last is not None and self._rows and self._run.experiment is not None:
            within(self._patience, lambda: self._log(last))

    def _log(self, last: WindowResult) -> None:
        import wandb

        table = wandb.Table(columns=list(self._rows[0]), data=[list(row.values()) for row in self._rows])
        plots = {
            DIFFUSION_PLOT: wandb.plot.scatter(table, _CURVATURE, _DIFFUSION, "Diffusion against curvature"),
            NOISE_PLOT: wandb.plot.scatter(table, _CURVATURE, _NOISE, "Gradient noise against curvature"),
        }
        values = {MODES: table, **plots}
        self._run.log({f"{self._name}/{key}": value for key, value in values.items()}, last)


def mode_rows(result: WindowResult, flags: tuple[Flag, ...] = ()) -> list[dict[str, Any]]:
    """A window's modes as rows of plain types; ``None`` where a number could not be measured.

    Args:
        result: the window's.
        flags: those that it raised.
    """
    onsets = {flag.mode: flag.onset_step for flag in flags}
    return [_row(result, mode, onsets.get(mode.name)) for mode in result.modes]


def _row(result: WindowResult, mode: ModeResult, onset: int | None) -> dict[str, Any]:
    curvature = mode.effective_curvature if mode.mixed else abs(mode.held_out_eigenvalue)
    return {
        "window": result.index,
        "from step": result.opened_at_step,
        "to step": result.closed_at_step,
        "mode": mode.name,
        "verdict": mode.verdict.value,
        "flagged since step": onset,
        "eigenvalue": _number(mode.held_out_eigenvalue),
        "standard error": _number(mode.held_out_standard_error),
        "residual": _number(mode.residual),
        "effective curvature": _number(mode.effective_curvature),
        "relaxation times": _number(mode.relaxation_times),
        "noise variance": _number(mode.noise_variance.value),
        "D": _number(mode.diffusion.value),
        "D low": _number(mode.diffusion.low),
        "D high": _number(mode.diffusion.high),
        "predicted D": _number(mode.predicted_diffusion),
        "log Bayes factor": _number(mode.log_bayes_factor),
        "drift z": _number(mode.drift_z),
        _CURVATURE: _log10(curvature),
        _DIFFUSION: _log10(mode.diffusion.value),
        _NOISE: _log10(mode.noise_variance.value),
        "reason": mode.reason,
        "marks": "; ".join(mode.marks),
        "layers": ", ".join(f"{name} {share:.0%}" for name, share in list(mode.layer_shares.items())[:3]),
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _log10(value: float) -> float | None:
    return math.log10(value) if 0 < value < math.inf else None
