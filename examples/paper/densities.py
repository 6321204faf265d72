"""The one-dimensional master equation against the histogram of SGD, on slices of a network's own loss.

A slice lets SGD move along one line only, ``theta = theta_0 + x v``: each run draws one of a fixed set of
minibatches a step and descends that minibatch's loss, evaluated by the network itself. The master equation
knows the same minibatches' gradients on a grid, and nothing of the runs.

- The stiffest mode, at eta lambda = 1.
- A double well that every network with an odd activation has: turn the sign of all weights into and out of
  a hidden unit, and the loss is the same. The line between the two minima goes through the dead unit, where
  every minibatch's gradient along the line vanishes: no noise there, and a barrier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from drawing import BLUE, GREEN, LAYOUT, ORANGE
from estimates import Array, Estimate
from paths import draw
from problems import Problem
from scipy.interpolate import CubicSpline
from shares import percent, shown, table
from torch import Tensor
from torch.func import grad, vmap

from sgd_probe.theory.master_equation import (
    FluctuatingLoss,
    Grid,
    evolve,
    langevin_propagator,
    master_equation,
    modified_equation,
)

MASTER, GAUSSIAN = "master equation", "Gaussian steps (SGD's two moments)"
MODIFIED, LANGEVIN = "modified equation", "Langevin equation"
#: Bins of a histogram; the outermost take all that lies beyond, and are not drawn.
BINS = 50
#: Points at which the network is asked for its gradients, with cubic splines between them; cells of the
#: master equation; cells of the equations that are dense matrices. Sharing a landing point between two cells
#: spreads it by up to half a cell, which matters where there is no noise: with B = 4 on the vision problem's
#: hidden unit, 600 cells gave 35% beyond the barrier where 9,600 and the runs agree on 25%.
NODES, CELLS, DENSE = 201, 9_601, 601
#: Minibatches of a slice.
BATCHES = 64


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        seeds: groups of runs; intervals are over them.
        runs: of a group.
        stiff: eta lambda, B and steps on the stiffest mode.
        well: the same between a unit and its mirror image, lambda that of the well.
    """

    seeds: int
    runs: int
    stiff: tuple[float, int, int]
    well: tuple[float, int, int]


FULL = {
    "vision": Plan(16, 250, (1.0, 8, 60), (0.4, 2, 60)),
    "language": Plan(16, 150, (1.0, 4, 40), (1.2, 2, 40)),
}
QUICK = {
    "vision": Plan(4, 75, (1.0, 8, 30), (0.4, 2, 30)),
    "language": Plan(4, 50, (1.0, 2, 20), (1.2, 2, 20)),
}
#: Parameters of a hidden unit: weights into it and its bias, by rows, and weights out of it, by columns.
UNITS = {
    "vision": ("0.weight", "0.bias", "2.weight"),
    "language": ("hidden.weight", "hidden.bias", "back.weight"),
}


@dataclass(frozen=True, eq=False)
class Slice:
    """The loss along a line, as a set of minibatch losses of which each step draws one.

    Attributes:
        name: what it is.
        loss: of one minibatch at a position, (position, inputs, targets) -> scalar.
        inputs: of the minibatches, shape (batches, samples, ...).
        targets: the same.
        start: position at which all runs begin, weight units.
        rate: learning rate.
        steps: of a run.
        barrier: drift and noise vanish at zero. What moves without jumps never gets there: such equations are
            solved on the side of the start, because cells would let it leak through.
    """

    name: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    start: float
    rate: float
    steps: int
    barrier: bool = False

    def run(self, runs: int, generator: torch.Generator) -> Array:
        """Positions of so many runs of SGD after the last step, shape (runs,)."""
        gradient = vmap(grad(self.loss))
        x = torch.full((runs,), self.start, dtype=torch.float64)
        for _ in range(self.steps):
            drawn = torch.randint(len(self.inputs), (runs,), generator=generator)
            x = x - self.rate * gradient(x, self.inputs[drawn], self.targets[drawn])
        return np.asarray(x.numpy())

    def between(self, low: float, high: float) -> Callable[[Grid], FluctuatingLoss]:
        """Every minibatch's gradient on an interval, by the network, for any grid within it."""
        nodes = np.linspace(low, high, NODES)
        along = vmap(grad(self.loss), in_dims=(0, None, None))
        centres = torch.as_tensor(nodes)
        rows = [along(centres, x, y) for x, y in zip(self.inputs, self.targets, strict=True)]
        smooth = CubicSpline(nodes, torch.stack(rows).numpy(), axis=1)

        def on(grid: Grid) -> FluctuatingLoss:
            return FluctuatingLoss(grid, smooth(grid.centres))

        return on


