"""The pictures of docs/paper.md, from the results file alone; chromium must be on PATH."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from plotly.subplots import make_subplots
from problems import NAMES

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from _figures import picture  # type: ignore[import-untyped]

BLUE, ORANGE, GREEN, GREY, SKY, INK = "#0072b2", "#d55e00", "#009e73", "#7a7a7a", "#56b4e9", "#222222"
COLOURS = {"vision": BLUE, "language": ORANGE}
VERDICTS = {"confined": BLUE, "undetermined": "#d9d9d9", "drifting": "#cc79a7", "diffusive": ORANGE}
TITLES = {"vision": "vision: MLP on digits", "language": "language: transformer on text"}
LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"size": 15, "color": INK},
    "margin": {"l": 80, "r": 30, "t": 50, "b": 70},
}
Results = Mapping[str, Any]


def draw(results: Results, folder: Path) -> None:
    """All pictures, as paper-*.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure, size in (
        ("separation", separation(results), (1150, 820)),
        ("diffusion", diffusion(results), (1150, 820)),
        ("variance", variance(results), (1150, 560)),
        ("collapse", collapse(results), (1150, 620)),
        ("beyond", beyond(results), (1150, 900)),
        ("product", product(results), (1150, 560)),
    ):
        figure.update_layout(**LAYOUT)
        picture(figure, folder / f"paper-{name}.png", size)


def separation(results: Results) -> Any:
    """Growth exponent above, shares of verdicts below, both against kappa."""
    figure = make_subplots(
        2, 2, subplot_titles=[TITLES[name] for name in NAMES], shared_xaxes=True, vertical_spacing=0.06
    )
    for column, name in enumerate(NAMES, 1):
        groups = results[name]["separation"]["groups"]
        kappas = [math.sqrt(max(group["kappa"][0], 0.01) * group["kappa"][1]) for group in groups]
        place: dict[str, Any] = {"row": 1, "col": column}
        figure.add_scatter(
            x=kappas,
            y=[group["expected"] for group in groups],
            name="theory",
            line={"color": GREY, "width": 2},
            showlegend=column == 1,
            **place,
        )
        exponents = [group["exponent"] for group in groups]
        _points(figure, kappas, exponents, "measured", INK, showlegend=column == 1, **place)
        for verdict, colour in VERDICTS.items():
            shares = [group["shares"].get(verdict, [0.0])[0] for group in groups]
            figure.add_scatter(
                x=kappas,
                y=shares,
                name=f"called {verdict}",
                mode="lines",
                line={"color": colour, "width": 0.5},
                fillcolor=colour,
                stackgroup="verdicts",
                showlegend=column == 1,
                row=2,
                col=column,
            )
    figure.update_xaxes(type="log", dtick=1)
    figure.update_xaxes(title="κ = η λ T", row=2)
    figure.update_yaxes(title="growth exponent of V", range=[-0.6, 1.4], row=1, col=1)
    figure.update_yaxes(range=[-0.6, 1.4], row=1, col=2)
    figure.update_yaxes(title="share of modes and seeds", range=[0, 1], row=2, col=1)
    figure.update_yaxes(range=[0, 1], row=2, col=2)
    figure.update_layout(legend={"orientation": "h", "y": -0.1, "x": 0.1})
    return figure


