"""Window results as a real run would give them, drawn from the closed forms with seeded noise."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sgd_probe.result import (
    CostResult,
    CurvatureResult,
    Interval,
    LagPoint,
    LossSlice,
    ModeKind,
    ModeResult,
    Verdict,
    WindowResult,
)

LEARNING_RATE = 0.05
NOISE_PER_CURVATURE = 0.4
_LAGS = (1, 2, 5, 10, 20, 50, 100)
_REASONS = {
    Verdict.CONFINED: "The displacement levels off: 20 relaxation times explain it far better than none.",
    Verdict.SAMPLING_CONFINED: "Displacements return within every epoch and the slope inside epochs is nil.",
    Verdict.DIFFUSIVE: "A flat mode explains the motion better, and D is the same at every lag.",
    Verdict.DRIFTING: "The net displacement is 3.4 times what this noise would do.",
    Verdict.UNSTABLE: "The weights run away and the gradient points outwards.",
    Verdict.UNDETERMINED: "The evidence (log Bayes factor 0.3) lies between the two thresholds.",
    Verdict.NO_NOISE: "Its noise is under a tenth of a random direction's.",
}


def make_mode(
    name: str = "top_01",
    *,
    eigenvalue: float = 10.0,
    verdict: Verdict = Verdict.CONFINED,
    window: int = 1000,
    seed: int = 0,
    **changes: Any,
) -> ModeResult:
    """One mode of a plain SGD run near a minimum; ``changes`` replace any field."""
    rng = np.random.default_rng(seed)
    kind = next((kind for kind in ModeKind if name.startswith(kind)), ModeKind.TOP)
    curvature = abs(eigenvalue) * (3.0 if kind is ModeKind.FLAT else 1.0)
    noise = NOISE_PER_CURVATURE * curvature * rng.lognormal(0.0, 0.3)
    lag = 100 if kind is ModeKind.FLAT else 10
    points = tuple(_lag_point(step, window // step, curvature, noise, rng) for step in _LAGS)
    at_lag = next(point for point in points if point.lag == lag)
    mode = ModeResult(
        name=name,
        kind=kind,
        eigenvalue=eigenvalue * 1.3,
        residual=float(rng.lognormal(-5.5, 0.8)),
        converged=kind is not ModeKind.FLAT,
        held_out_eigenvalue=eigenvalue,
        held_out_standard_error=abs(eigenvalue) * (0.8 if kind is ModeKind.FLAT else 0.06),
        effective_curvature=curvature,
        end_eigenvalue=eigenvalue * rng.lognormal(0.0, 0.05),
        relaxation_times=curvature * LEARNING_RATE * window,
        noise_variance=_around(noise, 60),
        noise_kurtosis=3.2,
        noise_share=1.4,
        measured_curvature=_around(curvature, 80) if verdict is Verdict.CONFINED else Interval.unknown(),
        diffusion=_scaled(at_lag.measured, 1 / (2 * lag)),
        diffusion_per_time=_scaled(at_lag.measured, 1 / (2 * lag * LEARNING_RATE)),
        diffusion_lag=lag,
        predicted_diffusion=at_lag.discrete / (2 * lag),
        langevin_diffusion=at_lag.langevin / (2 * lag),
        free_diffusion=LEARNING_RATE**2 * noise / 2,
        log_bayes_factor=12.0 if verdict is Verdict.CONFINED else -2.1,
        t_level=6.0,
        t_trend=6.2,
        drift_z=0.8,
        verdict=verdict,
        detail="",
        reason=_REASONS[verdict],
        epoch_correlation=Interval(-0.0009, -0.001, -0.0002),
        layer_shares={"encoder.blocks.0.attention.weight": 0.62, "head.weight": 0.31, "head.bias": 0.07},
        displacements=points,
    )
    return dataclasses.replace(mode, **changes)


def make_window(index: int = 0, *, seed: int = 0, **changes: Any) -> WindowResult:
    """A window of ten top modes and four flat directions with every verdict among them.

    One top mode has negative curvature, one could not be measured at all.
    """
    seed += 100 * index
    verdicts = [Verdict.CONFINED] * 7 + [Verdict.UNDETERMINED, Verdict.UNSTABLE, Verdict.SAMPLING_CONFINED]
    scale = 1.0 + 0.1 * index
    modes = [
        make_mode(f"top_{i:02d}", eigenvalue=scale * 24.0 * 0.75**i, verdict=verdict, seed=seed + i)
        for i, verdict in enumerate(verdicts, start=1)
    ]
    modes[8] = make_mode("top_09", eigenvalue=-1.9, verdict=Verdict.UNSTABLE, seed=seed + 9)
    flat = (Verdict.DIFFUSIVE, Verdict.DIFFUSIVE, Verdict.DRIFTING, Verdict.NO_NOISE)
    modes += [
        make_mode(f"flat_{i:02d}", eigenvalue=0.012 * 0.6**i, verdict=verdict, seed=seed + 20 + i)
        for i, verdict in enumerate(flat, start=1)
    ]
    modes[3] = dataclasses.replace(modes[3], marks=("it rotated by 31 degrees within the window",))
    modes[-1] = without_numbers(modes[-1])
    window = WindowResult(
        index=index,
        opened_at_step=200 + 2000 * index,
        closed_at_step=1203 + 2000 * index,
        steps=1000,
        skipped_steps=3,
        planned_steps=1000,
        complete=True,
        learning_rate=LEARNING_RATE,
        effective_learning_rate=LEARNING_RATE,
        confinement_clock=50.0,
        diffusion_clock=2.5,
        optimizer="SGD, learning rate 0.05, momentum 0",
        sampling="with replacement, 1000 batches an epoch",
        curvature=CurvatureResult(
            lambda_max=scale * 24.0,
            samples_found=512,
            samples_certified=256,
            batches_found=8,
            batches_certified=4,
            parameters=31_306,
            products=103,
            orthogonality=6e-7,
            converged=True,
            message="all ten top modes converged after 35 products",
            self_test="passed: symmetric to 2e-7, finite difference agrees to 1e-6",
            density_nodes=(-1.9, -0.01, 0.0, 0.03, 0.4, *sorted(scale * 24.0 * 0.75**i for i in range(1, 9))),
            density_weights=(1 / 31_306, 0.1, 0.8, 0.09, 0.01 - 9 / 31_306, *[1 / 31_306] * 8),
            density_widths=(0.0, 0.02, 0.02, 0.2, 0.4, *[0.0] * 8),
        ),
        cost=CostResult(
            open_seconds=4.2,
            observe_seconds=0.9,
            close_seconds=1.3,
            total_seconds=6.4 * (index + 1),
            training_seconds=180.0 * (index + 1),
            longest_pause_seconds=4.2,
            foretold_open_seconds=5.0,
            foretold_step=20.0,
            foretold_bytes=3e8,
            foretold_windows=4.0,
            peak_bytes=2e8,
        ),
        modes=tuple(modes),
        warnings=("The gradient is not small: this window starts away from a critical point.",),
        expected_false_flags=0.4,
        stability_limit=2 / LEARNING_RATE,
        epoch_correlation=-0.0009,
        epoch_correlation_interval=Interval(-0.0009, -0.001, -0.0002),
        expected_epoch_correlation=-1 / 999,
        slices=(_slice("top_01", 18.0), _slice("flat_01", 0.02)),
    )
    return dataclasses.replace(window, **changes)


def without_numbers(mode: ModeResult) -> ModeResult:
    """The same mode with every float and interval unknown."""
    unknown: dict[str, Any] = {}
    for field in dataclasses.fields(mode):
        value = getattr(mode, field.name)
        if isinstance(value, float):
            unknown[field.name] = math.nan
        elif isinstance(value, Interval):
            unknown[field.name] = Interval.unknown()
    points = tuple(
        dataclasses.replace(
            point, measured=Interval.unknown(), discrete=math.nan, langevin=math.nan, free=math.nan
        )
        for point in mode.displacements
    )
    return dataclasses.replace(mode, **unknown, displacements=points)


def run_info(**changes: Any) -> dict[str, Any]:
    """What a run folder's ``run.json`` holds."""
    return {
        "name": "sgd_probe",
        "config": {"top": 10, "flat": 4, "max_overhead": 0.05, "storage": {"vectors": False}},
        "plan": [
            "First window at step 200, a pause of about 4 s, 0.1 GB at the peak.",
            "5 windows over the run at an overhead of 5%.",
        ],
        "versions": {"sgd_probe": "0.1.0", "torch": "2.13.0", "pytorch_lightning": "2.6.6"},
        "parameters": {"encoder.blocks.0.attention.weight": 16_384, "head.weight": 14_848, "head.bias": 74},
        **changes,
    }


