"""Does a verdict follow what is done to the loss? A tether makes a flat direction confined; a kick decays.

Tether: a live training that the package watches. Its first window flags directions as diffusive. Half of
them, drawn at random, are then tied to where it is by ``k/2 (v.(theta - theta_t))^2`` in the user's loss, for
the second window; for the third the tie is cut. The flagged directions that are left alone are the control.

Kick: two runs with the same minibatches, one displaced along a mode. Their distance along it has to decay as
``(1 - eta lambda)^t``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from drawing import BLUE, GREEN, GREY, LAYOUT, ORANGE, bars
from estimates import Array, Estimate
from numpy.typing import NDArray
from paths import Paths, draw
from probing import batches, train
from problems import Problem
from shares import over_seeds, percent, share, shown, table
from torch import Tensor, nn
from torch.func import grad, vmap

from sgd_probe import LoopProbe, ModeKind, Verdict, WindowResult

#: eta lambda_1; of the kick whose distance changes its sign at every step.
PULL, ALTERNATING = 0.5, 1.3
#: eta k of each tether; steps between two windows.
TETHERS, REST = (0.6, 0.8, 1.0), 30
#: Squared cosine from which a mode of a window is a tethered direction.
SAME = 0.9
PHASES = ("before", "tethered", "released")
#: Lag of displacements, steps; size of a kick, weight units.
LAG, KICK = 20, 1e-3
#: Steps at which the curvature is looked at where the kicked runs are, each with the number of steps that it
#: stands for; of how many runs.
SEEN, MOST_SEEN = {0: 1, 1: 1, 2: 2, 4: 4, 8: 6, 14: 8, 22: 8, 30: 10}, 16


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        batch: B.
        tethered: runs of three windows.
        window: their steps.
        curvature: batches in each of LoopProbe's two sets.
        kicked: modes along which runs are kicked.
        smallest: curvature of the last of them over lambda_1.
        seeds: of kicked runs.
        steps: that they are followed.
    """

    batch: int
    tethered: int
    window: int
    curvature: int
    kicked: int
    smallest: float
    seeds: int
    steps: int


FULL = {
    "vision": Plan(64, 16, 80, 6, 8, 0.0105, 48, 40),
    "language": Plan(64, 10, 80, 4, 8, 0.002, 32, 40),
}
QUICK = {
    "vision": Plan(64, 1, 60, 3, 4, 0.0105, 3, 15),
    "language": Plan(16, 1, 60, 4, 3, 0.002, 3, 15),
}


# The tether


@dataclass(frozen=True, eq=False)
class Tethered:
    """Directions that the first window of each run flagged, through the three windows.

    Attributes:
        verdicts: by the package's rule on the steps of each window, shape (directions, phases).
        tied: which of them the second phase tethers, shape (directions,).
        spread: mean squared displacement over ``LAG`` steps, from every step on, over that of a free
            direction with no curvature, (directions, phases).
        foretold: the same by the closed forms, from eta k and the noise at the minimum.
        seed: of each direction.
        seen: LoopProbe's second window lists the direction as a stiff mode and calls it so; "" where none of
            its modes is the direction, (directions,).
        flat: in each phase, verdicts of LoopProbe's own near-flat directions, of all seeds.
    """

    verdicts: NDArray[np.str_]
    tied: NDArray[np.bool_]
    spread: Array
    foretold: Array
    seed: NDArray[np.int64]
    seen: NDArray[np.str_]
    flat: tuple[tuple[str, ...], ...]

    def share(self, phase: int, verdict: Verdict, tied: bool) -> Estimate:
        """Of the directions, those with a verdict in a phase."""
        chosen = self.tied == tied
        found = chosen & (self.verdicts[:, phase] == verdict.value)
        return share(self._per_seed(found), self._per_seed(chosen))

    def displacement(self, phase: int, tied: bool) -> Estimate:
        """Mean of ``spread``."""
        chosen = self.tied == tied
        return share(self._per_seed(chosen * self.spread[:, phase]), self._per_seed(chosen))

    def seen_confined(self) -> Estimate:
        """Tethered directions that LoopProbe's second window found as a stiff mode and called confined."""
        found = self.seen == Verdict.CONFINED.value
        return share(self._per_seed(found & self.tied), self._per_seed(self.tied))

    def less_free(self) -> Estimate:
        """Share of diffusive ones in the third window, those once tethered less those left alone."""
        free = self.verdicts[:, 2] == Verdict.DIFFUSIVE.value
        counts = [
            self._per_seed(chosen) for tied in (self.tied, ~self.tied) for chosen in (free & tied, tied)
        ]

        def difference(a: Array, b: Array, c: Array, d: Array) -> float:
            return float(a.sum() / b.sum() - c.sum() / d.sum()) if b.sum() and d.sum() else np.nan

        return over_seeds(difference, *counts)

    def _per_seed(self, values: Array | NDArray[np.bool_]) -> Array:
        return np.bincount(self.seed, values.astype(float), minlength=int(self.seed.max()) + 1)


