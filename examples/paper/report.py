"""What was measured as plain numbers: the results file, what holds and what fails, the tables of the page."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from estimates import Estimate
from problems import NAMES, Problem
from separation import CONFINED, FLAT
from variance import HEADLINE, Points, Variance

#: A formula holds where the whole interval of measured over predicted lies in here; by the value, where one
#: run's interval is wider than that.
GOOD = (0.9, 1.1)
#: An optimizer has at least so many near-flat modes, or nothing is claimed of them.
FEWEST = 20
#: Most relaxation times of a direction that a callback should call diffusive.
NEARLY_FLAT = 3.0
#: Ends a table in the page.
END = "<!-- end -->"
#: Half width that the interval of the slope of D may have, and how far from 1 it may be.
SLOPE = 0.05


def plain(value: Any) -> Any:
    """Dataclasses, arrays and estimates as what JSON knows; an estimate is [value, low, high]."""
    if isinstance(value, Estimate):
        return value.numbers()
    if isinstance(value, Variance):
        return _variance(value)
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def written(results: Mapping[str, Any]) -> str:
    """The results file: JSON with every innermost list or object on a line of its own."""
    text = json.dumps(results, indent=1)
    inner = re.compile(r"([\[{])\s+([^\[\]{}]*?)\s+([\]}])")
    return inner.sub(lambda found: found[1] + " ".join(found[2].split()) + found[3], text) + "\n"


def _short(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.3g}") for value in values]


def _variance(found: Variance) -> dict[str, Any]:
    runs = []
    for pull, rate, held_out, exact, softened in zip(
        found.plan.pulls, found.rates, found.held_out, found.exact, found.softened, strict=True
    ):
        along = {"held_out": _points(held_out), "exact": _points(exact)}
        runs.append({"pull": pull, "rate": plain(rate), "softened": plain(softened), **along})
    headline = {
        name: _ratios(Points.joined(parts).where(*HEADLINE))
        for name, parts in (("held_out", found.held_out), ("exact", found.exact))
    }
    return {"plan": plain(found.plan), "curvature": found.curvature, "runs": runs, "headline": headline}


def _points(points: Points) -> dict[str, Any]:
    return {
        "eta_lambda": _short(points.pull),
        "eta_lambda_error": _short(points.pulls.std(0)),
        "scaled_variance": plain(points.scaled),
        **_ratios(points),
    }


def _ratios(points: Points) -> dict[str, Any]:
    known = bool(np.isfinite(points.together).all())
    return {
        "points": len(points.pull),
        "over_discrete": plain(points.over_discrete()),
        "over_langevin": plain(points.over_langevin()),
        "over_modified": plain(points.over_modified()),
        "over_together": plain(points.over_together()) if known else None,
    }


def about(problem: Problem) -> dict[str, Any]:
    """A problem in numbers."""
    values = problem.eigenvalues
    outputs = problem.module()(problem.inputs)
    found: dict[str, Any] = plain(
        {
            "weights": problem.size,
            "samples": problem.samples,
            "decay": problem.decay,
            "cross_entropy": float(problem.criterion(outputs, problem.targets).detach()),
            "gradient_norm": float(problem.gradient(problem.weights).norm()),
            "moving_modes": int(problem.moving.sum()),
            "largest_eigenvalue": float(values[0]),
            "median_eigenvalue": float(values[problem.moving].median()),
            "smallest_eigenvalue": float(values[-1]),
        }
    )
    return found


@dataclass(frozen=True)
class Claim:
    """One statement, what was found, and whether it holds.

    Attributes:
        where: "vision" or "language".
        what: the statement.
        found: value and interval, or a number.
        asked: the criterion.
        holds: whether it is met.
    """

    where: str
    what: str
    found: Any
    asked: str
    holds: bool


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """The claims of the paper and what a user needs besides, judged by the results file alone."""
    return [
        claim
        for name in NAMES
        for judged in (_paper_claims, _loader_claims, _optimizer_claims, _product_claims)
        for claim in judged(name, results[name])
    ]


def _paper_claims(where: str, part: Mapping[str, Any]) -> Iterator[Claim]:
    apart = part["separation"]
    for label, group, verdict, least in (
        (f"(a) kappa >= {CONFINED:g}", apart["confined"], "confined", 0.95),
        (f"(a) kappa <= {FLAT:g}", apart["flat"], "diffusive", 0.8),
    ):
        share = group["shares"].get(verdict, [0.0, 0.0, 0.0])
        yield Claim(where, f"{label}: called {verdict}", share, f">= {least}", share[0] >= least)
        (value, low, high), expected = group["exponent"], group["expected"]
        holds = low <= expected <= high or abs(value - expected) <= 0.1
        yield Claim(where, f"{label}: growth exponent", group["exponent"], f"{abs(expected):.2f}", holds)
    value, low, high = slope = part["diffusion"]["slope"]
    holds = abs(value - 1) <= SLOPE and (high - low) / 2 <= SLOPE
    asked = "1 +- 0.05, interval within +- 0.05"
    yield Claim(where, "(b) slope of log D against log eta", slope, asked, holds)
    headline = part["variance"]["headline"]["held_out"]
    discrete, langevin = headline["over_discrete"], headline["over_langevin"]
    holds = GOOD[0] <= discrete[1] and discrete[2] <= GOOD[1]
    what = f"(c) eta lambda in {HEADLINE[0]} to {HEADLINE[1]}: V over"
    yield Claim(where, f"{what} discrete", discrete, "interval within 0.9 to 1.1", holds)
    yield Claim(where, f"{what} Langevin's: off by two", langevin, "above 1.5", langevin[1] > 1.5)
    ratios = [group["over_theory"] for group in part["collapse"]]
    sharp = [value for value, low, high in ratios if high - low <= GOOD[1] - GOOD[0]]
    share = sum(GOOD[0] <= value <= GOOD[1] for value in sharp) / max(len(sharp), 1)
    what = f"figure B: within 10% of the curve, of {len(sharp)} groups known to 10%"
    yield Claim(where, what, plain(share), ">= 0.9", share >= 0.9)


def _loader_claims(where: str, part: Mapping[str, Any]) -> Iterator[Claim]:
    for loader in part["loaders"]:
        for kind in ("flat", "stiff"):
            ratio = loader[kind]
            yield Claim(
                where, f"{loader['name']}: {kind} modes over theory", ratio, "0.9 to 1.1", _good(ratio)
            )


def _optimizer_claims(where: str, part: Mapping[str, Any]) -> Iterator[Claim]:
    for each in part["optimizers"]:
        for kind in ("flat", "stiff") if each["flat_modes"] >= FEWEST else ("stiff",):
            what = f"{each['name']}, {each['share']:.0%} of the limit: {kind} modes over theory"
            yield Claim(where, what, each[kind], "0.9 to 1.1", _good(each[kind]))


def _product_claims(where: str, part: Mapping[str, Any]) -> Iterator[Claim]:
    modes = part["product"]["modes"]
    stiff = [mode["verdict"] for mode in modes if mode["kind"] == "top" and mode["kappa"] >= CONFINED]
    flat = [mode["verdict"] for mode in modes if mode["kind"] == "flat" and mode["kappa"] <= NEARLY_FLAT]
    for label, verdicts, verdict, least in (
        (f"stiff, kappa >= {CONFINED:g}", stiff, "confined", 0.95),
        (f"near-flat, kappa <= {NEARLY_FLAT:g}", flat, "diffusive", 0.75),
    ):
        share = verdicts.count(verdict) / max(len(verdicts), 1)
        what = f"SGDProbe: {label} ({len(verdicts)}): called {verdict}"
        yield Claim(where, what, plain(share), f">= {least}", share >= least)
    _, low, high = slope = part["product"]["slope"]
    what = "SGDProbe: slope of log D against log eta"
    yield Claim(where, what, slope, "interval includes 1", low <= 1 <= high)


def _good(ratio: Sequence[float]) -> bool:
    """The value lies within 10% of 1, or chance alone may have taken it out."""
    return GOOD[0] <= ratio[0] <= GOOD[1] or (ratio[1] <= 1 <= ratio[2])


# Tables


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """The tables of docs/paper.md in Markdown, by name."""
    return {
        "problems": _problem_table(results),
        "separation": _separation_table(results),
        "diffusion": _diffusion_table(results),
        "variance": _variance_table(results),
        "loaders": _loader_table(results),
        "optimizers": _optimizer_table(results),
        "product": _product_table(results),
        "claims": _claim_table(results),
    }


def write_tables(page: Path, results: Mapping[str, Any]) -> None:
    """Put every table between its two marks in the page, ``<!-- table: name -->`` and ``<!-- end -->``."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables(results).items():
        mark = f"<!-- table: {name} -->"
        if mark not in text:
            raise ValueError(f"expected {mark} in {page}, found none: every table has its place there")
        before, _, rest = text.partition(mark)
        text = f"{before}{mark}\n{table}\n{END}{rest.partition(END)[2]}"
    page.write_text(text, encoding="utf-8")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _show(value: Any, digits: int = 3) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"{value[0]:.{digits}f} [{value[1]:.{digits}f}, {value[2]:.{digits}f}]"
    return f"{value:.{digits}g}"


