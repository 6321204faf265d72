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

from sgd_probe.result import WindowResult

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule
    from torch import Tensor, nn
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
    runs = sorted((output / "wandb").glob("offline-run-*"))
    print(f"W&B run (offline; `wandb sync` uploads it): {_relative(runs[-1])}/" if runs else "no W&B run")
    print(f"Report (open it in a browser):              {_relative(output / 'sgd_probe' / 'report.html')}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sgd-probe demo", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--output", default="demo_run", help="folder of the results (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=LEARNING_RATE, metavar="ETA", help="of SGD (%(default)s)"
    )
    parser.add_argument(
        "--shuffle", action="store_true", help="draw minibatches without replacement, as most trainings do"
    )
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
    module = digits_module(length.approach, losses, arguments.learning_rate)
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
    trainer.fit(module, digits_loader(arguments.shuffle))
    logger.experiment.finish()
    return probe.results, losses


def digits_loader(shuffle: bool = False) -> DataLoader[Any]:
    """Scikit-learn's 1,797 digits in minibatches drawn with replacement, or shuffled without."""
    import torch
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, RandomSampler, TensorDataset

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    if shuffle:
        return DataLoader(data, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    sampler = RandomSampler(data, replacement=True, num_samples=200 * BATCH_SIZE)
    return DataLoader(data, batch_size=BATCH_SIZE, sampler=sampler)


def digits_network() -> nn.Module:
    """A convolutional network of 1,898 weights for images of 8 x 8 pixels."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def digits_module(
    approach_steps: int, losses: list[float], learning_rate: float = LEARNING_RATE
) -> LightningModule:
    """A network of 1,898 weights: SGD with momentum for so many steps, plain SGD from then on.

    Every hundredth training loss is appended to ``losses``.
    """
    import pytorch_lightning as pl
    import torch
    from torch import nn

    class DigitsModule(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = digits_network()
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
                self.parameters(), lr=learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
            )

    return DigitsModule()


def _relative(path: Path) -> Path:
    """Shorter, where it lies below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
