"""A use of the flag, before and after: average the weights for as long as they only diffuse.

A small convolutional network learns scikit-learn's digits at a constant learning rate. At every window the
recipe asks two things: are the stiff directions settled (confined), and is at least half of the near-flat
ones flagged (diffusing along a valley)? While both hold, the weights are averaged; where they do not, the
average is thrown away. The same training gives what it is compared with: its last weights, and averages from
a step that was fixed beforehand. Differences are taken seed by seed. What came out is in docs/recipes.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
from typing import Any, NamedTuple

import torch
from scipy.stats import t
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from sgd_probe import LoopProbe, ModeKind, Verdict, WindowResult, find_flags
from sgd_probe.demo import digits_network

TRAINED_ON = 1000
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, BATCH_SIZE = 0.1, 0.9, 1e-3, 16
#: Steps of a window, and from one window to the next.
WINDOW, PERIOD = 500, 600
#: What the recipe is compared with: averages from these shares of the run on.
FIXED = (0.5, 0.75)


class FlaggedAverage:
    """The recipe: an average of the weights that lasts as long as windows say that they only diffuse."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.average: AveragedModel | None = None

    def judge(self, result: WindowResult) -> None:
        """Give this to the probe as ``on_result``."""
        stiff = [mode for mode in result.modes if mode.kind is ModeKind.TOP]
        flat = [mode for mode in result.modes if mode.kind is ModeKind.FLAT]
        settled = sum(mode.verdict is Verdict.CONFINED for mode in stiff) >= 0.8 * len(stiff)
        flagged = [flag for flag in find_flags([result]) if flag.kind is ModeKind.FLAT]
        if not settled or 2 * len(flagged) < len(flat):
            self.average = None
        elif self.average is None:
            self.average = AveragedModel(self.model)

    def update(self) -> None:
        """Call this after every step."""
        if self.average is not None:
            self.average.update_parameters(self.model)


class Score(NamedTuple):
    """Cross-entropy and share of errors on images that were not trained on."""

    loss: float
    error: float


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels, label_smoothing=0.1)


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor) -> Score:
    outputs = model(images)
    return Score(
        float(F.cross_entropy(outputs, labels)), float((outputs.argmax(1) != labels).double().mean())
    )


def train(seed: int, steps: int, momentum: float) -> tuple[dict[str, Score], list[WindowResult], int]:
    """Scores by what is scored, the windows, and how many steps the recipe's average holds."""
    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    ours, others = order[:TRAINED_ON], order[TRAINED_ON:]
    data = TensorDataset(images[ours], labels[ours])
    sampler = RandomSampler(data, replacement=True, num_samples=100 * BATCH_SIZE)
    loader = DataLoader(data, BATCH_SIZE, sampler=sampler)
    model = digits_network()
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=momentum, weight_decay=WEIGHT_DECAY
    )
    recipe = FlaggedAverage(model)
    fixed: dict[str, AveragedModel] = {}
    probe = LoopProbe(
        model,
        optimizer,
        loss_of,
        planned_steps=steps,
        top=6,
        flat=3,
        window=WINDOW,
        every_n_steps=PERIOD,
        curvature_batches=4,
        on_result=recipe.judge,
        strict=True,
    )
    with probe:
        for step in range(steps):
            if step % len(loader) == 0:
                batches = iter(probe.watch(loader))
            for share in FIXED:
                if step == round(share * steps):
                    fixed[f"average of the last {1 - share:.0%}"] = AveragedModel(model)
            loss_of(model, next(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
            recipe.update()
            for average in fixed.values():
                average.update_parameters(model)
    scored = {"last weights": model, **fixed, "recipe": recipe.average or model}
    held = 0 if recipe.average is None else int(recipe.average.n_averaged)
    tests = images[others], labels[others]
    return {name: score(found, *tests) for name, found in scored.items()}, probe.results, held


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half of its two-sided 95% interval by Student's t."""
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return mean, math.inf
    return mean, float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)


def _finite(value: Any) -> Any:
    """Strict JSON: of a single seed there is no interval."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8, help="trainings (%(default)s)")
    parser.add_argument("--steps", type=int, default=6000, help="of each (%(default)s)")
    parser.add_argument(
        "--momentum",
        type=float,
        default=MOMENTUM,
        help="0: a run that still learns when it ends (%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="two short trainings")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    seeds, steps = (2, 1800) if options.quick else (options.seeds, options.steps)
    torch.set_num_threads(1)
    logging.getLogger("sgd_probe").setLevel(logging.ERROR)

    runs: list[dict[str, Score]] = []
    for seed in range(seeds):
        scores, results, held = train(seed, steps, options.momentum)
        runs.append(scores)
        flags = len(find_flags(results))
        print(
            f"seed {seed}: {len(results)} windows, {flags} flags; the recipe's average holds {held:,} steps; "
            + ", ".join(f"{name} {found.loss:.4f} ({found.error:.2%})" for name, found in scores.items()),
            flush=True,
        )

    print(f"\nHeld-out cross-entropy and errors, {seeds} seeds; difference to the last weights, paired:")
    summary = {}
    for name in runs[0]:
        row = {}
        for quantity in Score._fields:
            values = [getattr(run[name], quantity) for run in runs]
            base = [getattr(run["last weights"], quantity) for run in runs]
            change, half = interval([v - b for v, b in zip(values, base, strict=True)])
            row |= {quantity: statistics.fmean(values), f"{quantity}_change": [change, half]}
        summary[name] = row
        (loss, loss_half), (error, error_half) = row["loss_change"], row["error_change"]
        print(
            f"  {name:<24} {row['loss']:.4f} ({loss:+.4f} ± {loss_half:.4f})   "
            f"{row['error']:.2%} ({100 * error:+.2f} ± {100 * error_half:.2f} points)"
        )
    for name in list(runs[0])[1:-1]:
        change, half = interval([run["recipe"].loss - run[name].loss for run in runs])
        print(f"  recipe against {name}: {change:+.4f} ± {half:.4f}")
        summary[f"recipe against {name}"] = [change, half]
    if options.json:
        print(json.dumps(_finite(summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
