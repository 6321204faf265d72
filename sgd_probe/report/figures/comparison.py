"""Several runs in one figure: a colour and a symbol for each run, since verdicts are not what is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sgd_probe.report.figures.drawing import Trace, scatter
from sgd_probe.report.figures.points import Quantity, bare, curvature, points
from sgd_probe.report.figures.style import (
    CURVATURE_AXIS,
    INK,
    Figure,
    bars,
    canvas,
    finite,
    log_axis,
    mode_names,
    text,
    with_empty_note,
)
from sgd_probe.report.figures.timeline import verdict_grid
from sgd_probe.report.scaling import RunDiffusion, comparable
from sgd_probe.report.wording import interval, number
from sgd_probe.result import ModeResult, WindowResult

#: Told apart by lightness too, and used for no verdict.
_COLOURS = ("#1b1b1b", "#5b3f95", "#8f6f00", "#0b7a75", "#8c2d52", "#5a7d9a")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "hexagon")
_LEGEND = 250


def compared_spectra(runs: Mapping[str, WindowResult]) -> Figure:
    """Curvature of every direction of each run's last window."""
    names = mode_names(list(runs.values()))
    plot = canvas("direction", CURVATURE_AXIS, entries=len(runs), entry_width=_LEGEND)
    places = {name: float(i) for i, name in enumerate(names)}
    plot.add_traces(_by_run(runs, lambda mode: bare(places[mode.name]), curvature))
    plot.update_xaxes(
        tickvals=list(places.values()),
        ticktext=[text(name) for name in names],
        range=[-0.6, len(names) - 0.4],
    )
    plot.update_yaxes(**log_axis(curvature(m).value for r in runs.values() for m in r.modes))
    return Figure(
        "compared_spectra",
        "Curvature of each direction",
        "Points of one column are directions of the same rank in each run's last window (bars: one standard "
        "error); a larger learning rate tends to settle where the stiffest curvature is smaller.",
        with_empty_note(plot, names),
        " ".join(f"{name}: largest {number(r.curvature.lambda_max)}." for name, r in runs.items()),
    )


def compared_noise(runs: Mapping[str, WindowResult]) -> Figure:
    """Gradient noise variance against curvature for each run's last window."""
    modes = [mode for result in runs.values() for mode in result.modes]
    plot = canvas(CURVATURE_AXIS, "noise variance (loss / weight)²", entries=len(runs), entry_width=_LEGEND)
    plot.add_traces(_by_run(runs, curvature, lambda mode: mode.noise_variance))
    plot.update_xaxes(**log_axis(curvature(mode).value for mode in modes))
    plot.update_yaxes(**log_axis(mode.noise_variance.value for mode in modes))
    return Figure(
        "compared_noise",
        "Gradient noise against curvature",
        "Runs that differ in their batch size alone lie on parallel lines, the noise variance being "
        "inversely proportional to it; one line for all says that equal curvature has equal noise.",
        with_empty_note(plot, modes),
    )


def compared_verdicts(runs: Mapping[str, WindowResult]) -> Figure:
    """The verdict of every direction of each run's last window, as a coloured grid."""
    plot = verdict_grid(list(runs.values()), [text(name) for name in runs], "run")
    return Figure(
        "compared_verdicts",
        "Verdicts",
        "One column per run, one row per name; a name is a rank, not one and the same direction, and a "
        "verdict holds over its own run's window.",
        plot,
    )


def diffusion_scaling(runs: Mapping[str, RunDiffusion]) -> Figure:
    """D per unit time and noise variance against the learning rate, with the line of the theory."""
    plot = canvas(
        "effective learning rate η", "2 D / σ², per unit time", entries=len(runs) + 1, entry_width=_LEGEND
    )
    known = {name: run for name, run in runs.items() if comparable(run)}
    for index, (name, run) in enumerate(runs.items()):
        if name in known:
            plot.add_traces(_scaled(name, run, index))
    rates = [run.rate for run in known.values()]
    if rates:
        ends = [min(rates) / 1.5, max(rates) * 1.5]
        plot.add_trace(
            scatter(
                x=ends,
                y=ends,
                name="the theory: η",
                mode="lines",
                line={"color": INK, "width": 1.4, "dash": "dot"},
                hoverinfo="skip",
            )
        )
    plot.update_xaxes(type="log", tickvals=sorted({float(f"{rate:.3g}") for rate in rates}))
    plot.update_yaxes(**log_axis(run.per_noise.value for run in known.values()))
    return Figure(
        "diffusion_scaling",
        "D against the learning rate",
        "Each run's large mark is the mean over its diffusing near-flat directions (95% interval), the small "
        "ones are those directions: D per unit time over half of the noise variance is the learning rate "
        "itself where independent noise alone moves them, so that marks on the dotted line agree with the "
        "theory.",
        with_empty_note(plot, list(known), "no run has a near-flat direction that diffuses"),
        " ".join(
            f"{name}: {interval(run.per_noise)} at learning rate {number(run.rate)}."
            for name, run in known.items()
        ),
    )


def _by_run(runs: Mapping[str, WindowResult], x: Quantity, y: Quantity) -> list[Trace]:
    traces = []
    for index, (name, result) in enumerate(runs.items()):
        marker = {"symbol": _of(_SYMBOLS, index), "size": 9, "color": _of(_COLOURS, index)}
        traces.append(points(result.modes, x, y, text(name), marker))
    return traces


def _scaled(name: str, run: RunDiffusion, index: int) -> list[Trace]:
    colour, symbol = _of(_COLOURS, index), _of(_SYMBOLS, index)
    single = [_per_noise(mode) for mode in run.modes]
    return [
        scatter(
            x=[run.rate * 1.03] * len(single),
            y=finite(single),
            mode="markers",
            marker={"symbol": f"{symbol}-open", "size": 6, "color": colour},
            opacity=0.6,
            showlegend=False,
            hovertext=[
                f"<b>{text(m.name)}</b><br>{number(v)}" for m, v in zip(run.modes, single, strict=True)
            ],
            hoverinfo="text",
        ),
        scatter(
            x=[run.rate],
            y=[run.per_noise.value],
            error_y=bars([run.per_noise]),
            name=text(name),
            mode="markers",
            marker={"symbol": symbol, "size": 12, "color": colour},
            hovertext=[f"<b>{text(name)}</b><br>{interval(run.per_noise)} at η = {number(run.rate)}"],
            hoverinfo="text",
        ),
    ]


def _per_noise(mode: ModeResult) -> float:
    noise = mode.noise_variance.value
    return 2 * mode.diffusion_per_time.value / noise if noise > 0 else math.nan


def _of(values: Sequence[str], index: int) -> str:
    return values[index % len(values)]
