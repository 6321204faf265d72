"""The one-dimensional master equation against the histogram of SGD, on slices of a network's own loss.

A slice lets SGD move along one line only, ``theta = theta_0 + x v``: each run draws one of a fixed set of
minibatches a step and descends that minibatch's loss, evaluated by the network itself. The master equation
knows the same minibatches' gradients on a grid, and nothing of the runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from estimates import Array
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
#: Bins of a histogram; cells of the grid, several a bin.
BINS, CELLS = 48, 20 * 48 + 1


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
    """

    name: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    start: float
    rate: float
    steps: int

    def run(self, runs: int, generator: torch.Generator) -> Array:
        """Positions of so many runs of SGD after the last step, shape (runs,)."""
        gradient = vmap(grad(self.loss))
        x = torch.full((runs,), self.start, dtype=torch.float64)
        for _ in range(self.steps):
            drawn = torch.randint(len(self.inputs), (runs,), generator=generator)
            x = x - self.rate * gradient(x, self.inputs[drawn], self.targets[drawn])
        return np.asarray(x.numpy())

    def on(self, grid: Grid) -> FluctuatingLoss:
        """Every minibatch's gradient at the centres of a grid."""
        along = vmap(grad(self.loss), in_dims=(0, None, None), chunk_size=256)
        centres = torch.as_tensor(grid.centres)
        rows = [along(centres, x, y) for x, y in zip(self.inputs, self.targets, strict=True)]
        return FluctuatingLoss(grid, torch.stack(rows).numpy())


@dataclass(frozen=True)
class Row:
    """What is asked of a density; the interval is there for the runs alone.

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
        slice: what was simulated.
        curvature: of the mean loss at the start.
        ends: final positions, shape (seeds, runs).
        edges: of the bins, (BINS + 1,).
        equations: probability of each bin, (BINS,), and of the sides of zero, by name; one that is not
            defined on this slice is missing.
        floor: distance that so many runs drawn from the master equation would have from it, mean and 97.5%.
        undefined: why an equation is missing, by name.
    """

    slice: Slice
    curvature: float
    ends: Array
    edges: Array
    equations: dict[str, Array]
    rows: dict[str, Row]
    floor: tuple[float, float]
    undefined: dict[str, str]

    @cached_property
    def shares(self) -> Array:
        """Share of each seed's runs in each bin, (seeds, BINS)."""
        return np.stack([binned(each, self.edges) for each in self.ends])

    def measured(self, what: Callable[[Array], float]) -> tuple[float, float]:
        """A number of the runs and half the width of its 95% interval over seeds."""
        each = np.array([what(seed) for seed in self.ends])
        return float(each.mean()), float(1.96 * each.std(ddof=1) / np.sqrt(len(each)))


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
    grid = Grid(low - 0.35 * (high - low), high + 0.35 * (high - low), CELLS)
    loss = cut.on(grid)
    before = np.zeros(CELLS)
    place = (cut.start - grid.low) / grid.width
    before[int(place)], before[int(place) + 1] = 1 - place % 1, place % 1
    edges = np.linspace(low - 0.01 * (high - low), high + 0.01 * (high - low), BINS + 1)
    found: dict[str, tuple[Array, Array]] = {}
    undefined: dict[str, str] = {}
    for name, equation in (
        (MASTER, master_equation),
        (MODIFIED, modified_equation),
        (LANGEVIN, langevin_propagator),
    ):
        try:
            late = evolve(equation(loss, cut.rate), before, cut.steps)
        except ValueError as error:
            undefined[name] = str(error)
            continue
        found[name] = grid.centres, late
    positions = gaussian_steps(loss, cut, 100_000, np.random.default_rng(seed))
    found[GAUSSIAN] = positions, np.full(len(positions), 1 / len(positions))
    pooled = binned(ends.ravel(), edges)
    equations = {name: binned(points, edges, weights) for name, (points, weights) in found.items()}
    draws = np.random.default_rng(seed).multinomial(ends.size, clean(equations[MASTER]), 500) / ends.size
    by_chance = 0.5 * np.abs(draws - clean(equations[MASTER])).sum(1)
    slope = np.gradient(loss.mean_gradient, grid.width)
    return Density(
        slice=cut,
        curvature=float(np.interp(cut.start, grid.centres, slope)),
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
