"""Claim (b): in nearly flat directions the variance grows with time, D in proportion to the learning rate.

Near-flat are the modes with a kappa of at most ``FLAT`` over the longest window at the highest rate, by the
Hessian at the minimum. Their squared displacement, averaged over modes, is divided by what their kappa leaves
of free diffusion, ``(1 - a^(2t)) / ((1 - a^2) t)``, and by 2 eta t: that is D per unit of time eta t.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from descent import descend
from estimates import Estimate, slope
from problems import Problem

from sgd_probe.theory import MinibatchSampling, SGDDynamics
from sgd_probe.theory.closed_forms import growth_ratio

#: Largest kappa of a near-flat mode.
FLAT = 0.5


@dataclass(frozen=True)
class Plan:
    """How D is measured.

    Attributes:
        pulls: eta lambda_1 of each run.
        batch: B.
        seeds: of each run.
        records: steps after which positions are kept; the last is the window.
    """

    pulls: tuple[float, ...]
    batch: int
    seeds: int
    records: tuple[int, ...]


RECORDS = (2, 5, 10, 20, 50, 100)
FULL = {
    "vision": Plan((0.02, 0.04, 0.08, 0.16, 0.32), 256, 256, RECORDS),
    "language": Plan((0.02, 0.04, 0.08, 0.16, 0.32), 64, 256, RECORDS),
}
QUICK = {
    "vision": Plan((0.04, 0.08, 0.16, 0.32), 128, 16, (5, 20, 50)),
    "language": Plan((0.04, 0.08, 0.16, 0.32), 32, 16, (5, 20, 50)),
}


@dataclass(frozen=True, eq=False)
class Diffusion:
    """What was measured on a problem, a run for each learning rate.

    Attributes:
        plan: of the measurement.
        rates: eta of each run.
        modes: how many are near-flat.
        noise: sigma^2 of a minibatch, their mean.
        spread: E x_t^2 after each record, mean over modes, a list a run.
        exponent: of the growth with time, log x^2 against log t, one a run: 1 for free diffusion.
        expected_exponent: by their kappa.
        coefficient: D per unit of time over the window, one a run.
        over_theory: the same over eta sigma^2 / 2.
        slope: of log D against log eta.
        uncorrected: the same without the division by what kappa leaves.
    """

    plan: Plan
    rates: list[float]
    modes: int
    noise: float
    spread: list[list[Estimate]]
    exponent: list[Estimate]
    expected_exponent: list[float]
    coefficient: list[Estimate]
    over_theory: list[Estimate]
    slope: Estimate
    uncorrected: Estimate


def measure(problem: Problem, plan: Plan) -> Diffusion:
    """Run SGD at every learning rate."""
    rates, window = [problem.rate(pull) for pull in plan.pulls], plan.records[-1]
    flat = problem.moving & (problem.eigenvalues * max(rates) * window <= FLAT)
    vectors, values = problem.vectors[:, flat].float(), problem.eigenvalues[flat].tolist()
    each_noise = problem.sample_variance[flat].numpy() / plan.batch
    noise = float(each_noise.mean())
    spread, exponents, expected, coefficients, raw = [], [], [], [], []
    for index, rate in enumerate(rates):
        generator = torch.Generator().manual_seed(200 + index)
        sampling = MinibatchSampling(batch_size=plan.batch)
        run = descend(problem, SGDDynamics(rate), sampling, plan.seeds, window, generator)
        kept = [(step.after @ vectors).double().numpy() for t, step in enumerate(run, 1) if t in plan.records]
        squares = np.stack(kept) ** 2  # (records, seeds, modes)
        shares = np.array([[growth_ratio(v, t, SGDDynamics(rate)) for v in values] for t in plan.records])
        spread.append([Estimate.of(each) for each in squares.mean(2)])
        exponents.append(slope(plan.records, list(squares.mean(2))))
        grown = (shares * each_noise).mean(1) * plan.records
        expected.append(float(np.polyfit(np.log(plan.records), np.log(grown), 1)[0]))
        coefficients.append((squares[-1] / shares[-1]).mean(1) / (2 * window * rate))
        raw.append(squares[-1].mean(1) / (2 * window * rate))
    return Diffusion(
        plan=plan,
        rates=rates,
        modes=int(flat.sum()),
        noise=noise,
        spread=spread,
        exponent=exponents,
        expected_exponent=expected,
        coefficient=[Estimate.of(each) for each in coefficients],
        over_theory=[
            Estimate.of(each / (rate * noise / 2)) for rate, each in zip(rates, coefficients, strict=True)
        ],
        slope=slope(rates, coefficients),
        uncorrected=slope(rates, raw),
    )
