r"""Take pictures of a page of the probe, or of its parts, in headless Chromium.

The README's picture, and those of docs/panels.md (a file for each figure):

    python docs/screenshot.py demo_run/sgd_probe/report.html docs/images/report.png \
        --keep header figures figure-spectrum figure-displacement --size 1280,1560
    python docs/screenshot.py demo_run/sgd_probe/report.html docs/images/panels --each
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=20000",
)
#: Width of a figure's picture, and the room around it (CSS pixels).
WIDTH, MARGIN = 820, 24
#: Writes the height of every figure, without its caption, into the page once all are drawn.
MEASURE = """<script>const waiting = setInterval(() => {
  if (!document.documentElement.dataset.drawn) return;
  clearInterval(waiting);
  const heights = [...document.querySelectorAll("div.plot")].map(
    (plot) => [plot.dataset.figure, Math.ceil(plot.getBoundingClientRect().height)]);
  document.body.dataset.heights = JSON.stringify(heights).replaceAll('"', "'");
}, 50);</script>"""
#: A figure by itself.
BARE = (
    "figcaption, h2, header, nav, footer, .modebar-container { display: none !important } "
    "figure { margin: 0 !important; padding: 0 !important; border: 0 !important } "
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path, help="file, or with --each the folder of the files")
    parser.add_argument("--size", default="1280,1500", help="width,height in pixels (%(default)s)")
    parser.add_argument("--keep", nargs="*", default=[], help="sections and figures to show, by id (all)")
    parser.add_argument("--each", action="store_true", help="every figure by itself, as large as it is")
    options = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print(f"expected one of {', '.join(BROWSERS)} on PATH, found none", file=sys.stderr)
        return 2
    page = options.page.read_text(encoding="utf-8")
    if not options.each:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        shoot(browser, styled(page, style(options.keep)), options.size, options.picture)
        print(options.picture)
        return 0
    options.picture.mkdir(parents=True, exist_ok=True)
    for name, height in heights(browser, page):
        if options.keep and f"figure-{name}" not in options.keep:
            continue
        alone = (
            f"{style(['figures', f'figure-{name}'])}<style>{BARE}main {{ padding-top: {MARGIN}px }}</style>"
        )
        picture = options.picture / f"{name.replace('_', '-')}.png"
        shoot(browser, styled(page, alone), f"{WIDTH},{height + 2 * MARGIN}", picture)
        print(picture)
    return 0


def heights(browser: str, page: str) -> list[tuple[str, int]]:
    """The figures of a page by name, with their heights at the width of a picture."""
    done = run(
        browser, page.replace("</body>", f"{MEASURE}</body>"), f"--window-size={WIDTH},1000", "--dump-dom"
    )
    found = done.split('data-heights="')[1].split('"')[0]
    return [(name, height) for name, height in json.loads(found.replace("'", '"'))]


def shoot(browser: str, page: str, size: str, picture: Path) -> None:
    run(browser, page, f"--window-size={size}", f"--screenshot={picture.resolve()}")


def run(browser: str, page: str, *flags: str) -> str:
    """Open a page with a profile of its own; returns what the browser prints."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(page, encoding="utf-8")
        command = [browser, *FLAGS, f"--user-data-dir={folder}/profile", *flags, path.as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout


def styled(page: str, css: str) -> str:
    return page.replace("</head>", f"{css}</head>", 1)


def style(keep: list[str]) -> str:
    """A style that hides all sections and figures but those that are named, and the list of sections."""
    if not keep:
        return ""
    others = "".join(f":not(#{name})" for name in keep)
    header = "" if "header" in keep else "header { display: none }"
    return f"<style>main > section{others}, figure{others}, nav {{ display: none }} {header}</style>"


if __name__ == "__main__":
    sys.exit(main())
