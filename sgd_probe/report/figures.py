"""One pure function per figure: window results in, a Plotly figure with its reading guide out.

Curvature is in units of the loss per squared weight, displacement in weights; D is per optimizer
step. What was not measured (NaN) is left out of a figure, never drawn as zero.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from sgd_probe.report.wording import VERDICT_STYLES, interval, number, plus_minus, steps
from sgd_probe.result import Interval, LagPoint, ModeKind, ModeResult, Verdict, WindowResult

_INK = "#1b1b1b"
_SOFT = "#6b6b6b"
_GRID = "#e6e6e6"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
# Pixels. A legend lies below its axes, as wide as they are, and takes the rows that its entries need there.
_WIDE, _NARROW = 1000, 275
_LEGEND_ROW = 20
_LEGEND_SYMBOL = 45
_WIDE_DECADES = 2.0  # a log axis over more than this labels powers of ten only
_MAX_CELL_TEXT_WINDOWS = 12
_MAX_TICKS = 8
_MAX_NAME = 24

_CURVATURE_AXIS = "|curvature| (loss / weight²)"

_Quantity = Callable[[ModeResult], Interval]


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure and what a reader needs to read it.

    Attributes:
        name: stable key ("spectrum").
        title: what it shows.
        how_to_read: one sentence that tells what to look for.
        plot: the Plotly figure.
    """

    name: str
    title: str
    how_to_read: str
    plot: go.Figure


def all_figures(results: Sequence[WindowResult]) -> tuple[Figure, ...]:
    """Every figure of a run: the first four from the last window, the others over all windows.

    Raises:
        ValueError: no window.
    """
    if not results:
        raise ValueError("expected at least one window result, found none: wait until a window has closed")
    last = results[-1]
    return (
        spectrum(last),
        displacement(last),
        noise(last),
        diffusion(last),
        verdict_timeline(results),
        lambda_max(results),
    )


def spectrum(result: WindowResult) -> Figure:
    """Curvature per mode (loss / weight²) with one standard error, coloured by verdict."""
    modes = result.modes
    plot = _canvas("direction", _CURVATURE_AXIS, entries=_verdicts(modes) + 1)
    positions = {mode.name: Interval(float(i), math.nan, math.nan) for i, mode in enumerate(modes)}
    plot.add_traces(_by_verdict(modes, lambda mode: positions[mode.name], _curvature))
    mixed = [mode for mode in modes if mode.mixed]
    if mixed:
        plot.add_trace(
            _points(
                mixed,
                lambda mode: positions[mode.name],
                _absolute_eigenvalue,
                name="|v·Hv|, mixed" if _has_interior(modes) else "|v·Hv|, flat",
                marker={
                    "symbol": "line-ew",
                    "size": 13,
                    "color": _SOFT,
                    "line": {"width": 2, "color": _SOFT},
                },
            )
        )
    plot.update_xaxes(
        tickvals=list(range(len(modes))),
        ticktext=[_text(mode.name) for mode in modes],
        range=[-0.6, len(modes) - 0.4],
    )
    plot.update_yaxes(_log_axis(_curvature(mode).value for mode in modes))
    return Figure(
        "spectrum",
        "Curvature of each direction",
        f"{_curvature_note(modes)}; bars are one standard error over held-out batches, and a bar that runs "
        "off the lower edge means that zero is within it.",
        _with_empty_note(plot, modes),
    )


def displacement(result: WindowResult) -> Figure:
    """Mean squared displacement (weight²) against lag (optimizer steps), measured and predicted."""
    modes = [mode for mode in result.modes if mode.displacements]
    plot = _canvas(
        "lag (optimizer steps)",
        "mean squared displacement (weight²)",
        entries=len(modes) + 3,
        entry_width=165,
    )
    plot.add_traces(_displacement_key() if modes else [])
    seen: dict[Verdict, int] = {}
    for mode in modes:
        rank = seen.get(mode.verdict, 0)
        seen[mode.verdict] = rank + 1
        plot.add_traces(_displacement_traces(mode, rank))
    lags = sorted({point.lag for mode in modes for point in mode.displacements})
    plot.update_xaxes(type="log", tickvals=lags[:: _stride(len(lags))], tickangle=0)
    plot.update_yaxes(_log_axis(point.measured.value for mode in modes for point in mode.displacements))
    return Figure(
        "displacement",
        "How far the weights get",
        "A confined direction levels off, a diffusive one keeps growing with slope one; points (95% "
        "intervals) should lie on the solid line if the discrete theory holds. Each verdict's first "
        "direction is shown: click a name to show or hide it.",
        _with_empty_note(plot, modes),
    )