@dataclass(frozen=True)
class Row:
    """What is asked of a density.

    Attributes:
        mean: of the position, weight units.
        deviation: standard deviation.
        below: share on the other side of zero.
        distance: total variation distance of the histograms: share of the runs that would have to be moved.
    """

    mean: float
    deviation: float
    below: float
    distance: float


@dataclass(frozen=True, eq=False)
class Density:
    """Runs of SGD on a slice beside the equations.

    Attributes:
        name: of the slice.
        pull: eta lambda, lambda the curvature of the mean loss at the start.
        batch: B.
        steps: of a run.
        ends: final positions, shape (seeds, runs).
        edges: of the bins, (BINS + 1,).
        equations: probability of each bin, (BINS,), and of the sides of zero, by name; one that is not
            defined on this slice is missing.
        floor: distance that so many runs drawn from the master equation would have from it, mean and 97.5%.
        undefined: why an equation is missing, by name.
    """

    name: str
    pull: float
    batch: int
    steps: int
    ends: Array
    edges: Array
    equations: dict[str, Array]
    rows: dict[str, Row]
    floor: tuple[float, float]
    undefined: dict[str, str]

    def measured(self, what: Callable[[Array], float]) -> Estimate:
        """A number of the runs of a seed, with its interval."""
        return Estimate.of(np.array([what(seed) for seed in self.ends]))


def compare(cut: Slice, seeds: int, runs: int, seed: int = 0) -> Density:
    """Simulate a slice and solve every equation on it.

    Args:
        cut: the slice.
        seeds: groups of runs; intervals are over them.
        runs: of a group.
        seed: of the draws.
    """
    ends = np.stack([cut.run(runs, torch.Generator().manual_seed(1_000 * seed + k)) for k in range(seeds)])
    # Far enough for what the runs reach on their way, and for other equations' wider tails.
    low, high = min(ends.min(), -abs(cut.start)), max(ends.max(), abs(cut.start))
    edges = np.linspace(low - 0.03 * (high - low), high + 0.03 * (high - low), BINS + 1)
    low, high = low - 0.35 * (high - low), high + 0.35 * (high - low)
    on = cut.between(low, high)
    fine, dense = Grid(low, high, CELLS), Grid(0.0 if cut.barrier else low, high, DENSE)
    found: dict[str, tuple[Array, Array]] = {}
    undefined: dict[str, str] = {}
    for name, equation, grid in (
        (MASTER, master_equation, fine),
        (MODIFIED, modified_equation, dense),
        (LANGEVIN, langevin_propagator, dense),
    ):
        loss = on(grid)
        try:
            late = evolve(equation(loss, cut.rate), at(grid, cut.start), cut.steps)
        except ValueError as error:
            undefined[name] = str(error)
        else:
            found[name] = grid.centres, late
    everywhere = on(fine)
    positions = gaussian_steps(everywhere, cut, 100_000, np.random.default_rng(seed))
    found[GAUSSIAN] = positions, np.full(len(positions), 1 / len(positions))
    pooled = binned(ends.ravel(), edges)
    equations = {name: binned(points, edges, weights) for name, (points, weights) in found.items()}
    draws = np.random.default_rng(seed).multinomial(ends.size, clean(equations[MASTER]), 500) / ends.size
    by_chance = 0.5 * np.abs(draws - clean(equations[MASTER])).sum(1)
    slope = np.gradient(everywhere.mean_gradient, fine.width)
    return Density(
        name=cut.name,
        pull=cut.rate * float(np.interp(cut.start, fine.centres, slope)),
        batch=cut.inputs.shape[1],
        steps=cut.steps,
        ends=ends,
        edges=edges,
        equations=equations,
        rows={
            name: Row(
                mean=float(points @ weights),
                deviation=float(np.sqrt(points**2 @ weights - (points @ weights) ** 2)),
                below=float(weights[points < 0].sum()),
                distance=float(0.5 * np.abs(equations[name] - pooled).sum()),
            )
            for name, (points, weights) in found.items()
        },
        floor=(float(by_chance.mean()), float(np.quantile(by_chance, 0.975))),
        undefined=undefined,
    )


