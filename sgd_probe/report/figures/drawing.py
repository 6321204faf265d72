"""A figure as the plain data that Plotly draws, put together without Plotly.

Plotly's own classes check every property that they are given, which takes ten times as long as all the rest
of a figure. Figures are drawn while a training waits, so they do without; a test has Plotly check them all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

#: One trace: its type and its properties under Plotly's names.
Trace = dict[str, Any]


def scatter(**properties: Any) -> Trace:
    """A trace of points or lines."""
    return {"type": "scatter", **properties}


def heatmap(**properties: Any) -> Trace:
    """A trace of coloured cells."""
    return {"type": "heatmap", **properties}


class Drawing:
    """Traces and a layout; its methods are called and behave like those of a Plotly figure.

    Attributes:
        data: the traces.
        layout: everything else, by Plotly's names.
    """

    def __init__(self, layout: Mapping[str, Any]) -> None:
        self.data: list[Trace] = []
        self.layout: dict[str, Any] = {"xaxis": {}, "yaxis": {}, **layout}

    def add_traces(self, traces: Iterable[Trace]) -> None:
        self.data += traces

    def add_trace(self, trace: Trace) -> None:
        self.data.append(trace)

    def add_annotation(self, **properties: Any) -> None:
        self.layout.setdefault("annotations", []).append(properties)

    def update_layout(self, **properties: Any) -> None:
        """Set properties; those of a group (``margin``) are added to it."""
        for name, value in properties.items():
            group = self.layout.get(name)
            self.layout[name] = {**group, **value} if isinstance(group, dict) else value

    def update_xaxes(self, **properties: Any) -> None:
        self.update_layout(xaxis=properties)

    def update_yaxes(self, **properties: Any) -> None:
        self.update_layout(yaxis=properties)

    def to_plotly_json(self) -> dict[str, Any]:
        """Traces and layout as one dictionary, as Plotly's figures give theirs."""
        return {"data": self.data, "layout": self.layout}

    def to_json(self) -> str:
        """The same as text, in strict JSON.

        Raises:
            ValueError: a number is not finite.
        """
        return json.dumps(self.to_plotly_json(), allow_nan=False, separators=(",", ":"))
