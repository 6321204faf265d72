"""The discrete theory on a trained network: SGD from a true minimum, in all modes of its dense Hessian.

Many seeds of SGD with replacement start at a minimum of an MLP on digits; the variance of each mode is
compared with the discrete formula, with the Langevin equation and with the recursion of all modes together.
What is measured and what came out is described in docs/theory.md. With ``--figure FOLDER`` it also draws the
pictures of that page, for which chromium must be on PATH.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _figures import picture
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from sgd_probe.theory import MinibatchSampling, SGDDynamics, SGDMode
from sgd_probe.theory.closed_forms import growth_ratio

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "paper"))
from descent import descend
from estimates import Array, Estimate, slope, squared_deviations
from heat import predict_together
from problems import Problem, load

#: Discrete and Langevin variance, (records, p) each.
Predictions = tuple[Array, Array]

#: Steps of a run, and those after which positions are kept.
STEPS = 100
RECORDS = tuple(range(STEPS // 2, STEPS + 1, 5))
#: Of the slope of D against eta.
WINDOWS = (50, 100)
#: Samples of a minibatch; eta lambda_1 of each run. The slow ones are those of D against eta.
BATCH = 256
SLOW = (0.02, 0.04, 0.08, 0.16, 0.32)
SLOW_CASES = tuple((pull, BATCH) for pull in SLOW)
HALF, ONE, FAST = (0.5, BATCH), (1.0, 4 * BATCH), (1.5, BATCH)
NOISY, NOISIER, BOTH = (0.5, 64), (0.5, 16), (1.5, 64)
QUICK_CASES = (*SLOW_CASES, HALF, ONE, FAST, NOISY)
CASES = (*QUICK_CASES, NOISIER, BOTH)
#: Boundaries of the groups of kappa = lambda eta T.
EDGES = (0.0, 0.3, 1.0, 3.0, 10.0, math.inf)
#: Near-flat: kappa at most this, at the fastest of SLOW over the whole run.
FLAT = 0.5
STIFF = 6


# Measured


@dataclass(frozen=True, eq=False)
class Run:
    """Many seeds of SGD from the minimum.

    Attributes:
        rate: eta.
        batch: samples of a minibatch, drawn with replacement.
        positions: v.(theta_t - theta_0) after the steps ``RECORDS``, (records, seeds, p).
        ends: theta_T - theta_0 of the first seeds, (at most 16, p).
    """

    rate: float
    batch: int
    positions: Array
    ends: Tensor


def simulate(minimum: Problem, rate: float, batch: int, seeds: int, generator: torch.Generator) -> Run:
    """All seeds at once in float32."""
    positions, sampling = [], MinibatchSampling(batch_size=batch)
    for t, step in enumerate(descend(minimum, SGDDynamics(rate), sampling, seeds, STEPS, generator), 1):
        if t in RECORDS:
            positions.append((step.after.double() @ minimum.vectors).numpy())
    return Run(rate, batch, np.stack(positions), step.after[:16].double())


def late_curvature(minimum: Problem, run: Run) -> Array:
    """v.Hv of the ``STIFF`` stiffest modes where runs have ended: the mean over the first seeds."""
    vectors = minimum.vectors[:, :STIFF].float()
    ends = (minimum.weights + run.ends).float()
    products = torch.stack([vmap(minimum.product, in_dims=(1, None))(vectors, there) for there in ends])
    return np.asarray((products * vectors.T).sum(2).mean(0).double().numpy())


@lru_cache(maxsize=1)
def hessian_variance(minimum: Problem) -> Array:
    """s^2 of the ``STIFF`` stiffest modes: variance of v.H_i v over the samples, (``STIFF``,)."""
    each = vmap(minimum.product, in_dims=(None, None, 0), chunk_size=300)
    samples = torch.arange(minimum.samples)[:, None]
    rows = [each(vector, minimum.weights, samples) @ vector for vector in minimum.vectors.T[:STIFF]]
    return np.asarray(torch.stack(rows).var(1, correction=0).numpy())


# Predicted


def predict(minimum: Problem, rate: float, batch: int, eigenvalues: Array | None = None) -> Predictions:
    """Variance of each mode by itself after ``RECORDS``, discrete and by Langevin, NaN for those left out.

    Args:
        minimum: the network.
        rate: eta.
        batch: samples of a minibatch.
        eigenvalues: of the first so many modes, where not those of the minimum.
    """
    values = minimum.eigenvalues.numpy() if eigenvalues is None else eigenvalues
    sampling, dynamics = MinibatchSampling(batch_size=batch), SGDDynamics(rate)
    discrete, langevin = np.full((2, len(RECORDS), minimum.size), np.nan)
    for k in np.flatnonzero(minimum.moving.numpy()[: len(values)]):
        noise = sampling.noise_variance(float(minimum.sample_variance[k]))
        mode = SGDMode(float(values[k]), noise, dynamics, sampling)
        discrete[:, k] = mode.moments(STEPS).variance[list(RECORDS)]
        langevin[:, k] = mode.langevin().moments(STEPS).variance[list(RECORDS)]
    return discrete, langevin


def share_of_own_hessian_noise(minimum: Problem, rate: float, batch: int) -> float:
    """By how much a mode's own s^2 raises the discrete prediction, at most among the stiffest."""
    sampling, dynamics, found = MinibatchSampling(batch_size=batch), SGDDynamics(rate), []
    for k, spread in enumerate(hessian_variance(minimum)):
        value, noise = (
            float(minimum.eigenvalues[k]),
            sampling.noise_variance(float(minimum.sample_variance[k])),
        )
        plain = SGDMode(value, noise, dynamics, sampling)
        with_spread = replace(plain, hessian_variance=sampling.noise_variance(float(spread)))
        found.append(with_spread.variance(STEPS) / plain.variance(STEPS) - 1)
    return max(found)