class Tether:
    """The user's loss with a tie that can be put on and cut."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.vectors: Tensor | None = None
        self.stiffness = self.origin = torch.zeros(0)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        value = self.problem.criterion(model(batch[0]), batch[1])
        if self.vectors is None:
            return value
        away = (nn.utils.parameters_to_vector(model.parameters()) - self.origin) @ self.vectors
        return value + 0.5 * (self.stiffness * away**2).sum()

    def tie(self, model: nn.Module, vectors: Tensor, stiffness: Tensor) -> None:
        self.origin = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        self.vectors, self.stiffness = vectors, stiffness

    def cut(self) -> None:
        self.vectors = None


def tether(problem: Problem, plan: Plan) -> Tethered:
    """Three windows of each run: before, tethered and released."""
    rows: list[dict[str, Any]] = []
    flat: tuple[list[str], ...] = ([], [], [])
    for seed in range(plan.tethered):
        rows += _tethered_run(problem, plan, seed, flat)

    def column(name: str) -> NDArray[Any]:
        return np.array([row[name] for row in rows])

    names = ("verdicts", "tied", "spread", "foretold", "seed", "seen")
    return Tethered(*(column(name) for name in names), tuple(map(tuple, flat)))


def _tethered_run(
    problem: Problem, plan: Plan, seed: int, flat: tuple[list[str], ...]
) -> list[dict[str, Any]]:
    rate, loss = problem.rate(PULL), Tether(problem)
    # The first window opens when both of its sets of batches have been seen.
    steps = 2 * plan.curvature + 3 * plan.window + 2 * REST + 1
    places: list[Tensor] = []
    flagged: list[Tensor] = []
    pulls: dict[int, float] = {}  # eta k of the tethered ones among them

    def watch(model: nn.Module, results: list[WindowResult], probe: LoopProbe) -> None:
        places.append(nn.utils.parameters_to_vector(model.parameters()).detach().double())
        if len(results) == 1 and not flagged:
            flats = {mode.name for mode in results[0].modes if mode.kind is ModeKind.FLAT}
            flagged.extend(vector for name, vector in probe.basis.items() if name in flats)
            order = np.random.default_rng(seed).permutation(len(flagged))[: -(-len(flagged) // 2)]
            pulls.update(zip(order.tolist(), TETHERS, strict=False))
            if pulls:
                vectors = torch.stack([flagged[index] for index in pulls], 1)
                loss.tie(model, vectors, torch.tensor(list(pulls.values())) / rate)
        elif len(results) == 2:
            loss.cut()

    windows = train(
        problem,
        rate,
        batches(problem, draw(problem, steps, 1, plan.batch, 500 + seed)[:, 0]),
        steps=steps,
        loss=loss.loss,
        after=watch,
        top=5,
        flat=6,
        window=plan.window,
        every_n_steps=plan.window + REST,
        curvature_batches=plan.curvature,
    )
    for found, probed in zip(flat, windows, strict=False):
        found += [mode.verdict.value for mode in probed.result.modes if mode.kind is ModeKind.FLAT]
    path = torch.stack(places)
    return [
        _row(problem, plan, vector.double(), pulls.get(index, 0.0), seed, path, windows)
        for index, vector in enumerate(flagged)
    ]


def _row(
    problem: Problem, plan: Plan, vector: Tensor, tied: float, seed: int, path: Tensor, windows: Sequence[Any]
) -> dict[str, Any]:
    """One flagged direction through the three windows."""
    rate, x = problem.rate(PULL), (path @ vector).numpy()[:, None, None]
    g = -np.diff(x, axis=0) / rate  # plain SGD: what it moved by is what it used
    mixing = problem.vectors.T @ vector
    noise = float((problem.deviations @ mixing).square().mean()) / plan.batch
    verdicts, spread, foretold = [], [], []
    for phase, window in enumerate(windows[: len(PHASES)]):
        first, last = window.result.opened_at_step, window.result.closed_at_step
        part = Paths(np.full(len(g), rate), x, g).between(first, last)
        verdicts.append(str(part.verdicts()[0, 0]))
        moved = part.x[LAG:, 0, 0] - part.x[:-LAG, 0, 0]
        spread.append(float((moved**2).mean()) / (rate**2 * noise * LAG))
        pull = tied if phase == 1 else 0.0
        a = 1 - pull
        foretold.append(2 * (1 - a**LAG) / (pull * (2 - pull) * LAG) if pull else 1.0)
    seen = ""
    if tied:
        cosines = (windows[1].vectors.T @ vector).square()
        best = int(cosines.argmax())
        if float(cosines[best]) >= SAME:
            seen = windows[1].result.modes[best].verdict.value
    return {
        "verdicts": verdicts,
        "tied": tied > 0,
        "spread": spread,
        "foretold": foretold,
        "seed": seed,
        "seen": seen,
    }


# The kick


@dataclass(frozen=True, eq=False)
class Kicked:
    """Distances between kicked runs and their companions.

    Attributes:
        pulls: eta lambda of each mode, (modes,).
        distance: along the kicked mode over the kick, shape (steps + 1, modes, seeds).
        felt: what the decay is by the Hessian of all samples where the first runs are: sums over steps of
            ``(v.H d)(v.d)`` and of ``lambda (v.d)^2`` with d the distance, (2, modes, at most ``MOST_SEEN``).
    """

    pulls: Array
    distance: Array
    felt: Array

    @cached_property
    def rates(self) -> list[Estimate]:
        """The decay of each mode's distance."""
        return [self._rate(index) for index in range(len(self.pulls))]

    def _rate(self, mode: int) -> Estimate:
        """``1 - a`` with a the regression of a step's distance on that before, over all seeds."""
        distance = self.distance[:, mode].T

        def rate(paths: Array) -> float:
            before, after = paths[:, :-1], paths[:, 1:]
            return float(((before - after) * before).sum() / (before**2).sum())

        return over_seeds(rate, distance)

    def foretold(self, mode: int) -> Estimate:
        """The decay over eta lambda by the Hessian of all samples where the runs are."""
        return share(*self.felt[:, mode])


