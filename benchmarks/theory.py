"""Every formula of docs/theory.md beside a Monte Carlo of the optimizer's update, with its standard error.

The simulation shares no code with the theory: it draws minibatches and moves weights as torch.optim.SGD does.
With ``--figure FOLDER`` it also writes the pictures of that page, for which chromium must be on PATH.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _figures import picture
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from scipy.stats import norm

from sgd_probe.theory import MinibatchSampling, QuadraticEnsemble, SGDDynamics, SGDMode, closed_forms
from sgd_probe.theory.master_equation import (
    FluctuatingLoss,
    Grid,
    discrete_fokker_planck,
    euler_maruyama,
    evolve,
    langevin_propagator,
    master_equation,
    modified_equation,
)
from sgd_probe.theory.sampling import (
    bridge_variance,
    epoch_factor,
    plain_epoch_factor,
    saturated_displacement,
)

Array = NDArray[np.float64]
NOISE = 0.49
PLAIN, BALL = SGDDynamics(0.1), SGDDynamics(0.1, momentum=0.9)


@dataclass(frozen=True)
class Row:
    """A formula beside the mean of independent replicas of what it predicts."""

    name: str
    theory: float
    measured: float
    error: float

    @classmethod
    def of(cls, name: str, theory: float, replicas: NDArray[Any]) -> Row:
        return cls(
            name, float(theory), float(replicas.mean()), float(replicas.std() / math.sqrt(len(replicas)))
        )

    @property
    def deviation(self) -> float:
        """In standard errors."""
        return (self.measured - self.theory) / self.error if self.error else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer replicas, under a minute")
    parser.add_argument("--json", action="store_true", help="print a summary as the last line")
    parser.add_argument(
        "--figure", type=Path, metavar="FOLDER", help="write the pictures of docs/theory.md there"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    replicas = 20_000 if options.quick else 200_000
    rows = []
    print(f"{'formula':<58} {'theory':>11} {'Monte Carlo':>11} {'s.e.':>8} {'off':>6} {'z':>5}")
    for index, case in enumerate(CASES):
        for row in case(np.random.default_rng([options.seed, index]), replicas):
            rows.append(row)
            off = f"{row.measured / row.theory - 1:+.1%}" if row.theory else "0"
            print(
                f"{row.name:<58} {row.theory:>11.5g} {row.measured:>11.5g} {row.error:>8.1g} {off:>6} "
                f"{row.deviation:>+5.1f}",
                flush=True,
            )
    if options.figure:
        options.figure.mkdir(parents=True, exist_ok=True)
        for draw in (_variance_figure, _displacement_figure, _density_figure):
            draw(options.figure, replicas, np.random.default_rng([options.seed, 10_000]))
    if options.json:
        summary = {
            "replicas": replicas,
            "formulas": len(rows),
            "largest_deviation": max(abs(row.deviation) for row in rows),
            "largest_relative_difference": max(
                abs(row.measured / row.theory - 1) for row in rows if row.theory
            ),
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(json.dumps(summary))
    return 0


# The simulation


class Replicas:
    """Weights moved by the rule of torch.optim.SGD, decoupled decay as AdamW has it."""

    def __init__(self, weights: Array, rule: SGDDynamics) -> None:
        self.weights, self.buffer, self._rule = weights, None, rule  # type: Array, Array | None, SGDDynamics

    def step(self, gradient: Array, rate: float | None = None) -> Array:
        rule = self._rule
        rate = rule.learning_rate if rate is None else rate
        weights = self.weights
        if rule.decoupled_weight_decay:
            weights = weights * (1 - rate * rule.weight_decay)
        else:
            gradient = gradient + rule.weight_decay * weights
        if rule.momentum:
            if self.buffer is None:
                self.buffer = gradient
            else:
                self.buffer = rule.momentum * self.buffer + (1 - rule.dampening) * gradient
            gradient = gradient + rule.momentum * self.buffer if rule.nesterov else self.buffer
        self.weights = weights - rate * gradient
        return self.weights


def skewed(rng: np.random.Generator, size: int) -> Array:
    """Noise of unit variance that is far from Gaussian: none of the formulas needs that."""
    return np.asarray(rng.exponential(size=size) - 1)


def settled(mode: SGDMode, rng: np.random.Generator, replicas: int) -> Replicas:
    """Replicas in their stationary state: to 1e-4 of the variance by the recursion."""
    target = mode.stationary_variance()
    steps = next(t for t in itertools.count(25, 25) if abs(mode.variance(t) / target - 1) < 1e-4)
    moving = Replicas(np.zeros(replicas), mode.dynamics)
    for _ in range(steps):
        moving.step(gradient(mode, moving.weights, rng))
    return moving


def gradient(mode: SGDMode, weights: Array, rng: np.random.Generator) -> Array:
    noise = math.sqrt(mode.noise_variance) * skewed(rng, len(weights))
    found = mode.eigenvalue * weights + noise
    if mode.hessian_variance:
        slope = mode.covariance / mode.noise_variance
        rest = math.sqrt(mode.hessian_variance - slope**2 * mode.noise_variance)
        found += (slope * noise + rest * rng.standard_normal(len(weights))) * weights
    return found


def shuffled(sampling: MinibatchSampling, replicas: int, rng: np.random.Generator) -> Iterator[Array]:
    """Noise of each step, S^2 = 1; every replica shuffles the same samples for itself (A = 1)."""
    values = skewed(rng, sampling.samples or 0)
    values = (values - values.mean()) / values.std(ddof=1)
    fresh = math.sqrt(sampling.fresh)
    kept = math.sqrt(1 - sampling.fresh)
    sizes = [size for (size,) in sampling.epoch]
    while True:
        order = rng.permuted(np.broadcast_to(values, (replicas, len(values))), axis=1)
        start = 0
        for size in sizes:
            drawn = order[:, start : start + size].mean(1)
            yield kept * drawn + fresh * rng.standard_normal(replicas) / math.sqrt(size)
            start += size


def shuffled_path(mode: SGDMode, steps: int, replicas: int, rng: np.random.Generator) -> Array:
    """Weights after 0, 1, ... steps of such noise, (steps + 1, replicas)."""
    moving = Replicas(np.zeros(replicas), mode.dynamics)
    noise = itertools.islice(shuffled(mode.sampling, replicas, rng), steps)
    return np.array(
        [moving.weights, *(moving.step(mode.eigenvalue * moving.weights + kick) for kick in noise)]
    )


# The formulas


def stationary_variances(rng: np.random.Generator, replicas: int) -> Iterator[Row]:
    cases = {
        "plain SGD, eta lambda = 0.1": (PLAIN, 1.0),
        "plain SGD, eta lambda = 1": (PLAIN, 10.0),
        "plain SGD, eta lambda = 1.8": (PLAIN, 18.0),
        "heavy ball 0.9": (BALL, 5.0),
        "heavy ball 0.9, dampening 0.5": (SGDDynamics(0.1, 0.9, 0.5), 5.0),
        "Nesterov 0.9": (SGDDynamics(0.1, 0.9, nesterov=True), 5.0),
        "heavy ball 0.9, coupled decay 0.5": (SGDDynamics(0.1, 0.9, weight_decay=0.5), 2.0),
        "heavy ball 0.9, decoupled decay 0.5": (
            SGDDynamics(0.1, 0.9, weight_decay=0.5, decoupled_weight_decay=True),
            2.0,
        ),
        "Nesterov 0.9, decoupled decay 0.5": (
            SGDDynamics(0.1, 0.9, nesterov=True, weight_decay=0.5, decoupled_weight_decay=True),
            2.0,
        ),
    }
    for name, (dynamics, eigenvalue) in cases.items():
        theory = closed_forms.stationary_variance(eigenvalue, NOISE, dynamics)
        moving = settled(SGDMode(eigenvalue, NOISE, dynamics), rng, replicas)
        yield Row.of(f"stationary variance, {name}", theory, moving.weights**2)


def hessian_noise(rng: np.random.Generator, replicas: int) -> Iterator[Row]:
    for name, dynamics in (("plain SGD", PLAIN), ("heavy ball 0.9", BALL)):
        mode = SGDMode(3.0, NOISE, dynamics, hessian_variance=2.0, covariance=0.6)
        theory = closed_forms.stationary_variance(3.0, NOISE, dynamics, 2.0)
        yield Row.of(
            f"stationary variance, Hessian noise, {name}", theory, settled(mode, rng, replicas).weights ** 2
        )
        moving, moments = Replicas(np.full(replicas, 1.5), dynamics), mode.moments(8, start=1.5)
        for _ in range(8):
            moving.step(gradient(mode, moving.weights, rng))
        yield Row.of(
            f"variance at t = 8 from x = 1.5, with covariance, {name}",
            moments.variance[-1],
            (moving.weights - moments.mean[-1]) ** 2,
        )
    mode, moving = SGDMode(0.0, NOISE, PLAIN, hessian_variance=9.0), Replicas(np.zeros(replicas), PLAIN)
    for _ in range(12):
        moving.step(gradient(mode, moving.weights, rng))
    theory = closed_forms.variance_from_point(0.0, NOISE, 12, PLAIN, hessian_variance=9.0)
    yield Row.of("flat mode under Hessian noise, t = 12 (geometric)", theory, moving.weights**2)


def transients(rng: np.random.Generator, replicas: int) -> Iterator[Row]:
    moving = Replicas(np.zeros(replicas), PLAIN)
    for _ in range(10):
        moving.step(gradient(SGDMode(1.0, NOISE, PLAIN), moving.weights, rng))
    yield Row.of(
        "from a point, t = 10", closed_forms.variance_from_point(1.0, NOISE, 10, PLAIN), moving.weights**2
    )
    rates = (0.15 * 0.5 * (1 + np.cos(np.pi * np.arange(60) / 60))).tolist()
    moving = Replicas(np.zeros(replicas), PLAIN)
    for rate in rates:
        moving.step(5.0 * moving.weights + math.sqrt(NOISE) * skewed(rng, replicas), rate)
    theory = closed_forms.scheduled_variance(5.0, NOISE, rates, PLAIN)
    yield Row.of("cosine schedule, t = 60", theory, moving.weights**2)
    for name, dynamics in (
        ("heavy ball 0.9", BALL),
        ("Nesterov 0.9", SGDDynamics(0.1, 0.9, nesterov=True)),
        ("dampening 0.9 (first buffer undamped)", SGDDynamics(0.1, 0.9, 0.9)),
    ):
        moving = Replicas(np.zeros(replicas), dynamics)
        for _ in range(20):
            moving.step(math.sqrt(NOISE) * skewed(rng, replicas))
        theory = closed_forms.free_mean_squared_displacement(NOISE, 20, dynamics, "empty")
        yield Row.of(f"flat, empty buffer, t = 20, {name}", theory, moving.weights**2)


def displacements(rng: np.random.Generator, replicas: int) -> Iterator[Row]:
    for name, dynamics in (
        ("plain SGD", PLAIN),
        ("heavy ball 0.9", BALL),
        ("Nesterov 0.9", SGDDynamics(0.1, 0.9, nesterov=True)),
    ):
        mode = SGDMode(4.0, NOISE, dynamics)
        moving = settled(mode, rng, replicas)
        start = moving.weights
        for _ in range(5):
            moving.step(gradient(mode, moving.weights, rng))
        theory = closed_forms.mean_squared_displacement(4.0, NOISE, 5, dynamics)
        yield Row.of(f"stationary MSD at lag 5, {name}", theory, (moving.weights - start) ** 2)
        moving = Replicas(np.zeros(replicas), dynamics)
        for t in range(130):
            start = moving.weights if t == 100 else start
            moving.step(math.sqrt(NOISE) * skewed(rng, replicas))
        theory = closed_forms.free_mean_squared_displacement(NOISE, 30, dynamics)
        yield Row.of(f"flat MSD at lag 30, warm buffer, {name}", theory, (moving.weights - start) ** 2)


def continuous_equations(rng: np.random.Generator, replicas: int) -> Iterator[Row]:
    """Langevin and modified equation by Euler-Maruyama in steps of eta / 40, at eta lambda = 0.5."""
    parts, eta, value = 40, 0.1, 5.0
    pull = eta * value
    for name, theory, drift, diffusion in (
        ("Langevin", closed_forms.langevin_stationary_variance(value, NOISE, PLAIN), 1.0, 1.0),
        (
            "modified equation",
            closed_forms.modified_stationary_variance(value, NOISE, PLAIN),
            1 + pull / 2,
            1 + pull,
        ),
    ):
        rate, kick = drift * pull / parts, eta * math.sqrt(diffusion * NOISE / parts)
        weights = np.zeros(replicas)
        for _ in range(20 * parts):
            weights = (1 - rate) * weights + kick * rng.standard_normal(replicas)
        # The fine scheme is itself discrete: its own variance is larger by 1 / (1 - rate / 2).
        yield Row.of(f"stationary variance, {name}", theory, weights**2 * (1 - rate / 2))


def accumulation(rng: np.random.Generator, replicas: int) -> Iterator[Row]:
    sampling = MinibatchSampling(accumulation=4)
    mode = SGDMode(3.0, sampling.noise_variance(NOISE), BALL, sampling)
    moving = Replicas(np.zeros(replicas), BALL)
    for _ in range(80):
        noise = sum(math.sqrt(NOISE) * skewed(rng, replicas) for _ in range(4))
        moving.step(3.0 * moving.weights + noise / 4)
    yield Row.of("accumulation of 4 microbatches, heavy ball 0.9", mode.variance(80), moving.weights**2)


def without_replacement(rng: np.random.Generator, replicas: int) -> Iterator[Row]:
    n, replicas = 10, replicas // 4
    sampling = MinibatchSampling(3 * n, 3, replacement=False)
    noise = sampling.noise_variance(1.0)
    first, second = itertools.islice(shuffled(sampling, replicas, rng), 2)
    yield Row.of("without replacement: in-epoch correlation", -1 / (n - 1), first * second / noise)
    path = shuffled_path(SGDMode(0.0, noise, PLAIN, sampling), 3 * n, replicas, rng)
    yield Row.of("... flat: bridge at m = 4 of 10", bridge_variance(noise, 4, n, 0.1), path[4] ** 2)
    starts = path[n : 2 * n]
    # Between a random step of one epoch and a random step of the next.
    every = np.array([(path[2 * n + m] - starts) ** 2 for m in range(n)]).mean((0, 1))
    yield Row.of("... flat: saturated MSD", saturated_displacement(noise, n, 0.1), every)
    for name, dynamics in (("plain SGD", PLAIN), ("heavy ball 0.8", SGDDynamics(0.05, 0.8))):
        mode = SGDMode(2.0, noise, dynamics, sampling)
        free = SGDMode(2.0, noise, dynamics)
        variance = free.stationary_variance()
        if dynamics.momentum:
            rho = [1 - free.mean_squared_displacement(j) / (2 * variance) for j in range(1, n)]
            factor = epoch_factor(rho)
        else:
            factor = plain_epoch_factor(1 - 0.1 * 2.0, n)
        path = shuffled_path(mode, 12 * n, replicas, rng)
        yield Row.of(
            f"... confined: V, factor F = {factor:.3f}, {name}", factor * variance, (path[-n:] ** 2).mean(0)
        )


def flat_diffusion(rng: np.random.Generator, replicas: int) -> Iterator[Row]:
    for name, sampling in (
        ("drop_last, N = 1797, B = 64 (r = 5)", MinibatchSampling(1797, 64, False, drop_last=True)),
        ("last batch kept, N = 1797, B = 64 (b = 5)", MinibatchSampling(1797, 64, False)),
        ("last batch kept, N = 1000, B = 37 (b = 1)", MinibatchSampling(1000, 37, False)),
        ("30% fresh noise, N = 640, B = 64", MinibatchSampling(640, 64, False, fresh=0.3)),
    ):
        n = sampling.steps_per_epoch
        mode = SGDMode(0.0, sampling.noise_variance(1.0), PLAIN, sampling)
        parts = [shuffled_path(mode, 3 * n, 5_000, rng)[-1] for _ in range(replicas // 5_000)]
        independent = closed_forms.free_diffusion(1.0 / sampling.batch_size, PLAIN)
        ratios = np.concatenate(parts) ** 2 / (2 * 3 * n * independent)
        yield Row.of(f"D/D_iid, {name}", sampling.diffusion_ratio(), ratios)


def all_modes(rng: np.random.Generator, replicas: int) -> Iterator[Row]:
    """A flat mode heats a stiff one through Hessian noise off the diagonal."""
    replicas //= 4
    stiff, flat, mixing = 4.0, 0.1, 0.5
    signs = np.array([1.0, 1.0, -1.0, -1.0])
    hessians = np.zeros((4, 2, 2))
    hessians[:, 0, 0], hessians[:, 1, 1] = stiff, flat
    hessians[:, 0, 1] = hessians[:, 1, 0] = mixing * signs
    gradients = np.array([[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
    covariance = QuadraticEnsemble(hessians, gradients, PLAIN).stationary()[1]
    moving = Replicas(np.zeros((replicas, 2)), PLAIN)
    for _ in range(500):
        drawn = rng.integers(4, size=replicas)
        moving.step(np.einsum("bij,bj->bi", hessians[drawn], moving.weights) + gradients[drawn])
    alone = closed_forms.stationary_variance(stiff, 1.0, PLAIN)
    heat = covariance[0, 0] / alone
    yield Row.of(
        f"stiff mode heated by a flat one ({heat:.2f} times)", covariance[0, 0], moving.weights[:, 0] ** 2
    )


def adam(rng: np.random.Generator, replicas: int) -> Iterator[Row]:
    """Adam's update with its preconditioner frozen, in the modes of P^1/2 H P^1/2."""
    replicas //= 4
    beta, eta = 0.9, 0.05
    hessian = np.array([[3.0, 1.0], [1.0, 2.0]])
    precondition = np.array([1.0, 0.25])
    half = np.asarray(sqrtm(np.diag(precondition)).real)
    value, mode = (each[..., -1] for each in np.linalg.eigh(half @ hessian @ half))
    theory = closed_forms.stationary_variance(
        float(value), NOISE * float(mode @ half @ half @ mode), SGDDynamics(eta, beta, beta)
    )
    weights, buffer = np.zeros((replicas, 2)), np.zeros((replicas, 2))
    for _ in range(300):
        noise = math.sqrt(NOISE) * np.stack([skewed(rng, replicas), skewed(rng, replicas)], axis=1)
        buffer = beta * buffer + (1 - beta) * (weights @ hessian + noise)
        weights = weights - eta * buffer * precondition
    projected = weights @ np.linalg.solve(half, mode)
    yield Row.of("Adam, frozen preconditioner, stiffest mode of P^1/2 H P^1/2", theory, projected**2)


