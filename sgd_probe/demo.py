"""``sgd-probe demo``: the whole path on a real training run, offline, in about two minutes.

A small convolutional network learns scikit-learn's digits. It first approaches a minimum with
momentum; then momentum is taken away and plain SGD, with minibatches drawn with replacement, moves
about that near-critical point while the probe watches which directions confine it and which do not.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sgd_probe.result import ModeKind, ModeResult, Verdict, WindowResult

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule
    from torch import Tensor
    from torch.utils.data import DataLoader

LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-3
BATCH_SIZE = 64


class _Length(NamedTuple):
    """Optimizer steps: with momentum, of plain SGD, of a window, and from window to window."""

    approach: int
    watch: int
    window: int
    period: int


FULL = _Length(approach=7_000, watch=6_400, window=1_000, period=2_400)
QUICK = _Length(approach=3_000, watch=700, window=600, period=1_500)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    arguments = _parse(argv)
    output = Path(arguments.output).resolve()
    _make_room(output)
    try:
        results, losses = _train(arguments, output)
    except ImportError as error:
        print(f"sgd-probe demo: needs {error.name}: pip install 'sgd-probe[demo]'", file=sys.stderr)
        return 2
    if not results:
        print("sgd-probe demo: no window closed; see the warnings above.", file=sys.stderr)
        return 1
    print(f"\nTraining loss {losses[0]:.3f} -> {losses[-1]:.3f}.")
    print(describe(results[-1]))
    runs = sorted((output / "wandb").glob("offline-run-*"))
    print(f"\nW&B run (offline; `wandb sync` uploads it): {_relative(runs[-1])}/" if runs else "\nno W&B run")
    print(f"Report (open it in a browser):              {_relative(output / 'sgd_probe' / 'report.html')}")
    return 0


def describe(result: WindowResult) -> str:
    """A table of the modes, the counts and the cost, as text."""
    rows = [_HEADER, *(_row(mode) for mode in result.modes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = [
        "  ".join(cell.ljust(width) if i in (0, 6, 7) else cell.rjust(width) for i, (cell, width) in line)
        for line in (enumerate(zip(row, widths, strict=True)) for row in rows)
    ]
    lines.insert(1, "-" * len(lines[0]))
    counts = ", ".join(f"{count} {verdict.value}" for verdict, count in result.counts().items() if count)
    cost = result.cost
    text = [
        f"Window {result.index}: steps {result.opened_at_step} to {result.closed_at_step} "
        f"({result.optimizer}; {result.sampling})",
        "",
        *(line.rstrip() for line in lines),
        "",
        "curvature: v.Hv on held-out batches for stiff modes, ||Hv||^2/|v.Hv| for near-flat ones; kappa: "
        "predicted relaxation",
        "times in the window; D: squared weight units per step; theory: D and verdict predicted from "
        "curvature and noise alone.",
        "",
        f"{counts} of {len(result.modes)} modes; "
        f"{result.expected_false_flags:.1f} of these flags are expected to be wrong.",
        f"The probe has cost {cost.total_seconds:.1f} s, {cost.fraction:.0%} of the "
        f"{cost.training_seconds:.1f} s of training (a step of this tiny network takes milliseconds).",
    ]
    text += [f"Warning: {warning}" for warning in result.warnings]
    return "\n".join(text)


_HEADER = (
    "mode",
    "curvature",
    "residual",
    "noise variance",
    "kappa",
    "D [95% interval]",
    "verdict",
    "theory",
)


def _row(mode: ModeResult) -> tuple[str, ...]:
    stiff = mode.kind is ModeKind.TOP
    curvature = (
        f"{mode.held_out_eigenvalue:.3g} ± {mode.held_out_standard_error:.1g}"
        if stiff
        else f"{mode.effective_curvature:.2g}"
    )
    diffusion = mode.diffusion
    verdict = mode.verdict.value + (f" ({mode.detail})" if mode.detail else "")
    return (
        mode.name,
        curvature,
        f"{mode.residual:.0e}",
        f"{mode.noise_variance.value:.2e}",
        f"{mode.relaxation_times:.1f}",
        f"{diffusion.value:.1e} [{diffusion.low:.1e}, {diffusion.high:.1e}]",
        verdict,
        f"{mode.predicted_diffusion:.1e} {_expected(mode)}",
    )


def _expected(mode: ModeResult) -> str:
    """What the predicted number of relaxation times leads one to expect."""
    if mode.relaxation_times >= 20:
        return Verdict.CONFINED.value
    return Verdict.DIFFUSIVE.value if abs(mode.relaxation_times) < 3 else "in between"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sgd-probe demo", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--output", default="demo_run", help="folder of the results (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a shorter run")
    return parser.parse_args(argv)


def _make_room(output: Path) -> None:
    """Remove what an earlier demo left; refuse a folder that holds anything else."""
    if output.exists() and (unknown := {entry.name for entry in output.iterdir()} - {"wandb", "sgd_probe"}):
        raise SystemExit(
            f"sgd-probe demo: expected {output} to be empty or an earlier demo's, found "
            f"{sorted(unknown)[0]!r}: choose another folder with --output"
        )
    for name in ("wandb", "sgd_probe"):
        shutil.rmtree(output / name, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)


def _train(arguments: argparse.Namespace, output: Path) -> tuple[list[WindowResult], list[float]]:
    os.environ.setdefault("WANDB_SILENT", "true")
    # The frameworks' hints (more workers, deprecations of their own) would drown the demo's output.
    warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning|torch")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.callbacks import TQDMProgressBar
    from pytorch_lightning.loggers import WandbLogger

    from sgd_probe import SGDProbe

    length = QUICK if arguments.quick else FULL
    # Threads only get in each other's way on tensors this small, badly so on a busy machine.
    torch.set_num_threads(1)
    pl.seed_everything(arguments.seed, verbose=False)
    losses: list[float] = []
    module = digits_module(length.approach, losses)
    probe = SGDProbe(
        top=10,
        flat=4,
        window=length.window,
        every_n_steps=length.period,
        curvature_batches=8,
        run_dir=output / "sgd_probe",
    )
    logger = WandbLogger(project="sgd-probe-demo", save_dir=output, offline=True)
    trainer = pl.Trainer(
        max_steps=length.approach + length.watch,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[probe, TQDMProgressBar(refresh_rate=100)],
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=50,
    )
    trainer.fit(module, digits_loader())
    logger.experiment.finish()
    return probe.results, losses


def digits_loader() -> DataLoader[Any]:
    """Scikit-learn's 1,797 digits in minibatches drawn with replacement."""
    import torch
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, RandomSampler, TensorDataset

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    sampler = RandomSampler(data, replacement=True, num_samples=200 * BATCH_SIZE)
    return DataLoader(data, batch_size=BATCH_SIZE, sampler=sampler)


def digits_module(approach_steps: int, losses: list[float]) -> LightningModule:
    """A network of 1,898 weights: SGD with momentum for so many steps, plain SGD from then on.

    Every hundredth training loss is appended to ``losses``.
    """
    import pytorch_lightning as pl
    import torch
    from torch import nn

    class DigitsModule(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1),
                nn.Tanh(),
                nn.AvgPool2d(2),
                nn.Conv2d(8, 16, 3, padding=1),
                nn.Tanh(),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(64, 10),
            )
            self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images, labels = batch
            loss: Tensor = self.criterion(self.network(images), labels)
            self.log("loss", loss, prog_bar=True)
            if self.global_step % 100 == 0:
                losses.append(float(loss.detach()))
            return loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == approach_steps:
                for group in self.trainer.optimizers[0].param_groups:
                    group["momentum"] = 0.0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(
                self.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
            )

    return DigitsModule()


def _relative(path: Path) -> Path:
    """Shorter, where it lies below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
