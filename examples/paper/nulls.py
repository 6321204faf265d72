"""What must be found where there is nothing to find, and what must not change.

- Sign-flipped increments of confined modes: no restoring force is left, so they have to be called diffusive.
- One batch for ever: no noise, so no diffusion.
- With and without replacement: a loader that goes through the data in epochs holds flat directions.
- eta, eta / 2, eta: D comes back.
- (eta, B) to (eta / 2, B / 4): D per step is ``eta^2 S^2 / (2 B)``, unchanged. Per unit of time eta t it is
  ``eta S^2 / (2 B)`` and doubles, as does the variance of a stiff mode, ``eta S^2 / (2 B lambda)``. Those
  two stay under (eta / 2, B / 2), where D per step halves. Relaxation times a step halve in both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from drawing import BLUE, GREY, LAYOUT, ORANGE, bars
from estimates import Array, Estimate
from numpy.typing import NDArray
from paths import descend, draw
from probing import batches, train
from problems import Problem
from shares import over_seeds, percent, shown, table
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from sgd_probe import ModeKind, Verdict
from sgd_probe.dynamics.diffusion import headline_lag

#: eta lambda_1 where verdicts are asked for.
PULL = 0.5
#: Smallest kappa of a confined mode; largest of a near-flat one, over a window at the highest rate.
CONFINED, FLAT = 20.0, 0.5
#: Stiff modes of which the variance is compared.
STIFF = 6
CHANGES = ("η/2, B/4", "η/2, B/2")


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        window: steps of the windows that are judged.
        batch: B there.
        curvature: batches in each of LoopProbe's two sets.
        seeds: of stacked runs.
        flips: of each path.
        frozen: runs on a single batch.
        loaders: runs with either way of drawing.
        pull: eta lambda_1 where D is compared.
        large: B there.
        steps: of each of three windows there.
    """

    window: int
    batch: int
    curvature: int
    seeds: int
    flips: int
    frozen: int
    loaders: int
    pull: float
    large: int
    steps: int


FULL = {
    "vision": Plan(150, 64, 8, 16, 10, 6, 10, 0.3, 256, 96),
    "language": Plan(150, 64, 5, 16, 10, 4, 8, 0.3, 128, 96),
}
QUICK = {
    "vision": Plan(150, 64, 3, 3, 4, 1, 1, 0.3, 128, 48),
    "language": Plan(150, 16, 4, 3, 4, 1, 1, 0.3, 32, 48),
}


@dataclass(frozen=True, eq=False)
class Flipped:
    """Shares of verdicts on the confined modes, as they moved and with flipped increments.

    Attributes:
        modes: how many.
        intact: shares by verdict.
        flipped: the same.
    """

    modes: int
    intact: dict[Verdict, Estimate]
    flipped: dict[Verdict, Estimate]


@dataclass(frozen=True, eq=False)
class Loader:
    """Windows of LoopProbe's under one way of drawing.

    Attributes:
        name: of it.
        epochs: in a window.
        stiff: verdicts on stiff modes, of each run.
        flat: on near-flat directions.
        epoch_spread: squared displacement of near-flat directions over an epoch over that of free diffusion
            under independent draws.
    """

    name: str
    epochs: float
    stiff: list[list[str]]
    flat: list[list[str]]
    epoch_spread: Estimate


@dataclass(frozen=True, eq=False)
class Change:
    """Runs at another learning rate or batch size, over those at (eta, B).

    Attributes:
        name: of the change.
        per_step: D per step of near-flat modes.
        per_time: D per unit of eta t.
        variance: of stiff modes.
        expected: of these three by the closed forms.
    """

    name: str
    per_step: Estimate
    per_time: Estimate
    variance: Estimate
    expected: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Result:
    """Of one problem.

    Attributes:
        problem: its name.
        flipped: sign-flipped increments.
        frozen: verdicts of LoopProbe on a single batch, by kind of direction.
        loaders: with replacement, without.
        lag: steps, of the displacements behind D.
        near_flat: modes behind D.
        windows: D over eta^2 sigma^2 / 2 at eta, eta / 2 and eta again.
        back: D of the third window over that of the first.
        changes: other learning rates and batch sizes.
    """

    problem: str
    flipped: Flipped
    frozen: dict[str, Counter[str]]
    loaders: tuple[Loader, ...]
    lag: int
    near_flat: int
    windows: tuple[Estimate, ...]
    back: Estimate
    changes: tuple[Change, ...]