def write_run_folder(
    folder: Path, results: Iterable[WindowResult] = (), info: Mapping[str, Any] | None = None, tail: str = ""
) -> Path:
    """Write ``run.json`` and ``windows.jsonl`` as the folder sink does; ``tail`` ends up as the last line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run_info() if info is None else info), encoding="utf-8")
    lines = "".join(json.dumps(result.to_dict()) + "\n" for result in results)
    (folder / "windows.jsonl").write_text(lines + tail, encoding="utf-8")
    return folder


def _slice(name: str, curvature: float) -> LossSlice:
    offsets = [0.02 * i for i in range(-5, 6)]
    rises = tuple(curvature * offset**2 / 2 for offset in offsets)
    return LossSlice(name, tuple(offsets), rises, tuple(0.01 * abs(offset) for offset in offsets), 0.7)


def _lag_point(lag: int, count: int, curvature: float, noise: float, rng: np.random.Generator) -> LagPoint:
    """Stationary displacement of one mode: discrete, Langevin, and a chi-square draw of the first."""
    step = LEARNING_RATE * curvature
    discrete = 2 * LEARNING_RATE * noise / (curvature * (2 - step)) * (1 - (1 - step) ** lag)
    langevin = LEARNING_RATE * noise / curvature * (1 - math.exp(-step * lag))
    measured = discrete * rng.chisquare(count) / count
    return LagPoint(lag, count, _around(measured, count), discrete, langevin, LEARNING_RATE**2 * noise * lag)


def _around(value: float, freedom: int) -> Interval:
    """A 95% chi-square interval (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    high = value / max(1 - spread - 1.96 * math.sqrt(spread), 0.2) ** 3
    return Interval(value, value / (1 - spread + 1.96 * math.sqrt(spread)) ** 3, high)


def _scaled(estimate: Interval, factor: float) -> Interval:
    return Interval(estimate.value * factor, estimate.low * factor, estimate.high * factor)
