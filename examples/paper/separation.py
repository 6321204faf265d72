"""Claim (a): along the Hessian's eigenbasis some modes are confined, the others diffuse.

Two measures that know nothing of the Hessian, sorted by kappa = eta lambda T, which comes from it: the
exponent with which the variance over seeds grows in time, 1 for a diffusing mode and 0 for a confined one,
and the verdict that the probe's own rule reaches on each mode from a single trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from descent import descend
from estimates import Estimate, resampled
from numpy.typing import NDArray
from problems import Problem

from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.dynamics.verdict import judge, weigh
from sgd_probe.result import Verdict
from sgd_probe.theory import MinibatchSampling, SGDDynamics
from sgd_probe.theory.closed_forms import growth_ratio

EDGES = (0.0, 0.1, 0.3, 1.0, 3.0, 6.0, 10.0, 20.0, 30.0, 60.0, np.inf)
#: Flat and confined beyond doubt, by kappa; between them is the crossover.
FLAT, CONFINED = 1.0, 30.0


@dataclass(frozen=True)
class Plan:
    """A window: eta lambda_1, B, seeds and T. The exponent is that between ``early`` and T."""

    pull: float
    batch: int
    seeds: int
    steps: int

    @property
    def early(self) -> int:
        return self.steps // 4


FULL = {"vision": Plan(0.5, 512, 48, 200), "language": Plan(0.5, 128, 48, 400)}
QUICK = {"vision": Plan(0.5, 256, 8, 120), "language": Plan(0.5, 64, 8, 120)}


@dataclass(frozen=True)
class Group:
    """Modes with similar kappa.

    Attributes:
        kappa: the smallest and the largest.
        modes: how many.
        exponent: of the growth of their variance in time.
        expected: by the formula of their curvature.
        shares: of each verdict over modes and seeds, those that occur.
    """

    kappa: tuple[float, float]
    modes: int
    exponent: Estimate
    expected: float
    shares: dict[str, Estimate]


@dataclass(frozen=True, eq=False)
class Separation:
    """What was measured on a problem.

    Attributes:
        plan: of the measurement.
        modes: that have noise.
        groups: by kappa.
        flat: modes with kappa up to ``FLAT``, as one group.
        confined: those with kappa from ``CONFINED``.
    """

    plan: Plan
    modes: int
    groups: list[Group]
    flat: Group
    confined: Group


def measure(problem: Problem, plan: Plan) -> Separation:
    """One run, every mode and every seed judged by itself."""
    moving = problem.moving
    rate, generator = problem.rate(plan.pull), torch.Generator().manual_seed(400)
    vectors, values = problem.vectors[:, moving].float(), problem.eigenvalues[moving].numpy()
    noise = problem.sample_variance[moving].numpy() / plan.batch
    dynamics, sampling = SGDDynamics(rate), MinibatchSampling(batch_size=plan.batch)
    # One a seed, which stays in the processor's cache.
    statistics = [WindowStatistics.empty(len(values), plan.steps) for _ in range(plan.seeds)]
    squares = {}
    x = np.zeros((plan.seeds, len(values)))
    for t, step in enumerate(descend(problem, dynamics, sampling, plan.seeds, plan.steps, generator), 1):
        after, gradient = ((part @ vectors).double().numpy() for part in (step.after, step.gradient))
        rows = zip(statistics, x, gradient, after, strict=True)
        statistics = [each.update(before, g, moved, rate, rate) for each, before, g, moved in rows]
        x = after
        if t in (plan.early, plan.steps):
            squares[t] = x**2 / (rate**2 * noise)
    verdicts = np.array([[judge(mode).verdict for mode in weigh(each, 0.0)] for each in statistics])
    kappa = rate * values * plan.steps
    expected = {
        t: np.array([t * growth_ratio(float(value), t, dynamics) for value in values]) for t in squares
    }
    octaves = np.log(plan.steps / plan.early)

    def group(chosen: NDArray[np.bool_]) -> Group:
        early, late = (squares[t][:, chosen].mean(1) for t in (plan.early, plan.steps))
        growth = np.log(late.mean() / early.mean()) / octaves
        means = resampled(np.stack([early, late], 1))
        laws = [expected[t][chosen].mean() for t in (plan.early, plan.steps)]
        found = verdicts[:, chosen]
        return Group(
            (float(kappa[chosen].min()), float(kappa[chosen].max())),
            int(chosen.sum()),
            Estimate.spread(float(growth), np.log(means[:, 1] / means[:, 0]) / octaves),
            float(np.log(laws[1] / laws[0]) / octaves),
            {v.value: Estimate.of((found == v).mean(1)) for v in Verdict if (found == v).any()},
        )

    bins = [(kappa >= low) & (kappa < high) for low, high in pairwise(EDGES)]
    return Separation(
        plan=plan,
        modes=len(values),
        groups=[group(chosen) for chosen in bins if chosen.any()],
        flat=group(kappa <= FLAT),
        confined=group(kappa >= CONFINED),
    )
