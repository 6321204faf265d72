"""What watching costs: the step with and without a window open, and whole runs against their budget.

The step of a ResNet-20 and of a character transformer beside what an open window adds to it: copies of
gradient and displacement, their projections on k directions (for near-flat ones on two images Hv, too), the
running sums, and what the optimizer says of itself. Against it stands the time of reading all those vectors
once, by a sum or by a product with one vector, whichever is faster on this machine, from memory as a training
leaves the caches. Beside it the same loop under ``wandb.watch`` at its defaults, where wandb is installed.
Then whole trainings with ``max_overhead`` of 2, 5 and 10%, and what the probe really took of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from _problems import FULL, SMALL, Recipe, build, data
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import ProbeConfig, SGDProbe
from sgd_probe.curvature.modes import ModeBasis
from sgd_probe.dynamics.force import JointStatistics
from sgd_probe.dynamics.projection import Projector, steps_together
from sgd_probe.dynamics.statistics import Draw, WindowStatistics
from sgd_probe.engine.optimizers import read_optimizer
from sgd_probe.engine.planning import WindowPlan
from sgd_probe.engine.probe import ProbeEngine
from sgd_probe.engine.sampling import Sampling
from sgd_probe.engine.step import Step
from sgd_probe.engine.window import Window

DIRECTIONS = (10, 20, 40)
#: Of the directions, so many are stiff, and as many near-flat ones have images as the probe has by default.
FLAT = 4


class Loop:
    """Plain training steps of one network."""

    def __init__(self, name: str, recipe: Recipe, batch_size: int) -> None:
        torch.manual_seed(0)
        self.model = build(name, recipe)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.01, momentum=0.9)
        inputs, targets = data(name, recipe)
        self.inputs, self.targets = inputs[:batch_size], targets[:batch_size].flatten()

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.inputs), self.targets).backward()
        self.optimizer.step()


class Watch:
    """What an open window does after a step: the window itself, on directions that were never looked for."""

    def __init__(self, loop: Loop, directions: int) -> None:
        self.engine = ProbeEngine(
            loop.model,
            lambda module, batch: module(batch),
            loop.optimizer,
            ProbeConfig(),
            sampling=Sampling("without_replacement", 1797, 64, 29),
            planned_steps=10**6,
        )
        space = self.engine.space
        size, optimizer = space.size, read_optimizer(loop.optimizer, space.parameters)
        rows = torch.randn(directions + 2 * FLAT, size) / size**0.5
        nothing: Any = (None,) * directions
        basis = ModeBasis(rows, nothing, 0, 1.0, 0.0, True, "")
        self.window = Window(
            index=0,
            opened_at_step=0,
            plan=WindowPlan(10**6, "as long as it takes"),
            basis=basis,
            space=space,
            live=loop.optimizer,
            optimizer=optimizer,
            certifying=[],
            samples_found=0,
            samples_certified=0,
            noise_trace=1.0,
            decays=(0.0,) * directions,
            resampled=None,
            start_gradient=(),
            radial=(),
            statistics=WindowStatistics.empty(directions, 10**6),
            joint=JointStatistics.empty(directions - FLAT),
            projector=Projector(rows, space.parameters, modes=directions),
        )
        self.engine._window = self.window
        self.rows = rows
        self.vector = torch.randn(size)
        #: So many steps are projected together; what they cost is shared between them.
        self.together = steps_together(rows.element_size() * size)

    def observe(self) -> None:
        self.engine.observe()

    def sum(self) -> None:
        """Read what there is to read, and do as little as possible with it."""
        self.rows.sum()

    def product(self) -> None:
        """The same, and do what one vector needs."""
        self.rows @ self.vector

    def parts(self) -> dict[str, float]:
        """Median seconds a step of what it consists of."""
        window, count = self.window, self.together
        projector, decays = window.projector, (0.0,) * len(window.space.parameters)
        step = Step(Draw(28.1), window._now)
        seconds: dict[str, list[float]] = {name: [] for name in PARTS}
        for _ in range(9):
            window.settle()
            taken = [_seconds(projector.take) for _ in range(count)]
            start = _clock()
            projections = projector.project(decays)
            seconds["products"].append((_clock() - start) / count)
            sums = [_seconds(lambda p=p: window._add(step, p)) for p in projections]
            seconds["gathering vectors"].append(statistics.mean(taken))
            seconds["running sums"].append(statistics.mean(sums))
            seconds["reading the optimizer"].append(_seconds(window._reader.read))
        return {name: statistics.median(found) for name, found in seconds.items()}


PARTS = ("products", "gathering vectors", "running sums", "reading the optimizer")


def _clock() -> float:
    """Of one thread its own time, which other work on the machine has no part in; else that of the wall."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _seconds(work: Callable[[], object]) -> float:
    start = _clock()
    work()
    return _clock() - start


@dataclass
class Times:
    """Of one window, in seconds.

    Attributes:
        gathering: observations that only copy a step.
        projecting: those that project all steps that wait.
        reading: the vectors once, by each way.
    """

    gathering: list[float] = field(default_factory=list)
    projecting: list[float] = field(default_factory=list)
    reading: dict[str, list[float]] = field(default_factory=lambda: {"sum": [], "product": []})