# Compared


def ratio(run: Run, predicted: Array, modes: NDArray[np.bool_]) -> Array:
    """Measured over predicted variance as one number a seed, (seeds,): the mean over modes and ``RECORDS``.

    The measured variance is that around the mean over seeds, unbiased.
    """
    squares = squared_deviations(run.positions[:, :, modes])
    return np.asarray((squares / predicted[:, None, modes]).mean((0, 2)))


@dataclass(frozen=True)
class Ratios:
    """Measured over predicted variance in some modes.

    Attributes:
        kappa: lambda eta T, the smallest and the largest of the modes.
        modes: how many.
        discrete: over the formula of each mode by itself.
        langevin: over that of the Langevin equation.
        together: over the recursion of all modes; None where that was not computed.
    """

    kappa: tuple[float, float]
    modes: int
    discrete: Estimate
    langevin: Estimate
    together: Estimate | None


@dataclass(frozen=True)
class Case:
    """A learning rate and a batch size.

    Attributes:
        pull: eta lambda_1.
        run: measured.
        groups: by kappa, those that have modes.
        stiff: the stiffest modes one by one.
        late_pulls: eta v.Hv of those where runs have ended, (``STIFF``,).
        late: their variance over the discrete formula with that curvature.
        own_hessian_noise: share by which s^2 would raise the discrete prediction, at most in those.
    """

    pull: float
    run: Run
    groups: list[Ratios]
    stiff: list[Ratios]
    late_pulls: Array
    late: list[Estimate]
    own_hessian_noise: float


@dataclass(frozen=True)
class Diffusion:
    """D per unit time of the near-flat modes over a window of so many steps.

    Attributes:
        window: steps.
        modes: how many are near-flat.
        points: measured, one a learning rate; the mean over modes.
        theory: ``eta sigma^2 / 2``, the same mean.
        slope: of log D against log eta; the interval is that of points with seeds of their own.
    """

    window: int
    modes: int
    points: list[Estimate]
    theory: list[float]
    slope: Estimate


