"""The noise of the minibatch gradient: its variance along the modes, and whether an epoch cancels it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from sgd_probe.report.figures.drawing import Trace, scatter
from sgd_probe.report.figures.points import bare, by_verdict, curvature, curvature_note, in_words
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
from sgd_probe.report.wording import interval, number
from sgd_probe.result import Interval, ModeResult, WindowResult


def noise(result: WindowResult) -> Figure:
    """Gradient noise variance along each mode against its curvature, with the line of proportionality."""
    plot = canvas(CURVATURE_AXIS, "noise variance (loss / weight)²", entries=verdict_count(result.modes) + 1)
    plot.add_traces(by_verdict(result.modes, curvature, lambda mode: mode.noise_variance))
    line = _proportional_line(result.modes)
    if line is not None:
        plot.add_trace(line)
    plot.update_xaxes(**log_axis(curvature(mode).value for mode in result.modes))
    plot.update_yaxes(**log_axis(mode.noise_variance.value for mode in result.modes))
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
    """Correlation of the noise of two steps of an epoch, along each mode, beside what the loader makes it."""
    epoch, expected = _epoch_correlation(result), result.expected_epoch_correlation
    modes = [mode for mode in result.modes if math.isfinite(mode.epoch_correlation.value)]
    told = math.isfinite(epoch.value)
    plot = canvas("direction", "correlation of two steps", entries=verdict_count(modes) + 2, entry_width=190)
    ends = [-0.7, len(modes) + 0.7]
    positions = {mode.name: float(place) for place, mode in enumerate(modes, start=1)}
    plot.add_traces(
        by_verdict(modes, lambda mode: bare(positions[mode.name]), lambda mode: mode.epoch_correlation)
    )
    if told:
        plot.add_trace(
            scatter(
                x=[0],
                y=[epoch.value],
                error_y=bars([epoch]),
                name="median mode",
                mode="markers",
                marker={"symbol": "diamond-tall", "size": 13, "color": INK},
                hovertext=[f"median mode: {interval(epoch)}"],
                hoverinfo="text",
            )
        )
    if told and math.isfinite(expected):
        by_loader = "independent draws: 0" if expected == 0 else f"−1/(n−1) = {number(expected)}"
        plot.add_trace(
            scatter(
                x=ends,
                y=[expected, expected],
                name=by_loader,
                mode="lines",
                line={"color": INK, "width": 1.6, "dash": "dot"},
                hoverinfo="skip",
            )
        )
    labels = ["median", *(text(mode.name) for mode in modes)]
    plot.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, range=ends, showgrid=False)
    plot.update_yaxes(zeroline=True, zerolinecolor=SOFT, zerolinewidth=1)
    return Figure(
        "autocorrelation",
        "Does an epoch cancel its noise?",
        "A loader that visits every sample once makes any two of the n steps of an epoch correlate by "
        "−1/(n−1), so that an epoch's noise adds up to nothing; points (95% intervals, over whole epochs) on "
        "the dotted line say that it does, points about zero that draws are independent, and points above "
        "that something beside this noise moves the gradient.",
        with_empty_note(plot, [epoch] if told else [], "this needs five whole epochs in a window"),
        f"Two steps of one epoch correlate by {interval(epoch)} in the median mode, expected "
        f"{number(expected)}."
        if told
        else "Fewer than five whole epochs lie in this window.",
    )


def _epoch_correlation(result: WindowResult) -> Interval:
    """With its interval where the window is recent enough to have one."""
    measured = result.epoch_correlation_interval
    if math.isfinite(measured.value):
        return measured
    return Interval(result.epoch_correlation, math.nan, math.nan)


def _proportional_line(modes: Sequence[ModeResult]) -> Trace | None:
    """Noise variance proportional to curvature, through the median ratio."""
    pairs = [(curvature(mode).value, mode.noise_variance.value) for mode in modes]
    drawable = [(x, y) for x, y in pairs if 0 < x < math.inf and 0 < y < math.inf]
    if len(drawable) < 2:
        return None
    ratio = statistics.median(y / x for x, y in drawable)
    ends = [min(drawable)[0], max(drawable)[0]]
    return scatter(
        x=ends,
        y=finite(ratio * x for x in ends),
        name="variance ∝ curvature",
        mode="lines",
        line={"color": INK, "width": 1.2, "dash": "dot"},
        hoverinfo="skip",
    )
