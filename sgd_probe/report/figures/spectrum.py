"""Where the directions of a window lie: each by its curvature, among all eigenvalues, and over the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sgd_probe.report.figures.drawing import Trace, heatmap, scatter
from sgd_probe.report.figures.points import (
    absolute_eigenvalue,
    by_verdict,
    curvature,
    curvature_note,
    has_interior,
    in_words,
    points,
)
from sgd_probe.report.figures.style import (
    CURVATURE_AXIS,
    INK,
    SOFT,
    Figure,
    canvas,
    finite,
    hover,
    log_axis,
    rounded,
    text,
    verdict_count,
    window_axis,
    with_empty_note,
)
from sgd_probe.report.wording import VERDICT_STYLES, number, plus_minus, steps
from sgd_probe.result import Interval, ModeKind, ModeResult, Verdict, WindowResult

#: Below this share of the largest |eigenvalue| the axis of a spectrum turns from logarithmic to linear.
_LINEAR_SHARE = 1e-3
#: Standard deviation of the kernel on that axis: what a lone eigenvalue is spread over is about 25% of it.
_KERNEL = 0.2
#: A lone eigenvalue peaks at one: the count is of what lies within a width of this.
_WIDTH = _KERNEL * math.sqrt(2 * math.pi)
_CURVE_POINTS = 240
#: Pieces of the width over which a node of the bulk is spread.
_PARTS = 9
_MAP_ROWS = 72
#: White to black in steps that look equal; the browser knows a scale of that name, but the other way round.
_GREYS = [[i / 8, f"rgb({v},{v},{v})"] for i, v in enumerate((255, 240, 217, 189, 150, 115, 82, 37, 0))]
#: Below one eigenvalue, where the directions of the window are marked.
_RUG, _FLOOR = 0.5, 0.3


def spectrum(result: WindowResult) -> Figure:
    """Curvature per mode (loss / weight²) with one standard error, coloured by verdict."""
    modes = result.modes
    plot = canvas("direction", CURVATURE_AXIS, entries=verdict_count(modes) + 1)
    positions = {mode.name: Interval(float(i), math.nan, math.nan) for i, mode in enumerate(modes)}
    plot.add_traces(by_verdict(modes, lambda mode: positions[mode.name], curvature))
    mixed = [mode for mode in modes if mode.mixed]
    if mixed:
        plot.add_trace(
            points(
                mixed,
                lambda mode: positions[mode.name],
                absolute_eigenvalue,
                name="|v·Hv|, mixed" if has_interior(modes) else "|v·Hv|, flat",
                marker={
                    "symbol": "line-ew",
                    "size": 13,
                    "color": SOFT,
                    "line": {"width": 2, "color": SOFT},
                },
            )
        )
    plot.update_xaxes(
        tickvals=list(range(len(modes))),
        ticktext=[text(mode.name) for mode in modes],
        range=[-0.6, len(modes) - 0.4],
    )
    plot.update_yaxes(**log_axis(curvature(mode).value for mode in modes))
    return Figure(
        "spectrum",
        "Curvature of each direction",
        f"{curvature_note(modes)}; bars are one standard error over held-out batches, and a bar that runs "
        "off the lower edge means that zero is within it.",
        with_empty_note(plot, modes),
        in_words(modes, "curvature", "loss / weight²", curvature),
    )


def density(result: WindowResult) -> Figure:
    """How many eigenvalues lie where, and the window's directions among them with their residuals."""
    found, modes = result.curvature, result.modes
    axis = _Axis.of([result])
    plot = canvas("eigenvalue (loss / weight²)", "eigenvalues nearby", entries=verdict_count(modes) + 1)
    grid = axis.grid(_CURVE_POINTS)
    counts = _counts(result, axis, grid)
    if counts:
        plot.add_trace(
            scatter(
                x=rounded(grid),
                y=rounded(max(count, _FLOOR / 10) for count in counts),
                name="all eigenvalues",
                mode="lines",
                line={"color": INK, "width": 1.6},
                hovertext=[
                    f"near {number(axis.value(u))}: {number(c)}" for u, c in zip(grid, counts, strict=True)
                ],
                hoverinfo="text",
            )
        )
    plot.add_traces([_marks(modes, verdict, axis, found.lambda_max) for verdict in _present(modes)])
    top = max(counts, default=1.0)
    plot.update_xaxes(**axis.labels())
    plot.update_yaxes(type="log", range=[math.log10(_FLOOR), math.log10(max(3 * top, 10.0))], dtick=1)
    told = "." if counts else ". Without near-flat directions no search has seen the bulk of it."
    return Figure(
        "density",
        "The directions among all eigenvalues",
        "The line counts the eigenvalues of the Hessian within about 25% of each place (linear below "
        f"{number(axis.linear, 1)}): isolated peaks of height one are the stiff directions, the hill at zero "
        "is the bulk, whose inner structure this estimate does not resolve; marks are the directions of this "
        "window, their bars the residual within which a top mode's eigenvalue lies.",
        with_empty_note(plot, [*counts, *modes]),
        f"{found.parameters:,} eigenvalues, the largest {number(found.lambda_max)}{told}",
    )


