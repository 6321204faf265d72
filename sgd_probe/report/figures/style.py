"""What all figures share: their form, their axes and legends, and how a run's words are shown."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sgd_probe.report.figures.drawing import Drawing
from sgd_probe.report.wording import VERDICT_STYLES, number
from sgd_probe.result import Interval, ModeKind, ModeResult, WindowResult

if TYPE_CHECKING:
    import plotly.graph_objects as go

INK = "#1b1b1b"
SOFT = "#6b6b6b"
CURVATURE_AXIS = "|curvature| (loss / weight²)"

_GRID = "#e6e6e6"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
# Pixels. A legend lies below its axes, as wide as they are, and takes the rows that its entries need there.
_WIDE, _NARROW = 1000, 275
_LEGEND_ROW = 20
_LEGEND_SYMBOL = 45
_WIDE_DECADES = 2.0  # a log axis over more than this labels powers of ten only
_NARROW_DECADES = 0.5  # over less than this, all digits
_MAX_TICKS = 8
_MAX_NAME = 24


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure and what a reader needs to read it.

    Attributes:
        name: stable key ("spectrum").
        title: what it shows.
        how_to_read: one sentence that tells what to look for.
        drawing: what Plotly draws, as plain data.
        summary: what is to be seen in it here, in words, for those who do not see it.
    """

    name: str
    title: str
    how_to_read: str
    drawing: Drawing
    summary: str = ""

    @property
    def plot(self) -> go.Figure:
        """The Plotly figure; Plotly checks it, which takes its time."""
        import plotly.graph_objects as go

        return go.Figure(self.drawing.to_plotly_json())


def canvas(x_title: str, y_title: str, *, entries: int, entry_width: int = 128, height: int = 420) -> Drawing:
    """An empty figure in the common style, ``height`` pixels high plus its legend.

    ``layout.meta.narrow_height`` is the height that a narrow screen needs, in pixels.
    """
    return Drawing(
        {
            # What the template "none" of Plotly's package stands for: the browser's own defaults.
            "template": {"data": {"scatter": [{"type": "scatter"}]}},
            "height": height + _legend_height(entries, entry_width, _WIDE),
            "meta": {"narrow_height": height - 20 + _legend_height(entries, entry_width, _NARROW)},
            "font": {"family": _FONT, "size": 13, "color": INK},
            "margin": {"l": 64, "r": 16, "t": 36, "b": 56},
            "hoverlabel": {"bgcolor": "white", "font": {"color": INK}, "align": "left"},
            "showlegend": True,
            "legend": {
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
            "xaxis": _axis(x_title),
            "yaxis": _axis(y_title),
        }
    )


def _axis(title: str) -> dict[str, object]:
    return {
        "title": {"text": title, "font": {"size": 13}},
        "gridcolor": _GRID,
        "linecolor": SOFT,
        "showline": True,
        "ticks": "outside",
        "tickcolor": SOFT,
        "zeroline": False,
        "exponentformat": "power",
        "automargin": True,
        "tickfont": {"size": 12},
    }


def _legend_height(entries: int, entry_width: int, width: int) -> int:
    columns = max(1, width // (entry_width + _LEGEND_SYMBOL))
    return _LEGEND_ROW * math.ceil(entries / columns)


def log_axis(values: Iterable[float]) -> dict[str, object]:
    """A logarithmic axis whose labels stay apart, however many decades the values span."""
    logs = [math.log10(value) for value in values if 0 < value < math.inf]
    if logs and max(logs) - min(logs) > _WIDE_DECADES:
        decades = math.ceil((max(logs) - min(logs)) / 8)
        minor = {"ticks": "outside", "ticklen": 3, "tickcolor": SOFT}
        return {"type": "log", "dtick": decades, "minor": minor}
    if not logs:
        return {"type": "log"}
    # Over little more than a decade Plotly would label every digit.
    digits = (1, 2, 5) if max(logs) - min(logs) > _NARROW_DECADES else range(1, 10)
    exponents = range(math.floor(min(logs)) - 1, math.ceil(max(logs)) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [number(tick, 1) for tick in ticks]}


def window_axis(results: Sequence[WindowResult]) -> dict[str, object]:
    """An axis with a place for every window, labelled by its first optimizer step."""
    shown = range(0, len(results), stride(len(results)))
    return {
        "tickvals": list(shown),
        "ticktext": [str(results[i].opened_at_step) for i in shown],
        "range": [-0.5, max(len(results), 1) - 0.5],
        "showgrid": False,
    }


def with_empty_note(plot: Drawing, content: Sequence[object], note: str = "nothing was measured") -> Drawing:
    """Say so where there is nothing to draw."""
    if not content:
        plot.update_xaxes(showticklabels=False, showgrid=False)
        plot.update_yaxes(showticklabels=False, showgrid=False)
        plot.add_annotation(
            text=note,
            x=0.5,
            y=0.5,
            xref="paper",
            yref="paper",
            showarrow=False,
            font={"size": 15, "color": SOFT},
        )
    return plot


def bars(values: Sequence[Interval]) -> dict[str, object]:
    """Error bars; caps have no width, so that an unknown interval draws nothing at all."""
    return {
        "type": "data",
        "symmetric": False,
        "array": finite(value.high - value.value for value in values),
        "arrayminus": finite(value.value - value.low for value in values),
        "width": 0,
        "thickness": 1.6,
    }


def steps_of_colour(colours: Sequence[str]) -> list[tuple[float, str]]:
    """A colour scale of equal flat steps."""
    count = len(colours)
    return [(edge / count, colour) for i, colour in enumerate(colours) for edge in (i, i + 1)]


def finite(values: Iterable[float]) -> list[float | None]:
    """Plotly leaves a gap at None."""
    return [value if math.isfinite(value) else None for value in values]


def rounded(values: Iterable[float]) -> list[float | None]:
    """As :func:`finite`, to the five digits that a screen can show: a page has many of them."""
    return [None if value is None else float(f"{value:.5g}") for value in finite(values)]


def hover(mode: ModeResult, *lines: str) -> str:
    """What the pointer shows of a mode."""
    return "<br>".join((f"<b>{text(mode.name)}</b> · {VERDICT_STYLES[mode.verdict].label}", *lines))


def text(value: str) -> str:
    """A run's own words as they are, not as the HTML that Plotly reads; cut where axes have no room."""
    short = value if len(value) <= _MAX_NAME else f"{value[: _MAX_NAME - 1]}…"
    return html.escape(short, quote=False)


def ending(value: str) -> str:
    """As :func:`text`, cut at the front: the end of a parameter's name says what it is."""
    return text(value if len(value) <= _MAX_NAME else f"…{value[1 - _MAX_NAME :]}")


def mode_names(results: Sequence[WindowResult]) -> list[str]:
    """Mode names of all windows: top ones first, flat ones last, each kind in its order of appearance."""
    modes = [mode for result in results for mode in result.modes]
    ordered = sorted(modes, key=lambda mode: list(ModeKind).index(mode.kind))
    return list(dict.fromkeys(mode.name for mode in ordered))


def verdict_count(modes: Iterable[ModeResult]) -> int:
    """Number of different verdicts: that many legend entries."""
    return len({mode.verdict for mode in modes})


def stride(count: int) -> int:
    """Label every how manieth of ``count`` ticks."""
    return max(1, math.ceil(count / _MAX_TICKS))
