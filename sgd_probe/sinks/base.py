"""What a sink is, the exact metric names, and the guard that keeps a failing sink harmless."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sgd_probe.result import Verdict, WindowResult

log = logging.getLogger("sgd_probe")

#: Directions by mode name: unit vectors of the probed space, float32, each of shape (parameters,).
Vectors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What is known when the fit begins; plain JSON types only.

    Attributes:
        name: prefix of every metric (``sgd_probe``).
        config: every knob of the probe and its value.
        plan: the preflight message's lines.
        versions: packages and their versions.
        parameters: names and sizes of the probed parameters, in the order of the flat vector.
    """

    name: str
    config: Mapping[str, Any]
    plan: tuple[str, ...]
    versions: Mapping[str, str]
    parameters: Mapping[str, int] = field(default_factory=dict)


class Sink(Protocol):
    """Takes results somewhere. Every method may raise: the group catches, warns once, goes on."""

    def start(self, run: RunInfo) -> None:
        """Called once when the fit begins."""

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        """Called when a window has closed. ``vectors`` may be empty."""

    def finish(self) -> None:
        """Called once when the fit has ended, however it ended."""


def speaker(name: str = "sgd_probe") -> str:
    """What a probe calls itself in its messages: with its name, where the user has given it one."""
    return name if name == "sgd_probe" else f"sgd_probe {name}"


def scalars(result: WindowResult, name: str = "sgd_probe") -> dict[str, float]:
    """Every scalar of a window under its exact metric name; non-finite values are left out.

    The names are those of the documentation: ``{name}/lambda_max``, ``{name}/n_<verdict>`` (they
    add up to the number of modes), ``{name}/cost/*``, ``{name}/window/*`` and, per mode,
    ``{name}/<mode>/<quantity>``.
    """
    values: dict[str, float] = {
        f"{name}/lambda_max": result.curvature.lambda_max,
        f"{name}/window/index": result.index,
        f"{name}/window/steps": result.steps,
        f"{name}/window/warnings": len(result.warnings),
        f"{name}/window/undermined": sum(mode.undermined for mode in result.modes),
        f"{name}/window/held_out_overlap": result.curvature.held_out_overlap,
        f"{name}/window/end_overlap": result.curvature.end_overlap,
        f"{name}/window/expected_false_flags": result.expected_false_flags,
        f"{name}/window/products": result.curvature.products,
        f"{name}/cost/window_seconds": (
            result.cost.open_seconds + result.cost.observe_seconds + result.cost.close_seconds
        ),
        f"{name}/cost/pause_seconds": max(result.cost.open_seconds, result.cost.close_seconds),
        f"{name}/cost/longest_pause_seconds": result.cost.longest_pause_seconds,
        f"{name}/cost/foretold_pause_seconds": result.cost.foretold_open_seconds,
        f"{name}/cost/peak_bytes": result.cost.peak_bytes,
        f"{name}/cost/foretold_bytes": result.cost.foretold_bytes,
        f"{name}/cost/total_seconds": result.cost.total_seconds,
        f"{name}/cost/fraction": result.cost.fraction,
    }
    values |= verdict_counts(result.counts(), name)
    for mode in result.modes:
        prefix = f"{name}/{mode.name}"
        values |= {
            f"{prefix}/eigenvalue": mode.held_out_eigenvalue,
            f"{prefix}/residual": mode.residual,
            f"{prefix}/effective_curvature": mode.effective_curvature,
            f"{prefix}/relaxation_times": mode.relaxation_times,
            f"{prefix}/noise_variance": mode.noise_variance.value,
            f"{prefix}/diffusion": mode.diffusion.value,
            f"{prefix}/diffusion_low": mode.diffusion.low,
            f"{prefix}/diffusion_high": mode.diffusion.high,
            f"{prefix}/predicted_diffusion": mode.predicted_diffusion,
            f"{prefix}/log_bayes_factor": mode.log_bayes_factor,
            f"{prefix}/drift_z": mode.drift_z,
        }
    return {key: float(value) for key, value in values.items() if math.isfinite(value)}


def verdict_counts(counts: Mapping[Verdict, int], name: str = "sgd_probe") -> dict[str, float]:
    """One metric per verdict, ``{name}/n_<verdict>``; verdicts that are not a key count zero."""
    return {f"{name}/n_{verdict.value}": float(counts.get(verdict, 0)) for verdict in Verdict}


class SinkGroup:
    """Feeds several sinks; one that fails is reported once and left out from then on.

    Args:
        sinks: the sinks, in the order in which they are fed.
        strict: raise the first failure instead of going on without the sink.
    """

    def __init__(self, sinks: Iterable[Sink], strict: bool = False) -> None:
        self._sinks = list(sinks)
        self._strict = strict

    def start(self, run: RunInfo) -> None:
        self._each("start", run)

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        self._each("write", result, vectors)

    def finish(self) -> None:
        self._each("finish")

    def _each(self, method: str, *args: Any) -> None:
        for sink in list(self._sinks):
            try:
                getattr(sink, method)(*args)
            except Exception as error:
                if self._strict:
                    raise
                self._sinks.remove(sink)
                log.warning(
                    "sgd_probe: %s failed in %s (%s: %s). Training and the other outputs go on without it, "
                    "and results stay in memory (`results`); the next fit tries it again.",
                    type(sink).__name__,
                    method,
                    type(error).__name__,
                    error,
                )