def spectra(results: Sequence[WindowResult]) -> Figure:
    """The spectrum over the run, a column per window, with its directions in their verdicts' colours."""
    axis = _Axis.of(results)
    grid = axis.grid(_MAP_ROWS)
    columns = [_counts(result, axis, grid) for result in results]
    plot = canvas("window, by its first optimizer step", "eigenvalue (loss / weight²)", entries=7, height=440)
    if any(columns):
        highest = max(max(column, default=1.0) for column in columns)
        plot.add_trace(
            heatmap(
                x=list(range(len(results))),
                y=rounded(grid),
                z=[
                    rounded(
                        math.log10(max(column[row], _FLOOR)) if column else math.nan for column in columns
                    )
                    for row in range(len(grid))
                ],
                zmin=math.log10(_FLOOR),
                zmax=math.log10(max(highest, 10.0)),
                colorscale=_GREYS,
                hoverinfo="skip",
                colorbar=_count_bar(highest),
            )
        )
    for verdict, style in VERDICT_STYLES.items():
        placed = [(i, m) for i, result in enumerate(results) for m in result.modes if m.verdict is verdict]
        if placed:
            plot.add_trace(
                scatter(
                    x=[column for column, _ in placed],
                    y=rounded(axis.place(mode.held_out_eigenvalue) for _, mode in placed),
                    name=style.label,
                    mode="markers",
                    marker={
                        "symbol": style.symbol,
                        "size": 8,
                        "color": style.colour,
                        "line": {"width": 1, "color": "white"},
                    },
                    hovertext=[hover(m, f"steps {steps(results[i])}", _eigenvalue(m)) for i, m in placed],
                    hoverinfo="text",
                )
            )
    labels = axis.labels()
    plot.update_xaxes(**window_axis(results))
    plot.update_yaxes(tickvals=labels["tickvals"], ticktext=labels["ticktext"], showgrid=False)
    plot.update_layout(margin={"t": 76})
    modes = [mode for result in results for mode in result.modes]
    first, last = results[0].curvature.lambda_max, results[-1].curvature.lambda_max
    return Figure(
        "spectra",
        "The spectrum over the run",
        "Each column is the spectrum of one window (darker: more eigenvalues nearby) with the held-out "
        "eigenvalues of its directions as marks: stiff ones that leave the bulk upwards say that training "
        "sharpens, marks that sink into it say that there is less left to confine them.",
        with_empty_note(plot, modes),
        f"{len(results)} windows; the largest eigenvalue goes from {number(first)} to {number(last)}.",
    )


@dataclass(frozen=True)
class _Axis:
    """An axis for eigenvalues of both signs: logarithmic far from zero, linear near it.

    A value v lies at ``asinh(v / linear)``.

    Attributes:
        linear: where the one turns into the other (loss / weight²).
        low: its lower end, a place.
        high: its upper end.
    """

    linear: float
    low: float
    high: float

    @classmethod
    def of(cls, results: Sequence[WindowResult]) -> _Axis:
        values = [0.0]
        for result in results:
            values += [*result.curvature.density_nodes, result.curvature.lambda_max]
            values += [mode.held_out_eigenvalue for mode in result.modes]
        values = [value for value in values if math.isfinite(value)]
        largest = max(map(abs, values)) or 1.0
        linear = 10.0 ** math.floor(math.log10(largest * _LINEAR_SHARE))
        # Nor finer than what is known of the bulk at zero.
        coarse = max((_width_at_zero(result) for result in results), default=0.0)
        if coarse > linear:
            linear = 10.0 ** math.ceil(math.log10(coarse / 3))
        places = [math.asinh(value / linear) for value in (min(values), max(values))]
        return cls(linear, places[0] - 1.0, places[1] + 1.0)

    def place(self, value: float) -> float:
        return math.asinh(value / self.linear) if math.isfinite(value) else math.nan

    def value(self, place: float) -> float:
        return self.linear * math.sinh(place)

    def grid(self, count: int) -> list[float]:
        return [self.low + (self.high - self.low) * i / (count - 1) for i in range(count)]

    def labels(self) -> dict[str, object]:
        """Ticks at zero and at powers of ten on both sides."""
        exponent = round(math.log10(self.linear))
        powers = [10.0**e for e in range(exponent + 1, exponent + 8)]
        values = [*(-p for p in reversed(powers)), 0.0, *powers]
        shown = [v for v in values if self.low <= self.place(v) <= self.high]
        signs = [
            f"{'−' if v < 0 else ''}10<sup>{round(math.log10(abs(v)))}</sup>" if v else "0" for v in shown
        ]
        return {
            "tickvals": [self.place(v) for v in shown],
            "ticktext": signs,
            "range": [self.low, self.high],
        }