def noise(result: WindowResult) -> Figure:
    """Gradient noise variance along each mode against its curvature, with the line of proportionality."""
    plot = _canvas(_CURVATURE_AXIS, "noise variance (loss / weight)²", entries=_verdicts(result.modes) + 1)
    plot.add_traces(_by_verdict(result.modes, _curvature, lambda mode: mode.noise_variance))
    line = _proportional_line(result.modes)
    if line is not None:
        plot.add_trace(line)
    plot.update_xaxes(_log_axis(_curvature(mode).value for mode in result.modes))
    plot.update_yaxes(_log_axis(mode.noise_variance.value for mode in result.modes))
    return Figure(
        "noise",
        "Gradient noise against curvature",
        "Near a minimum the noise of the minibatch gradient follows the curvature, so that points lie along "
        "the dotted line of proportionality (drawn through the median ratio). "
        f"{_curvature_note(result.modes)}.",
        _with_empty_note(plot, result.modes),
    )


def diffusion(result: WindowResult) -> Figure:
    """Apparent D per optimizer step against curvature: measured, predicted, and free of curvature."""
    modes = result.modes
    plot = _canvas(_CURVATURE_AXIS, "D (weight² / optimizer step)", entries=_verdicts(modes) + 2)
    plot.add_traces(_by_verdict(modes, _curvature, lambda mode: mode.diffusion))
    for name, symbol, quantity in (
        ("discrete prediction", "line-ew", lambda mode: _bare(mode.predicted_diffusion)),
        ("free (no curvature)", "x-thin", lambda mode: _bare(mode.free_diffusion)),
    ):
        marker = {"symbol": symbol, "size": 12, "line": {"width": 2, "color": _INK}}
        plot.add_trace(_points(modes, lambda m: _bare(_curvature(m).value), quantity, name, marker))
    plot.update_xaxes(_log_axis(_curvature(mode).value for mode in modes))
    plot.update_yaxes(_log_axis(mode.diffusion.value for mode in modes))
    return Figure(
        "diffusion",
        "Diffusion against curvature",
        "D is half the squared displacement per step over the lag that the table names: where curvature "
        "holds a direction, points fall below its cross, the D of this noise without any curvature; points "
        "(95% intervals) on their dash agree with the discrete theory.",
        _with_empty_note(plot, modes),
    )


def verdict_timeline(results: Sequence[WindowResult]) -> Figure:
    """The verdict of every mode name in every window as a coloured grid."""
    names = _mode_names(results)
    order = list(VERDICT_STYLES)
    plot = _canvas(
        "window, by its first optimizer step", "", entries=len(order), height=110 + 22 * max(len(names), 8)
    )
    cells = [{mode.name: mode for mode in result.modes} for result in results]
    rows = [[window.get(name) for window in cells] for name in names]
    spans = [steps(result) for result in results]
    plot.add_trace(
        go.Heatmap(
            x=list(range(len(results))),
            y=list(range(len(names))),
            z=[[order.index(mode.verdict) if mode else None for mode in row] for row in rows],
            hovertext=[
                [_hover(mode, f"steps {span}") if mode else "" for mode, span in zip(row, spans, strict=True)]
                for row in rows
            ],
            hoverinfo="text",
            hoverongaps=False,
            zmin=-0.5,
            zmax=len(order) - 0.5,
            colorscale=_steps_of_colour([style.colour for style in VERDICT_STYLES.values()]),
            showscale=False,
            xgap=2,
            ygap=2,
        )
    )
    if len(results) <= _MAX_CELL_TEXT_WINDOWS:
        plot.add_trace(_cell_codes(results, names))
    present = {mode.verdict for result in results for mode in result.modes}
    plot.add_traces([_colour_key(verdict) for verdict in order if verdict in present])
    shown = range(0, len(results), _stride(len(results)))
    plot.update_xaxes(
        tickvals=list(shown),
        ticktext=[str(results[i].opened_at_step) for i in shown],
        range=[-0.5, max(len(results), 1) - 0.5],
        showgrid=False,
    )
    plot.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[_text(name) for name in names],
        range=[max(len(names), 1) - 0.5, -0.5],
        showgrid=False,
    )
    return Figure(
        "verdicts",
        "Verdicts over the run",
        "One row per name and one column per window, coloured by verdict; a name is a rank (top_01 is the "
        "stiffest direction of its own window), so that a row need not follow one and the same direction.",
        _with_empty_note(plot, names),
    )


