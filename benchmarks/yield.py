"""What share of the modes of an ordinary run gets a verdict: untuned trainings, the probe as it comes.

A network on digits learns with shuffled batches, SGD with momentum and a cosine schedule; a small character
transformer with AdamW, a warm-up and a cosine schedule. A window opens every eighth of the run, its length
chosen by the probe. Printed are the verdicts by kind of mode and third of the run, the share that is
determinate and not undermined by what the window says against itself, and the reasons where it is not. What
came out is in docs/verdicts.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from _problems import Recipe, build, data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import SGDProbe
from sgd_probe.result import ModeKind, ModeResult, Verdict, WindowResult

#: Windows of a run, one after the other.
WINDOWS = 8
NO_YIELD = (Verdict.UNDETERMINED, Verdict.NO_NOISE)


@dataclass(frozen=True)
class Run:
    """An ordinary training.

    Attributes:
        network: which, and
        recipe: how large.
        batch_size: of the shuffled loader.
        optimizer: "sgd" or "adamw".
        learning_rate: at its highest.
        warm_up: steps of linear warm-up.
        epochs: of training.
        samples: of the data, at most.
    """

    network: str
    recipe: Recipe
    batch_size: int
    optimizer: str
    learning_rate: float
    warm_up: int
    epochs: int
    samples: int


FULL = {
    "digits, SGD with momentum": Run(
        "mlp", Recipe(64, 2, 8, 0, 0), 64, "sgd", 0.05, 0, epochs=280, samples=1797
    ),
    "digits, SGD with momentum, convolutions": Run(
        "resnet", Recipe(8, 1, 16, 0, 0), 64, "sgd", 0.05, 0, epochs=150, samples=1797
    ),
    "text, AdamW with warm-up": Run(
        "transformer", Recipe(48, 2, 32, 0, 0), 32, "adamw", 2e-3, 200, epochs=50, samples=4096
    ),
}
QUICK = {
    "digits, SGD with momentum": Run(
        "mlp", Recipe(32, 1, 8, 0, 0), 64, "sgd", 0.05, 0, epochs=60, samples=1797
    ),
    "text, AdamW with warm-up": Run(
        "transformer", Recipe(16, 1, 16, 0, 0), 32, "adamw", 2e-3, 100, epochs=12, samples=4096
    ),
}


class Learner(pl.LightningModule):
    """The network with its optimizer; nothing in it knows of the probe."""

    def __init__(self, run: Run, model: nn.Module, steps: int) -> None:
        super().__init__()
        self.run, self.model, self.steps = run, model, steps
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        loss = F.cross_entropy(self.model(inputs), targets.flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        rate = self.run.learning_rate
        if self.run.optimizer == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=rate, weight_decay=0.01)
        warm_up = self.run.warm_up

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(self.steps - warm_up, 1)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train(run: Run, seed: int) -> list[WindowResult]:
    """The windows of one training."""
    pl.seed_everything(seed, verbose=False)
    inputs, targets = data(run.network, run.recipe)
    chosen = TensorDataset(inputs[: run.samples], targets[: run.samples])
    loader = DataLoader(chosen, run.batch_size, shuffle=True)
    steps = run.epochs * len(loader)
    probe = SGDProbe(every_n_steps=steps // WINDOWS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=run.epochs,
            accelerator="cpu",
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[probe],
        )
        trainer.fit(Learner(run, build(run.network, run.recipe), steps), loader)
        loss = float(trainer.callback_metrics["loss"])
    print(f"  seed {seed}: {steps} steps, {len(probe.results)} windows, last loss {loss:.3g}", flush=True)
    return probe.results


def counted(modes: list[ModeResult]) -> dict[str, float]:
    """Share of each verdict, and of those that stand."""
    if not modes:
        return {}
    verdicts = Counter(mode.verdict.value for mode in modes)
    standing = sum(mode.verdict not in NO_YIELD and not mode.undermined for mode in modes)
    return {name: count / len(modes) for name, count in verdicts.most_common()} | {
        "yield": standing / len(modes)
    }


def why_not(modes: list[ModeResult]) -> Counter[str]:
    """What stands between a mode and a verdict, without its numbers."""
    reasons: Counter[str] = Counter()
    for mode in modes:
        if mode.verdict in NO_YIELD:
            reasons[_plainly(mode.reason)] += 1
        elif mode.undermined:
            reasons["undermined: " + _plainly(mode.marks[0]) if mode.marks else "subspace turned"] += 1
    return reasons


def _plainly(text: str) -> str:
    """A reason without its numbers."""
    return re.sub(r"-?\d[\d.,e%+-]*", "#", text)[:75].strip(" .")


def report(name: str, runs: list[list[WindowResult]]) -> dict[str, dict[str, float]]:
    """Print the tables of one problem."""
    found = {}
    for third, label in enumerate(("first third", "second third", "last third")):
        windows = [
            w
            for results in runs
            for w in results
            if int(3 * w.opened_at_step / max(results[-1].closed_at_step, 1)) == third
        ]
        for kind in (ModeKind.TOP, ModeKind.FLAT):
            modes = [m for w in windows for m in w.modes if m.kind is kind]
            shares = counted(modes)
            found[f"{label}, {kind.value}"] = shares
            listed = ", ".join(
                f"{share:.0%} {verdict}" for verdict, share in shares.items() if verdict != "yield"
            )
            standing = shares.get("yield", 0)
            print(f"  {label:13} {kind.value:5} {len(modes):4} modes  yield {standing:4.0%}  {listed}")
    modes = [m for results in runs for w in results for m in w.modes]
    print(f"  why not, over all {len(modes)}:")
    for reason, count in why_not(modes).most_common(8):
        print(f"    {count:4}  {reason}")
    lengths = sorted(w.steps for results in runs for w in results)
    print(f"  windows of {lengths[0]} to {lengths[-1]} steps, median {lengths[len(lengths) // 2]}")
    said = Counter(_plainly(w) for results in runs for r in results for w in r.warnings)
    for warning, count in said.most_common(6):
        print(f"    {count:4} windows: {warning}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller networks, one seed, under a minute")
    parser.add_argument("--seeds", type=int, help="runs of each training (3, or 1 with --quick)")
    parser.add_argument("--only", help="trainings whose name contains this")
    parser.add_argument("--json", action="store_true", help="print the shares as the last line")
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("sgd_probe").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    seeds = options.seeds or (1 if options.quick else 3)
    found = {}
    for name, run in (QUICK if options.quick else FULL).items():
        if options.only and options.only not in name:
            continue
        print(name, flush=True)
        found[name] = report(name, [train(run, seed) for seed in range(seeds)])
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
