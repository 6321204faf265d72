"""What windows say one after the other: verdicts, largest curvature, distance from instability."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sgd_probe.report.figures.drawing import Drawing, Trace, heatmap, scatter
from sgd_probe.report.figures.points import signed_eigenvalue
from sgd_probe.report.figures.style import (
    SOFT,
    Figure,
    bars,
    canvas,
    finite,
    hover,
    mode_names,
    steps_of_colour,
    text,
    window_axis,
    with_empty_note,
)
from sgd_probe.report.wording import VERDICT_STYLES, headline, interval, number, steps
from sgd_probe.result import Interval, ModeKind, ModeResult, Verdict, WindowResult

_MAX_CELL_TEXT_WINDOWS = 12


def verdict_timeline(results: Sequence[WindowResult]) -> Figure:
    """The verdict of every mode name in every window as a coloured grid."""
    plot = verdict_grid(results, [steps(result) for result in results], "window, by its first optimizer step")
    plot.update_xaxes(**window_axis(results))
    return Figure(
        "verdicts",
        "Verdicts over the run",
        "One row per name and one column per window, coloured by verdict; a name is a rank (top_01 is the "
        "stiffest direction of its own window), so that a row need not follow one and the same direction.",
        plot,
        f"{len(results)} windows. {headline(results[-1])}.",
    )


def verdict_grid(results: Sequence[WindowResult], labels: Sequence[str], title: str) -> Drawing:
    """A row per mode name and a column per window, coloured by verdict.

    Args:
        results: the columns.
        labels: what each is called.
        title: of the columns.
    """
    names = mode_names(results)
    order = list(VERDICT_STYLES)
    plot = canvas(title, "", entries=len(order), height=110 + 22 * max(len(names), 8))
    cells = [{mode.name: mode for mode in result.modes} for result in results]
    rows = [[window.get(name) for window in cells] for name in names]
    plot.add_trace(
        heatmap(
            x=list(range(len(results))),
            y=list(range(len(names))),
            z=[[order.index(mode.verdict) if mode else None for mode in row] for row in rows],
            hovertext=[
                [hover(mode, label) if mode else "" for mode, label in zip(row, labels, strict=True)]
                for row in rows
            ],
            hoverinfo="text",
            hoverongaps=False,
            zmin=-0.5,
            zmax=len(order) - 0.5,
            colorscale=steps_of_colour([style.colour for style in VERDICT_STYLES.values()]),
            showscale=False,
            xgap=2,
            ygap=2,
        )
    )
    if len(results) <= _MAX_CELL_TEXT_WINDOWS:
        plot.add_trace(_cell_codes(results, names))
    present = {mode.verdict for result in results for mode in result.modes}
    plot.add_traces([_colour_key(verdict) for verdict in order if verdict in present])
    plot.update_xaxes(
        tickvals=list(range(len(results))),
        ticktext=list(labels),
        range=[-0.5, max(len(results), 1) - 0.5],
        showgrid=False,
    )
    plot.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[text(name) for name in names],
        range=[max(len(names), 1) - 0.5, -0.5],
        showgrid=False,
    )
    return with_empty_note(plot, names)


def lambda_max(results: Sequence[WindowResult]) -> Figure:
    """Largest curvature (loss / weight²) of each window: where it was found, and held out."""
    plot = canvas(
        "optimizer step at which the window opened", "curvature (loss / weight²)", entries=2, entry_width=260
    )
    opened = [result.opened_at_step for result in results]
    found = [result.curvature.lambda_max for result in results]
    stiffest = [next((m for m in r.modes if m.kind is ModeKind.TOP), None) for r in results]
    held_out = [signed_eigenvalue(mode) if mode else Interval.unknown() for mode in stiffest]
    plot.add_trace(
        scatter(
            x=opened,
            y=finite(found),
            name="largest, on the batches that found it",
            mode="lines+markers",
            marker={"symbol": "circle-open", "size": 8, "color": SOFT},
            line={"color": SOFT, "width": 1.2, "dash": "dot"},
            hovertext=[f"steps {steps(r)}: {number(v)}" for r, v in zip(results, found, strict=True)],
            hoverinfo="text",
        )
    )
    plot.add_trace(
        scatter(
            x=opened,
            y=finite(h.value for h in held_out),
            error_y=bars(held_out),
            name="stiffest mode, on held-out batches",
            mode="lines+markers",
            marker={"symbol": "circle", "size": 8, "color": VERDICT_STYLES[Verdict.CONFINED].colour},
            line={"width": 1.8},
            hovertext=[f"steps {steps(r)}: {interval(h)}" for r, h in zip(results, held_out, strict=True)],
            hoverinfo="text",
        )
    )
    values = [value for value in (*found, *(h.value for h in held_out)) if math.isfinite(value)]
    plot.update_xaxes(tickformat=",d")
    if values and min(values) > 0:
        plot.update_yaxes(rangemode="tozero")
    return Figure(
        "lambda_max",
        "Largest curvature over the run",
        "A rising line means that training moves into sharper regions; held-out values (bars: one "
        "standard error) are the unbiased ones, those on the finding batches are inflated by having been "
        "chosen there.",
        with_empty_note(plot, values),
        f"On the finding batches it goes from {number(found[0])} to {number(found[-1])}.",
    )


def edge_of_stability(results: Sequence[WindowResult]) -> Figure:
    """Largest curvature over the largest that is stable: eta lambda_1 / 2 for plain SGD."""
    plot = canvas("optimizer step", "largest curvature / stability limit", entries=4, entry_width=260)
    sharpest = [_sharpest(result) for result in results]
    at_start = [
        _over(signed_eigenvalue(mode), r.stability_limit) if mode else Interval.unknown()
        for mode, r in zip(sharpest, results, strict=True)
    ]
    at_end = [
        mode.end_eigenvalue / r.stability_limit if mode else math.nan
        for mode, r in zip(sharpest, results, strict=True)
    ]
    blue = VERDICT_STYLES[Verdict.CONFINED].colour
    plot.add_trace(
        scatter(
            x=[result.opened_at_step for result in results],
            y=finite(value.value for value in at_start),
            error_y=bars(at_start),
            name="when a window opens, held out",
            mode="lines+markers",
            marker={"symbol": "circle", "size": 8, "color": blue},
            line={"width": 1.8, "color": blue},
            hovertext=[_edge_words(r, v.value) for r, v in zip(results, at_start, strict=True)],
            hoverinfo="text",
        )
    )
    plot.add_trace(
        scatter(
            x=[result.closed_at_step for result in results],
            y=finite(at_end),
            name="the same direction when it closes",
            mode="markers",
            marker={"symbol": "circle-open", "size": 9, "color": blue, "line": {"width": 2}},
            hovertext=[_edge_words(r, v) for r, v in zip(results, at_end, strict=True)],
            hoverinfo="text",
        )
    )
    values = [v for v in (*(value.value for value in at_start), *at_end) if math.isfinite(v)]
    ends = [results[0].opened_at_step, results[-1].closed_at_step]
    plot.add_trace(
        scatter(
            x=ends,
            y=[1.0, 1.0],
            name="edge of stability",
            mode="lines",
            line={"color": VERDICT_STYLES[Verdict.UNSTABLE].colour, "width": 2},
            hoverinfo="skip",
        )
    )
    plot.update_xaxes(tickformat=",d")
    plot.update_yaxes(range=[min(0.0, 1.1 * min(values, default=0.0)), 1.15 * max([1.0, *values])])
    last = at_start[-1].value
    return Figure(
        "edge_of_stability",
        "How near is the edge of stability?",
        "The stiffest positive curvature over the largest at which a mode is stable, 2/η for plain SGD and "
        "2(1+μ)/η with momentum μ: above the line the mean of that mode grows from step to step, and well "
        "below it the discrete theory differs little from the Langevin one.",
        with_empty_note(plot, values, "the theory does not cover this optimizer"),
        f"Last window: {number(last, 2)} of the limit {number(results[-1].stability_limit)} loss / weight²."
        if math.isfinite(last)
        else "Unknown: the theory does not cover this optimizer.",
    )


def _sharpest(result: WindowResult) -> ModeResult | None:
    top = [mode for mode in result.modes if mode.kind is ModeKind.TOP and mode.held_out_eigenvalue > 0]
    return max(top, key=lambda mode: mode.held_out_eigenvalue, default=None)


def _over(value: Interval, unit: float) -> Interval:
    return Interval(value.value / unit, value.low / unit, value.high / unit)


def _edge_words(result: WindowResult, share: float) -> str:
    return (
        f"steps {steps(result)}: {number(share)}<br>limit {number(result.stability_limit)} at learning rate "
        f"{number(result.learning_rate)}"
    )


def _cell_codes(results: Sequence[WindowResult], names: Sequence[str]) -> Trace:
    """The code of each verdict, written on its cell, so that colour does not stand alone."""
    cells = [(column, mode) for column, result in enumerate(results) for mode in result.modes]
    styles = [VERDICT_STYLES[mode.verdict] for _, mode in cells]
    return scatter(
        x=[column for column, _ in cells],
        y=[names.index(mode.name) for _, mode in cells],
        text=[style.code for style in styles],
        mode="text",
        textfont={"color": ["white" if _is_dark(style.colour) else "black" for style in styles], "size": 12},
        hoverinfo="skip",
        showlegend=False,
    )


def _is_dark(colour: str) -> bool:
    """White reads better than black on this hex colour (by its luma, 0 to 255)."""
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 110


def _colour_key(verdict: Verdict) -> Trace:
    style = VERDICT_STYLES[verdict]
    return scatter(
        x=[None],
        y=[None],
        name=f"{style.code}: {style.label}",
        mode="markers",
        marker={"symbol": "square", "size": 12, "color": style.colour},
        hoverinfo="skip",
    )
