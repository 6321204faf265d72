"""Several runs side by side: one self-contained page, and the check of D against the learning rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from sgd_probe.report.figures.comparison import (
    compared_noise,
    compared_spectra,
    compared_verdicts,
    diffusion_scaling,
)
from sgd_probe.report.page import (
    bullets,
    figure_section,
    page,
    row,
    section,
    table,
    verdict_mark,
    write_page,
)
from sgd_probe.report.run_folder import WINDOWS_FILE, RunFolder, read_run_folder
from sgd_probe.report.scaling import RunDiffusion, comparable, ratio, run_diffusion
from sgd_probe.report.wording import VERDICT_STYLES, horizon, interval, number, share, steps
from sgd_probe.result import Interval, WindowResult


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: by a name that tells them apart, in the order given; each has a window at least.
        diffusion: how the flat directions of each diffuse.
    """

    runs: Mapping[str, RunFolder]
    diffusion: Mapping[str, RunDiffusion]

    @property
    def last(self) -> dict[str, WindowResult]:
        """The last window of each run."""
        return {name: run.windows[-1] for name, run in self.runs.items()}

    def checks(self) -> tuple[str, ...]:
        """D per unit time against the learning rate, a sentence for every run after the first."""
        (first, reference), *others = self.diffusion.items()
        return tuple(_check(first, reference, name, run) for name, run in others)


def compare(folders: Sequence[Path]) -> Comparison:
    """Read runs to be compared.

    Raises:
        FileNotFoundError: there is no run in a folder.
        ValueError: fewer than two folders, one of them twice, or a run without a closed window.
    """
    if len(folders) < 2:
        raise ValueError(f"expected at least two run folders to compare, found {len(folders)}")
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ValueError("expected different run folders, found one of them twice")
    runs = dict(zip(_names(resolved), map(read_run_folder, folders), strict=True))
    for name, run in runs.items():
        if not run.windows:
            raise ValueError(
                f"expected a closed window in every run, found none in {name}: compare it once "
                f"{WINDOWS_FILE} has a line"
            )
    return Comparison(runs, {name: run_diffusion(run.windows) for name, run in runs.items()})


def write_comparison(folders: Sequence[Path], path: Path) -> Comparison:
    """Write the page of several runs, whole or not at all.

    Args:
        folders: of the runs; the first is what the others are compared with.
        path: the file to write.

    Raises:
        FileNotFoundError: there is no run in a folder, or no folder to write the page to.
        ValueError: what cannot be compared, or ``path`` is a folder.
    """
    found = compare(folders)
    write_page(build_comparison(found), path)
    return found


def build_comparison(found: Comparison) -> str:
    """The page as text."""
    figures = [
        diffusion_scaling(found.diffusion),
        compared_spectra(found.last),
        compared_noise(found.last),
        compared_verdicts(found.last),
    ]
    title = f"{len(found.runs)} runs side by side"
    header = (
        f'<header><p class="eyebrow">sgd_probe comparison</p><h1>{title}</h1>'
        f'<p class="facts">{escape(" · ".join(found.runs))}</p></header>\n'
    )
    sections = [
        section("check", "D against the learning rate", _check_table(found)),
        section("runs", "The runs", _run_table(found)),
        figure_section(figures),
        _settings(found),
    ]
    return page(f"sgd_probe comparison: {', '.join(found.runs)}", header, sections, with_figures=True)


def _check(first: str, reference: RunDiffusion, name: str, run: RunDiffusion) -> str:
    for label, one in ((first, reference), (name, run)):
        if not comparable(one):
            return (
                f"{name} against {first}: D cannot be compared, for {label} has no near-flat direction that "
                "diffuses (a shuffled loader cancels its noise within an epoch)."
            )
    expected = run.rate / reference.rate
    per_time, per_noise = _ratios(reference, run)
    agrees = per_noise.low <= expected <= per_noise.high
    return (
        f"{name} against {first}: the learning rate is {number(expected)} times as large, D per unit time "
        f"{interval(per_time)} times, and at equal noise {interval(per_noise)} times: this "
        f"{'agrees with D ∝ η' if agrees else 'does not agree with D ∝ η'}."
    )


def _ratios(reference: RunDiffusion, run: RunDiffusion) -> tuple[Interval, Interval]:
    return ratio(reference.per_time, run.per_time), ratio(reference.per_noise, run.per_noise)