def diffusion(results: Results) -> Any:
    """Above: spread of near-flat modes against steps. Below: D against the learning rate."""
    figure = make_subplots(2, 2, subplot_titles=[TITLES[name] for name in NAMES], vertical_spacing=0.14)
    shades = ["#cfe3f1", "#9ac5e3", SKY, BLUE, "#003f63"]
    for column, name in enumerate(NAMES, 1):
        part = results[name]["diffusion"]
        records, rates = np.array(part["plan"]["records"]), part["rates"]
        for shade, pull, rate, spread in zip(
            shades[-len(rates) :], part["plan"]["pulls"], rates, part["spread"], strict=True
        ):
            _points(
                figure,
                records,
                spread,
                f"η λ₁ = {pull:g}",
                shade,
                showlegend=column == 1,
                row=1,
                col=column,
            )
            figure.add_scatter(
                x=records,
                y=rate**2 * part["noise"] * records,
                name="η²σ²t",
                mode="lines",
                line={"color": GREY, "width": 1},
                showlegend=column == 1 and pull == part["plan"]["pulls"][0],
                row=1,
                col=column,
            )
        _points(
            figure, rates, part["coefficient"], "D measured", INK, showlegend=column == 1, row=2, col=column
        )
        figure.add_scatter(
            x=rates,
            y=[rate * part["noise"] / 2 for rate in rates],
            name="η σ² / 2",
            mode="lines",
            line={"color": GREY, "width": 2, "dash": "dash"},
            showlegend=column == 1,
            row=2,
            col=column,
        )
        value, low, high = part["slope"]
        figure.add_annotation(
            text=f"slope {value:.3f} [{low:.3f}, {high:.3f}]",
            xref="x domain" if column == 1 else "x2 domain",
            x=0.05,
            y=0.95,
            yref="y domain",
            showarrow=False,
            row=2,
            col=column,
        )
        figure.update_xaxes(title="steps t", type="log", dtick=1, row=1, col=column)
        ticks = {"tickvals": rates, "ticktext": [f"{rate:.2g}" for rate in rates]}
        figure.update_xaxes(title="η", type="log", **ticks, row=2, col=column)
    figure.update_yaxes(type="log", dtick=1, exponentformat="power")
    figure.update_yaxes(title="V of near-flat modes", row=1, col=1)
    figure.update_yaxes(title="D per unit of η t", row=2, col=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.12, "x": 0.02})
    return figure


def variance(results: Results) -> Any:
    """Figure A: V lambda / (eta sigma^2) against eta lambda, with three laws."""
    figure = make_subplots(
        1, 2, subplot_titles=[TITLES[name] for name in NAMES], shared_yaxes=True, horizontal_spacing=0.04
    )
    pulls = np.linspace(0.02, 1.62, 200)
    for column, name in enumerate(NAMES, 1):
        place, first = {"row": 1, "col": column}, column == 1
        figure.add_vrect(
            x0=0.8,
            x1=1.2,
            fillcolor="#dfe7ee",
            line_width=0,
            layer="below",
            exclude_empty_subplots=False,
            **place,
        )
        for label, law, look in (
            ("discrete equation, 1 / (2 − η λ)", 1 / (2 - pulls), {"color": BLUE, "width": 2.5}),
            ("Langevin equation, 1 / 2", np.full_like(pulls, 0.5), {"color": ORANGE, "width": 2.5}),
            (
                "second-order modified equation",
                (1 + pulls) / (2 + pulls),
                {"color": GREEN, "width": 1.5, "dash": "dash"},
            ),
        ):
            figure.add_scatter(x=pulls, y=law, name=label, mode="lines", line=look, showlegend=first, **place)
        for key, label, symbol, colour in (
            ("exact", "λ of the population", "circle-open", GREY),
            ("held_out", "λ held out", "circle", INK),
        ):
            runs = [run[key] for run in results[name]["variance"]["runs"]]
            x = np.concatenate([run["eta_lambda"] for run in runs])
            errors = 1.96 * np.concatenate([run["eta_lambda_error"] for run in runs])
            found = [each for run in runs for each in run["scaled_variance"]]
            _points(
                figure,
                x,
                found,
                f"measured, {label}",
                colour,
                symbol,
                errors,
                size=6,
                showlegend=first,
                **place,
            )
    figure.update_xaxes(title="η λ", range=[0, 1.65])
    figure.update_yaxes(range=[0.3, 3.2])
    figure.update_yaxes(title="V λ / (η σ²)", row=1, col=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.16, "x": 0})
    return figure