def at(grid: Grid, position: float) -> Array:
    """All probability in one place, shared between the two nearest cells."""
    found = np.zeros(grid.cells)
    place = (position - grid.low) / grid.width
    found[int(place)], found[int(place) + 1] = 1 - place % 1, place % 1
    return found


def gaussian_steps(loss: FluctuatingLoss, cut: Slice, runs: int, rng: np.random.Generator) -> Array:
    """Runs with Gaussian noise of the same mean and variance at every position: the two moments of SGD."""
    x, centres = np.full(runs, cut.start), loss.grid.centres
    for _ in range(cut.steps):
        drift = np.interp(x, centres, loss.mean_gradient)
        kick = np.sqrt(np.interp(x, centres, loss.noise_variance))
        x = x - cut.rate * (drift + kick * rng.standard_normal(runs))
    return x


def binned(points: Array, edges: Array, weights: Array | None = None) -> Array:
    """Share of each bin; what lies outside counts for the outermost ones."""
    inside = points.clip(edges[0], edges[-1])
    weights = np.full(len(points), 1 / len(points)) if weights is None else weights
    return np.histogram(inside, edges, weights=weights)[0]


def clean(shares: Array) -> Array:
    """Probabilities for a draw: nothing below zero, one in all."""
    shares = shares.clip(0)
    return np.asarray(shares / shares.sum())


# The slices of a network


def measure(problem: Problem, plan: Plan) -> tuple[Density, Density]:
    """The stiffest mode and the double well."""
    return tuple(  # type: ignore[return-value]
        compare(cut, plan.seeds, plan.runs)
        for cut in (stiffest(problem, *plan.stiff), mirrored(problem, *plan.well))
    )


def stiffest(problem: Problem, pull: float, batch: int, steps: int) -> Slice:
    """Along the stiffest mode, from the minimum."""
    return _slice(
        problem,
        "stiffest mode",
        problem.weights,
        problem.vectors[:, 0],
        0.0,
        problem.rate(pull),
        batch,
        steps,
    )


def mirrored(problem: Problem, pull: float, batch: int, steps: int) -> Slice:
    """Between a hidden unit and its mirror image, the unit with the lowest barrier; from the minimum."""
    units = [own_weights(problem, unit) for unit in range(12)]
    unit = min(units, key=lambda own: float(problem.loss(problem.weights - own)))
    length = float(unit.norm())
    vector = unit / length
    curvature = float(vector @ problem.product(vector))
    cut = _slice(
        problem, "hidden unit", problem.weights - unit, vector, length, pull / curvature, batch, steps
    )
    return replace(cut, barrier=True)


def own_weights(problem: Problem, unit: int) -> Tensor:
    """The minimum's weights of a hidden unit, zero elsewhere, (p,)."""
    into, bias, out = UNITS[problem.name]
    parts = []
    for name, parameter in problem.module().named_parameters():
        kept = torch.zeros_like(parameter)
        if name in (into, bias):
            kept[unit] = parameter[unit]
        elif name == out:
            kept[:, unit] = parameter[:, unit]
        parts.append(kept.detach().flatten())
    return torch.cat(parts)


