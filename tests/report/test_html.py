"""The page of a run: complete, escaped, self-contained, and drawn by a real browser."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sgd_probe.report.compare import build_comparison, compare
from sgd_probe.report.html import build_report, write_report
from sgd_probe.report.wording import VERDICT_STYLES
from sgd_probe.result import WindowResult
from tests.helpers.results import make_mode, make_window, run_info, without_numbers, write_run_folder

HOSTILE = "</script><img class=owned src=x onerror=\"document.title='owned'\">'<!--&\u2028"
MAX_BYTES = 6_000_000
FIGURES = 12


class Page(HTMLParser):
    """Elements, attributes and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._silent = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._silent = tag in {"script", "style"}

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def hostile_window() -> WindowResult:
    """A window whose every text is an attack."""
    window = make_window()
    mode = make_mode(
        f"top_01{HOSTILE}", detail=HOSTILE, reason=HOSTILE, marks=(HOSTILE,), layer_shares={HOSTILE: 1.0}
    )
    return replace(
        window,
        optimizer=HOSTILE,
        sampling=HOSTILE,
        warnings=(HOSTILE,),
        curvature=replace(window.curvature, message=HOSTILE, self_test=HOSTILE, converged=False),
        modes=(mode, *window.modes[1:]),
    )


def hostile_folder(parent: Path) -> Path:
    info = run_info(
        name=HOSTILE,
        config={HOSTILE: {HOSTILE: [HOSTILE]}},
        plan=[HOSTILE],
        versions={HOSTILE: HOSTILE},
        parameters={HOSTILE: HOSTILE},
    )
    return write_run_folder(parent / "<b class=owned>run", [hostile_window()], info)


def test_page_tells_the_verdicts_the_numbers_the_cost_and_the_plan(tmp_path: Path) -> None:
    window = make_window()
    page = Page(build_report(write_run_folder(tmp_path, [make_window(0), window])))
    assert "7 confined, 1 sampling-confined, 2 diffusive" in page.text
    assert "(steps 200–1203)" in page.text
    for style in VERDICT_STYLES.values():
        assert style.meaning in page.text
    for mode in window.modes:
        assert mode.name in page.text
        assert mode.reason in page.text
    for text in (
        *window.warnings,
        *run_info()["plan"],
        window.sampling,
        window.curvature.self_test,
        "max_overhead",
    ):
        assert text in page.text
    assert "512 samples in 8 batches" in page.text
    assert "256 other samples in 4 batches" in page.text
    assert "rotated by 31 degrees" in page.text
    assert "−1.90\u00a0±\u00a00.11" in page.text


def test_an_interior_direction_is_an_eigenvector_or_a_mixed_direction(tmp_path: Path) -> None:
    modes = (
        make_mode("top_01", converged=False),
        make_mode("interior_01", eigenvalue=2.0),
        make_mode("interior_02", eigenvalue=0.3, effective_curvature=0.512, converged=False),
        make_mode("flat_01", eigenvalue=0.01),
    )
    text = Page(build_report(write_run_folder(tmp_path, [make_window(modes=modes)]))).text
    assert "the stiffest ones first, then the interior and the near-flat ones" in text
    top, first, second, flat = (
        text[text.index(start) : text.index(end)]
        for start, end in (
            ("top_01", "interior_01"),
            ("interior_01", "interior_02"),
            ("interior_02", "flat_01"),
            ("flat_01", "How to read it"),
        )
    )
    assert "not converged" in top and "effective;" not in top
    assert not any(word in first for word in ("not converged", "mixed direction", "effective;"))
    assert "mixed direction" in second and "0.512" in second and "effective; v·Hv 0.300" in second
    assert "mixed direction" not in flat and "effective;" in flat


def test_markup_can_be_read_aloud_and_reached_by_keyboard(tmp_path: Path) -> None:
    page = Page(build_report(write_run_folder(tmp_path, [make_window()])))
    assert page.all("html") == [{"lang": "en"}]
    assert page.count("h1") == page.count("main") == page.count("title") == 1
    assert page.count("table") == page.count("caption") == 2
    assert all(cell.get("scope") in {"col", "row"} for cell in page.all("th"))
    assert page.count("header") == page.count("nav") == page.count("footer") == 1
    assert page.count("figure") == page.count("figcaption") == FIGURES
    described = [plot for plot in page.all("div") if plot.get("class") == "plot"]
    assert len({plot["aria-label"] for plot in described}) == FIGURES
    for plot in described:
        title, _, summary = str(plot["aria-label"]).partition(". ")
        assert plot["role"] == "img" and title and summary.endswith(".")
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(deeper - level <= 1 for level, deeper in itertools.pairwise(levels)), "a level is left out"
    targets = {link["href"] for link in page.all("a")}
    assert targets <= {f"#{element['id']}" for _, element in page.elements if "id" in element}
    assert len(targets) > 5
    scrolling = [block for block in page.all("div") if block.get("class") == "scroll"]
    assert all(block["tabindex"] == "0" and block["aria-labelledby"] for block in scrolling)
    identifiers = [element["id"] for _, element in page.elements if "id" in element]
    assert len(set(identifiers)) == len(identifiers)