def densities(rng: np.random.Generator, replicas: int) -> Iterator[Row]:
    """A double well under state-dependent noise: one-step moments and the share that has changed wells."""
    wells = Wells()
    grid, rate = Grid(-4.0, 3.0, 701), 0.3
    loss, before = wells.on(grid), grid.gaussian(-1.0, 0.3)
    after = wells.run(rng.normal(-1.0, 0.3, replicas), rate, 1, rng)
    yield Row.of(
        "double well, one step: E theta^2 by the discrete equation",
        grid.moment(discrete_fokker_planck(loss, rate) @ before, 2),
        after**2,
    )
    ends = wells.run(rng.normal(-1.0, 0.3, replicas), rate, 40, rng)
    late = evolve(master_equation(loss, rate), before, 40)
    yield Row.of(
        "... share in the other well after 40 steps, master eq.",
        late[grid.centres > 0].sum(),
        (ends > 0) * 1.0,
    )
    yield Row.of("... E theta^2 after 40 steps, master eq.", grid.moment(late, 2), ends**2)


CASES: list[Callable[[np.random.Generator, int], Iterator[Row]]] = [
    stationary_variances,
    hessian_noise,
    transients,
    displacements,
    continuous_equations,
    accumulation,
    without_replacement,
    flat_diffusion,
    all_modes,
    adam,
    densities,
]