def _problem_table(results: Mapping[str, Any]) -> str:
    rows = [
        ("weights", "weights"),
        ("samples", "samples of the population"),
        ("decay", "factor of the L2 term"),
        ("cross_entropy", "cross entropy at the minimum, nats"),
        ("gradient_norm", "norm of the gradient there"),
        ("moving_modes", "modes with noise"),
        ("largest_eigenvalue", "largest eigenvalue"),
        ("median_eigenvalue", "median of those with noise"),
    ]
    header = ["", *NAMES]
    return _table(
        header, [[label, *(_show(results[n]["problem"][key], 4) for n in NAMES)] for key, label in rows]
    )


def _separation_table(results: Mapping[str, Any]) -> str:
    rows = []
    for name in NAMES:
        for group in results[name]["separation"]["groups"]:
            shares = group["shares"]
            rows.append(
                [
                    name,
                    f"{group['kappa'][0]:.2g} to {group['kappa'][1]:.2g}",
                    str(group["modes"]),
                    _show(group["exponent"], 2),
                    f"{group['expected']:.2f}",
                    *(f"{shares.get(v, [0.0])[0]:.1%}" for v in ("confined", "diffusive", "undetermined")),
                ]
            )
    header = ["", "kappa", "modes", "growth exponent", "theory", "confined", "diffusive", "undetermined"]
    return _table(header, rows)


