"""The noise of the minibatch gradient: its variance along the modes, and whether an epoch cancels it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import plotly.graph_objects as go

from sgd_probe.report.figures.points import by_verdict, curvature, curvature_note, in_words
from sgd_probe.report.figures.style import (
    CURVATURE_AXIS,
    INK,
    SOFT,
    Figure,
    bars,
    canvas,
    finite,
    log_axis,
    text,
    verdict_count,
    with_empty_note,
)
from sgd_probe.report.wording import VERDICT_STYLES, interval, number
from sgd_probe.result import Interval, ModeResult, WindowResult

_Z95 = 1.96


def noise(result: WindowResult) -> Figure:
    """Gradient noise variance along each mode against its curvature, with the line of proportionality."""
    plot = canvas(CURVATURE_AXIS, "noise variance (loss / weight)²", entries=verdict_count(result.modes) + 1)
    plot.add_traces(by_verdict(result.modes, curvature, lambda mode: mode.noise_variance))
    line = _proportional_line(result.modes)
    if line is not None:
        plot.add_trace(line)
    plot.update_xaxes(log_axis(curvature(mode).value for mode in result.modes))
    plot.update_yaxes(log_axis(mode.noise_variance.value for mode in result.modes))
    return Figure(
        "noise",
        "Gradient noise against curvature",
        "Near a minimum the noise of the minibatch gradient follows the curvature, so that points lie along "
        "the dotted line of proportionality (drawn through the median ratio). "
        f"{curvature_note(result.modes)}.",
        with_empty_note(plot, result.modes),
        in_words(result.modes, "noise variance", "(loss / weight)²", lambda mode: mode.noise_variance),
    )


def autocorrelation(result: WindowResult) -> Figure:
    """Correlation of the noise of two steps, of an epoch and in succession, beside what it should be."""
    epoch, expected = _epoch_correlation(result), result.expected_epoch_correlation
    modes = [mode for mode in result.modes if math.isfinite(mode.noise_correlation)]
    plot = canvas("", "correlation of the noise of two steps", entries=verdict_count(modes) + 2)
    told = math.isfinite(epoch.value)
    if told:
        plot.add_trace(
            go.Scatter(
                x=[0],
                y=[epoch.value],
                error_y=bars([epoch]),
                name="of one epoch, all modes",
                mode="markers",
                marker={"symbol": "star-diamond", "size": 12, "color": INK},
                hovertext=[f"two steps of one epoch: {interval(epoch)}"],
                hoverinfo="text",
            )
        )
    spread = _Z95 / math.sqrt(result.steps) if result.steps else math.nan
    for verdict, style in VERDICT_STYLES.items():
        chosen = [(place, mode) for place, mode in enumerate(modes, start=1) if mode.verdict is verdict]
        if chosen:
            plot.add_trace(_successive(chosen, style.label, style.symbol, style.colour, spread))
    level = expected if math.isfinite(expected) else math.nan
    if math.isfinite(level):
        name = "independent draws: 0" if level == 0 else f"without replacement: −1/(n−1) = {number(level)}"
        plot.add_trace(
            go.Scatter(
                x=[-0.7, len(modes) + 0.7],
                y=[level, level],
                name=name,
                mode="lines",
                line={"color": INK, "width": 1.4, "dash": "dot"},
                hoverinfo="skip",
            )
        )
    labels = ["one epoch" if told else "", *(text(mode.name) for mode in modes)]
    plot.update_xaxes(
        tickvals=list(range(len(labels))), ticktext=labels, range=[-0.7, len(modes) + 0.7], showgrid=False
    )
    plot.update_yaxes(zeroline=True, zerolinecolor=SOFT, zerolinewidth=1)
    plot.update_layout(legend={"entrywidth": 190})
    return Figure(
        "autocorrelation",
        "Does an epoch cancel its noise?",
        "A loader that visits every sample once makes any two steps of an epoch correlate by −1/(n−1) at "
        "n steps an epoch, so that an epoch's noise adds up to nothing; the black mark is measured over "
        "whole epochs (95% interval, five at least) and should lie on the dotted line, the coloured ones are "
        "successive steps of each mode, whose bars are the 95% range of chance.",
        with_empty_note(plot, [*modes, *([epoch] if told else [])]),
        f"Two steps of one epoch correlate by {interval(epoch)}, expected {number(expected)}.",
    )


def _epoch_correlation(result: WindowResult) -> Interval:
    """With its interval where the window is recent enough to have one."""
    measured = result.epoch_correlation_interval
    if math.isfinite(measured.value):
        return measured
    return Interval(result.epoch_correlation, math.nan, math.nan)


def _successive(
    placed: Sequence[tuple[int, ModeResult]], name: str, symbol: str, colour: str, spread: float
) -> go.Scatter:
    values = [mode.noise_correlation for _, mode in placed]
    return go.Scatter(
        x=[place for place, _ in placed],
        y=finite(values),
        error_y=bars([Interval(value, value - spread, value + spread) for value in values]),
        name=name,
        mode="markers",
        marker={"symbol": symbol, "size": 8, "color": colour},
        hovertext=[
            f"<b>{text(mode.name)}</b><br>successive steps: {number(mode.noise_correlation)}"
            for _, mode in placed
        ],
        hoverinfo="text",
    )


def _proportional_line(modes: Sequence[ModeResult]) -> go.Scatter | None:
    """Noise variance proportional to curvature, through the median ratio."""
    pairs = [(curvature(mode).value, mode.noise_variance.value) for mode in modes]
    drawable = [(x, y) for x, y in pairs if 0 < x < math.inf and 0 < y < math.inf]
    if len(drawable) < 2:
        return None
    ratio = statistics.median(y / x for x, y in drawable)
    ends = [min(drawable)[0], max(drawable)[0]]
    return go.Scatter(
        x=ends,
        y=finite(ratio * x for x in ends),
        name="variance ∝ curvature",
        mode="lines",
        line={"color": INK, "width": 1.2, "dash": "dot"},
        hoverinfo="skip",
    )