class Wells:
    """``dL_B = theta^3 - theta + kick_B + wobble_B sin theta``, 200 minibatches."""

    def __init__(self, *, symmetric: bool = False) -> None:
        levels = (np.arange(200) + 0.5) / 200
        kicks = norm.ppf(levels) if symmetric else -np.log(levels)
        wobbles = np.random.default_rng(0).standard_normal(200)
        self.kicks = (kicks - kicks.mean()) / kicks.std()
        self.wobbles = 0.2 * (wobbles - wobbles.mean())

    def gradient(self, weights: Array, batch: Any) -> Array:
        return np.asarray(weights**3 - weights + self.kicks[batch] + self.wobbles[batch] * np.sin(weights))

    def on(self, grid: Grid) -> FluctuatingLoss:
        return FluctuatingLoss(grid, self.gradient(grid.centres[None], np.arange(200)[:, None]))

    def run(self, weights: Array, rate: float, steps: int, rng: np.random.Generator) -> Array:
        for _ in range(steps):
            weights = weights - rate * self.gradient(weights, rng.integers(200, size=len(weights)))
        return weights


# The pictures

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#7a7a7a"
LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"size": 15, "color": "#222"},
    "margin": {"l": 80, "r": 30, "t": 60, "b": 70},
    "legend": {"bgcolor": "rgba(255,255,255,0.8)"},
}


