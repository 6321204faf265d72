"""A window as text for a terminal: with Rich where it is installed and a terminal listens, else plain."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sgd_probe.report.wording import VERDICT_STYLES, horizon, interval, number, plus_minus, share, steps
from sgd_probe.result import ModeResult, Verdict, WindowResult

_COLUMNS = ("direction", "verdict", "curvature", "D per step [95%]", "predicted", "relaxations")
#: Columns of words; the others are numbers, which end alike.
_WORDS = 2
#: Where a table has no room, these columns stay in one piece: the name, the curvature and D.
_UNBROKEN = (0, 2, 3)
#: Narrower than this a table breaks its rows, and wider it is hard to read.
_NARROWEST, _WIDEST = 80, 120
#: All columns take so many characters; where there are fewer, the last two are left out.
_FULL = 100


def window_summary(
    result: WindowResult, *, speaker: str = "sgd_probe", rich: bool | None = None, width: int | None = None
) -> str:
    """The modes of a window as a table, with its counts, its horizon, its cost and its warnings.

    Args:
        result: the window.
        speaker: what the probe calls itself.
        rich: with colours, by Rich; where None, if that is installed and the output is a terminal.
        width: of the table in characters; that of the terminal if None.
    """
    if rich is None:
        rich = importlib.util.find_spec("rich") is not None and sys.stdout.isatty() and sys.stderr.isatty()
    if width is None:
        width = min(max(shutil.get_terminal_size((_WIDEST, 24)).columns, _NARROWEST), _WIDEST)
    columns = len(_COLUMNS) if width >= _FULL else len(_COLUMNS) - 2
    rows = [_row(mode)[:columns] for mode in result.modes]
    table = _rich_table(result, rows, width) if rich else _plain_table(rows)
    title = f"{speaker}: window {result.index}, optimizer steps {steps(result)}"
    return "\n".join([title, f"  {result.optimizer}; {result.sampling}", "", table, "", *_notes(result)])


def places(windows: int, folder: Path | None, speaker: str = "sgd_probe") -> str:
    """Say how many windows there were, and where their results lie."""
    count = f"{speaker}: {windows} window{'' if windows == 1 else 's'} closed."
    if folder is None:
        return f"{count} `probe.results` holds them; give the probe a `run_dir` to keep them."
    return f"{count} Results in {_relative(folder)}{os.sep}, the page is report.html there."


def _row(mode: ModeResult) -> tuple[str, ...]:
    curvature = (
        f"{number(mode.effective_curvature)} effective"
        if mode.mixed and math.isfinite(mode.effective_curvature)
        else plus_minus(mode.held_out_eigenvalue, mode.held_out_standard_error)
    )
    verdict = VERDICT_STYLES[mode.verdict].label + (f" ({mode.detail})" if mode.detail else "")
    return (
        mode.name,
        verdict + (" !" if mode.undermined else ""),
        curvature,
        interval(mode.diffusion, 2),
        number(mode.predicted_diffusion, 2),
        number(mode.relaxation_times),
    )


def _notes(result: WindowResult) -> list[str]:
    counts = result.counts()
    found = ", ".join(f"{counts[v]} {style.label}" for v, style in VERDICT_STYLES.items() if counts[v])
    flags = result.expected_false_flags
    flagged = counts[Verdict.DIFFUSIVE] and math.isfinite(flags)
    wrong = f"; {flags:.1f} of its flags are expected to be wrong" if flagged else ""
    cost = result.cost
    notes = [
        f"{found or 'No modes'}{wrong}. Verdicts hold over {horizon(result)}.",
        "Curvature: v·Hv held out, for mixed directions ‖Hv‖²/|v·Hv|, in loss / weight². D: weight² / step.",
        f"By the end of this window the probe had cost {cost.total_seconds:.1f} s, {share(cost.fraction)} of "
        f"the {cost.training_seconds:.1f} s of training until then.",
    ]
    if any(mode.undermined for mode in result.modes):
        notes.append("! a mark takes the ground from under this verdict; the report says which.")
    return [*notes, *(f"Warning: {warning}" for warning in result.warnings)]


def _plain_table(rows: Sequence[Sequence[str]]) -> str:
    titles = _COLUMNS[: len(rows[0])] if rows else _COLUMNS
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]

    def line(row: Sequence[str]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        text = "  ".join(cell.ljust(w) if i < _WORDS else cell.rjust(w) for i, (cell, w) in cells)
        return text.rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(titles), rule, *map(line, rows)])


def _rich_table(result: WindowResult, rows: Sequence[Sequence[str]], width: int) -> str:
    """The same table in colour, as the text that a terminal draws it from."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(_COLUMNS[: len(rows[0])] if rows else _COLUMNS):
        words = index < _WORDS
        table.add_column(name, justify="left" if words else "right", no_wrap=index in _UNBROKEN)
    for mode, (name, verdict, *numbers) in zip(result.modes, rows, strict=True):
        # Text, not markup: a run's own words may hold brackets.
        mark = Text("■\u00a0", style=VERDICT_STYLES[mode.verdict].colour)
        table.add_row(Text(name), mark + Text(verdict), *map(Text, numbers))
    console = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().strip("\n")


def _relative(path: Path) -> Path:
    """Shorter, where it lies below the working directory."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