def lambda_max(results: Sequence[WindowResult]) -> Figure:
    """Largest curvature (loss / weight²) of each window: where it was found, and held out."""
    plot = _canvas(
        "optimizer step at which the window opened", "curvature (loss / weight²)", entries=2, entry_width=260
    )
    opened = [result.opened_at_step for result in results]
    found = [result.curvature.lambda_max for result in results]
    stiffest = [next((m for m in r.modes if m.kind is ModeKind.TOP), None) for r in results]
    held_out = [_signed_eigenvalue(mode) if mode else Interval.unknown() for mode in stiffest]
    plot.add_trace(
        go.Scatter(
            x=opened,
            y=_finite(found),
            name="largest, on the batches that found it",
            mode="lines+markers",
            marker={"symbol": "circle-open", "size": 8, "color": _SOFT},
            line={"color": _SOFT, "width": 1.2, "dash": "dot"},
            hovertext=[f"steps {steps(r)}: {number(v)}" for r, v in zip(results, found, strict=True)],
            hoverinfo="text",
        )
    )
    plot.add_trace(
        go.Scatter(
            x=opened,
            y=_finite(h.value for h in held_out),
            error_y=_bars(held_out),
            name="stiffest mode, on held-out batches",
            mode="lines+markers",
            marker={"symbol": "circle", "size": 8, "color": VERDICT_STYLES[Verdict.CONFINED].colour},
            line={"width": 1.8},
            hovertext=[f"steps {steps(r)}: {interval(h)}" for r, h in zip(results, held_out, strict=True)],
            hoverinfo="text",
        )
    )
    values = [value for value in (*found, *(h.value for h in held_out)) if math.isfinite(value)]
    if values and min(values) > 0:
        plot.update_yaxes(rangemode="tozero")
    return Figure(
        "lambda_max",
        "Largest curvature over the run",
        "A rising line means that training moves into sharper regions; held-out values (bars: one "
        "standard error) are the unbiased ones, those on the finding batches are inflated by having been "
        "chosen there.",
        _with_empty_note(plot, values),
    )


# Quantities of a mode, as intervals.


def _curvature(mode: ModeResult) -> Interval:
    """The curvature that decides a mode's motion: positive, in loss / weight²."""
    if mode.mixed:
        return _bare(mode.effective_curvature)
    return _absolute_eigenvalue(mode)


def _signed_eigenvalue(mode: ModeResult) -> Interval:
    value, error = mode.held_out_eigenvalue, mode.held_out_standard_error
    return Interval(value, value - error, value + error)


def _absolute_eigenvalue(mode: ModeResult) -> Interval:
    value, error = abs(mode.held_out_eigenvalue), mode.held_out_standard_error
    return Interval(value, value - error, value + error)


def _bare(value: float) -> Interval:
    """A value whose interval is unknown."""
    return Interval(value, math.nan, math.nan)


def _is_negative(mode: ModeResult) -> bool:
    return mode.kind is not ModeKind.FLAT and mode.held_out_eigenvalue < 0


# Traces.


def _by_verdict(modes: Sequence[ModeResult], x: _Quantity, y: _Quantity) -> list[go.Scatter]:
    """One trace of points per verdict that occurs, in the order of the verdicts."""
    traces = []
    for verdict, style in VERDICT_STYLES.items():
        found = [mode for mode in modes if mode.verdict is verdict]
        if not found:
            continue
        symbols = [f"{style.symbol}-open" if _is_negative(mode) else style.symbol for mode in found]
        marker = {"symbol": symbols, "size": 10, "color": style.colour, "line": {"width": 1}}
        traces.append(_points(found, x, y, style.label, marker))
    return traces


def _points(
    modes: Sequence[ModeResult], x: _Quantity, y: _Quantity, name: str, marker: dict[str, object]
) -> go.Scatter:
    xs, ys = [x(mode) for mode in modes], [y(mode) for mode in modes]
    return go.Scatter(
        x=_finite(value.value for value in xs),
        y=_finite(value.value for value in ys),
        error_x=_bars(xs),
        error_y=_bars(ys),
        name=name,
        mode="markers",
        marker=marker,
        hovertext=[_hover(mode, *_summary(mode)) for mode in modes],
        hoverinfo="text",
        showlegend=True,
    )