def _variance_figure(folder: Path, replicas: int, rng: np.random.Generator) -> None:
    """Stationary variance over Langevin's, against the share of the stability limit."""
    import plotly.graph_objects as go

    pulls = np.linspace(0.01, 1.9, 200)
    figure = go.Figure()
    optimizers = (
        ("plain SGD", PLAIN, BLUE, 7),
        ("heavy ball, 0.9 (the same curve)", BALL, ORANGE, 2.5),
        ("Nesterov, 0.9", SGDDynamics(0.1, 0.9, nesterov=True), GREEN, 2.5),
    )
    for name, dynamics, colour, width in optimizers:
        limit = closed_forms.stability_limit(dynamics)
        shares, points = np.linspace(0.005, 0.93, 200), np.array([0.05, 0.2, 0.4, 0.6, 0.8, 0.9])
        curve = [_over_langevin(share * limit, dynamics) for share in shares]
        figure.add_scatter(x=shares, y=curve, name=name, line={"color": colour, "width": width})
        found, errors = [], []
        for share in points:
            mode = SGDMode(share * limit, NOISE, dynamics)
            row = Row.of("", 0.0, settled(mode, rng, replicas // 4).weights ** 2)
            langevin = mode.langevin().stationary_variance()
            found.append(row.measured / langevin)
            errors.append(2 * row.error / langevin)
        figure.add_scatter(
            x=points,
            y=found,
            error_y={"array": errors},
            mode="markers",
            marker={"color": colour, "size": 9},
            showlegend=False,
        )
    limit = closed_forms.stability_limit(PLAIN)
    modified = [
        closed_forms.modified_stationary_variance(pull / 0.1, NOISE, PLAIN)
        / closed_forms.langevin_stationary_variance(pull / 0.1, NOISE, PLAIN)
        for pull in pulls
    ]
    figure.add_scatter(
        x=pulls / 0.1 / limit,
        y=modified,
        name="modified equation, plain SGD",
        line={"color": BLUE, "dash": "dash", "width": 2},
    )
    figure.add_scatter(
        x=[0, 0.95],
        y=[1, 1],
        mode="lines",
        name="Langevin",
        line={"color": GREY, "dash": "dot", "width": 2},
    )
    figure.update_layout(**LAYOUT)
    figure.update_layout(title="Stationary variance over that of the Langevin equation; points: simulation")
    figure.update_layout(legend={"x": 0.02, "y": 0.98})
    figure.update_xaxes(title="curvature, share of the stability limit", range=[0, 0.96])
    figure.update_yaxes(title="V / V<sub>Langevin</sub>", type="log", tickvals=[0.2, 0.5, 1, 2, 5, 10, 20])
    picture(figure, folder / "theory-variance.png")


def _over_langevin(eigenvalue: float, dynamics: SGDDynamics) -> float:
    discrete = closed_forms.stationary_variance(eigenvalue, NOISE, dynamics)
    return discrete / closed_forms.langevin_stationary_variance(eigenvalue, NOISE, dynamics)


def _displacement_figure(folder: Path, replicas: int, rng: np.random.Generator) -> None:
    """MSD against the lag: curvature, sampling and a partial last batch."""
    import plotly.graph_objects as go

    figure = go.Figure()
    whole = MinibatchSampling(1792, 64, replacement=False)  # 28 batches
    ragged = MinibatchSampling(1797, 64, replacement=False)  # 28 batches and five samples
    lags = np.unique(np.geomspace(1, 3000, 60).astype(int))
    independent = MinibatchSampling(batch_size=64)
    curves = (
        ("confined, eta lambda = 1", SGDMode(10.0, 1 / 64, PLAIN), BLUE, "solid"),
        ("confined, eta lambda = 0.02", SGDMode(0.2, 1 / 64, PLAIN), BLUE, "dash"),
        ("flat, independent batches", SGDMode(0.0, 1 / 64, PLAIN, independent), ORANGE, "solid"),
        (
            "flat, shuffled: 28 whole batches",
            SGDMode(0.0, whole.noise_variance(), PLAIN, whole),
            GREEN,
            "solid",
        ),
        (
            "flat, shuffled: a last batch of 5 besides",
            SGDMode(0.0, ragged.noise_variance(), PLAIN, ragged),
            GREEN,
            "dash",
        ),
    )
    unit = PLAIN.learning_rate**2 / 64
    for name, mode, colour, dash in curves:
        curve = [mode.mean_squared_displacement(int(lag)) / unit for lag in lags]
        figure.add_scatter(x=lags, y=curve, name=name, line={"color": colour, "dash": dash, "width": 2.5})
        points = [1, 3, 10, 30, 100, 300]
        found = _simulated_displacements(mode, points, rng, min(replicas // 20, 2_000))
        figure.add_scatter(
            x=points,
            y=np.array(found) / unit,
            mode="markers",
            marker={"color": colour, "size": 8},
            showlegend=False,
        )
    figure.update_layout(**LAYOUT)
    figure.update_layout(title="Mean squared displacement of a mode; points: simulation")
    figure.update_layout(legend={"x": 0.02, "y": 0.98})
    figure.update_xaxes(title="lag (steps)", type="log", dtick=1)
    figure.update_yaxes(title="MSD / (eta<sup>2</sup> S<sup>2</sup> / B)", type="log", dtick=1)
    picture(figure, folder / "theory-displacement.png")


def _simulated_displacements(
    mode: SGDMode, lags: list[int], rng: np.random.Generator, replicas: int
) -> list[float]:
    """From every step of an epoch (or 20 steps) after the transient, averaged over replicas."""
    if mode.sampling.is_independent:
        moving = (
            settled(mode, rng, replicas) if mode.eigenvalue else Replicas(np.zeros(replicas), mode.dynamics)
        )
        path = [moving.weights]
        for _ in range(20 + max(lags)):
            path.append(moving.step(gradient(mode, moving.weights, rng)))
        starts = range(20)
    else:
        n = mode.sampling.steps_per_epoch
        path = list(shuffled_path(mode, n + max(lags), replicas, rng))
        starts = range(n)
    return [float(np.mean([(path[s + lag] - path[s]) ** 2 for s in starts])) for lag in lags]


def _density_figure(folder: Path, replicas: int, rng: np.random.Generator) -> None:
    """A double well after forty steps at a large learning rate, with symmetric and with skewed noise."""
    from plotly.subplots import make_subplots

    grid, rate, steps = Grid(-4.0, 3.0, 701), 0.3, 40
    edges = np.linspace(-3.0, 2.2, 79)
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    for row, kind in enumerate(("symmetric", "skewed"), start=1):
        wells = Wells(symmetric=kind == "symmetric")
        loss, before = wells.on(grid), grid.gaussian(-1.0, 0.3)
        runs = wells.run(rng.normal(-1.0, 0.3, replicas), rate, steps, rng)
        counts = np.histogram(runs, edges)[0] / (len(runs) * np.diff(edges))
        figure.add_bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts,
            width=np.diff(edges),
            name=f"{replicas:,} runs of SGD",
            marker={"color": "#c3cedb", "line": {"width": 0}},
            showlegend=row == 1,
            row=row,
            col=1,
        )
        share = (runs > 0).mean()
        error = math.sqrt(share * (1 - share) / len(runs))
        print(f"  {kind} noise, in the other well: simulation {share:.4f} +- {error:.1g}")
        for name, equation, colour, dash in (
            ("master equation", master_equation, BLUE, "solid"),
            ("Euler-Maruyama (SGD's two moments)", euler_maruyama, GREEN, "dash"),
            ("modified equation", modified_equation, ORANGE, "dash"),
            ("Langevin equation", langevin_propagator, ORANGE, "solid"),
        ):
            late = evolve(equation(loss, rate), before, steps)
            line = {"color": colour, "dash": dash, "width": 2.5}
            density = late / grid.width
            figure.add_scatter(
                x=grid.centres, y=density, name=name, line=line, showlegend=row == 1, row=row, col=1
            )
            print(f"    {name}: {late[grid.centres > 0].sum():.4f}, edge {grid.edge(late):.1g}")
        figure.update_yaxes(title=f"density, {kind} noise", row=row, col=1)
    figure.update_layout(**LAYOUT)
    figure.update_layout(title="Double well, eta = 0.3, forty steps from the left well", bargap=0)
    figure.update_layout(legend={"x": 0.65, "y": 0.99})
    figure.update_xaxes(range=[-2.8, 2.2])
    figure.update_xaxes(title="weight", row=2, col=1)
    picture(figure, folder / "theory-density.png", (1000, 820))


if __name__ == "__main__":
    sys.exit(main())