def collapse(results: Results) -> Any:
    """Figure B: MSD over free MSD against kappa, and what is left after division by the formula."""
    figure = make_subplots(
        1, 2, subplot_titles=["all runs, windows and batches", "over their own formula (groups known to 15%)"]
    )
    curve = np.geomspace(1e-3, 300, 300)
    figure.add_scatter(
        x=curve,
        y=-np.expm1(-2 * curve) / (2 * curve),
        name="(1 − e<sup>−2κ'</sup>) / 2κ'",
        mode="lines",
        line={"color": INK, "width": 1.5},
        row=1,
        col=1,
    )
    figure.add_hrect(
        y0=0.9,
        y1=1.1,
        fillcolor="#dfe7ee",
        line_width=0,
        layer="below",
        exclude_empty_subplots=False,
        row=1,
        col=2,
    )
    figure.add_hline(y=1, line={"color": INK, "width": 1.5}, exclude_empty_subplots=False, row=1, col=2)
    for name in NAMES:
        groups = results[name]["collapse"]
        cases = list(dict.fromkeys((group["pull"], group["batch"]) for group in groups))
        for symbol, case in zip(("circle", "square", "diamond", "triangle-up"), cases, strict=False):
            chosen = [group for group in groups if (group["pull"], group["batch"]) == case]
            label = f"{name}, η λ₁ = {case[0]:g}, B = {case[1]}"
            sharp = [group for group in chosen if group["over_theory"][2] - group["over_theory"][1] < 0.3]
            for column, key, shown in ((1, "measured", chosen), (2, "over_theory", sharp)):
                _points(
                    figure,
                    [group["discrete_kappa"] for group in shown],
                    [group[key] for group in shown],
                    label,
                    COLOURS[name],
                    symbol,
                    size=7,
                    opacity=0.75,
                    showlegend=column == 1,
                    row=1,
                    col=column,
                )
    figure.update_xaxes(title="κ' = η λ T (1 − η λ / 2)", type="log", dtick=1)
    figure.update_yaxes(title="x² / (η² σ² T)", type="log", dtick=1, row=1, col=1)
    figure.update_yaxes(title="measured / formula", range=[0.6, 1.5], row=1, col=2)
    figure.update_layout(legend={"orientation": "h", "y": -0.16, "x": 0})
    return figure


def beyond(results: Results) -> Any:
    """Above: near-flat modes under three loaders, step by step. Below: optimizers over their formulas."""
    titles = [f"{TITLES[name]}, near-flat modes" for name in NAMES]
    below = ["variance over the optimizer's own formula", "... and over other formulas, stiff modes"]
    figure = make_subplots(2, 2, subplot_titles=[*titles, *below], vertical_spacing=0.2)
    looks = (GREY, BLUE, ORANGE)
    for column, name in enumerate(NAMES, 1):
        for colour, loader in zip(looks, results[name]["loaders"], strict=True):
            steps = np.arange(1, len(loader["free"]) + 1)
            place = {"row": 1, "col": column, "legendgroup": loader["name"]}
            figure.add_scatter(
                x=steps,
                y=loader["free_theory"],
                mode="lines",
                line={"color": colour, "width": 1.5},
                showlegend=False,
                **place,
            )
            _points(
                figure, steps, loader["free"], loader["name"], colour, size=6, showlegend=column == 1, **place
            )
        epoch = results[name]["loaders"][-1]["batches"]
        for end in range(epoch, len(steps) + 1, epoch):
            figure.add_vline(x=end, line={"color": "#dddddd", "width": 1}, row=1, col=column)
        figure.update_xaxes(title="steps (lines: epochs with the last batch kept)", row=1, col=column)
        rows = results[name]["optimizers"]
        labels = [f"{row['name']}, {row['share']:.0%}" for row in rows]
        for shift, key, colour, symbol, panel, label in (
            (-0.12, "stiff", COLOURS[name], "circle", 1, f"{name}, stiff modes"),
            (0.12, "flat", COLOURS[name], "circle-open", 1, f"{name}, near-flat modes"),
            (-0.12, "stiff_over_langevin", COLOURS[name], "diamond", 2, f"{name}, over Langevin's"),
            (0.12, "stiff_over_plain", COLOURS[name], "x", 2, f"{name}, over plain SGD's"),
        ):
            kept = [k for k, row in enumerate(rows) if row[key] is not None]
            x = [k + shift + 0.06 * (column - 1.5) for k in kept]
            found = [rows[k][key] for k in kept]
            _points(figure, x, found, label, colour, symbol, row=2, col=panel)
        for panel in (1, 2):
            figure.update_xaxes(
                tickvals=list(range(len(rows))), ticktext=labels, tickangle=-30, row=2, col=panel
            )
    for panel in (1, 2):
        figure.add_hline(y=1, line={"color": INK, "width": 1}, row=2, col=panel)
    figure.update_yaxes(title="V / (η² S² / B)", row=1, col=1)
    figure.update_yaxes(title="measured / formula", row=2, col=1)
    figure.update_yaxes(
        type="log", range=[math.log10(0.35), math.log10(25)], tickvals=[0.5, 1, 2, 5, 10, 20], row=2, col=2
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.22, "x": 0})
    return figure


