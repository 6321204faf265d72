"""One self-contained page from a run folder: no network, no pickle, everything escaped."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from sgd_probe.report.figures import Figure, all_figures
from sgd_probe.report.run_folder import RUN_FILE, WINDOWS_FILE, RunFolder, read_run_folder
from sgd_probe.report.wording import VERDICT_STYLES, headline, interval, number, plus_minus, share, steps
from sgd_probe.result import ModeKind, ModeResult, Verdict, WindowResult

#: Nothing may be fetched or sent: scripts and styles are in the page, images only as data.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
_LAYERS_SHOWN = 2


def write_report(run_folder: Path, path: Path | None = None) -> Path:
    """Write the page of a run folder, whole or not at all.

    Args:
        run_folder: the folder that holds ``run.json`` and ``windows.jsonl``.
        path: the file to write; ``report.html`` in the run folder if None.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: there is no run, or no folder to write the page to.
        ValueError: the run cannot be read, or ``path`` is a folder.
    """
    target = run_folder / "report.html" if path is None else path
    page = build_report(run_folder)
    if target.is_dir():
        raise ValueError(
            f"expected a file to write the report to, found the folder {target}: add a file name"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"expected a folder for the report, found none at {target.parent}: create it or choose another"
        )
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(page, encoding="utf-8")
        os.replace(draft, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
    return target


def build_report(run_folder: Path) -> str:
    """The page of a run folder as text.

    Raises:
        FileNotFoundError: there is no run folder or no ``run.json`` in it.
        ValueError: a file is of another schema or not what the probe writes.
    """
    run = read_run_folder(run_folder)
    last = run.windows[-1] if run.windows else None
    figures = all_figures(run.windows) if last else ()
    sections = [_header(run), _notes(run)]
    if last:
        sections += [
            _verdict_legend(last),
            _modes(last),
            _figures(figures),
            _history(run.windows),
            _measurement(last),
        ]
    sections.append(_preparation(run))
    scripts = (get_plotlyjs(), _asset("report.js")) if figures else ()
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>sgd_probe report: {escape(run.folder)}</title>\n"
        f"<style>{_asset('report.css')}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#content">Skip to the content</a>\n<main id="content">\n'
        f"{''.join(sections)}</main>\n"
        f"<footer><p>Made from {RUN_FILE} and {WINDOWS_FILE}; "
        "this page loads nothing from a network.</p></footer>\n"
        f"{''.join(f'<script>{script}</script>' for script in scripts)}\n</body>\n</html>\n"
    )


# Sections.


def _header(run: RunFolder) -> str:
    last = run.windows[-1] if run.windows else None
    words = headline(last) if last else "No window has closed yet"
    facts = [f"Run {run.folder}"]
    if last:
        facts += [
            f"{len(run.windows)} window{'s' if len(run.windows) > 1 else ''}",
            f"probe time {share(last.cost.fraction)} of the training time",
        ]
        if math.isfinite(last.expected_false_flags):
            flags = number(last.expected_false_flags, 2)
            facts.append(f"about {flags} wrong flags expected by chance in the last window")
    waiting = (
        ""
        if last
        else "<p>While training runs: results appear here once the first window has closed, if this page is "
        "made again then. After training: the plan below says what a window would have taken.</p>"
    )
    return (
        f'<header><p class="eyebrow">sgd_probe report</p><h1>{escape(words)}</h1>'
        f'<p class="facts">{escape(" · ".join(facts))}</p>{waiting}</header>\n'
    )


def _notes(run: RunFolder) -> str:
    """Warnings of the last window and of the files, where the reader cannot miss them."""
    notes = [*_file_notes(run)]
    if run.windows:
        notes += _window_notes(run.windows[-1])
    if not notes:
        return ""
    return _section("warnings", "Before you trust this", _list(notes), css="warnings")


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
        f"<div><dt>{_verdict(verdict, counts[verdict])}</dt><dd>{escape(style.meaning)}</dd></div>"
        for verdict, style in VERDICT_STYLES.items()
    )
    lead = "<p>Each verdict holds up to the length of its window, not for ever.</p>"
    return _section("legend", "What the verdicts mean", f'{lead}<dl class="legend">{items}</dl>')


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
    return _section("modes", "Directions in the last window", _table(caption, columns, body, "modes-table"))


def _mode_body(mode: ModeResult) -> str:
    """Two table rows: the numbers, and below them the reason in the table's full width."""
    layers = [f"{layer} ({share(part)})" for layer, part in list(mode.layer_shares.items())[:_LAYERS_SHOWN]]
    marks = "".join(f"<li>{escape(mark)}</li>" for mark in mode.marks)
    why = (
        escape(mode.reason)
        + (f'<ul class="marks">{marks}</ul>' if marks else "")
        + (_small(f"Mostly in {', '.join(layers)}.") if layers else "")
    )
    count = len(numbers := _mode_row(mode))
    return f'<tbody>{_row(numbers)}<tr class="why"><td colspan="{count}"><div>{why}</div></td></tr></tbody>'