def compare(minimum: Problem, pull: float, run: Run, generator: torch.Generator, every: int | None) -> Case:
    """Hold a run against theory; ``every`` is that of :func:`predict_together`, None to do without."""
    discrete, langevin = predict(minimum, run.rate, run.batch)
    together = predict_together(minimum, run.rate, run.batch, RECORDS, generator, every) if every else None
    kappa = minimum.eigenvalues.numpy() * run.rate * STEPS

    def ratios(chosen: NDArray[np.bool_]) -> Ratios:
        return Ratios(
            kappa=(float(kappa[chosen].min()), float(kappa[chosen].max())),
            modes=int(chosen.sum()),
            discrete=Estimate.of(ratio(run, discrete, chosen)),
            langevin=Estimate.of(ratio(run, langevin, chosen)),
            together=None if together is None else Estimate.of(ratio(run, together, chosen)),
        )

    moving = minimum.moving.numpy()
    bins = [moving & (kappa >= low) & (kappa < high) for low, high in pairwise(EDGES)]
    each = [np.arange(len(kappa)) == k for k in range(STIFF)]
    curvature = late_curvature(minimum, run)
    late = predict(minimum, run.rate, run.batch, curvature)[0]
    return Case(
        pull=pull,
        run=run,
        groups=[ratios(chosen) for chosen in bins if chosen.any()],
        stiff=[ratios(chosen) for chosen in each],
        late_pulls=curvature * run.rate,
        late=[Estimate.of(ratio(run, late, chosen)) for chosen in each],
        own_hessian_noise=share_of_own_hessian_noise(minimum, run.rate, run.batch),
    )


def diffusion(minimum: Problem, runs: Sequence[Run], window: int) -> Diffusion:
    """From squared displacements, each mode's divided by what its kappa leaves of free diffusion.

    That share is the growth ratio, ``(1 - a^(2 t)) / ((1 - a^2) t)``.
    """
    values = minimum.eigenvalues.numpy()
    flat = minimum.moving.numpy() & (values * max(run.rate for run in runs) * STEPS <= FLAT)
    noise = float(minimum.sample_variance.numpy()[flat].mean())
    measured = []
    for run in runs:
        share = np.array(
            [growth_ratio(float(value), window, SGDDynamics(run.rate)) for value in values[flat]]
        )
        squares = run.positions[RECORDS.index(window)][:, flat] ** 2
        measured.append((squares / share).mean(1) / (2 * window * run.rate))
    return Diffusion(
        window=window,
        modes=int(flat.sum()),
        points=[Estimate.of(each) for each in measured],
        theory=[run.rate * noise / run.batch / 2 for run in runs],
        slope=slope([run.rate for run in runs], measured),
    )