def product(results: Results) -> Any:
    """What the callback reports: verdicts by kappa, and D against the learning rate."""
    figure = make_subplots(
        1, 2, subplot_titles=["directions of all windows, by verdict", "D of near-flat directions"]
    )
    rng = np.random.default_rng(0)
    heights = {verdict: k for k, verdict in enumerate(("diffusive", "drifting", "undetermined", "confined"))}
    for name in NAMES:
        part = results[name]["product"]
        for kind, symbol in (("top", "circle"), ("flat", "circle-open")):
            modes = [mode for mode in part["modes"] if mode["kind"] == kind and mode["verdict"] in heights]
            shift = 0.12 if name == "vision" else -0.12
            figure.add_scatter(
                x=[max(mode["kappa"], 1e-2) for mode in modes],
                y=[heights[mode["verdict"]] + shift + 0.08 * rng.uniform(-1, 1) for mode in modes],
                mode="markers",
                name=f"{name}, {'stiff' if kind == 'top' else 'near-flat'}",
                marker={"color": COLOURS[name], "symbol": symbol, "size": 8},
                row=1,
                col=1,
            )
        pulls = part["plan"]["pulls"]
        free = [
            [m["diffusion"] for m in part["modes"] if m["pull"] == pull and m["kind"] == "flat"]
            for pull in pulls
        ]
        rates = [next(m["rate"] for m in part["modes"] if m["pull"] == pull) for pull in pulls]
        shown = [_mean(each) for each in free]
        _points(figure, rates, shown, f"{name}, D / (σ²/2)", COLOURS[name], "square", row=1, col=2)
    span = np.array([0.003, 4.0])
    figure.add_scatter(
        x=span, y=span, name="η", mode="lines", line={"color": GREY, "width": 2, "dash": "dash"}, row=1, col=2
    )
    figure.update_yaxes(tickvals=list(heights.values()), ticktext=list(heights), row=1, col=1)
    figure.update_xaxes(title="κ by the held-out curvature", type="log", dtick=1, row=1, col=1)
    figure.update_xaxes(title="η", type="log", dtick=1, row=1, col=2)
    figure.update_yaxes(title="D per unit of η t, over σ²/2", type="log", dtick=1, row=1, col=2)
    figure.update_layout(legend={"orientation": "h", "y": -0.18, "x": 0})
    return figure


def _mean(values: Sequence[float]) -> list[float]:
    """With the 95% interval of independent numbers."""
    mean, half = float(np.mean(values)), 1.96 * float(np.std(values)) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def _points(
    figure: Any,
    x: Sequence[float] | Any,
    estimates: Sequence[Sequence[float]],
    name: str,
    colour: str,
    symbol: str = "circle",
    errors: Any = None,
    size: int = 8,
    **where: Any,
) -> None:
    """Markers with their 95% intervals."""
    value, low, high = np.array(estimates, dtype=float).reshape(-1, 3).T
    figure.add_scatter(
        x=x,
        y=value,
        error_y={
            "symmetric": False,
            "array": high - value,
            "arrayminus": value - low,
            "thickness": 1.2,
            "width": 2,
        },
        error_x=None if errors is None else {"array": errors, "thickness": 0.8, "width": 0},
        name=name,
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": size},
        **where,
    )