def _mode_row(mode: ModeResult) -> list[str]:
    curvature = plus_minus(mode.held_out_eigenvalue, mode.held_out_standard_error)
    if mode.mixed:
        curvature = number(mode.effective_curvature) + _small(f"effective; v·Hv {curvature}")
    return [
        escape(mode.name) + (_small(reservation) if (reservation := _reservation(mode)) else ""),
        _verdict(mode.verdict) + (_small(mode.detail) if mode.detail else ""),
        curvature,
        number(mode.residual, 2),
        interval(mode.noise_variance),
        number(mode.relaxation_times),
        interval(mode.diffusion) + _small(f"at lag {mode.diffusion_lag}"),
        number(mode.predicted_diffusion),
    ]


def _reservation(mode: ModeResult) -> str:
    """Flat directions do not claim to be eigenvectors: only the others can fail to be one."""
    if mode.converged or mode.kind is ModeKind.FLAT:
        return ""
    return "mixed direction" if mode.mixed else "not converged"


def _figures(figures: Sequence[Figure]) -> str:
    script_note = "<noscript><p>The figures need JavaScript; the tables hold the same numbers.</p></noscript>"
    return _section("figures", "Figures", script_note + "".join(map(_figure, figures)))


def _figure(figure: Figure) -> str:
    name = escape(figure.name)
    # In JSON "<" occurs inside strings only, where its escape means the same and cannot end the script.
    data = figure.plot.to_json().replace("<", "\\u003c")
    return (
        f'<figure id="figure-{name}"><figcaption><h3>{escape(figure.title)}</h3>'
        f"<p><strong>How to read it.</strong> {escape(figure.how_to_read)}</p></figcaption>"
        f'<div class="plot" data-figure="{name}" role="img" aria-label="{escape(figure.title)}"></div>'
        f'<script type="application/json" data-for="{name}">{data}</script></figure>\n'
    )


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
    body = f"<tbody>{''.join(_row(_history_row(result)) for result in results)}</tbody>"
    caption = "Windows in the order of the run."
    return _section("history", "All windows", _table(caption, columns, body, "history-table"))


def _history_row(result: WindowResult) -> list[str]:
    counts = result.counts()
    verdicts = " ".join(_verdict(v, counts[v]) for v in VERDICT_STYLES if counts[v])
    return [
        str(result.index),
        steps(result),
        f"{result.steps} of {result.planned_steps}" + ("" if result.complete else " (incomplete)"),
        str(result.skipped_steps),
        number(result.learning_rate),
        number(result.curvature.lambda_max),
        verdicts or "no modes",
        number(max(result.cost.open_seconds, result.cost.close_seconds)),
        _list(result.warnings) if result.warnings else "none",
    ]


def _measurement(result: WindowResult) -> str:
    found, cost = result.curvature, result.cost
    facts = {
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
            f"({share(cost.fraction)})"
        ),
    }
    return _section("measurement", "How the last window was measured, and its cost", _facts(facts))


def _preparation(run: RunFolder) -> str:
    plan = _list(run.plan) if run.plan else "<p>No plan was recorded.</p>"
    blocks = (
        ("Configuration", {key: _json(value) for key, value in run.config.items()}),
        ("Versions", {key: str(value) for key, value in run.versions.items()}),
        ("Probed parameters and their sizes", {key: str(value) for key, value in run.parameters.items()}),
    )
    details = "".join(
        f"<details><summary>{title}</summary>{_facts(values)}</details>" for title, values in blocks if values
    )
    return _section("plan", "Plan and configuration", f"<h3>Plan at the start</h3>{plan}{details}")


# Pieces.


def _section(name: str, title: str, body: str, css: str = "") -> str:
    heading = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}" class="{css}" aria-labelledby="{name}-title">{heading}{body}</section>\n'


def _table(caption: str, columns: Iterable[tuple[str, str]], body: str, name: str) -> str:
    """A table in a scrolling container that the keyboard can reach; ``body`` is HTML already."""
    head = "".join(f'<th scope="col">{title}{_small(unit) if unit else ""}</th>' for title, unit in columns)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}-caption">'
        f'<table class="{name}"><caption id="{name}-caption"><span>{escape(caption)}</span></caption>'
        f"<thead><tr>{head}</tr></thead>{body}</table></div>"
    )


def _row(cells: Sequence[str]) -> str:
    """A table row under its own header; the cells are HTML already."""
    first, *rest = cells
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'


def _verdict(verdict: Verdict, count: int | None = None) -> str:
    """A verdict in colour and in words, with the number of its modes if given."""
    style = VERDICT_STYLES[verdict]
    many = "" if count is None else f' <span class="count">{count}</span>'
    swatch = f'<i style="background:{style.colour}"></i>'
    return f'<span class="verdict">{swatch}{escape(style.label)}{many}</span>'


def _small(text: str) -> str:
    """A second line within a table cell."""
    return f"<small>{escape(text)}</small>"


def _facts(values: Mapping[str, str]) -> str:
    items = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in values.items()
    )
    return f'<dl class="facts-list">{items}</dl>'


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _asset(name: str) -> str:
    return (files("sgd_probe.report") / name).read_text(encoding="utf-8")