# The report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer seeds, less noise, under a minute")
    parser.add_argument("--json", action="store_true", help="print a summary as the last line")
    parser.add_argument(
        "--figure", type=Path, metavar="FOLDER", help="write the pictures of docs/theory.md there"
    )
    parser.add_argument("--seeds", type=int, help="runs of each learning rate (512, or 32 with --quick)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seeds = options.seeds or (32 if options.quick else 512)
    if seeds < 2:
        parser.error(f"expected at least two seeds, found {seeds}: a variance needs them")
    started = time.perf_counter()
    minimum = load("vision")
    _print_minimum(minimum, seeds)
    cases: dict[tuple[float, int], Case] = {}
    for index, (pull, batch) in enumerate(QUICK_CASES if options.quick else CASES):
        generator = torch.Generator().manual_seed(1_000 * options.seed + index)
        run = simulate(minimum, minimum.rate(pull), batch, seeds, generator)
        every = None if pull in SLOW else 20 if options.quick else 5
        cases[pull, batch] = compare(minimum, pull, run, generator, every)
        _print_case(cases[pull, batch])
    lines = [diffusion(minimum, [cases[key].run for key in SLOW_CASES], window) for window in WINDOWS]
    _print_diffusion(lines)
    if options.figure:
        options.figure.mkdir(parents=True, exist_ok=True)
        _ratio_figure(cases, options.figure / "theory-network-variance.png")
        _mode_figure(cases, lines, options.figure / "theory-network-modes.png")
    if options.json:
        print(json.dumps(_summary(minimum, cases, lines, seeds, time.perf_counter() - started)))
    return 0


def gradient_norm(minimum: Problem) -> float:
    """Of the full loss."""
    return float(minimum.gradient(minimum.weights).norm())


def _print_minimum(minimum: Problem, seeds: int) -> None:
    values = minimum.eigenvalues.numpy()
    print(
        f"MLP on digits, {len(values)} weights, |gradient| {gradient_norm(minimum):.1g}; eigenvalues from "
        f"{values[0]:.3g} to {values[-1]:.2g}, median {np.median(values):.2g}\n"
        f"{int(minimum.moving.sum())} modes; {int((~minimum.moving).sum())} have no noise and are left "
        f"out\n{seeds} seeds of {STEPS} steps; measured over predicted variance, mean over "
        f"steps {RECORDS[0]} to {RECORDS[-1]} [95% interval over seeds]"
    )


def _print_case(case: Case) -> None:
    print(f"\neta lambda_1 = {case.pull:g}, batch {case.run.batch}")
    print(f"  {'kappa':<14} {'modes':>5}  {'discrete':<21}  {'Langevin':<21}  all modes together")
    for group in case.groups:
        print(f"  {_span(group.kappa):<14} {group.modes:>5}  {_columns(group)}")
    if case.pull >= 1:
        print(
            f"  {'eta lambda':<10} {'at the end':>10}  {'discrete':<21}  {'Langevin':<21}  "
            f"{'all modes together':<21}  by the end's"
        )
        for k, (mode, late) in enumerate(zip(case.stiff, case.late, strict=True)):
            print(
                f"  {mode.kappa[0] / STEPS:<10.3f} {case.late_pulls[k]:>10.3f}  {_columns(mode):<67}  {late}"
            )
    print(f"  s^2 of a mode by itself would add at most {case.own_hessian_noise:.1%}", flush=True)


def _span(kappa: tuple[float, float]) -> str:
    return f"{kappa[0]:.2g} to {kappa[1]:.2g}"


def _columns(ratios: Ratios) -> str:
    shown = [str(ratios.discrete), str(ratios.langevin), str(ratios.together or "")]
    return "  ".join(f"{each:<21}" for each in shown).rstrip()


def _print_diffusion(lines: list[Diffusion]) -> None:
    for line in lines:
        print(f"\nD per unit time over {line.window} steps, {line.modes} near-flat modes: slope {line.slope}")
        for pull, point, theory in zip(SLOW, line.points, line.theory, strict=True):
            found = Estimate(point.value / theory, point.low / theory, point.high / theory)
            print(f"  eta lambda_1 = {pull:<5g} D {point.value:.4g}, over eta sigma^2 / 2: {found}")


def _summary(
    minimum: Problem, cases: dict[tuple[float, int], Case], lines: list[Diffusion], seeds: int, seconds: float
) -> dict[str, Any]:
    return {
        "weights": len(minimum.weights),
        "modes": int(minimum.moving.sum()),
        "gradient_norm": gradient_norm(minimum),
        "seeds": seeds,
        "cases": [
            {
                "pull": case.pull,
                "batch": case.run.batch,
                "groups": [_row(group) for group in case.groups],
                "stiff": [_row(mode) for mode in case.stiff],
                "own_hessian_noise": round(case.own_hessian_noise, 4),
                "late_pulls": case.late_pulls.round(4).tolist(),
            }
            for case in cases.values()
        ],
        "slopes": {line.window: _numbers(line.slope) for line in lines},
        "near_flat_modes": lines[0].modes,
        "seconds": round(seconds, 1),
    }


def _row(ratios: Ratios) -> dict[str, Any]:
    named = {name: getattr(ratios, name) for name in ("discrete", "langevin", "together")}
    known = {name: _numbers(each) for name, each in named.items() if each}
    return {"kappa": [float(f"{each:.4g}") for each in ratios.kappa], "modes": ratios.modes, **known}


def _numbers(estimate: Estimate) -> list[float]:
    return [round(each, 4) for each in (estimate.value, estimate.low, estimate.high)]


# The pictures

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#7a7a7a"
LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"size": 15, "color": "#222"},
    "margin": {"l": 80, "r": 30, "t": 45, "b": 70},
}


