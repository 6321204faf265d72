"""The page of a run, from its folder: verdicts, modes, figures, and how it was measured at what cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sgd_probe.report.figures import all_figures
from sgd_probe.report.page import (
    bullets,
    facts,
    figure_section,
    page,
    row,
    section,
    small,
    table,
    verdict_mark,
    write_page,
)
from sgd_probe.report.run_folder import WINDOWS_FILE, RunFolder, read_run_folder
from sgd_probe.report.wording import VERDICT_STYLES, headline, interval, number, plus_minus, share, steps
from sgd_probe.result import ModeKind, ModeResult, WindowResult

_LAYERS_SHOWN = 2


#: While the training runs its page shows so many windows, the last ones, and takes no more memory for that.
RUNNING_WINDOWS = 100


def write_report(run_folder: Path, path: Path | None = None, *, running: bool = False) -> Path:
    """Write the page of a run folder, whole or not at all.

    Args:
        run_folder: the folder that holds ``run.json`` and ``windows.jsonl``.
        path: the file to write; ``report.html`` in the run folder if None.
        running: the training goes on, and the page says so.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: there is no run, or no folder to write the page to.
        ValueError: the run cannot be read, or ``path`` is a folder.
    """
    target = run_folder / "report.html" if path is None else path
    write_page(build_report(run_folder, running=running), target)
    return target


def build_report(run_folder: Path, *, running: bool = False) -> str:
    """The page of a run folder as text.

    Args:
        run_folder: the folder that holds ``run.json`` and ``windows.jsonl``.
        running: the training goes on, and the page says so; of more than a hundred windows it shows the last.

    Raises:
        FileNotFoundError: there is no run folder or no ``run.json`` in it.
        ValueError: a file is of another schema or not what the probe writes.
    """
    run = read_run_folder(run_folder, RUNNING_WINDOWS if running else None)
    last = run.windows[-1] if run.windows else None
    figures = all_figures(run.windows) if last else ()
    sections = [_notes(run)]
    if last:
        sections += [
            _verdict_legend(last),
            _modes(last),
            figure_section(figures),
            _history(run.windows),
            _measurement(last),
        ]
    sections.append(_preparation(run))
    return page(f"sgd_probe report: {run.folder}", _header(run, running), sections, bool(figures))


# Sections.


def _header(run: RunFolder, running: bool) -> str:
    last = run.windows[-1] if run.windows else None
    words = headline(last) if last else "No window has closed yet"
    said = [f"Run {run.folder}"]
    if running and last:
        said.append(f"still training at step {last.closed_at_step}: reload this page for later windows")
    if last:
        said += [
            f"{len(run.windows)} window{'s' if len(run.windows) > 1 else ''}",
            f"probe time {share(last.cost.fraction)} of the training time",
        ]
        if math.isfinite(last.expected_false_flags):
            flags = number(last.expected_false_flags, 2)
            said.append(f"about {flags} wrong flags expected by chance in the last window")
    waiting = (
        ""
        if last
        else "<p>While training runs: results appear here once the first window has closed, if this page is "
        "made again then. After training: the plan below says what a window would have taken.</p>"
    )
    return (
        f'<header><p class="eyebrow">sgd_probe report</p><h1>{escape(words)}</h1>'
        f'<p class="facts">{escape(" · ".join(said))}</p>{waiting}</header>\n'
    )


def _notes(run: RunFolder) -> str:
    """Warnings of the last window and of the files, where the reader cannot miss them."""
    notes = [*_file_notes(run)]
    if run.windows:
        notes += _window_notes(run.windows[-1])
    if not notes:
        return ""
    return section("warnings", "Before you trust this", bullets(notes), css="warnings")


def _file_notes(run: RunFolder) -> Iterable[str]:
    if run.unreadable:
        lines = ", ".join(map(str, run.unreadable))
        yield (
            f"Left out because it could not be read: line {lines} of {WINDOWS_FILE}. The process was "
            "probably stopped while it wrote."
        )


def _window_notes(result: WindowResult) -> Iterable[str]:
    if not result.complete:
        yield (
            f"The last window ended after {result.steps} of {result.planned_steps} planned steps: its "
            "verdicts hold for that shorter time only."
        )
    if not result.curvature.converged:
        yield f"Not every stiff direction converged to an eigenvector: {result.curvature.message}."
    yield from result.warnings


def _verdict_legend(result: WindowResult) -> str:
    counts = result.counts()
    items = "".join(
        f"<div><dt>{verdict_mark(verdict, counts[verdict])}</dt><dd>{escape(style.meaning)}</dd></div>"
        for verdict, style in VERDICT_STYLES.items()
    )
    lead = "<p>Each verdict holds up to the length of its window, not for ever.</p>"
    return section("legend", "What the verdicts mean", f'{lead}<dl class="legend">{items}</dl>')


def _modes(result: WindowResult) -> str:
    columns = (
        ("Direction", ""),
        ("Verdict", ""),
        ("Curvature", "v·Hv held out ± s.e., loss / weight²"),
        ("Residual", "of |λ₁|"),
        ("Noise variance", "(loss / weight)², 95%"),
        ("κ", "relaxation times"),
        ("D measured", "weight² / step, 95%"),
        ("D predicted", "weight² / step"),
    )
    interior = any(mode.kind is ModeKind.INTERIOR for mode in result.modes)
    caption = (
        f"Directions of the window over steps {steps(result)}: the stiffest ones first, then the "
        f"{'interior and the ' if interior else ''}near-flat ones; the line below each says why."
    )
    body = "".join(map(_mode_body, result.modes))
    return section("modes", "Directions in the last window", table(caption, columns, body, "modes-table"))


def _mode_body(mode: ModeResult) -> str:
    """Two table rows: the numbers, and below them the reason in the table's full width."""
    layers = [f"{layer} ({share(part)})" for layer, part in list(mode.layer_shares.items())[:_LAYERS_SHOWN]]
    marks = "".join(f"<li>{escape(mark)}</li>" for mark in mode.marks)
    why = (
        escape(mode.reason)
        + (f'<ul class="marks">{marks}</ul>' if marks else "")
        + (small(f"Mostly in {', '.join(layers)}.") if layers else "")
    )
    count = len(numbers := _mode_row(mode))
    return f'<tbody>{row(numbers)}<tr class="why"><td colspan="{count}"><div>{why}</div></td></tr></tbody>'


