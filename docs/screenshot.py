"""Take the README's picture: the report page of a run, rendered in headless Chromium.

python docs/screenshot.py demo_run/sgd_probe/report.html docs/images/report.png
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
    parser.add_argument("--anchor", default="", help="id of the element to scroll to")
    options = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print(f"expected one of {', '.join(BROWSERS)} on PATH, found none", file=sys.stderr)
        return 2
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    page = options.page.resolve().as_uri() + (f"#{options.anchor}" if options.anchor else "")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser,
                *FLAGS,
                f"--user-data-dir={profile}",
                f"--window-size={options.size}",
                f"--screenshot={options.picture.resolve()}",
                page,
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
    print(options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