def kick(problem: Problem, pull: float, batch: int, modes: Sequence[int], steps: int, seeds: int) -> Kicked:
    """Runs with common minibatches, in float64: one by itself, and one kicked along each mode."""
    rate, vectors = problem.rate(pull), problem.vectors[:, list(modes)]
    drawn = draw(problem, steps, seeds, batch, 900)
    kicks = torch.cat([torch.zeros(1, problem.size), KICK * vectors.T]).double()
    moved = kicks[:, None].repeat(1, seeds, 1)
    runs = vmap(
        vmap(grad(lambda there, rows: problem.loss(problem.weights + there, rows))), in_dims=(0, None)
    )
    product = vmap(vmap(problem.product, in_dims=(0, 0)), in_dims=(0, None), chunk_size=4)
    values = problem.eigenvalues[list(modes), None]
    felt = torch.zeros(2, len(modes), min(seeds, MOST_SEEN), dtype=torch.float64)
    distance = [torch.ones(len(modes), seeds, dtype=torch.float64)]
    for t, rows in enumerate(drawn):
        if t in SEEN:
            apart = (moved[1:] - moved[0])[:, :MOST_SEEN]
            pulled = (product(apart, problem.weights + moved[0, :MOST_SEEN]) * vectors.T[:, None]).sum(2)
            along = (apart * vectors.T[:, None]).sum(2)
            felt += SEEN[t] * torch.stack([pulled * along, values * along**2])
        moved = moved - rate * runs(moved, rows)
        apart = moved[1:] - moved[0]
        distance.append(torch.einsum("msp,pm->ms", apart, vectors) / KICK)
    pulls = (problem.eigenvalues[list(modes)] * rate).numpy()
    return Kicked(pulls, torch.stack(distance).numpy(), (felt / KICK**2).numpy())