def _check_table(found: Comparison) -> str:
    lead = (
        "<p>A flat direction diffuses by η²σ²/2 a step, so that D per unit time ηt is ησ²/2: proportional to "
        "the learning rate where the noise variance σ² is the same. Only near-flat directions that were "
        "found to diffuse count, of all windows at a run's last learning rate; intervals are 95%.</p>"
    )
    columns = (
        ("Run", ""),
        ("η", "effective learning rate"),
        ("Directions", "that diffuse"),
        ("D per unit time", "weight²"),
        ("2 D / σ²", "by the theory η"),
        ("D, times the first run's", ""),
        ("at equal noise", "by the theory the ratio of η"),
        ("Ratio of η", ""),
    )
    reference = next(iter(found.diffusion.values()))
    rows = []
    for name, run in found.diffusion.items():
        compared = run is not reference and comparable(run) and comparable(reference)
        per_time, per_noise = _ratios(reference, run) if compared else (None, None)
        rows.append(
            row(
                [
                    escape(name),
                    number(run.rate),
                    str(len(run.modes)),
                    interval(run.per_time),
                    interval(run.per_noise),
                    interval(per_time) if per_time else "–",
                    interval(per_noise) if per_noise else "–",
                    number(run.rate / reference.rate) if run is not reference else "–",
                ]
            )
        )
    body = f"<tbody>{''.join(rows)}</tbody>"
    return lead + bullets(found.checks()) + table("D of every run.", columns, body, "check-table")


_FACTS: tuple[tuple[str, Callable[[RunFolder, WindowResult], str]], ...] = (
    ("Optimizer", lambda run, last: last.optimizer),
    ("Sampling", lambda run, last: last.sampling),
    ("Samples a batch", lambda run, last: f"{_batch(last):g}"),
    ("Learning rate", lambda run, last: number(last.learning_rate)),
    ("Windows", lambda run, last: str(len(run.windows))),
    ("Last window", lambda run, last: f"steps {steps(last)}"),
    ("Horizon", lambda run, last: horizon(last)),
    ("Largest curvature", lambda run, last: number(last.curvature.lambda_max)),
    ("Of the stability limit", lambda run, last: share(last.curvature.lambda_max / last.stability_limit)),
    (
        "D over that of noise alone, pooled",
        lambda run, last: interval(last.pooled_diffusion),
    ),
    ("Samples behind the curvature", lambda run, last: f"{last.curvature.samples_found:,}"),
    ("Cost of the probe", lambda run, last: f"{share(last.cost.fraction)} of the training"),
)


def _run_table(found: Comparison) -> str:
    columns = (("", ""), *((escape(name), "") for name in found.runs))
    pairs = [(run, run.windows[-1]) for run in found.runs.values()]
    rows = [row([title, *(escape(says(run, last)) for run, last in pairs)]) for title, says in _FACTS]
    rows += [
        row([verdict_mark(verdict), *(str(last.counts()[verdict]) for _, last in pairs)])
        for verdict in VERDICT_STYLES
        if any(last.counts()[verdict] for _, last in pairs)
    ]
    rows.append(
        row(["Warnings", *(bullets(last.warnings) if last.warnings else "none" for _, last in pairs)])
    )
    caption = "What was trained and measured; verdicts count the directions of the last window."
    return table(caption, columns, f"<tbody>{''.join(rows)}</tbody>", "runs-table")


def _settings(found: Comparison) -> str:
    """The knobs of the probe that differ."""
    knobs = dict.fromkeys(key for run in found.runs.values() for key in run.config)
    told = {key: [json.dumps(run.config.get(key)) for run in found.runs.values()] for key in knobs}
    differing = {key: values for key, values in told.items() if len(set(values)) > 1}
    if not differing:
        return section("settings", "Settings of the probe", "<p>They are the same in all runs.</p>")
    columns = (("Knob", ""), *((escape(name), "") for name in found.runs))
    rows = (row([escape(key), *map(escape, values)]) for key, values in differing.items())
    body = f"<tbody>{''.join(rows)}</tbody>"
    return section(
        "settings", "Settings of the probe", table("Those that differ.", columns, body, "settings-table")
    )


def _batch(result: WindowResult) -> float:
    return result.curvature.samples_found / max(result.curvature.batches_found, 1)


def _names(folders: Sequence[Path]) -> list[str]:
    """The ends of paths that tell them apart."""
    for depth in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    shared = 0  # what all end in tells nothing
    parts = [name.split("/") for name in names]
    while all(len(p) > shared + 1 and p[-1 - shared] == parts[0][-1 - shared] for p in parts):
        shared += 1
    return ["/".join(p[: len(p) - shared]) for p in parts]
