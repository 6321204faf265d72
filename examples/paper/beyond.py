"""What a user meets beyond SGD with replacement: shuffled epochs, a partial last batch, momentum, AdamW.

Each setting runs from the minimum; variances over seeds are held against the exact recursion of its own
optimizer and loader (``sgd_probe.theory.SGDMode``), and against the formula that ignores what is special
about it. Each mode is taken by itself: heat from other modes is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from descent import AdamW, Step, descend, descend_adamw, second_moments
from estimates import Array, Estimate, squared_deviations
from numpy.typing import NDArray
from problems import Problem
from torch import Tensor

from sgd_probe.theory import MinibatchSampling, SGDDynamics, SGDMode
from sgd_probe.theory.closed_forms import Buffer, stability_limit

#: Largest kappa of a near-flat mode, and how many of them are enough.
FLAT, FLAT_MODES = 0.5, 60
#: Coordinates of less than this share of the mean second moment never move: pixels that are always dark.
DEAD = 1e-9


@dataclass(frozen=True)
class Plan:
    """Sizes.

    Attributes:
        epoch_batch: B of the loaders.
        epoch_seeds: of each loader.
        epochs: of each loader.
        pull: eta lambda_1 of those runs.
        batch: B for momentum and AdamW: their variances are ten times those of plain SGD, so it is large.
        seeds: of each optimizer.
        steps: of each optimizer; the second half counts for stiff modes.
        shares: of the stability limit in the stiffest mode.
        stiff: modes.
    """

    epoch_batch: int
    epoch_seeds: int
    epochs: int
    pull: float
    batch: int
    seeds: int
    steps: int
    shares: tuple[float, ...]
    stiff: int


FULL = {
    "vision": Plan(256, 256, 6, 0.2, 2048, 48, 100, (0.1, 0.5), 12),
    "language": Plan(64, 256, 6, 0.2, 512, 48, 100, (0.1, 0.5), 12),
}
QUICK = {
    "vision": Plan(256, 16, 2, 0.2, 512, 12, 40, (0.1,), 6),
    "language": Plan(64, 16, 2, 0.2, 128, 12, 40, (0.1,), 6),
}


@dataclass(frozen=True)
class Loader:
    """Near-flat and stiff modes under one way to draw minibatches.

    Attributes:
        name: "with replacement", "shuffled, last batch dropped" or "shuffled, last batch kept".
        batches: steps an epoch.
        free: spread of the near-flat modes over eta^2 S^2 / B, mean over modes: measured, a step at a time.
        free_theory: the same by theory.
        flat: spread at the epochs' ends over theory, near-flat modes.
        flat_over_independent: the last of them over that of independent minibatches.
        ratio: D over that of independent full batches, by the closed form.
        stiff: variance of the stiff modes over theory, second half of the run.
        stiff_over_independent: over the theory of independent minibatches.
    """

    name: str
    batches: int
    free: list[Estimate]
    free_theory: list[float]
    flat: Estimate
    flat_over_independent: Estimate
    ratio: float
    stiff: Estimate
    stiff_over_independent: Estimate


@dataclass(frozen=True)
class Optimizer:
    """Stiff and near-flat modes under an optimizer.

    Attributes:
        name: "heavy ball", "Nesterov" or "AdamW".
        share: of the stability limit, in the stiffest mode.
        rate: eta.
        stiff: measured variance over that of the optimizer's own recursion.
        stiff_over_langevin: over that of the Langevin equation with its effective learning rate.
        stiff_over_plain: over plain SGD's formula with the nominal rate; not for AdamW.
        flat: near-flat modes over the optimizer's own recursion.
        flat_modes: how many there are.
    """

    name: str
    share: float
    rate: float
    stiff: Estimate
    stiff_over_langevin: Estimate
    stiff_over_plain: Estimate | None
    flat: Estimate
    flat_modes: int


@dataclass(frozen=True, eq=False)
class Modes:
    """What a run is projected on: vectors (p, k), eigenvalues and S^2, (k,); where theory applies."""

    vectors: Tensor
    eigenvalues: Array
    sample_variance: Array

    def stiff(self, count: int) -> Modes:
        return self._take(np.arange(count))

    def flat(self, rate: float, steps: int) -> tuple[Modes, int]:
        """Those with kappa up to ``FLAT``, some of them, and how many there are."""
        kappa = self.eigenvalues * rate * steps
        noisy = self.sample_variance > DEAD * self.sample_variance.mean()
        chosen = np.flatnonzero(noisy & (np.abs(kappa) <= FLAT))
        some = chosen[np.linspace(0, len(chosen) - 1, min(FLAT_MODES, len(chosen))).round().astype(int)]
        return self._take(some), len(chosen)

    def _take(self, chosen: NDArray[np.intp]) -> Modes:
        indices = torch.from_numpy(np.asarray(chosen))
        return Modes(self.vectors[:, indices], self.eigenvalues[chosen], self.sample_variance[chosen])

    def predict(
        self, dynamics: SGDDynamics, sampling: MinibatchSampling, steps: int, buffer: Buffer = "empty"
    ) -> Array:
        """Variance after 1, 2, ... steps, (steps, k)."""
        # Without replacement S^2 has N - 1 in its denominator.
        total = None if sampling.replacement else sampling.samples
        spread = self.sample_variance * (total / (total - 1) if total else 1.0)
        rows = []
        for value, variance in zip(self.eigenvalues.tolist(), spread.tolist(), strict=True):
            mode = SGDMode(value, sampling.noise_variance(variance), dynamics, sampling)
            rows.append(mode.moments(steps, buffer=buffer).variance[1:])
        return np.stack(rows, 1)


def loaders(problem: Problem, plan: Plan) -> list[Loader]:
    """The three ways to draw minibatches, at one learning rate."""
    size, total, rate = plan.epoch_batch, problem.samples, problem.rate(plan.pull)
    independent = MinibatchSampling(batch_size=size)
    shuffled = [
        MinibatchSampling(total, size, replacement=False, drop_last=dropped) for dropped in (True, False)
    ]
    steps = plan.epochs * shuffled[1].steps_per_epoch
    dynamics, modes = SGDDynamics(rate), exact_modes(problem)
    stiff, (flat, _) = modes.stiff(plan.stiff), modes.flat(rate, steps)
    plain = [each.predict(dynamics, independent, steps) for each in (flat, stiff)]
    found = []
    names = ("with replacement", "shuffled, last batch dropped", "shuffled, last batch kept")
    for index, (name, sampling) in enumerate(zip(names, (independent, *shuffled), strict=True)):
        generator = torch.Generator().manual_seed(500 + index)
        run = descend(problem, dynamics, sampling, plan.epoch_seeds, steps, generator)
        free, settled = _spread(run, flat, stiff)  # (steps, seeds, k) each
        law, stiff_law = (each.predict(dynamics, sampling, steps) for each in (flat, stiff))
        epoch = sampling.steps_per_epoch if sampling.samples else shuffled[1].steps_per_epoch
        ends = np.arange(epoch - 1, steps, epoch)
        unit = rate**2 * flat.sample_variance / size
        half = slice(steps // 2, None)
        found.append(
            Loader(
                name,
                epoch,
                [Estimate.of(each) for each in (free / unit).mean(2)],
                [float(each) for each in (law / unit).mean(1)],
                Estimate.of((free[ends].mean(2) / law[ends].mean(1)[:, None]).mean(0)),
                Estimate.of(free[ends[-1]].mean(1) / plain[0][ends[-1]].mean()),
                sampling.diffusion_ratio(),
                Estimate.of((settled[half] / stiff_law[half, None]).mean((0, 2))),
                Estimate.of((settled[half] / plain[1][half, None]).mean((0, 2))),
            )
        )
    return found


def optimizers(problem: Problem, plan: Plan) -> list[Optimizer]:
    """Heavy ball, Nesterov and AdamW at some shares of their stability limits, with replacement."""
    found = []
    for index, share in enumerate(plan.shares):
        for name, dynamics in (
            ("heavy ball", SGDDynamics(1.0, momentum=0.9)),
            ("Nesterov", SGDDynamics(1.0, momentum=0.9, nesterov=True)),
        ):
            modes = exact_modes(problem)
            rate = share * stability_limit(dynamics) / float(modes.eigenvalues[0])
            dynamics = SGDDynamics(rate, momentum=0.9, nesterov=dynamics.nesterov)
            generator = torch.Generator().manual_seed(600 + index)
            sampling = MinibatchSampling(batch_size=plan.batch)
            run = descend(problem, dynamics, sampling, plan.seeds, plan.steps, generator)
            found.append(_compare(name, share, rate, run, modes, dynamics, plan, "empty"))
        modes, decay = adam_modes(problem, plan.batch), 0.01
        law = SGDDynamics(1.0, momentum=0.9, dampening=0.9)
        rate = share * stability_limit(law) / float(modes.eigenvalues[0])
        law = replace(law, learning_rate=rate, weight_decay=decay, decoupled_weight_decay=True)
        generator = torch.Generator().manual_seed(700 + index)
        run = descend_adamw(problem, AdamW(rate, decay), plan.batch, plan.seeds, plan.steps, generator)
        found.append(_compare("AdamW", share, rate, run, modes, law, plan, "warm"))
    return found


def exact_modes(problem: Problem) -> Modes:
    return Modes(problem.vectors.float(), problem.eigenvalues.numpy(), problem.sample_variance.numpy())


def adam_modes(problem: Problem, batch: int) -> Modes:
    """Modes w of P^1/2 H P^1/2 for the frozen preconditioner P = 1 / (sqrt(E g^2) + eps).

    The vectors are P^-1/2 w, which projects displacements of the weights; coordinates without noise are left
    out.
    """
    second = second_moments(problem, batch)
    live = second > DEAD * second.mean()
    root = torch.where(live, (second.sqrt() + AdamW(1.0).eps) ** -0.5, 0.0)
    values, modes = torch.linalg.eigh(root[:, None] * problem.hessian * root)
    values, modes = values.flip(0), modes.flip(1)
    noise = ((problem.gradients - problem.gradients.mean(0)) * root) @ modes
    inverse = torch.where(live, 1 / root, 0.0)
    return Modes((inverse[:, None] * modes).float(), values.numpy(), noise.square().mean(0).numpy())


def _spread(run: Iterator[Step], *modes: Modes) -> list[Array]:
    """Squared deviations from the mean over seeds after every step, (steps, seeds, k) for each set."""
    kept: list[list[Array]] = [[] for _ in modes]
    for step in run:
        for rows, each in zip(kept, modes, strict=True):
            rows.append((step.after @ each.vectors).double().numpy())
    return [squared_deviations(np.stack(rows)) for rows in kept]


def _compare(
    name: str,
    share: float,
    rate: float,
    run: Iterator[Step],
    modes: Modes,
    dynamics: SGDDynamics,
    plan: Plan,
    buffer: Buffer,
) -> Optimizer:
    stiff, (flat, many) = modes.stiff(plan.stiff), modes.flat(dynamics.effective_learning_rate, plan.steps)
    settled, free = _spread(run, stiff, flat)
    independent, half = MinibatchSampling(batch_size=plan.batch), slice(plan.steps // 2, None)
    law = stiff.predict(dynamics, independent, plan.steps, buffer)
    plain = stiff.predict(SGDDynamics(rate), independent, plan.steps, buffer)
    langevin = np.array(
        [
            SGDMode(float(value), float(spread) / plan.batch, dynamics).langevin().stationary_variance()
            for value, spread in zip(stiff.eigenvalues, stiff.sample_variance, strict=True)
        ]
    )
    last = flat.predict(dynamics, independent, plan.steps, buffer)[-1]
    return Optimizer(
        name,
        share,
        rate,
        Estimate.of((settled[half] / law[half, None]).mean((0, 2))),
        Estimate.of((settled[half] / langevin).mean((0, 2))),
        Estimate.of((settled[half] / plain[half, None]).mean((0, 2))) if buffer == "empty" else None,
        Estimate.of((free[-1] / last).mean(1)),
        many,
    )