def observed(loop: Loop, rounds: int) -> dict[str, Any]:
    """What windows of several sizes add to the steps of a loop, beside reading their directions, by turns.

    An observation finds the caches as the optimizer's step leaves them, a reading finds them cold.

    Args:
        loop: the training.
        rounds: times that a whole number of observations is repeated.
    """
    watches = {directions: Watch(loop, directions) for directions in DIRECTIONS}
    times = {directions: Times() for directions in DIRECTIONS}
    stepping: list[float] = []
    other = torch.randn(2**24)
    together = watches[DIRECTIONS[0]].together
    for number in range(rounds * together):
        stepping.append(_seconds(loop.step))
        for directions, watch in watches.items():
            found = times[directions]
            other.add_(1.0)
            loop.optimizer.step()
            last = number % together == together - 1
            (found.projecting if last else found.gathering).append(_seconds(watch.observe))
            for name, seconds in found.reading.items():
                other.add_(1.0)
                seconds.append(_seconds(getattr(watch, name)))
    step = statistics.median(stepping)
    return {f"k{k}": _summed_up(watches[k], times[k], k, step) for k in DIRECTIONS}


def _summed_up(watch: Watch, times: Times, directions: int, step: float) -> dict[str, float]:
    # All observations but the last of each round only gather; the last one projects for all.
    share = 1 / watch.together
    whole = statistics.median(times.projecting) * share
    if times.gathering:
        whole += statistics.median(times.gathering) * (1 - share)
    read = {name: statistics.median(found) for name, found in times.reading.items()}
    fastest, rows, parts = min(read.values()), directions + 2 * FLAT, watch.parts()
    print(
        f"  k = {directions}: {whole / step:.2%} of a step of {1e3 * step:.1f} ms, {1e3 * whole:.2f} ms; "
        f"{whole / fastest:.2f} times reading the {rows} vectors once "
        f"({4 * rows * len(watch.vector) / fastest / 1e9:.0f} GB/s), {whole / read['product']:.2f} times one "
        f"product with them\n    of it: "
        + ", ".join(f"{name} {seconds / sum(parts.values()):.0%}" for name, seconds in parts.items()),
        flush=True,
    )
    return {
        "overhead": whole / step,
        "over_bandwidth": whole / fastest,
        "over_product": whole / read["product"],
    }


def steps(name: str, recipe: Recipe, batch_size: int, rounds: int) -> dict[str, Any]:
    """Overheads of one network."""
    loop = Loop(name, recipe, batch_size)
    watched = _wandb_watch(name, recipe, batch_size, 2 * rounds + 2)
    size = sum(parameter.numel() for parameter in loop.parameters)
    print(
        f"{name}: {size:,} weights, batches of {batch_size}; wandb.watch costs {_percent(watched)} of a step"
    )
    loop.step()
    found = observed(loop, rounds)
    return {key: figures | {"wandb_watch_overhead": watched} for key, figures in found.items()}


def _percent(share: float | None) -> str:
    return (
        "nothing that could be measured: it is not installed, so no share"
        if share is None
        else f"{share:.2%}"
    )


def _wandb_watch(name: str, recipe: Recipe, batch_size: int, pairs: int) -> float | None:
    """Its share of a step, at its defaults: gradients, every 1,000 steps."""
    try:
        import wandb
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True))
        bare, watched = Loop(name, recipe, batch_size), Loop(name, recipe, batch_size)
        run.watch(watched.model, log="gradients")
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(2 * pairs):
            for kind, loop in ((False, bare), (True, watched)):
                start = time.perf_counter()
                loop.step()
                if kind:
                    run.log({"loss": 0.0})
                times[kind].append(time.perf_counter() - start)
        run.finish()
    return statistics.median(times[True]) / statistics.median(times[False]) - 1


class Learner(pl.LightningModule):
    """A training that knows nothing of the probe."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        super().__init__()
        self.model = build(name, recipe)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.model(inputs), targets.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def budget(share: float, epochs: int) -> dict[str, float]:
    """A whole training under a budget."""
    pl.seed_everything(0, verbose=False)
    recipe = SMALL["mlp"]
    inputs, targets = data("mlp", recipe)
    loader = DataLoader(TensorDataset(inputs, targets), 64, shuffle=True)
    # Nothing for free: the first window, too, has to fit in.
    config = ProbeConfig(grace_seconds=0.0)
    probe = SGDProbe(top=3, flat=1, window=100, max_overhead=share, curvature_batches=2, config=config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[probe],
        )
        start = time.perf_counter()
        trainer.fit(Learner("mlp", recipe), loader)
        seconds = time.perf_counter() - start
    spent = probe.results[-1].cost.total_seconds if probe.results else 0.0
    return {"measured": spent / (seconds - spent), "windows": len(probe.results)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and one budget, under a minute")
    parser.add_argument("--json", action="store_true", help="print the figures as the last line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("sgd_probe").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {
        name: steps(name, FULL[name], batch, 1 if options.quick else 4)
        for name, batch in (("resnet", 64), ("transformer", 32))
    }
    found["budget"] = {}
    budget(0.5, 5)  # what a process does for the first time is no part of a run of a minute
    for share in (0.05,) if options.quick else (0.02, 0.05, 0.10):
        result = budget(share, round((22 if options.quick else 40) / share))
        found["budget"][f"{share:.2f}"] = result
        print(
            f"budget {share:.0%}: the probe took {result['measured']:.1%}, {result['windows']} windows",
            flush=True,
        )
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
