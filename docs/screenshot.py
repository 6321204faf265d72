r"""Take a picture of a report page, or of parts of it, in headless Chromium.

The README's picture:

    python docs/screenshot.py demo_run/sgd_probe/report.html docs/images/report.png \
        --keep header figures figure-spectrum figure-displacement --size 1280,1330
"""

from __future__ import annotations

import argparse
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
    "--virtual-time-budget=10000",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--size", default="1280,1500", help="width,height in pixels (%(default)s)")
    parser.add_argument("--keep", nargs="*", default=[], help="sections and figures to show, by id (all)")
    options = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print(f"expected one of {', '.join(BROWSERS)} on PATH, found none", file=sys.stderr)
        return 2
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(options.page.read_text().replace("</head>", style(options.keep) + "</head>", 1))
        command = [
            browser,
            *FLAGS,
            f"--user-data-dir={folder}/profile",
            f"--window-size={options.size}",
            f"--screenshot={options.picture.resolve()}",
            page.as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    print(options.picture)
    return 0


def style(keep: list[str]) -> str:
    """A style that hides all sections and figures but those that are named."""
    if not keep:
        return ""
    others = "".join(f":not(#{name})" for name in keep)
    header = "nav { display: none } " + ("" if "header" in keep else "header { display: none }")
    return f"<style>main > section{others}, figure{others} {{ display: none }} {header}</style>"


if __name__ == "__main__":
    sys.exit(main())
