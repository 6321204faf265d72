"""The product itself: ``SGDProbe`` on an ordinary training, which knows neither the minimum nor the Hessian.

A network is trained from scratch by Lightning, with Adam and then at one of four constant learning rates of
plain SGD, minibatches drawn with replacement. The callback finds the directions, judges them and measures D;
no more than its results is used here.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from estimates import Array, Estimate
from problems import Problem
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from sgd_probe import ModeKind, SGDProbe, WindowResult

#: Learning rate of the approach.
ADAM = 3e-3
#: Minibatches of a curvature set, and what makes the mean of 1 / sigma^2 over so few right (Gaussian noise).
BATCHES = 16
UNBIASED = (BATCHES - 3) / (BATCHES - 1)


@dataclass(frozen=True)
class Plan:
    """A training and its windows.

    Attributes:
        pulls: eta lambda_1 of plain SGD, by the curvature at the minimum.
        batch: B.
        decay: weight decay of the training. The digits' is a tenth of that of their minimum, which holds all
            directions: no window would have both confined and flat ones.
        approach: steps of Adam.
        settle: steps of plain SGD before the window.
        window: T.
        seeds: trainings, each with every learning rate.
        top: stiff modes.
        flat: near-flat directions.
    """

    pulls: tuple[float, ...]
    batch: int
    decay: float
    approach: int
    settle: int
    window: int
    seeds: int
    top: int = 8
    flat: int = 8


FULL = {
    "vision": Plan((0.1, 0.2, 0.4, 0.8), 64, 3e-4, 6_000, 1_000, 500, 4),
    "language": Plan((0.1, 0.2, 0.4, 0.8), 32, 1e-3, 8_000, 2_000, 500, 4),
}
QUICK = {
    "vision": Plan((0.2, 0.4), 64, 3e-4, 600, 100, 300, 1, 6, 4),
    "language": Plan((0.2, 0.4), 32, 1e-3, 600, 100, 300, 1, 6, 4),
}


@dataclass(frozen=True)
class Mode:
    """One direction of one window, as the callback reports it.

    Attributes:
        seed: of the training.
        pull: eta lambda_1 as planned.
        rate: eta.
        kind: "top" or "flat".
        kappa: relaxation times in the window, by the held-out curvature.
        verdict: of the probe.
        diffusion: D per unit of time over sigma^2 / 2, sigma^2 by resampling at fixed weights.
    """

    seed: int
    pull: float
    rate: float
    kind: str
    kappa: float
    verdict: str
    diffusion: float


@dataclass(frozen=True)
class Product:
    """What the callback said.

    Attributes:
        plan: of the trainings.
        modes: all directions of all windows.
        verdicts: how many of each, by kind.
        slope: of log D against log eta, D the mean over near-flat directions; the interval resamples whole
            trainings and, within them, directions.
    """

    plan: Plan
    modes: list[Mode]
    verdicts: dict[str, dict[str, int]]
    slope: Estimate


def measure(problem: Problem, plan: Plan) -> Product:
    """Train, watch, and collect what the callback reports."""
    modes = []
    for seed in range(plan.seeds):
        adam = partial(torch.optim.Adam, lr=ADAM, weight_decay=plan.decay)
        start = train(problem, untrained(problem, seed), adam, plan.approach, plan.batch, seed)[0]
        for index, pull in enumerate(plan.pulls):
            rate, draws = problem.rate(pull), 1_000 * (seed + 1) + index
            sgd = partial(torch.optim.SGD, lr=rate, weight_decay=plan.decay)
            settled = train(problem, copy.deepcopy(start), sgd, plan.settle, plan.batch, draws)[0]
            results = train(problem, settled, sgd, plan.window + 1, plan.batch, draws + 500, plan)[1]
            for mode in results[-1].modes:
                modes.append(
                    Mode(
                        seed,
                        pull,
                        rate,
                        "top" if mode.kind is ModeKind.TOP else "flat",
                        mode.relaxation_times,
                        mode.verdict.value,
                        mode.diffusion_per_time.value / (mode.resampled_noise.value / 2) * UNBIASED,
                    )
                )
    kinds = {kind: Counter(mode.verdict for mode in modes if mode.kind == kind) for kind in ("top", "flat")}
    return Product(plan, modes, {kind: dict(found) for kind, found in kinds.items()}, slope(modes, plan))


def slope(modes: list[Mode], plan: Plan, times: int = 2_000) -> Estimate:
    """Of log D against log eta, D the mean over all near-flat directions, whatever their verdicts."""
    rng = np.random.default_rng(0)
    cells = [
        [
            np.array(
                [
                    mode.diffusion
                    for mode in modes
                    if (mode.seed, mode.pull, mode.kind) == (seed, pull, "flat")
                ]
            )
            for pull in plan.pulls
        ]
        for seed in range(plan.seeds)
    ]
    logs = np.log(plan.pulls)

    def fit(rows: list[list[Array]]) -> float:
        points = [np.concatenate([row[k] for row in rows]) for k in range(len(logs))]
        return float(np.polyfit(logs, np.log([each.mean() for each in points]), 1)[0])

    def redrawn() -> float:
        seeds = rng.integers(plan.seeds, size=plan.seeds)
        return fit([[cell[rng.integers(len(cell), size=len(cell))] for cell in cells[s]] for s in seeds])

    return Estimate.spread(fit(cells), np.array([redrawn() for _ in range(times)]))


def untrained(problem: Problem, seed: int) -> nn.Module:
    """The architecture with new weights."""
    torch.manual_seed(seed)
    module = problem.module(dtype=torch.float32)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def train(
    problem: Problem,
    network: nn.Module,
    optimizer: Callable[..., torch.optim.Optimizer],
    steps: int,
    batch: int,
    seed: int,
    plan: Plan | None = None,
) -> tuple[nn.Module, list[WindowResult]]:
    """An ordinary fit of so many steps, watched if there is a plan."""
    import pytorch_lightning as pl

    warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning|torch")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return problem.criterion(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self.parameters())

    torch.manual_seed(seed)
    data = TensorDataset(problem.inputs.float(), problem.targets)
    sampler = RandomSampler(data, replacement=True, num_samples=steps * batch)
    loader: DataLoader[Any] = DataLoader(data, batch_size=batch, sampler=sampler)
    with tempfile.TemporaryDirectory() as folder:
        probe = plan and SGDProbe(
            top=plan.top,
            flat=plan.flat,
            window=plan.window,
            every_n_steps=plan.window + 1,
            curvature_batches=BATCHES,
            run_dir=Path(folder) / "run",
            strict=True,
        )
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            callbacks=[probe] if probe else [],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(Module(), loader)
        return network, list(probe.results) if probe else []