def _displacement_traces(mode: ModeResult, rank: int) -> list[go.Scatter]:
    """Measured points and both predictions of one mode, switched together in the legend."""
    style = VERDICT_STYLES[mode.verdict]
    measured = [point.measured for point in mode.displacements]
    symbols = [other.symbol for other in VERDICT_STYLES.values()]
    shared = {
        "x": [point.lag for point in mode.displacements],
        "legendgroup": mode.name,
        "visible": True if rank == 0 else "legendonly",
    }
    predictions = [
        go.Scatter(
            y=_finite(values),
            mode="lines",
            line={"color": style.colour, "width": 2, "dash": dash},
            hoverinfo="skip",
            showlegend=False,
            **shared,
        )
        for dash, values in (
            ("solid", [point.discrete for point in mode.displacements]),
            ("dash", [point.langevin for point in mode.displacements]),
        )
    ]
    points = go.Scatter(
        y=_finite(value.value for value in measured),
        error_y=_bars(measured),
        mode="markers",
        marker={
            "color": style.colour,
            "symbol": symbols[(symbols.index(style.symbol) + rank) % len(symbols)],
            "size": 8,
        },
        name=f"{_text(mode.name)} · {style.label}",
        hovertext=[_hover(mode, *_lag_lines(point)) for point in mode.displacements],
        hoverinfo="text",
        **shared,
    )
    return [*predictions, points]


def _displacement_key() -> list[go.Scatter]:
    """Legend entries that say what points, solid and dashed lines are."""
    key = {"x": [None], "y": [None], "hoverinfo": "skip"}
    return [
        go.Scatter(name="measured", mode="markers", marker={"color": _INK, "size": 8}, **key),
        go.Scatter(name="discrete prediction", mode="lines", line={"color": _INK, "width": 2}, **key),
        go.Scatter(name="Langevin", mode="lines", line={"color": _INK, "width": 1.6, "dash": "dash"}, **key),
    ]


def _proportional_line(modes: Sequence[ModeResult]) -> go.Scatter | None:
    """Noise variance proportional to curvature, through the median ratio."""
    pairs = [(_curvature(mode).value, mode.noise_variance.value) for mode in modes]
    drawable = [(x, y) for x, y in pairs if 0 < x < math.inf and 0 < y < math.inf]
    if len(drawable) < 2:
        return None
    ratio = statistics.median(y / x for x, y in drawable)
    ends = [min(drawable)[0], max(drawable)[0]]
    return go.Scatter(
        x=ends,
        y=_finite(ratio * x for x in ends),
        name="variance ∝ curvature",
        mode="lines",
        line={"color": _INK, "width": 1.2, "dash": "dot"},
        hoverinfo="skip",
    )