def measure(problem: Problem, plan: Plan) -> Result:
    """All nulls."""
    windows, back = hysteresis(problem, plan)
    return Result(
        problem=problem.name,
        flipped=flipped(problem, plan),
        frozen=frozen(problem, plan),
        loaders=(loader(problem, plan, replacement=True), loader(problem, plan, replacement=False)),
        lag=headline_lag(plan.steps, 0.0),
        near_flat=int(near_flat(problem, plan).sum()),
        windows=windows,
        back=back,
        changes=changes(problem, plan),
    )


def flipped(problem: Problem, plan: Plan) -> Flipped:
    """Judge the confined modes' paths as they are and with random signs."""
    rate = problem.rate(PULL)
    confined = problem.moving & (problem.eigenvalues * rate * plan.window >= CONFINED)
    drawn = draw(problem, plan.window, plan.seeds, plan.batch, 31)
    paths = descend(problem, rate, drawn, problem.vectors[:, confined])
    rng = np.random.default_rng(31)
    intact = paths.verdicts()
    mixed = np.concatenate([paths.flipped(rng).verdicts() for _ in range(plan.flips)], axis=1)

    def by_verdict(found: NDArray[np.str_]) -> dict[Verdict, Estimate]:
        return {
            each: Estimate.of((found == each.value).mean(1))
            for each in Verdict
            if (found == each.value).any()
        }

    return Flipped(int(confined.sum()), by_verdict(intact), by_verdict(mixed))


def frozen(problem: Problem, plan: Plan) -> dict[str, Counter[str]]:
    """LoopProbe on a training that repeats one batch."""
    found: dict[str, Counter[str]] = {kind.value: Counter() for kind in (ModeKind.TOP, ModeKind.FLAT)}
    for seed in range(plan.frozen):
        stream = batches(problem, draw(problem, 1, 1, plan.batch, 50 + seed)[:, 0])
        (window,) = train(
            problem,
            problem.rate(PULL),
            stream,
            steps=plan.window + 20,
            top=6,
            flat=4,
            window=plan.window,
            every_n_steps=10 * plan.window,
            curvature_batches=plan.curvature,
        )
        for mode in window.result.modes:
            found[mode.kind.value][mode.verdict.value] += 1
    return found


def loader(problem: Problem, plan: Plan, *, replacement: bool) -> Loader:
    """LoopProbe on an ordinary loader."""
    rate, kept = problem.rate(PULL), []
    data = TensorDataset(problem.inputs.float(), problem.targets)
    size = len(data) // plan.batch  # steps an epoch
    stiff, flat = [], []
    for seed in range(plan.loaders):
        generator = torch.Generator().manual_seed(70 + seed)
        sampler = RandomSampler(data, replacement=replacement, generator=generator)
        stream = DataLoader(data, batch_size=plan.batch, sampler=sampler, drop_last=True)
        places: list[Tensor] = []

        def watch(model: nn.Module, *_: Any, places: list[Tensor] = places) -> None:
            places.append(nn.utils.parameters_to_vector(model.parameters()).detach().double())

        steps = (plan.window + 40) // size * size + size  # whole epochs
        (window,) = train(
            problem,
            rate,
            stream,
            steps=steps,
            after=watch,
            sampling="auto",
            top=6,
            flat=6,
            window=plan.window,
            every_n_steps=10 * plan.window,
            curvature_batches=plan.curvature,
        )
        modes = window.result.modes
        stiff.append([mode.verdict.value for mode in modes if mode.kind is ModeKind.TOP])
        flat.append([mode.verdict.value for mode in modes if mode.kind is ModeKind.FLAT])
        vectors = window.vectors[:, [mode.kind is ModeKind.FLAT for mode in modes]]
        noise = (problem.deviations @ (problem.vectors.T @ vectors)).square().mean(0) / plan.batch
        moved = torch.stack(places[::size]).diff(dim=0) @ vectors  # the loop begins with an epoch
        kept.append((moved.square().mean(0) / (rate**2 * noise * size)).numpy())
    return Loader(
        "with replacement" if replacement else "without replacement",
        plan.window / size,
        stiff,
        flat,
        Estimate.of(np.array(kept).mean(1)),
    )


def near_flat(problem: Problem, plan: Plan) -> Tensor:
    """Modes of which D is asked, a mask."""
    return problem.moving & (problem.eigenvalues * problem.rate(plan.pull) * plan.steps <= FLAT)


