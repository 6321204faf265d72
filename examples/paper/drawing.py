"""How the figures look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from estimates import Estimate

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#7a7a7a"
LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"size": 15, "color": "#222"},
    "margin": {"l": 80, "r": 30, "t": 45, "b": 70},
}


def bars(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """Error bars: 95% intervals."""
    return {
        "symmetric": False,
        "array": [each.high - each.value for each in estimates],
        "arrayminus": [each.value - each.low for each in estimates],
        "thickness": 1.5,
    }
