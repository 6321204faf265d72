"""Claim (c), figure A: the stationary variance of stiff modes against eta lambda.

``V lambda / (eta sigma^2)`` is 1 / (2 - eta lambda) for the discrete equation and 1/2 for the Langevin
equation. V is the variance over seeds; lambda is the curvature on samples that did not find the direction;
sigma^2 the variance of minibatch gradients drawn anew at the minimum. Nothing else is taken from a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from descent import descend
from directions import Directions, both_folds, exact
from estimates import TIMES, Array, Estimate, resampled, squared_deviations
from heat import predict_together
from problems import Problem
from torch import Tensor
from torch.func import vmap

from sgd_probe.theory import MinibatchSampling, SGDDynamics

#: The headline is about eta lambda in here.
HEADLINE = (0.8, 1.2)
#: A mode has settled after so many relaxation times.
SETTLED = 3.0
#: Runs at whose ends the curvature is looked at.
ENDS = 8


@dataclass(frozen=True)
class Plan:
    """How the stiff modes are measured.

    Attributes:
        pulls: eta lambda_1 of each run.
        batch: B.
        seeds: of each run.
        steps: of each run; the second half counts.
        modes: stiffest ones.
        minibatches: drawn for sigma^2.
        every: of :func:`~heat.predict_together`.
    """

    pulls: tuple[float, ...]
    batch: int
    seeds: int
    steps: int
    modes: int
    minibatches: int
    every: int


FULL = {
    "vision": Plan((0.2, 0.5, 0.8, 1.0, 1.2, 1.5), 1024, 128, 80, 12, 8192, 5),
    "language": Plan((0.2, 0.5, 0.8, 1.0, 1.2, 1.5), 128, 256, 80, 12, 8192, 5),
}
QUICK = {
    "vision": Plan((0.3, 1.1), 512, 24, 40, 4, 1024, 20),
    "language": Plan((0.3, 1.1), 128, 24, 40, 4, 1024, 20),
}


@dataclass(frozen=True, eq=False)
class Points:
    """The settled modes of one run along some directions; bootstrap samples in rows.

    Attributes:
        pull: eta lambda, (points,).
        pulls: the same with the error of lambda, (times, points).
        spread: V / (eta^2 sigma^2), (points,).
        spreads: the same, seeds resampled, with the error of sigma^2, (times, points).
        together: V / (eta^2 sigma^2) by the recursion of all modes; NaN where that is not known, (points,).
    """

    pull: Array
    pulls: Array
    spread: Array
    spreads: Array
    together: Array

    @property
    def scaled(self) -> list[Estimate]:
        """V lambda / (eta sigma^2)."""
        samples = self.spreads * self.pulls
        return [Estimate.spread(float(v), s) for v, s in zip(self.spread * self.pull, samples.T, strict=True)]

    def where(self, low: float, high: float) -> Points:
        """Those with eta lambda between these."""
        chosen = (self.pull >= low) & (self.pull <= high)
        parts = (self.pulls[:, chosen], self.spread[chosen], self.spreads[:, chosen], self.together[chosen])
        return Points(self.pull[chosen], *parts)

    @classmethod
    def joined(cls, parts: Iterable[Points]) -> Points:
        found = list(parts)
        names = ("pull", "pulls", "spread", "spreads", "together")
        return cls(*(np.concatenate([getattr(part, name) for part in found], -1) for name in names))

    def over_discrete(self) -> Estimate:
        """Measured over discrete variance, mean over points."""
        return self._over(lambda pull: 1 / (2 - pull))

    def over_langevin(self) -> Estimate:
        return self._over(lambda pull: np.full_like(pull, 0.5))

    def over_modified(self) -> Estimate:
        """Over that of the second-order modified equation."""
        return self._over(lambda pull: (1 + pull) / (2 + pull))

    def over_together(self) -> Estimate:
        """Over the recursion of all modes."""
        ratio = (self.spreads / self.together).mean(1)
        return Estimate.spread(float((self.spread / self.together).mean()), ratio)

    def _over(self, law: object) -> Estimate:
        assert callable(law)
        value = (self.spread * self.pull / law(self.pull)).mean()
        return Estimate.spread(float(value), (self.spreads * self.pulls / law(self.pulls)).mean(1))


@dataclass(frozen=True, eq=False)
class Variance:
    """What was measured on a problem, a run for each learning rate.

    Attributes:
        plan: of the measurement.
        rates: eta of each run.
        held_out: points along held-out directions of both folds, run by run.
        exact: points along the eigenvectors of the population.
        softened: curvature of the exact modes where runs have ended over that at the minimum, their mean, run
            by run: 1 where the loss is a quadratic as far as they get.
        curvature: held-out and exact lambda of the stiffest modes, for the record.
    """

    plan: Plan
    rates: list[float]
    held_out: list[Points]
    exact: list[Points]
    softened: list[float]
    curvature: dict[str, list[float]]


def measure(problem: Problem, plan: Plan) -> Variance:
    """Run SGD at every learning rate and hold it against the formulas."""
    sets = [*both_folds(problem, plan.modes), exact(problem, plan.modes)]
    vectors = torch.cat([each.vectors for each in sets], 1).float()
    records = range(plan.steps // 2, plan.steps + 1)
    rates, held_out, known, softened = [], [], [], []
    for index, pull in enumerate(plan.pulls):
        rate, generator = problem.rate(pull), torch.Generator().manual_seed(100 + index)
        dynamics, sampling = SGDDynamics(rate), MinibatchSampling(batch_size=plan.batch)
        kept = []
        for t, step in enumerate(descend(problem, dynamics, sampling, plan.seeds, plan.steps, generator), 1):
            if t in records:
                kept.append((step.after @ vectors).double().numpy())
        softened.append(softening(problem, step.after[:ENDS], plan.modes))
        variance = squared_deviations(np.stack(kept)).mean(0)  # (seeds, modes of all sets)
        parts = np.split(variance, len(sets), axis=1)
        together = predict_together(problem, rate, plan.batch, records, generator, plan.every).mean(0)
        rng = np.random.default_rng(index)
        points = [
            _points(part, each, rate, plan, rng, together[: plan.modes] if each is sets[-1] else None)
            for part, each in zip(parts, sets, strict=True)
        ]
        rates.append(rate)
        held_out.append(Points.joined(points[:-1]))
        known.append(points[-1])
    curvature = {
        name: [float(f"{value:.5g}") for value in values]
        for name, values in (
            ("found on A, measured on B", sets[0].curvature),
            ("standard error", sets[0].error),
            ("found on B, measured on A", sets[1].curvature),
            ("exact", sets[2].curvature),
        )
    }
    return Variance(plan, rates, held_out, known, softened, curvature)


def softening(problem: Problem, ends: Tensor, modes: int) -> float:
    """v.Hv of the stiffest modes at these displacements over lambda, the mean over both."""
    vectors, values = problem.vectors[:, :modes].T.float(), problem.eigenvalues[:modes].float()
    each = vmap(problem.product, in_dims=(0, None))
    found = [(each(vectors, problem.weights.float() + end) * vectors).sum(1) / values for end in ends]
    return float(torch.stack(found).mean())


def _points(
    variance: Array,
    along: Directions,
    rate: float,
    plan: Plan,
    rng: np.random.Generator,
    together: Array | None,
) -> Points:
    """V of each seed, (seeds, k), over eta^2 sigma^2; modes that had no time to settle are left out."""
    noise, noise_error = along.resampled_noise(plan.batch, plan.minibatches, rng)
    pull = rate * along.curvature
    settled = pull * plan.steps / 2 >= SETTLED
    free = rate**2 * noise
    draws = rng.standard_normal((2, TIMES, len(pull)))
    pulls = pull + draws[0] * rate * along.error
    spreads = resampled(variance, int(rng.integers(2**31))) / (free * (1 + draws[1] * noise_error / noise))
    # The exact S^2 / B there: the recursion knows no resampling.
    share = np.full(len(pull), np.nan) if together is None else together / free
    return Points(
        pull[settled],
        pulls[:, settled],
        (variance.mean(0) / free)[settled],
        spreads[:, settled],
        share[settled],
    )
