"""Figure B: squared displacement over that of free diffusion, against kappa, for every mode.

For plain SGD from the minimum it is ``(1 - a^(2T)) / ((1 - a^2) T)`` with a = 1 - eta lambda. Written with
``kappa' = kappa (1 - eta lambda / 2)``, kappa = eta lambda T, this is close to ``(1 - exp(-2 kappa')) /
(2 kappa')`` whatever eta, batch size, T and network: one curve. The Langevin equation has kappa in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from descent import descend
from estimates import Estimate
from problems import Problem

from sgd_probe.theory import MinibatchSampling, SGDDynamics
from sgd_probe.theory.closed_forms import growth_ratio

#: Boundaries of the groups of kappa', five for every two decades.
EDGES = 10.0 ** np.arange(-3.0, 3.0, 0.4)
#: A group has at least so many modes, or it is left out: one mode's noise is not an average.
FEWEST = 4


@dataclass(frozen=True)
class Plan:
    """What is varied.

    Attributes:
        cases: eta lambda_1 and B of each run.
        windows: T.
        seeds: of each run.
    """

    cases: tuple[tuple[float, int], ...]
    windows: tuple[int, ...]
    seeds: int


FULL = {
    "vision": Plan(((0.05, 64), (0.05, 512), (0.2, 512), (1.0, 1024)), (10, 30, 100), 96),
    "language": Plan(((0.05, 16), (0.05, 128), (0.2, 64), (1.0, 256)), (10, 30, 100), 96),
}
QUICK = {
    "vision": Plan(((0.1, 64), (0.5, 256)), (10, 40), 16),
    "language": Plan(((0.1, 32), (0.5, 128)), (10, 40), 16),
}


@dataclass(frozen=True)
class Group:
    """Modes of one run and window with similar kappa'.

    Attributes:
        pull: eta lambda_1 of the run.
        batch: B.
        window: T.
        modes: how many.
        kappa: eta lambda T, geometric mean.
        discrete_kappa: kappa', geometric mean.
        measured: x_T^2 / (eta^2 sigma^2 T), mean over modes.
        over_theory: the same, each mode divided by its own formula.
    """

    pull: float
    batch: int
    window: int
    modes: int
    kappa: float
    discrete_kappa: float
    measured: Estimate
    over_theory: Estimate


def measure(problem: Problem, plan: Plan) -> list[Group]:
    """All groups of all runs."""
    moving = problem.moving & (problem.eigenvalues > 0)
    vectors, values = problem.vectors[:, moving].float(), problem.eigenvalues[moving].numpy()
    found = []
    for index, (pull, batch) in enumerate(plan.cases):
        rate, generator = problem.rate(pull), torch.Generator().manual_seed(300 + index)
        dynamics, sampling = SGDDynamics(rate), MinibatchSampling(batch_size=batch)
        noise = problem.sample_variance[moving].numpy() / batch
        run = descend(problem, dynamics, sampling, plan.seeds, max(plan.windows), generator)
        kept = {t: step.after @ vectors for t, step in enumerate(run, 1) if t in plan.windows}
        for window, positions in kept.items():
            share = positions.double().numpy() ** 2 / (rate**2 * noise * window)
            theory = np.array([growth_ratio(float(value), window, dynamics) for value in values])
            kappa = rate * values * window
            discrete = kappa * (1 - rate * values / 2)
            for low, high in pairwise(EDGES):
                chosen = (discrete >= low) & (discrete < high)
                if chosen.sum() < FEWEST:
                    continue
                found.append(
                    Group(
                        pull,
                        batch,
                        window,
                        int(chosen.sum()),
                        float(np.exp(np.log(kappa[chosen]).mean())),
                        float(np.exp(np.log(discrete[chosen]).mean())),
                        Estimate.of(share[:, chosen].mean(1)),
                        Estimate.of((share / theory)[:, chosen].mean(1)),
                    )
                )
    return found