def _width_at_zero(result: WindowResult) -> float:
    """Width of the node of the bulk that is nearest to zero."""
    found = result.curvature
    pairs = zip(found.density_nodes, found.density_widths, strict=True)
    return min(((abs(node), width) for node, width in pairs if width > 0), default=(0.0, 0.0))[1]


def _counts(result: WindowResult, axis: _Axis, grid: Sequence[float]) -> list[float]:
    """Eigenvalues near each place of a grid; empty where no search has seen the bulk."""
    found = result.curvature
    columns = (found.density_nodes, found.density_weights, found.density_widths)
    spread = [
        (axis.place(node + width * (2 * i + 1 - parts) / parts), found.parameters * weight / parts)
        for node, weight, width in zip(*columns, strict=True)
        for parts in ((_PARTS if width else 1),)
        for i in range(parts)
    ]
    if not spread:
        return []
    nodes, heights = np.array(spread).T
    kernel = np.exp(-0.5 * ((np.asarray(grid)[:, None] - nodes) / _KERNEL) ** 2)
    counts: list[float] = (kernel @ heights).tolist()
    return counts


def _present(modes: Sequence[ModeResult]) -> list[Verdict]:
    return [verdict for verdict in VERDICT_STYLES if any(mode.verdict is verdict for mode in modes)]


def _marks(modes: Sequence[ModeResult], verdict: Verdict, axis: _Axis, scale: float) -> Trace:
    """The directions of one verdict below the curve, each with its residual as a bar."""
    style = VERDICT_STYLES[verdict]
    chosen = [mode for mode in modes if mode.verdict is verdict]
    places = [axis.place(mode.eigenvalue) for mode in chosen]
    reach = [mode.residual * abs(scale) for mode in chosen]
    ends = [
        (axis.place(m.eigenvalue - r), axis.place(m.eigenvalue + r))
        for m, r in zip(chosen, reach, strict=True)
    ]
    return scatter(
        x=finite(places),
        y=[_RUG] * len(chosen),
        error_x={
            "type": "data",
            "symmetric": False,
            "array": finite(end[1] - place for end, place in zip(ends, places, strict=True)),
            "arrayminus": finite(place - end[0] for end, place in zip(ends, places, strict=True)),
            "width": 4,
            "thickness": 1.6,
        },
        name=style.label,
        mode="markers",
        marker={
            "symbol": [f"{style.symbol}-open" if m.kind is ModeKind.FLAT else style.symbol for m in chosen],
            "size": 9,
            "color": style.colour,
            "line": {"width": 1.5},
        },
        hovertext=[
            hover(m, f"v·Hv {number(m.eigenvalue)} on the batches that found it", f"residual ± {number(r)}")
            for m, r in zip(chosen, reach, strict=True)
        ],
        hoverinfo="text",
    )


def _eigenvalue(mode: ModeResult) -> str:
    return f"v·Hv held out {plus_minus(mode.held_out_eigenvalue, mode.held_out_standard_error)}"


def _count_bar(highest: float) -> dict[str, object]:
    decades = range(0, max(math.ceil(math.log10(max(highest, 10.0))), 1) + 1)
    return {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 1.02,
        "yanchor": "bottom",
        "len": 0.5,
        "thickness": 10,
        "title": {"text": "eigenvalues nearby", "side": "top", "font": {"size": 12}},
        "tickvals": list(decades),
        "ticktext": [f"10<sup>{d}</sup>" if d else "1" for d in decades],
    }