def spaced_modes(problem: Problem, count: int, smallest: float) -> list[int]:
    """Modes whose curvatures are spaced evenly on a logarithmic axis, from the stiffest one down."""
    values = problem.eigenvalues
    wanted = np.geomspace(1, smallest, count) * float(values[0])
    candidates = torch.where(problem.moving, values, torch.inf)
    return sorted({int((candidates.log() - np.log(level)).abs().argmin()) for level in wanted})


# The report


@dataclass(frozen=True, eq=False)
class Result:
    """Of one problem.

    Attributes:
        problem: its name.
        tethered: the tether's.
        kicked: kicks along modes from stiff to flat.
        alternating: a kick along the stiffest mode at eta lambda = ``ALTERNATING``.
    """

    problem: str
    tethered: Tethered
    kicked: Kicked
    alternating: Kicked


def measure(problem: Problem, plan: Plan) -> Result:
    """Tether and kick."""
    modes = spaced_modes(problem, plan.kicked, plan.smallest)
    return Result(
        problem.name,
        tether(problem, plan),
        kick(problem, PULL, plan.batch, modes, plan.steps, plan.seeds),
        kick(problem, ALTERNATING, 4 * plan.batch, [0], 12, plan.seeds),
    )


def tables(result: Result) -> str:
    """Verdicts and displacements of the tethered directions and of the control; rates of decay."""
    tethered, rows = result.tethered, []
    for tied in (True, False):
        chosen = tethered.tied == tied
        if not chosen.any():
            continue
        for phase, name in enumerate(PHASES):
            row = [f"{'tethered' if tied else 'left alone'} ({chosen.sum()})" if not phase else "", name]
            row += [
                percent(tethered.share(phase, verdict, tied))
                for verdict in (Verdict.CONFINED, Verdict.DIFFUSIVE, Verdict.UNDETERMINED)
            ]
            row += [
                shown(tethered.displacement(phase, tied)),
                f"{tethered.foretold[chosen, phase].mean():.2f}" if tied and phase == 1 else "",
            ]
            rows.append(row)
    seen = tethered.seen[tethered.tied]
    flat = ", ".join(
        f"{sum(each in _FREE for each in found)} of {len(found)} {name}"
        for name, found in zip(PHASES, tethered.flat, strict=True)
    )
    head = ["directions", "window", "confined", "diffusive", "undetermined", "MSD over free", "foretold"]
    decays = [
        [
            f"{pull:.3g}",
            shown(rate, ".3g"),
            shown(over(rate, pull), ".3f"),
            shown(kicked.foretold(mode), ".3f"),
        ]
        for kicked in (result.kicked, result.alternating)
        for mode, (pull, rate) in enumerate(zip(kicked.pulls.tolist(), kicked.rates, strict=True))
    ]
    name = result.problem.capitalize()
    return (
        f"**{name}, tether ({len(set(tethered.seed))} runs)**\n\n{table(head, rows)}\n\n"
        f"LoopProbe's own second window lists {sum(seen != '')} of the {len(seen)} tethered directions among "
        f"its stiff modes, and calls {sum(seen == Verdict.CONFINED.value)} of those confined. Of its "
        f"near-flat directions, drawn anew in each window, are diffusive: {flat}.\n\n"
        f"**{name}, kick**\n\n"
        f"{table(KICK_HEAD, decays)}"
    )


