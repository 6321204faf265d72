"""The loss along a valley and along its wall, with how far the weights get along each."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sgd_probe.report.figures.drawing import Trace, scatter
from sgd_probe.report.figures.style import (
    Figure,
    bars,
    canvas,
    finite,
    text,
    with_empty_note,
)
from sgd_probe.report.wording import VERDICT_STYLES, number, plus_minus
from sgd_probe.result import Interval, LossSlice, ModeResult, Verdict, WindowResult


def loss_slices(result: WindowResult) -> Figure:
    """The loss along the stiffest and the flattest direction, and how far the window got along each."""
    known = {mode.name: mode for mode in result.modes}
    pairs = [(known[found.mode], found) for found in result.slices if found.mode in known]
    plot = canvas(
        "displacement along the direction (weight)",
        "rise of the loss",
        entries=2 * len(pairs) or 1,
        entry_width=300,
    )
    said = []
    for mode, found in pairs:
        plot.add_trace(_slice(mode, found))
        distance, words = _distance(mode, result.steps)
        if math.isfinite(distance):
            plot.add_traces(_band(mode, distance, words))
        said.append(
            f"Along {mode.name} ({VERDICT_STYLES[mode.verdict].label}) the loss rises by "
            f"{number(found.rises[-1])} at {number(found.offsets[-1])}; {words} {number(distance)}."
        )
    plot.update_yaxes(zeroline=True, zerolinecolor="#bdbdbd", zerolinewidth=1)
    return Figure(
        "slices",
        "The valley and its wall",
        "The loss of the held-out batches along two directions through the weights at which the window "
        "opened (bars: one standard error): a valley hardly rises where the wall goes up; the band of a "
        "direction is how far its weights typically get in the window, a diffusion length √(2DT) where they "
        "diffuse. A slope at zero is the mean gradient, known no better than its bars.",
        with_empty_note(plot, pairs, "no slices were taken"),
        " ".join(said) or "No slices were taken.",
    )


def _slice(mode: ModeResult, found: LossSlice) -> Trace:
    style = VERDICT_STYLES[mode.verdict]
    doubts = [Interval(r, r - e, r + e) for r, e in zip(found.rises, found.errors, strict=True)]
    return scatter(
        x=list(found.offsets),
        y=finite(found.rises),
        error_y=bars(doubts),
        name=f"{text(mode.name)} · {style.label}",
        mode="lines+markers",
        line={"color": style.colour, "width": 2, "shape": "spline"},
        marker={"symbol": style.symbol, "size": 8, "color": style.colour},
        hovertext=[
            f"<b>{text(mode.name)}</b> at {number(x)}<br>loss {number(found.loss + rise, 5)}<br>"
            f"rise {plus_minus(rise, error)}"
            for x, rise, error in zip(found.offsets, found.rises, found.errors, strict=True)
        ],
        hoverinfo="text",
    )


def _distance(mode: ModeResult, steps: int) -> tuple[float, str]:
    """How far a direction typically gets in the window, and what to call it."""
    if mode.verdict in (Verdict.DIFFUSIVE, Verdict.DRIFTING):
        spread = 2 * mode.diffusion.value * steps
        return math.sqrt(spread) if spread >= 0 else math.nan, f"diffusion length after {steps} steps ±"
    point = next((p for p in mode.displacements if p.lag == mode.diffusion_lag), None)
    spread = point.measured.value if point is not None else math.nan
    return (
        math.sqrt(spread) if spread >= 0 else math.nan,
        f"typical displacement over {mode.diffusion_lag} steps ±",
    )


def _band(mode: ModeResult, distance: float, words: str) -> list[Trace]:
    """A line along zero as long as the distance to both sides, and its legend entry."""
    style = VERDICT_STYLES[mode.verdict]
    shared: Mapping[str, object] = {"hoverinfo": "skip", "mode": "lines", "legendgroup": f"band {mode.name}"}
    return [
        scatter(
            x=[-distance, distance],
            y=[0.0, 0.0],
            line={"color": style.colour, "width": 16},
            opacity=0.35,
            name=f"{words} {number(distance)}",
            **shared,
        )
    ]