def hysteresis(problem: Problem, plan: Plan) -> tuple[tuple[Estimate, ...], Estimate]:
    """D over free diffusion in three windows of one run: eta, eta / 2, eta."""
    rate, flat = problem.rate(plan.pull), near_flat(problem, plan)
    noise = problem.sample_variance[flat].numpy() / plan.large
    drawn = draw(problem, 3 * plan.steps, plan.seeds, plan.large, 61)
    rates = np.repeat([rate, rate / 2, rate], plan.steps)
    paths = descend(problem, rates, drawn, problem.vectors[:, flat])
    found = []
    for phase, each in enumerate((rate, rate / 2, rate)):
        window = paths.between(phase * plan.steps, (phase + 1) * plan.steps)
        found.append((per_step(window) / (each**2 * noise / 2)).mean(1))
    back = over_seeds(lambda last, first: float(last.mean() / first.mean()), found[2], found[0])
    return tuple(Estimate.of(each) for each in found), back


def per_step(paths: Any) -> Array:
    """D per step at the package's headline lag, by its own running sums, (seeds, directions)."""
    sums, lag = paths.statistics(), headline_lag(paths.steps, 0.0)
    level = int(math.log2(lag))
    clock = sums.lag_elapsed[level] / (sums.diffusion_clock / sums.steps)  # steps that the displacements span
    return np.asarray(sums.lag_square[level] / (2 * clock)).reshape(paths.g.shape[1:])


