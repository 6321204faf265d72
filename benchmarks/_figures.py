"""A plotly figure as a picture; chromium must be on PATH."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SCREENSHOT = Path(__file__).resolve().parent.parent / "docs" / "screenshot.py"


def picture(figure: Any, path: Path, size: tuple[int, int] = (1000, 620)) -> None:
    """Write a figure as a PNG of a size in pixels."""
    figure.update_layout(width=size[0], height=size[1])
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        html = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False})
        page.write_text(
            html.replace("<head>", "<head><style>body { margin: 0 }</style>", 1), encoding="utf-8"
        )
        shape = f"{size[0]},{size[1]}"
        subprocess.run([sys.executable, str(SCREENSHOT), str(page), str(path), "--size", shape], check=True)