def _cell_codes(results: Sequence[WindowResult], names: Sequence[str]) -> go.Scatter:
    """The code of each verdict, written on its cell, so that colour does not stand alone."""
    cells = [(column, mode) for column, result in enumerate(results) for mode in result.modes]
    styles = [VERDICT_STYLES[mode.verdict] for _, mode in cells]
    return go.Scatter(
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


def _colour_key(verdict: Verdict) -> go.Scatter:
    style = VERDICT_STYLES[verdict]
    return go.Scatter(
        x=[None],
        y=[None],
        name=f"{style.code}: {style.label}",
        mode="markers",
        marker={"symbol": "square", "size": 12, "color": style.colour},
        hoverinfo="skip",
    )


def _bars(values: Sequence[Interval]) -> dict[str, object]:
    """Error bars; caps have no width, so that an unknown interval draws nothing at all."""
    return {
        "type": "data",
        "symmetric": False,
        "array": _finite(value.high - value.value for value in values),
        "arrayminus": _finite(value.value - value.low for value in values),
        "width": 0,
        "thickness": 1.6,
    }


def _steps_of_colour(colours: Sequence[str]) -> list[tuple[float, str]]:
    """A colour scale of equal flat steps."""
    count = len(colours)
    return [(edge / count, colour) for i, colour in enumerate(colours) for edge in (i, i + 1)]


# Words and layout.


def _curvature_note(modes: Iterable[ModeResult]) -> str:
    """What "curvature" is in a figure of these modes."""
    if _has_interior(modes):
        eigenvectors, mixed = "an eigenvector", "a mixed direction (flat, or interior and not converged)"
    else:
        eigenvectors, mixed = "a top mode", "a flat direction"
    return (
        f"Curvature is the held-out |v·Hv| of {eigenvectors} (hollow: it is negative) "
        f"and the effective curvature ‖Hv‖²/|v·Hv| of {mixed}"
    )


def _has_interior(modes: Iterable[ModeResult]) -> bool:
    return any(mode.kind is ModeKind.INTERIOR for mode in modes)


def _summary(mode: ModeResult) -> tuple[str, ...]:
    return (
        f"curvature {plus_minus(mode.held_out_eigenvalue, mode.held_out_standard_error)}",
        f"effective curvature {number(mode.effective_curvature)}",
        f"noise variance {interval(mode.noise_variance)}",
        f"D per step {interval(mode.diffusion)}",
        f"D predicted {number(mode.predicted_diffusion)}, free {number(mode.free_diffusion)}",
    )


def _lag_lines(point: LagPoint) -> tuple[str, ...]:
    return (
        f"lag {point.lag}, {point.count} displacements",
        f"measured {interval(point.measured)}",
        f"discrete {number(point.discrete)}, Langevin {number(point.langevin)}",
    )


def _hover(mode: ModeResult, *lines: str) -> str:
    return "<br>".join((f"<b>{_text(mode.name)}</b> · {VERDICT_STYLES[mode.verdict].label}", *lines))


def _text(value: str) -> str:
    """A run's own words as they are, not as the HTML that Plotly reads; cut where axes have no room."""
    short = value if len(value) <= _MAX_NAME else f"{value[: _MAX_NAME - 1]}…"
    return html.escape(short, quote=False)


def _mode_names(results: Sequence[WindowResult]) -> list[str]:
    """Mode names of all windows: top ones first, flat ones last, each kind in its order of appearance."""
    modes = [mode for result in results for mode in result.modes]
    ordered = sorted(modes, key=lambda mode: list(ModeKind).index(mode.kind))
    return list(dict.fromkeys(mode.name for mode in ordered))


def _verdicts(modes: Iterable[ModeResult]) -> int:
    """Number of different verdicts: that many legend entries."""
    return len({mode.verdict for mode in modes})


def _stride(count: int) -> int:
    """Label every how manieth of ``count`` ticks."""
    return max(1, math.ceil(count / _MAX_TICKS))


def _finite(values: Iterable[float]) -> list[float | None]:
    """Plotly leaves a gap at None."""
    return [value if math.isfinite(value) else None for value in values]


def _canvas(
    x_title: str, y_title: str, *, entries: int, entry_width: int = 128, height: int = 420
) -> go.Figure:
    """An empty figure in the common style, ``height`` pixels high plus its legend.

    ``layout.meta.narrow_height`` is the height that a narrow screen needs, in pixels.
    """
    axis = {
        "gridcolor": _GRID,
        "linecolor": _SOFT,
        "showline": True,
        "ticks": "outside",
        "tickcolor": _SOFT,
        "zeroline": False,
        "exponentformat": "power",
        "automargin": True,
        "tickfont": {"size": 12},
    }
    plot = go.Figure()
    plot.update_layout(
        template="none",
        height=height + _legend_height(entries, entry_width, _WIDE),
        meta={"narrow_height": height - 20 + _legend_height(entries, entry_width, _NARROW)},
        font={"family": _FONT, "size": 13, "color": _INK},
        margin={"l": 64, "r": 16, "t": 36, "b": 56},
        hoverlabel={"bgcolor": "white", "font": {"color": _INK}, "align": "left"},
        showlegend=True,
        legend={
            "orientation": "h",
            "traceorder": "normal",
            "xref": "container",
            "x": 0,
            "xanchor": "left",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "entrywidth": entry_width,
            "font": {"size": 12},
        },
        xaxis={**axis, "title": {"text": x_title, "font": {"size": 13}}},
        yaxis={**axis, "title": {"text": y_title, "font": {"size": 13}}},
    )
    return plot


def _legend_height(entries: int, entry_width: int, width: int) -> int:
    columns = max(1, width // (entry_width + _LEGEND_SYMBOL))
    return _LEGEND_ROW * math.ceil(entries / columns)


def _log_axis(values: Iterable[float]) -> dict[str, object]:
    """A logarithmic axis whose labels stay apart, however many decades the values span."""
    logs = [math.log10(value) for value in values if 0 < value < math.inf]
    if logs and max(logs) - min(logs) > _WIDE_DECADES:
        decades = math.ceil((max(logs) - min(logs)) / 8)
        minor = {"ticks": "outside", "ticklen": 3, "tickcolor": _SOFT}
        return {"type": "log", "dtick": decades, "minor": minor}
    return {"type": "log"}


def _with_empty_note(plot: go.Figure, content: Sequence[object]) -> go.Figure:
    """Say so where there is nothing to draw."""
    if not content:
        plot.add_annotation(
            text="nothing was measured",
            x=0.5,
            y=0.5,
            xref="paper",
            yref="paper",
            showarrow=False,
            font={"size": 15, "color": _SOFT},
        )
    return plot