def _slice(
    problem: Problem,
    name: str,
    origin: Tensor,
    vector: Tensor,
    start: float,
    rate: float,
    batch: int,
    steps: int,
) -> Slice:
    drawn = draw(problem, BATCHES, 1, batch, 0)[:, 0]

    def loss(x: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return problem.loss_of(origin + x * vector, inputs, targets)

    return Slice(
        f"{problem.name}, {name}", loss, problem.inputs[drawn], problem.targets[drawn], start, rate, steps
    )


# The report


def tables(densities: Sequence[Density]) -> str:
    """Runs and equations of each slice, in Markdown."""
    return "\n\n".join(_table(each) for each in densities)


def _table(found: Density) -> str:
    chance = f"{found.floor[0]:.3f} by chance, below {found.floor[1]:.3f}"
    rows = [
        [
            f"SGD, {found.ends.size:,} runs",
            shown(found.measured(lambda ends: float(ends.mean())), ".3f"),
            shown(found.measured(lambda ends: float(ends.std())), ".3f"),
            percent(found.measured(lambda ends: float((ends < 0).mean()))),
            chance,
        ]
    ]
    for name in (MASTER, GAUSSIAN, MODIFIED, LANGEVIN):
        if name in found.rows:
            row = found.rows[name]
            numbers = (f"{row.mean:.3f}", f"{row.deviation:.3f}", f"{row.below:.2%}", f"{row.distance:.3f}")
            rows.append([name, *numbers])
        else:
            rows.append([name, "negative diffusion", "", "", ""])
    return (
        f"**{found.name.capitalize()}: eta lambda = {found.pull:.2f}, B = {found.batch}, "
        f"{found.steps} steps, {len(found.ends)} seeds**\n\n"
        + table(["", "mean", "standard deviation", "below zero", "total variation distance"], rows)
    )


def figure(densities: Sequence[Density]) -> Any:
    """Histograms of the runs and the equations' densities, a row for each slice."""
    from plotly.subplots import make_subplots

    columns = 2
    panels = make_subplots(
        -(-len(densities) // columns),
        columns,
        subplot_titles=[each.name for each in densities],
        vertical_spacing=0.13,
        horizontal_spacing=0.09,
    )
    for index, found in enumerate(densities):
        row, column = divmod(index, columns)
        place = {"row": row + 1, "col": column + 1}
        middles, width = (found.edges[1:] + found.edges[:-1]) / 2, found.edges[1] - found.edges[0]
        panels.add_bar(
            x=middles[1:-1],
            y=binned(found.ends.ravel(), found.edges)[1:-1] / width,
            width=width,
            name="runs of SGD on the network",
            marker={"color": "#c3cedb", "line": {"width": 0}},
            showlegend=not index,
            **place,
        )
        for name, colour, dash in (
            (MASTER, BLUE, "solid"),
            (GAUSSIAN, GREEN, "dash"),
            (LANGEVIN, ORANGE, "solid"),
        ):
            panels.add_scatter(
                x=middles[1:-1],
                y=found.equations[name][1:-1] / width,
                name=name,
                mode="lines",
                line={"color": colour, "dash": dash, "width": 2.5},
                showlegend=not index,
                **place,
            )
        least = 0.3 / (found.ends.size * width)
        most = max(float(each.max()) for each in found.equations.values()) / width
        panels.update_yaxes(
            type="log",
            range=[np.log10(least), np.log10(3 * most)],
            dtick=1,
            exponentformat="power",
            title="density" if not column else None,
            **place,
        )
        panels.update_xaxes(title="position along the line (weight units)", **place)
    panels.update_layout(**LAYOUT, bargap=0, legend={"orientation": "h", "y": -0.1, "x": 0.05})
    return panels