def test_page_is_one_file_below_the_limit_and_asks_no_network(tmp_path: Path) -> None:
    text = build_report(write_run_folder(tmp_path, [make_window(i) for i in range(100)]))
    page = Page(text)
    assert len(text.encode()) < MAX_BYTES / 2
    assert page.count("link") == 0
    assert all("src" not in element for _, element in page.elements)
    assert all(str(link["href"]).startswith("#") for link in page.all("a"))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_a_page_of_a_training_that_goes_on_says_so(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path, [make_window()])
    assert "still training at step 1203" in Page(build_report(folder, running=True)).text
    assert "still training" not in Page(build_report(folder)).text


def test_everything_from_the_files_is_escaped(tmp_path: Path) -> None:
    page = Page(build_report(hostile_folder(tmp_path)))
    assert page.count("img") == page.count("b") == 0
    assert page.text.count("<img class=owned") > 10
    assert "<b class=owned>run" in page.text


def test_figures_survive_their_way_through_the_page(tmp_path: Path) -> None:
    page = build_report(hostile_folder(tmp_path))
    blocks = page.split('<script type="application/json"')[1:]
    assert len(blocks) == FIGURES
    for block in blocks:
        data = block[block.index(">") + 1 : block.index("</script>")]
        assert json.loads(data)["data"]


@pytest.mark.parametrize(
    "tail", ['{"schema": 1, "index": 3, "ope', '{"schema": 1, "optimizer": "\udc80', "null"]
)
def test_a_line_broken_off_by_a_kill_is_survived_and_mentioned(tmp_path: Path, tail: str) -> None:
    folder = write_run_folder(tmp_path, [make_window()])
    with (folder / "windows.jsonl").open("ab") as file:
        file.write(tail.encode(errors="surrogateescape"))
    text = Page(build_report(folder)).text
    assert "line 2 of windows.jsonl" in text
    assert "7 confined" in text


def test_a_run_resumed_after_a_broken_line_shows_both_parts(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path, [make_window(0)], tail='{"schema": 1, "ind\n')
    with (folder / "windows.jsonl").open("a") as file:
        file.write(json.dumps(make_window(1).to_dict()) + "\n")
    text = Page(build_report(folder)).text
    assert "2 windows" in text
    assert "line 2 of windows.jsonl" in text


@pytest.mark.parametrize("windows_file", [True, False])
def test_a_run_without_a_closed_window_says_so_and_shows_the_plan(tmp_path: Path, windows_file: bool) -> None:
    folder = write_run_folder(tmp_path)
    if not windows_file:
        (folder / "windows.jsonl").unlink()
    page = build_report(folder)
    assert "No window has closed yet" in page
    assert "First window at step 200" in page
    assert "plotly" not in page.lower()
    assert len(page) < 20_000


def test_an_unfinished_window_and_an_unconverged_solver_are_told_first(tmp_path: Path) -> None:
    window = make_window(complete=False, steps=300, expected_false_flags=math.nan)
    window = replace(window, curvature=replace(window.curvature, converged=False, message="stopped at 60"))
    text = Page(build_report(write_run_folder(tmp_path, [window]))).text
    assert "ended after 300 of 1000 planned steps" in text
    assert "Not every stiff direction converged to an eigenvector: stopped at 60." in text
    assert "wrong flags" not in text


def test_unknown_numbers_and_no_modes_at_all_make_a_page(tmp_path: Path) -> None:
    modes = tuple(without_numbers(mode) for mode in make_window().modes)
    text = Page(build_report(write_run_folder(tmp_path / "a", [make_window(modes=modes)]))).text
    assert "unknown" in text
    assert "nan" not in text.lower()
    empty = Page(build_report(write_run_folder(tmp_path / "b", [make_window(modes=(), warnings=())])))
    assert "No modes in the last window" in empty.text
    assert "Before you trust this" not in empty.text


