"""A long training under hundreds of windows: does anything pile up?

The same small training runs without the probe and with it. Resident memory (all that is free handed back
to the system), threads and open descriptors are read twenty times; what counts is the second half. Results
are written to the run folder and dropped: kept in memory, they are all that may grow.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from sgd_probe import SGDProbe

#: Length of a window, and from one to the next; so often is looked.
WINDOW, LOOKS = 50, 20


class Learner(pl.LightningModule):
    """A network with what keeps state: dropout, BatchNorm, a metric of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 4))
        self.net = nn.Sequential(*layers)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.5)


class Books(pl.Callback):
    """What the process holds, every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            gc.collect()
            if hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)
            status = Path("/proc/self/status").read_text().splitlines()
            resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
            self.rows.append(
                {
                    "step": trainer.global_step,
                    "megabytes": resident / 1024,
                    "threads": threading.active_count(),
                    "files": len(list(Path("/proc/self/fd").iterdir())),
                    "objects": len(gc.get_objects()),
                }
            )


def train(steps: int, probed: bool, folder: Path) -> dict[str, Any]:
    """One training; megabytes per 10,000 steps are the slope over its second half."""
    pl.seed_everything(0, verbose=False)
    inputs = torch.randn(512, 8)
    data = TensorDataset(inputs, inputs[:, 0].gt(0).long() + 2 * inputs[:, 1].gt(0).long())
    loader = DataLoader(data, 16, sampler=RandomSampler(data, replacement=True))
    books, callbacks = Books(steps // LOOKS), []
    if probed:
        probe = SGDProbe(
            top=3, flat=2, window=WINDOW, every_n_steps=WINDOW, curvature_batches=2, run_dir=folder / "run"
        )
        callbacks = [probe]
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, books],
    )
    module = Learner()
    began = time.perf_counter()
    trainer.fit(module, loader)
    half = [row for row in books.rows if row["step"] > steps / 2]
    slopes = {
        key: float(np.polyfit([row["step"] for row in half], [row[key] for row in half], 1)[0]) * 10_000
        for key in ("megabytes", "objects")
    }
    last = probe.results[-1] if probed else None
    return {
        "steps": trainer.global_step,
        "windows": last.index + 1 if last else 0,
        "seconds": time.perf_counter() - began,
        "first_megabytes": half[0]["megabytes"],
        "last_megabytes": half[-1]["megabytes"],
        "megabytes_per_10k_steps": slopes["megabytes"],
        "objects_per_10k_steps": slopes["objects"],
        "threads": half[-1]["threads"] - half[0]["threads"],
        "files": half[-1]["files"] - half[0]["files"],
        "longest_pause_seconds": last.cost.longest_pause_seconds if last else 0.0,
        "weights": float(sum(p.double().abs().sum() for p in module.parameters())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="optimizer steps of each training")
    parser.add_argument("--quick", action="store_true", help="2,000 steps")
    parser.add_argument("--json", action="store_true", help="print the figures as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("pytorch_lightning", "sgd_probe"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if not Path("/proc/self/status").exists():
        parser.error("resident memory is read from Linux's own books (/proc): run it on Linux")
    steps, found = 2_000 if options.quick else options.steps, {}
    with tempfile.TemporaryDirectory() as folder:
        train(10 * WINDOW, True, Path(folder))  # the first page of a process loads what draws its figures
    for name, probed in (("without", False), ("with", True)):
        with tempfile.TemporaryDirectory() as folder:
            threads, files = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
            found[name] = row = train(steps, probed, Path(folder))
            left = threading.active_count() - threads, len(list(Path("/proc/self/fd").iterdir())) - files
        print(
            f"{name} the probe: {row['steps']:,} steps, {row['windows']} windows, {row['seconds']:.0f} s; "
            f"second half {row['first_megabytes']:.1f} -> {row['last_megabytes']:.1f} MB "
            f"({row['megabytes_per_10k_steps']:+.2f} MB and {row['objects_per_10k_steps']:+.0f} objects per "
            f"10,000 steps), threads {row['threads']:+d}, files {row['files']:+d}; left over at the end: "
            f"threads {left[0]:+d}, files {left[1]:+d}",
            flush=True,
        )
    same = found["with"]["weights"] == found["without"]["weights"]
    print(
        f"weights at the end {'are the same' if same else 'DIFFER'}; longest pause "
        f"{found['with']['longest_pause_seconds']:.2f} s"
    )
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