def changes(problem: Problem, plan: Plan) -> tuple[Change, ...]:
    """D and the variance of stiff modes at other learning rates and batch sizes, each with its own seeds."""
    flat = near_flat(problem, plan)
    chosen = flat.clone()
    chosen[:STIFF] = True
    steps, base, found = 2 * plan.steps, problem.rate(plan.pull), []
    runs = ((base, plan.large), (base / 2, plan.large // 4), (base / 2, plan.large // 2))
    for index, (rate, batch) in enumerate(runs):
        drawn = draw(problem, steps, plan.seeds, batch, 80 + index)
        paths = descend(problem, rate, drawn, problem.vectors[:, chosen])
        diffusion = per_step(paths[STIFF:]).mean(1)
        # All begin at the minimum: what is left of that after so many steps is nothing.
        settled = paths.x[plan.steps // 2 :, :, :STIFF]
        scale = problem.sample_variance[:STIFF].numpy() / problem.eigenvalues[:STIFF].numpy()
        found.append((rate, diffusion, ((settled**2).mean(0) / scale).mean(1)))

    def ratio(now: Array, first: Array) -> float:
        return float(now.mean() / first.mean())

    def stationary(rate: float, batch: int) -> float:
        pulls = rate * problem.eigenvalues[:STIFF].numpy()
        return float((rate / (batch * (2 - pulls))).mean())

    (first_rate, first_batch), (_, first_d, first_v) = runs[0], found[0]
    out = []
    for name, (_, batch), (rate, diffusion, variance) in zip(CHANGES, runs[1:], found[1:], strict=True):
        kicks = rate**2 / batch / (first_rate**2 / first_batch)
        stiff = stationary(rate, batch) / stationary(first_rate, first_batch)
        out.append(
            Change(
                name,
                over_seeds(ratio, diffusion, first_d),
                over_seeds(ratio, diffusion / rate, first_d / first_rate),
                over_seeds(ratio, variance, first_v),
                (kicks, kicks * first_rate / rate, stiff),
            )
        )
    return tuple(out)


# The report


def tables(result: Result) -> str:
    """All nulls of one problem, in Markdown."""
    name = result.problem.capitalize()
    shown_verdicts = [
        each for each in Verdict if each in result.flipped.intact or each in result.flipped.flipped
    ]
    flips = [
        [what, *(percent(found[each]) if each in found else "0" for each in shown_verdicts)]
        for what, found in (
            ("as they moved", result.flipped.intact),
            ("signs flipped", result.flipped.flipped),
        )
    ]
    kinds = [[kind, _counts(counts)] for kind, counts in result.frozen.items()]
    loaders = [
        [
            f"{each.name}, {each.epochs:.1f} epochs",
            _counts(Counter(v for run in each.stiff for v in run)),
            _counts(Counter(v for run in each.flat for v in run)),
            shown(each.epoch_spread, ".3f"),
        ]
        for each in result.loaders
    ]
    windows = [
        [rate, shown(each, ".3f")] for rate, each in zip(("η", "η/2", "η again"), result.windows, strict=True)
    ]
    windows.append(["third over first", shown(result.back, ".3f")])
    others = [
        [
            each.name,
            *(
                f"{shown(found, '.3f')} ({expected:.3g})"
                for found, expected in zip(
                    (each.per_step, each.per_time, each.variance), each.expected, strict=True
                )
            ),
        ]
        for each in result.changes
    ]
    return "\n\n".join(
        (
            f"**{name}, increments of the {result.flipped.modes} modes with kappa of {CONFINED:g} and more**",
            table(["", *(each.value.replace("_", " ") for each in shown_verdicts)], flips),
            f"**{name}, one batch for ever**",
            table(["directions", "verdicts of LoopProbe"], kinds),
            f"**{name}, how the loader draws**",
            table(["loader", "stiff", "near-flat", "near-flat MSD over an epoch / free"], loaders),
            f"**{name}, η to η/2 and back: {result.near_flat} near-flat modes, lag {result.lag}**",
            table(["learning rate", "D over η²σ²/2"], windows),
            f"**{name}, other learning rates and batch sizes, over (η, B); expected in brackets**",
            table(["", "D per step", "D per unit of ηt", "variance of stiff modes"], others),
        )
    )


def _counts(found: Counter[str]) -> str:
    return ", ".join(f"{count} {verdict.replace('_', ' ')}" for verdict, count in found.most_common())


def figure(results: Sequence[Result]) -> Any:
    """The flipped signs, the epochs, the learning rate that comes back, and the two scalings."""
    from plotly.subplots import make_subplots

    titles = [
        "Confined modes",
        "Near-flat: an epoch",
        "D at η, η/2, η",
        *(f"{each} over η, B" for each in CHANGES),
    ]
    panels = make_subplots(1, 5, subplot_titles=titles, horizontal_spacing=0.06)
    none = Estimate(0.0, 0.0, 0.0)
    for index, (result, colour) in enumerate(zip(results, (BLUE, ORANGE), strict=False)):
        intact, flipped = result.flipped.intact, result.flipped.flipped
        columns: list[list[Estimate]] = [
            [
                intact.get(Verdict.CONFINED, none),
                flipped.get(Verdict.CONFINED, none),
                flipped.get(Verdict.DIFFUSIVE, none),
            ],
            [each.epoch_spread for each in result.loaders],
            list(result.windows),
            *([each.per_step, each.per_time, each.variance] for each in result.changes),
        ]
        for column, points in enumerate(columns, start=1):
            panels.add_scatter(
                x=[place + 0.12 * (2 * index - 1) for place in range(len(points))],
                y=[each.value for each in points],
                error_y=bars(points),
                name=result.problem,
                mode="markers",
                marker={"color": colour, "symbol": ("circle", "square-open")[index % 2], "size": 10},
                showlegend=column == 1,
                row=1,
                col=column,
            )
    expected = [None, None, [1.0] * 3, *(each.expected for each in results[0].changes)]
    labels = [
        ["confined<br>as moved", "confined<br>flipped", "diffusive<br>flipped"],
        ["with", "without<br>replacement"],
        ["η", "η/2", "η again"],
        *([["D per<br>step", "D per<br>η t", "stiff<br>V"]] * 2),
    ]
    for column, (values, ticks) in enumerate(zip(expected, labels, strict=True), start=1):
        places = list(range(len(ticks)))
        if values is not None:
            panels.add_scatter(
                x=places,
                y=values,
                name="expected",
                mode="markers",
                marker={"symbol": "line-ew", "size": 46, "line": {"color": GREY, "width": 2}},
                showlegend=column == 3,
                row=1,
                col=column,
            )
        panels.update_xaxes(
            tickvals=places, ticktext=ticks, range=[-0.5, len(ticks) - 0.5], tickangle=0, row=1, col=column
        )
        panels.update_yaxes(rangemode="tozero", row=1, col=column)
    panels.update_yaxes(title="share of verdicts", range=[-0.03, 1.03], tickformat=".0%", row=1, col=1)
    panels.update_yaxes(title="mean squared displacement / free", row=1, col=2)
    panels.update_yaxes(title="D over η²σ²/2", range=[0, 1.5], row=1, col=3)
    panels.update_yaxes(title="ratio", row=1, col=4)
    panels.update_layout(**LAYOUT, legend={"orientation": "h", "y": -0.16, "x": 0})
    return panels