def test_missing_or_damaged_runs_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a run folder, found nothing"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected run\.json"):
        build_report(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        build_report(tmp_path)
    write_run_folder(tmp_path, info={"name": "x"})
    with pytest.raises(ValueError, match="expected 'config'"):
        build_report(tmp_path)
    write_run_folder(tmp_path, tail='{"schema": 99}')
    with pytest.raises(ValueError, match="line 1: expected a window result of schema 1, found 99"):
        build_report(tmp_path)


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run_folder(tmp_path / "run")
    assert write_report(folder) == folder / "report.html"
    before = sorted(folder.iterdir())

    def fail(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    (folder / "report.html").write_text("the old one")
    with pytest.raises(OSError, match="disk full"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "the old one"
    assert sorted(folder.iterdir()) == before


def test_the_page_can_go_elsewhere_but_not_into_nothing(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run")
    assert (
        write_report(folder, tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    )
    with pytest.raises(ValueError, match="found the folder"):
        write_report(folder, tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a folder for the report"):
        write_report(folder, tmp_path / "no" / "page.html")


# A real browser.

MEASURE = f"<script>{Path(__file__).with_name('measure.js').read_text()}</script></body>"
COLLECT = """<script>const found = []; addEventListener("message", (event) => { found.push(event.data);
  document.getElementById("found").textContent = JSON.stringify(found); })</script><pre id="found"></pre>"""
#: The page and the width (CSS pixels) of each frame. A window cannot be as narrow as a phone; a frame can.
FRAMES = {
    "wide": ("run", 1280),
    "phone": ("run", 390),
    "hostile": ("hostile", 390),
    "comparison": ("comparison", 1280),
    "comparison on a phone": ("comparison", 390),
}


def browser() -> str:
    """A Chromium on PATH; without one the test is skipped, or fails where a browser is required."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    message = "no chromium, chromium-browser or google-chrome on PATH"
    if os.environ.get("SGD_PROBE_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{message}, and SGD_PROBE_REQUIRE_BROWSER=1 asks for one")
    pytest.skip(f"{message}: the page was not rendered")


def render(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The DOM of a page after its scripts ran, and the console's lines."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --window-size=2200,1000 "
        "--virtual-time-budget=15000 --dump-dom"
    )
    command = [browser(), *flags.split(), f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
def test_a_browser_draws_every_figure_at_both_widths_without_errors(tmp_path: Path) -> None:
    browser()
    folders = {
        "run": write_run_folder(tmp_path / "run", [make_window(i) for i in range(3)]),
        "hostile": hostile_folder(tmp_path),
    }
    for name, folder in folders.items():
        (tmp_path / f"{name}.html").write_text(
            build_report(folder).replace("</body>", MEASURE), encoding="utf-8"
        )
    third = write_run_folder(tmp_path / "third", [make_window(2)])
    compared = build_comparison(compare([*folders.values(), third]))
    (tmp_path / "comparison.html").write_text(compared.replace("</body>", MEASURE), encoding="utf-8")
    frames = "".join(
        f'<iframe name="{frame}" src="{page}.html" style="border:0;width:{width}px;height:800px"></iframe>'
        for frame, (page, width) in FRAMES.items()
    )
    (tmp_path / "frames.html").write_text(f"<!DOCTYPE html><body>{COLLECT}{frames}</body>", encoding="utf-8")

    dom, console = render(tmp_path / "frames.html", tmp_path / "profile")

    assert console == []
    found: dict[str, dict[str, Any]] = {
        measured["frame"]: measured
        for measured in json.loads(dom.split('<pre id="found">')[1].split("</pre>")[0].replace("&lt;", "<"))
    }
    assert set(found) == set(FRAMES)
    for frame, (_, width) in FRAMES.items():
        measured = found[frame]
        assert measured["width"] == width
        assert measured["scroll"] <= width, "the page scrolls sideways"
        figures = 4 if frame.startswith("comparison") else FIGURES
        assert measured["figures"] == measured["drawn"] == figures, frame
        assert measured["clipped"] == [], "figures that reach beyond the page"
        assert measured["hidden"] == 0
        assert measured["covered"] == [], "a header that leaves no room for what it heads"
        assert measured["owned"] == [], "words of a run that became markup"
        assert measured["pale"] == [], "text that is hard to tell from its background"
        assert measured["unfocused"] == [], "what has the keyboard's focus does not show it"
        assert measured["title"].startswith(("sgd_probe report", "sgd_probe comparison"))
        assert not [title for title in measured["buttons"] if "hare" in title or "cloud" in title.lower()]
