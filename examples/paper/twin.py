"""Are the verdicts true? Against a linearised twin whose modes are known, under the same minibatches.

Of each direction the truth is kappa = eta lambda T: how many relaxation times of the frozen Hessian the
window holds. Below 1 the twin is free, from 20 on it is confined; in between no single window can tell.
Two sets of directions are judged: those that the package itself found on the live network (LoopProbe), and
all exact eigenvectors of the Hessian, by the package's sums and rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from drawing import BLUE, GREY, LAYOUT, ORANGE, bars
from estimates import Array, Estimate
from numpy.typing import NDArray
from paths import Paths, descend, draw, effective_curvature, twin
from probing import batches, train
from problems import Problem
from shares import percent, share, table

from sgd_probe import Verdict

#: Classes of kappa.
CLASSES = ((0.0, 1.0), (1.0, 3.0), (3.0, 20.0), (20.0, math.inf))
#: Edges of the figure's groups of kappa.
GROUPS = (0.01, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 7.0, 12.0, 20.0, 35.0, 100.0)
#: Verdicts that leave a mode free.
FREE = (Verdict.DIFFUSIVE, Verdict.SAMPLING_CONFINED)
COLUMNS: tuple[tuple[str, tuple[Verdict, ...]], ...] = (
    ("confined", (Verdict.CONFINED,)),
    ("diffusive", FREE),
    ("drifting or unstable", (Verdict.DRIFTING, Verdict.UNSTABLE)),
    ("undetermined", (Verdict.UNDETERMINED, Verdict.NO_NOISE)),
)


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        pull: eta lambda_1.
        batch: B.
        window: T.
        curvature: batches in each of LoopProbe's two sets.
        probed: runs that LoopProbe watches.
        seeds: of stacked runs, in which all modes are judged.
    """

    pull: float = 0.5
    batch: int = 64
    window: int = 120
    curvature: int = 8
    probed: int = 12
    seeds: int = 16


FULL = {"vision": Plan(), "language": Plan()}
QUICK = {
    "vision": Plan(curvature=3, probed=1, seeds=2),
    "language": Plan(batch=16, curvature=4, probed=1, seeds=2),
}


@dataclass(frozen=True, eq=False)
class Judged:
    """Verdicts beside the truth.

    Attributes:
        kappa: of the twin, shape (seeds, directions).
        network: verdicts on the network's motion, the same shape.
        twin: on the twin's motion along the same directions.
        unexplained: squared distance between the two paths over that of the network's path from its start.
    """

    kappa: Array
    network: NDArray[np.str_]
    twin: NDArray[np.str_]
    unexplained: Array

    def __len__(self) -> int:
        return self.kappa.size

    def within(self, low: float, high: float) -> NDArray[np.bool_]:
        """Directions of a class of kappa."""
        return np.asarray((self.kappa >= low) & (self.kappa < high))

    def share(
        self, chosen: NDArray[np.bool_], verdicts: tuple[Verdict, ...], *, of_twin: bool = False
    ) -> Estimate:
        """Of verdicts among some directions."""
        found = np.isin(self.twin if of_twin else self.network, [each.value for each in verdicts])
        return share((found & chosen).sum(1), chosen.sum(1))

    def agreement(self, chosen: NDArray[np.bool_]) -> Estimate:
        """Directions along which network and twin have the same verdict."""
        return share(((self.network == self.twin) & chosen).sum(1), chosen.sum(1))

    def opposed(self, chosen: NDArray[np.bool_]) -> Estimate:
        """Directions along which one is confined and the other free."""
        confined, free = Verdict.CONFINED.value, [each.value for each in FREE]
        one = (self.network == confined) & np.isin(self.twin, free)
        other = (self.twin == confined) & np.isin(self.network, free)
        return share(((one | other) & chosen).sum(1), chosen.sum(1))


@dataclass(frozen=True, eq=False)
class Result:
    """Of one problem.

    Attributes:
        problem: its name.
        probe: directions that the package found and judged on the live network.
        modes: all exact modes that have noise.
    """

    problem: str
    probe: Judged
    modes: Judged


def measure(problem: Problem, plan: Plan) -> Result:
    """Run the network, the package on it, and the twin."""
    return Result(problem.name, watched(problem, plan), every_mode(problem, plan))


