"""What watching costs: the step with and without a window open, and whole runs against their budget.

The step of a ResNet-20 and of a character transformer beside what an open window adds to it: the projection
of gradient and displacement on k directions, and the running sums. "Reading the directions once" is one
product with their matrix. Beside it the same loop under ``wandb.watch`` at its defaults, where wandb is
installed. Then whole trainings with ``max_overhead`` of 2, 5 and 10%, and what the probe really took of them.
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
from typing import Any

import pytorch_lightning as pl
import torch
from _problems import FULL, SMALL, Recipe, build, data
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import ProbeConfig, SGDProbe
from sgd_probe.dynamics.force import JointStatistics
from sgd_probe.dynamics.projection import Projector
from sgd_probe.dynamics.statistics import Draw, WindowStatistics

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
    """What an open window does after a step."""

    def __init__(self, loop: Loop, directions: int) -> None:
        size = sum(parameter.numel() for parameter in loop.parameters)
        self.basis = torch.randn(directions, size) / size**0.5
        images = torch.randn(2, FLAT, size) / size**0.5
        self.projector = Projector(self.basis, loop.parameters, images=images)
        self.decays = (0.0,) * len(loop.parameters)
        self.statistics = WindowStatistics.empty(directions, 1000)
        self.joint = JointStatistics.empty(directions - FLAT)

    def project(self) -> Any:
        return self.projector.project(self.decays)

    def add(self, projection: Any) -> None:
        x, g = projection.displacement, projection.gradient
        self.statistics = self.statistics.update(x, g, x, 0.01, 0.1, u=projection.force, draw=Draw(28.1))
        self.joint = self.joint.update(x[: self.joint.products.shape[0] // 2], g[:-FLAT])

    def __call__(self) -> None:
        self.add(self.project())


def timed(work: Callable[[], object], repeats: int = 30) -> float:
    """Median seconds of some work."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def steps(name: str, recipe: Recipe, batch_size: int, pairs: int) -> dict[str, Any]:
    """Overheads of one network."""
    loop, found = Loop(name, recipe, batch_size), {}
    size = sum(parameter.numel() for parameter in loop.parameters)
    watched = _wandb_watch(name, recipe, batch_size, pairs)
    print(
        f"{name}: {size:,} weights, batches of {batch_size}; wandb.watch costs {_percent(watched)} of a step"
    )
    for directions in DIRECTIONS:
        watch = Watch(loop, directions)
        # Each alone, one after the other: the difference of two steps of a training is all noise.
        seconds = timed(loop.step, pairs)
        whole, projection = timed(watch), watch.project()
        projecting, sums = timed(watch.project), timed(lambda w=watch, p=projection: w.add(p))
        vector = torch.randn(size)
        reading = timed(lambda w=watch, v=vector: w.basis @ v)
        found[f"k{directions}"] = {
            "overhead": whole / seconds,
            "over_bandwidth": whole / reading,
            "sums_over_projection": sums / projecting,
            "wandb_watch_overhead": watched,
        }
        print(
            f"  k = {directions}: {whole / seconds:.2%} of a step of {1e3 * seconds:.1f} ms, "
            f"{whole / reading:.2f} times reading the directions once (projection "
            f"{projecting / reading:.2f}); sums {sums / projecting:.2f} of the projection",
            flush=True,
        )
    return found


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
    parser.add_argument("--quick", action="store_true", help="smaller networks, under a minute")
    parser.add_argument("--json", action="store_true", help="print the figures as the last line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("sgd_probe").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    recipes = SMALL if options.quick else FULL
    found: dict[str, Any] = {
        name: steps(name, recipes[name], batch, 8 if options.quick else 20)
        for name, batch in (("resnet", 64), ("transformer", 32))
    }
    found["budget"] = {}
    budget(0.5, 5)  # what a process does for the first time is no part of a run of a minute
    for share in (0.05,) if options.quick else (0.02, 0.05, 0.10):
        result = budget(share, round(18 / share))
        found["budget"][f"{share:.2f}"] = result
        print(
            f"budget {share:.0%}: the probe took {result['measured']:.1%}, {result['windows']} windows",
            flush=True,
        )
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
