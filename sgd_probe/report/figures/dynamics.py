"""How the weights move along the modes: displacement by lag, and diffusion."""

from __future__ import annotations

from sgd_probe.report.figures.drawing import Trace, scatter
from sgd_probe.report.figures.points import bare, by_verdict, curvature, in_words, points
from sgd_probe.report.figures.style import (
    CURVATURE_AXIS,
    INK,
    SOFT,
    Figure,
    bars,
    canvas,
    finite,
    hover,
    log_axis,
    stride,
    text,
    verdict_count,
    with_empty_note,
)
from sgd_probe.report.wording import VERDICT_STYLES, interval, number
from sgd_probe.result import LagPoint, ModeResult, Verdict, WindowResult

#: Its name in the key, its dash, what it says of a lag, and whether it is drawn in the mode's own colour.
_LINES = (
    ("discrete prediction", "solid", lambda point: point.discrete, True),
    ("Langevin", "dash", lambda point: point.langevin, True),
    ("if it were flat", "dot", lambda point: point.free, False),
)


def displacement(result: WindowResult) -> Figure:
    """Mean squared displacement (weight²) against lag (optimizer steps), measured and predicted."""
    modes = [mode for mode in result.modes if mode.displacements]
    plot = canvas(
        "lag (optimizer steps)",
        "mean squared displacement (weight²)",
        entries=len(modes) + 1 + len(_LINES),
        entry_width=165,
    )
    plot.add_traces(_key() if modes else [])
    seen: dict[Verdict, int] = {}
    for mode in modes:
        rank = seen.get(mode.verdict, 0)
        seen[mode.verdict] = rank + 1
        plot.add_traces(_traces(mode, rank))
    lags = sorted({point.lag for mode in modes for point in mode.displacements})
    plot.update_xaxes(type="log", tickvals=lags[:: stride(len(lags))], tickangle=0)
    plot.update_yaxes(**log_axis(point.measured.value for mode in modes for point in mode.displacements))
    return Figure(
        "displacement",
        "How far the weights get",
        "A confined direction levels off below its dotted line, a diffusive one keeps growing along it with "
        "slope one; points (95% intervals) should lie on the solid line if the discrete theory holds. Each "
        "verdict's first direction is shown: click a name to show or hide it.",
        with_empty_note(plot, modes),
        in_words(
            modes,
            "squared displacement over the longest lag",
            "weight²",
            lambda m: m.displacements[-1].measured,
        ),
    )


def diffusion(result: WindowResult) -> Figure:
    """Apparent D per optimizer step against curvature: measured, predicted, and free of curvature."""
    modes = result.modes
    plot = canvas(CURVATURE_AXIS, "D (weight² / optimizer step)", entries=verdict_count(modes) + 2)
    plot.add_traces(by_verdict(modes, curvature, lambda mode: mode.diffusion))
    for name, symbol, quantity in (
        ("discrete prediction", "line-ew", lambda mode: bare(mode.predicted_diffusion)),
        ("free (no curvature)", "x-thin", lambda mode: bare(mode.free_diffusion)),
    ):
        marker = {"symbol": symbol, "size": 12, "line": {"width": 2, "color": INK}}
        plot.add_trace(points(modes, lambda m: bare(curvature(m).value), quantity, name, marker))
    plot.update_xaxes(**log_axis(curvature(mode).value for mode in modes))
    plot.update_yaxes(**log_axis(mode.diffusion.value for mode in modes))
    return Figure(
        "diffusion",
        "Diffusion against curvature",
        "D is half the squared displacement per step over the lag that the table names: where curvature "
        "holds a direction, points fall below its cross, the D of this noise without any curvature; points "
        "(95% intervals) on their dash agree with the discrete theory.",
        with_empty_note(plot, modes),
        in_words(modes, "D per step", "weight²", lambda mode: mode.diffusion),
    )


def _traces(mode: ModeResult, rank: int) -> list[Trace]:
    """Measured points and all lines of one mode, switched together in the legend."""
    style = VERDICT_STYLES[mode.verdict]
    measured = [point.measured for point in mode.displacements]
    symbols = [other.symbol for other in VERDICT_STYLES.values()]
    shared = {
        "x": [point.lag for point in mode.displacements],
        "legendgroup": mode.name,
        "visible": True if rank == 0 else "legendonly",
    }
    lines = [
        scatter(
            y=finite(map(says, mode.displacements)),
            mode="lines",
            line={"color": style.colour if own else SOFT, "width": 2 if own else 1.4, "dash": dash},
            hoverinfo="skip",
            showlegend=False,
            **shared,
        )
        for _, dash, says, own in _LINES
    ]
    measurements = scatter(
        y=finite(value.value for value in measured),
        error_y=bars(measured),
        mode="markers",
        marker={
            "color": style.colour,
            "symbol": symbols[(symbols.index(style.symbol) + rank) % len(symbols)],
            "size": 8,
        },
        name=f"{text(mode.name)} · {style.label}",
        hovertext=[hover(mode, *_lag_lines(point)) for point in mode.displacements],
        hoverinfo="text",
        **shared,
    )
    return [*lines, measurements]


def _key() -> list[Trace]:
    """Legend entries that say what points and lines are."""
    key = {"x": [None], "y": [None], "hoverinfo": "skip"}
    return [
        scatter(name="measured", mode="markers", marker={"color": INK, "size": 8}, **key),
        *(
            scatter(
                name=name,
                mode="lines",
                line={"color": INK if own else SOFT, "width": 1.8, "dash": dash},
                **key,
            )
            for name, dash, _, own in _LINES
        ),
    ]


def _lag_lines(point: LagPoint) -> tuple[str, ...]:
    return (
        f"lag {point.lag}, {point.count} displacements",
        f"measured {interval(point.measured)}",
        f"discrete {number(point.discrete)}, Langevin {number(point.langevin)}",
        f"if it were flat {number(point.free)}",
    )