def watched(problem: Problem, plan: Plan) -> Judged:
    """A window of LoopProbe's in each run, and the twin along the directions that it chose."""
    rate, found = problem.rate(plan.pull), []
    for seed in range(plan.probed):
        drawn = draw(problem, plan.window + 20, 1, plan.batch, 100 + seed)
        (window,) = train(
            problem,
            rate,
            batches(problem, drawn[:, 0]),
            steps=len(drawn),
            top=8,
            interior=3,
            flat=6,
            window=plan.window,
            every_n_steps=10 * plan.window,
            curvature_batches=plan.curvature,
        )
        first, last = window.result.opened_at_step, window.result.closed_at_step
        network, linear = (
            follow(problem, rate, drawn, window.vectors).between(first, last) for follow in (descend, twin)
        )
        kappa = effective_curvature(problem, window.vectors) * rate * plan.window
        verdicts = np.array([mode.verdict.value for mode in window.result.modes])
        found.append(judged(kappa[None], verdicts[None], network, linear))
    return Judged(*(np.concatenate([getattr(each, name) for each in found]) for name in _FIELDS))


def every_mode(problem: Problem, plan: Plan) -> Judged:
    """All exact eigenvectors that have noise, in stacked runs."""
    rate, vectors = problem.rate(plan.pull), problem.vectors[:, problem.moving]
    drawn = draw(problem, plan.window, plan.seeds, plan.batch, 7)
    network, linear = (follow(problem, rate, drawn, vectors) for follow in (descend, twin))
    kappa = (problem.eigenvalues[problem.moving] * rate * plan.window).numpy()
    return judged(np.tile(kappa, (plan.seeds, 1)), network.verdicts(), network, linear)


def judged(kappa: Array, verdicts: NDArray[np.str_], network: Paths, linear: Paths) -> Judged:
    """Put verdicts beside those on the twin's path."""
    apart = ((network.x - linear.x) ** 2).sum(0) / (network.x**2).sum(0)
    return Judged(kappa, verdicts, linear.verdicts(), apart)


_FIELDS = ("kappa", "network", "twin", "unexplained")


def tables(result: Result) -> str:
    """The confusions, in Markdown: the network's verdicts, and below them the twin's own."""
    return "\n\n".join(
        f"**{result.problem.capitalize()}, {title}**\n\n{_confusion(found)}"
        for title, found in (
            (f"directions of LoopProbe's windows ({len(result.probe.kappa)} seeds)", result.probe),
            (f"all exact modes ({len(result.modes.kappa)} seeds)", result.modes),
        )
    )


def _confusion(found: Judged) -> str:
    rows = []
    for low, high in CLASSES:
        chosen = found.within(low, high)
        if not chosen.any():
            continue
        name = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} and more"
        for of_twin in (False, True):
            shares = [found.share(chosen, verdicts, of_twin=of_twin) for _, verdicts in COLUMNS]
            row = ["", "", "twin"] if of_twin else [name, f"{chosen.sum():,}", "network"]
            row += [percent(each) for each in shares]
            if of_twin:
                row += ["", "", ""]
            else:
                apart = np.median(found.unexplained[chosen])
                row += [percent(found.agreement(chosen)), percent(found.opposed(chosen)), f"{apart:.1%}"]
            rows.append(row)
    head = ["kappa", "n", "of", *(name for name, _ in COLUMNS), "same verdict", "opposite verdict"]
    head.append("paths apart")
    return table(head, rows)


def figure(results: Sequence[Result]) -> Any:
    """Shares of verdicts on all exact modes against kappa: network and twin."""
    from plotly.subplots import make_subplots

    panels = make_subplots(
        1, len(results), subplot_titles=[each.problem for each in results], shared_yaxes=True
    )
    for column, result in enumerate(results, start=1):
        place = {"row": 1, "col": column}
        for name, verdicts, colour in (
            ("confined", COLUMNS[0][1], BLUE),
            ("diffusive", COLUMNS[1][1], ORANGE),
            ("undetermined", COLUMNS[3][1], GREY),
        ):
            for of_twin in (True, False):
                groups = [result.modes.within(*edges) for edges in pairwise(GROUPS)]
                groups = [each for each in groups if each.any()]
                points = [result.modes.share(each, verdicts, of_twin=of_twin) for each in groups]
                panels.add_scatter(
                    x=[float(np.exp(np.log(result.modes.kappa[each]).mean())) for each in groups],
                    y=[each.value for each in points],
                    error_y=None if of_twin else bars(points),
                    name=f"{name}, {'twin' if of_twin else 'network'}",
                    mode="lines" if of_twin else "markers",
                    line={"color": colour, "width": 2},
                    marker={"color": colour, "size": 9},
                    showlegend=column == 1,
                    **place,
                )
        panels.add_vrect(x0=1, x1=20, fillcolor="#e6eaf0", line_width=0, layer="below", **place)
    panels.update_xaxes(title="κ = η λ T of the frozen Hessian", type="log", dtick=1)
    panels.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")
    panels.update_yaxes(title="share of verdicts", col=1)
    panels.update_layout(**LAYOUT, legend={"orientation": "h", "y": -0.2, "x": 0})
    return panels