def _mode_row(mode: ModeResult) -> list[str]:
    curvature = plus_minus(mode.held_out_eigenvalue, mode.held_out_standard_error)
    if mode.mixed:
        curvature = number(mode.effective_curvature) + small(f"effective; v·Hv {curvature}")
    return [
        escape(mode.name) + (small(reservation) if (reservation := _reservation(mode)) else ""),
        verdict_mark(mode.verdict) + (small(mode.detail) if mode.detail else ""),
        curvature,
        number(mode.residual, 2),
        interval(mode.noise_variance),
        number(mode.relaxation_times),
        interval(mode.diffusion) + small(f"at lag {mode.diffusion_lag}"),
        number(mode.predicted_diffusion),
    ]


def _reservation(mode: ModeResult) -> str:
    """Flat directions do not claim to be eigenvectors: only the others can fail to be one."""
    if mode.converged or mode.kind is ModeKind.FLAT:
        return ""
    return "mixed direction" if mode.mixed else "not converged"


def _history(results: Sequence[WindowResult]) -> str:
    columns = (
        ("Window", ""),
        ("Steps", "first–last"),
        ("Used", "of planned"),
        ("Left out", "steps"),
        ("Learning rate", "mean"),
        ("Largest curvature", "loss / weight²"),
        ("Verdicts", ""),
        ("Longest pause", "s"),
        ("Warnings", ""),
    )
    body = f"<tbody>{''.join(row(_history_row(result)) for result in results)}</tbody>"
    caption = "Windows in the order of the run."
    return section("history", "All windows", table(caption, columns, body, "history-table"))


def _history_row(result: WindowResult) -> list[str]:
    counts = result.counts()
    verdicts = " ".join(verdict_mark(v, counts[v]) for v in VERDICT_STYLES if counts[v])
    return [
        str(result.index),
        steps(result),
        f"{result.steps} of {result.planned_steps}" + ("" if result.complete else " (incomplete)"),
        str(result.skipped_steps),
        number(result.learning_rate),
        number(result.curvature.lambda_max),
        verdicts or "no modes",
        number(max(result.cost.open_seconds, result.cost.close_seconds)),
        bullets(result.warnings) if result.warnings else "none",
    ]


def _measurement(result: WindowResult) -> str:
    found, cost = result.curvature, result.cost
    known = {
        "Optimizer": result.optimizer,
        "Displacements": f"in {result.coordinates}",
        "Sampling": result.sampling,
        "Length": result.plan or "unknown",
        "Learning rate": number(result.learning_rate),
        "Effective learning rate": number(result.effective_learning_rate),
        "Clocks": f"Ση = {number(result.confinement_clock)}, Ση² = {number(result.diffusion_clock)}",
        "Weights probed": f"{found.parameters:,}",
        "Directions found on": f"{found.samples_found} samples in {found.batches_found} batches",
        "Certified on": f"{found.samples_certified} other samples in {found.batches_certified} batches",
        "Hessian-vector products": str(found.products),
        "Solver": found.message,
        "Self-test of the Hessian": found.self_test,
        "Stiff subspace": (
            f"overlap with its image under the held-out Hessian {number(found.held_out_overlap, 2)}, at the "
            f"window's end {number(found.end_overlap, 2)}"
        ),
        "Largest |vᵢ·vⱼ|": number(found.orthogonality, 2),
        "Pauses": f"{number(cost.open_seconds)} s to open, {number(cost.close_seconds)} s to close",
        "Reading the steps": f"{number(cost.observe_seconds)} s",
        "All windows so far": (
            f"{number(cost.total_seconds)} s beside {number(cost.training_seconds)} s of training "
            f"until then ({share(cost.fraction)})"
        ),
    }
    return section("measurement", "How the last window was measured, and its cost", facts(known))


def _preparation(run: RunFolder) -> str:
    plan = bullets(run.plan) if run.plan else "<p>No plan was recorded.</p>"
    blocks = (
        ("Configuration", {key: _json(value) for key, value in run.config.items()}),
        ("Versions", {key: str(value) for key, value in run.versions.items()}),
        ("Probed parameters and their sizes", {key: str(value) for key, value in run.parameters.items()}),
    )
    details = "".join(
        f"<details><summary>{title}</summary>{facts(values)}</details>" for title, values in blocks if values
    )
    return section("plan", "Plan and configuration", f"<h3>Plan at the start</h3>{plan}{details}")


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