def _ratio_figure(cases: dict[tuple[float, int], Case], path: Path) -> None:
    """Measured over predicted variance against kappa: four cases, three predictions."""
    from plotly.subplots import make_subplots

    chosen = (HALF, ONE, FAST, NOISY)
    titles = [f"η λ₁ = {pull:g}, batch {batch}" for pull, batch in chosen]
    figure = make_subplots(2, 2, subplot_titles=titles, shared_xaxes=True, vertical_spacing=0.1)
    for index, key in enumerate(chosen):
        row, column = divmod(index, 2)
        place = {"row": row + 1, "col": column + 1}
        groups = cases[key].groups
        for name, colour, symbol, shift, estimates in (
            ("Langevin", ORANGE, "diamond", 1.0, [group.langevin for group in groups]),
            ("discrete, each mode by itself", BLUE, "circle", 1.12, [group.discrete for group in groups]),
            ("discrete, all modes together", GREEN, "square", 0.89, [group.together for group in groups]),
        ):
            figure.add_scatter(
                x=[shift * math.sqrt(max(group.kappa[0], 1e-2) * group.kappa[1]) for group in groups],
                error_y=_bars(estimates),
                y=[each.value for each in estimates if each],
                name=name,
                mode="markers+lines",
                line={"width": 1, "color": colour},
                marker={"color": colour, "symbol": symbol, "size": 9},
                showlegend=index == 0,
                **place,
            )
        figure.add_hrect(y0=0.9, y1=1.1, fillcolor="#dfe7ee", line_width=0, layer="below", **place)
        figure.add_hline(y=1, line={"color": GREY, "width": 1}, **place)
    figure.update_layout(**LAYOUT)
    figure.update_layout(legend={"orientation": "h", "y": -0.12, "x": 0.12})
    figure.update_xaxes(type="log", dtick=1)
    figure.update_xaxes(title="κ = λ η T", row=2)
    figure.update_yaxes(
        type="log", range=[math.log10(0.85), math.log10(2.0)], tickvals=[0.9, 1, 1.1, 1.25, 1.5, 1.75, 2]
    )
    figure.update_yaxes(title="measured / predicted", col=1)
    picture(figure, path, (1100, 800))


def _mode_figure(cases: dict[tuple[float, int], Case], lines: list[Diffusion], path: Path) -> None:
    """Left: the stiffest modes over Langevin. Right: D of near-flat modes against the learning rate."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        1, 2, subplot_titles=["Stiff modes: variance over Langevin's", "Near-flat modes: D per unit time"]
    )
    pulls = np.linspace(0.02, 1.55, 100)
    figure.add_scatter(
        x=pulls, y=2 / (2 - pulls), name="2 / (2 − η λ)", line={"color": BLUE, "width": 2.5}, row=1, col=1
    )
    figure.add_hline(y=1, line={"color": ORANGE, "width": 2, "dash": "dot"}, row=1, col=1)
    figure.add_annotation(
        x=1.4, y=0.9, text="Langevin", font={"color": ORANGE}, showarrow=False, row=1, col=1
    )
    for key, symbol in ((HALF, "circle"), (ONE, "square"), (FAST, "diamond")):
        modes = cases[key].stiff
        figure.add_scatter(
            x=[mode.kappa[0] / STEPS for mode in modes],
            y=[mode.langevin.value for mode in modes],
            error_y=_bars([mode.langevin for mode in modes]),
            name=f"measured, η λ₁ = {key[0]:g}, batch {key[1]}",
            mode="markers",
            marker={"color": "black", "symbol": symbol, "size": 8},
            row=1,
            col=1,
        )
    rates = [cases[key].run.rate for key in SLOW_CASES]
    looks = ({"color": ORANGE, "size": 9}, {"color": BLUE, "size": 16, "symbol": "diamond-open"})
    for line, look in zip(lines, looks, strict=True):
        figure.add_scatter(
            x=rates,
            y=[point.value for point in line.points],
            error_y=_bars(line.points),
            name=f"{line.window} steps: slope {line.slope}",
            mode="markers",
            marker=look,
            row=1,
            col=2,
        )
    figure.add_scatter(
        x=rates,
        y=lines[0].theory,
        name="η σ² / 2",
        mode="lines",
        line={"color": GREY, "width": 2},
        row=1,
        col=2,
    )
    figure.update_layout(**LAYOUT)
    figure.update_layout(legend={"orientation": "h", "y": -0.18, "x": 0})
    figure.update_xaxes(title="η λ", row=1, col=1)
    figure.update_yaxes(title="V / V<sub>Langevin</sub>", range=[0.7, 5], row=1, col=1)
    figure.update_xaxes(title="η", type="log", tickvals=[0.05, 0.1, 0.2, 0.5, 1], row=1, col=2)
    figure.update_yaxes(title="D per unit of η t", type="log", dtick=1, exponentformat="power", row=1, col=2)
    picture(figure, path, (1200, 640))


def _bars(estimates: Sequence[Estimate | None]) -> dict[str, Any]:
    """Error bars for estimates: their 95% intervals."""
    known = [each for each in estimates if each]
    return {
        "symmetric": False,
        "array": [each.high - each.value for each in known],
        "arrayminus": [each.value - each.low for each in known],
    }


if __name__ == "__main__":
    sys.exit(main())