KICK_HEAD = (
    "eta lambda",
    "decay a step, measured",
    "over eta lambda",
    "by the Hessian where the runs are",
)
_FREE = (Verdict.DIFFUSIVE.value, Verdict.SAMPLING_CONFINED.value)


def over(estimate: Estimate, unit: float) -> Estimate:
    """An estimate in units of a number."""
    return Estimate(*(each / unit for each in (estimate.value, estimate.low, estimate.high)))


def figure(results: Sequence[Result]) -> Any:
    """The tethered directions' displacements and verdicts by window, and decay against eta lambda."""
    from plotly.subplots import make_subplots

    titles = ["Tether: how far flagged directions get", "Kick: how fast the distance decays"]
    panels = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.1)
    for index, result in enumerate(results):
        symbol = SYMBOLS[index % len(SYMBOLS)]
        for tied, colour, name in ((True, BLUE, "tethered in the second"), (False, ORANGE, "left alone")):
            if not (result.tethered.tied == tied).any():
                continue
            points = [result.tethered.displacement(phase, tied) for phase in range(len(PHASES))]
            panels.add_scatter(
                x=[phase + 0.06 * (2 * index - 1) + 0.02 * tied for phase in range(len(PHASES))],
                y=[each.value for each in points],
                error_y=bars(points),
                name=f"{result.problem}, {name}",
                mode="markers+lines",
                line={"color": colour, "width": 1.5, "dash": "solid" if not index else "dot"},
                marker={"color": colour, "symbol": symbol, "size": 10},
                row=1,
                col=1,
            )
        for kicked in (result.kicked, result.alternating):
            points = [over(*pair) for pair in zip(kicked.rates, kicked.pulls, strict=True)]
            panels.add_scatter(
                x=kicked.pulls,
                y=[each.value for each in points],
                error_y=bars(points),
                name=f"{result.problem}, kick",
                mode="markers",
                marker={"color": GREEN, "symbol": symbol, "size": 10},
                showlegend=kicked is result.kicked,
                row=1,
                col=2,
            )
    tied = [each.tethered.foretold[each.tethered.tied, 1].mean() for each in results]
    panels.add_scatter(
        x=[0.8, 1.2],
        y=[float(np.mean(tied))] * 2,
        name="foretold of a tether",
        mode="lines",
        line={"color": GREY, "width": 2, "dash": "dash"},
        row=1,
        col=1,
    )
    panels.add_hline(y=1, line={"color": GREY, "width": 2}, row=1, col=2)
    panels.update_xaxes(tickvals=[0, 1, 2], ticktext=list(PHASES), title="window", row=1, col=1)
    panels.update_yaxes(
        title=f"mean squared displacement over {LAG} steps / free", type="log", dtick=1, row=1, col=1
    )
    panels.update_xaxes(title="η λ of the mode at the minimum", type="log", dtick=1, row=1, col=2)
    panels.update_yaxes(title="measured decay over η λ", range=[0.75, 1.25], row=1, col=2)
    panels.update_layout(**LAYOUT, legend={"orientation": "h", "y": -0.2, "x": 0})
    return panels


SYMBOLS = ("circle", "square-open")