def _diffusion_table(results: Mapping[str, Any]) -> str:
    rows = []
    for name in NAMES:
        part = results[name]["diffusion"]
        for k, pull in enumerate(part["plan"]["pulls"]):
            rows.append(
                [
                    name,
                    f"{pull:g}",
                    _show(part["rates"][k]),
                    _show(part["over_theory"][k]),
                    _show(part["exponent"][k]),
                    f"{part['expected_exponent'][k]:.3f}",
                ]
            )
        rows.append([name, "slope of log D", "", f"**{_show(part['slope'])}**", "", ""])
        rows.append([name, "... kappa left in", "", _show(part["uncorrected"]), "", ""])
    header = ["", "eta lambda_1", "eta", "D / (eta sigma²/2)", "growth in time", "theory"]
    return _table(header, rows)


def _variance_table(results: Mapping[str, Any]) -> str:
    rows = []
    for name in NAMES:
        part = results[name]["variance"]
        for label, key in (("held out", "held_out"), ("exact", "exact")):
            for run in part["runs"]:
                end = f"{run['softened']:.3f}" if key == "exact" else ""
                rows.append([name, label, f"{run['pull']:g}", *_ratio_cells(run[key]), end])
            cells = [f"**{cell}**" if cell else "" for cell in _ratio_cells(part["headline"][key])]
            rows.append([name, label, "**0.8 to 1.2**", *cells, ""])
    laws = ["V / discrete", "V / Langevin", "V / modified", "V / all modes"]
    return _table(["", "lambda", "eta lambda_1", "points", *laws, "curvature at the end"], rows)


def _ratio_cells(found: Mapping[str, Any]) -> list[str]:
    keys = ("over_discrete", "over_langevin", "over_modified", "over_together")
    return [str(found["points"]), *(_show(found[key]) for key in keys)]


def _loader_table(results: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            loader["name"],
            str(loader["batches"]),
            _show(loader["flat"]),
            _show(loader["flat_over_independent"]),
            f"{loader['ratio']:.3g}",
            _show(loader["stiff"]),
            _show(loader["stiff_over_independent"]),
        ]
        for name in NAMES
        for loader in results[name]["loaders"]
    ]
    header = [
        "",
        "minibatches",
        "n",
        "flat / theory",
        "flat / independent",
        "formula",
        "stiff / theory",
        "stiff / independent",
    ]
    return _table(header, rows)


def _optimizer_table(results: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            each["name"],
            f"{each['share']:.0%}",
            _show(each["stiff"]),
            _show(each["stiff_over_langevin"]),
            _show(each["stiff_over_plain"]),
            _show(each["flat"]),
            str(each["flat_modes"]),
        ]
        for name in NAMES
        for each in results[name]["optimizers"]
    ]
    header = [
        "",
        "optimizer",
        "of the limit",
        "stiff / theory",
        "stiff / Langevin",
        "stiff / plain SGD",
        "flat / theory",
        "flat modes",
    ]
    return _table(header, rows)


def _product_table(results: Mapping[str, Any]) -> str:
    rows = []
    for name in NAMES:
        part = results[name]["product"]
        for kind in ("top", "flat"):
            counts = part["verdicts"][kind]
            kappas = sorted(mode["kappa"] for mode in part["modes"] if mode["kind"] == kind)
            span = f"{kappas[0]:.3g} to {kappas[-1]:.3g}, median {kappas[len(kappas) // 2]:.3g}"
            listed = ", ".join(
                f"{count} {verdict}" for verdict, count in sorted(counts.items(), key=lambda c: -c[1])
            )
            rows.append([name, kind, span, listed, _show(part["slope"], 2) if kind == "flat" else ""])
    return _table(["", "directions", "kappa", "verdicts", "slope of log D against log eta"], rows)


def _claim_table(results: Mapping[str, Any]) -> str:
    rows = [
        [
            each["where"],
            each["what"],
            _show(each["found"]),
            each["asked"],
            "holds" if each["holds"] else "**fails**",
        ]
        for each in results["claims"]
    ]
    return _table(["", "statement", "found", "asked", ""], rows)
