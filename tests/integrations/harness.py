"""Trains a module with and without the probe and takes everything that must not differ."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch
import numpy as np
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchmetrics import Metric

PACKAGES = {"pytorch_lightning": pytorch_lightning, "lightning.pytorch": lightning.pytorch}


@dataclass
class Fingerprint:
    """State of the world after a fit, down to the bit."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[int | None, dict[str, float]]] = field(default_factory=list)

    def assert_equal(self, other: Fingerprint) -> None:
        assert self.tensors.keys() == other.tensors.keys()
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor, other.tensors[name]), f"{name} differs"
        assert self.values.keys() == other.values.keys()
        for name, value in self.values.items():
            assert value == other.values[name], f"{name} differs"
        assert self.rows == other.rows


class RecordingDataset(Dataset[Any]):
    """Gaussian blobs; keeps the order in which its samples are asked for, and may augment them."""

    def __init__(
        self, shape: tuple[int, ...], count: int = 256, classes: int = 4, augment: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        self.labels = torch.randint(classes, (count,), generator=generator)
        centres = torch.randn((classes, *shape), generator=generator)
        self.inputs = centres[self.labels] + 0.7 * torch.randn((count, *shape), generator=generator)
        self.augment = augment
        self.order: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.order.append(index)
        sample = self.inputs[index]
        if self.augment:
            sample = sample * random.choice((0.9, 1.1)) + float(np.random.normal(scale=0.05))
            sample = sample + 0.05 * torch.randn(())
        return sample, self.labels[index]


def loader(dataset: RecordingDataset, replacement: bool = True, batch_size: int = 16) -> DataLoader[Any]:
    sampler = RandomSampler(dataset, replacement=replacement)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler)


def memory_logger(package: str) -> Any:
    """A logger of the package that keeps its rows."""

    class MemoryLogger(PACKAGES[package].loggers.logger.Logger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[tuple[int | None, dict[str, float]]] = []

        @property
        def name(self) -> str:
            return "memory"

        @property
        def version(self) -> int:
            return 0

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            """Keep none."""

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append((step, dict(metrics)))

    return MemoryLogger()


def fit(
    package: str,
    make_module: Callable[[Any], Any],
    make_loader: Callable[[], DataLoader[Any]],
    callbacks: list[Any],
    root: Any,
    *,
    steps: int = 240,
    **options: Any,
) -> tuple[Fingerprint, Any]:
    """Train and take the fingerprint; the module class is made from the package's LightningModule."""
    pl = PACKAGES[package]
    pl.seed_everything(11, verbose=False)
    module = make_module(pl.LightningModule)
    data = make_loader()
    logger = memory_logger(package)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=logger,
        default_root_dir=root,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(module, data)
    return take(trainer, module, data, logger), trainer


def take(trainer: Any, module: Any, data: DataLoader[Any], logger: Any) -> Fingerprint:
    """Everything that the probe may not change."""
    found = Fingerprint()
    found.tensors |= {f"state/{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found.tensors[f"grad/{name}"] = parameter.grad.clone()
    for index, state in trainer.optimizers[0].state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                found.tensors[f"optimizer/{index}/{key}"] = value.clone()
    for name, child in module.named_modules():
        if isinstance(child, Metric):
            for key in child._defaults:
                found.tensors[f"metric/{name}/{key}"] = getattr(child, key).clone()
            found.values[f"metric/{name}/updates"] = child._update_count
    found.tensors["rng/torch"] = torch.get_rng_state()
    found.values["rng/python"] = random.getstate()
    found.values["rng/numpy"] = str(np.random.get_state())
    found.values["order"] = data.dataset.order  # type: ignore[attr-defined]
    found.values["modes"] = {name: child.training for name, child in module.named_modules()}
    found.values["attributes"] = {
        k: v for k, v in vars(module).items() if isinstance(v, int | float | str | list)
    }
    found.values["progress"] = (trainer.global_step, trainer.current_epoch)
    found.values["callback_metrics"] = {
        key: float(value)
        for key, value in trainer.callback_metrics.items()
        if not key.startswith("sgd_probe/")
    }
    found.rows = [
        (step, user)
        for step, row in logger.rows
        if (user := {k: v for k, v in row.items() if not k.startswith("sgd_probe/")})
    ]
    return found


def mlp(base: Any) -> Any:
    """Dropout, a metric, a counter and a list in the training step; clipping is up to the trainer."""
    from torchmetrics.classification import MulticlassAccuracy

    class DropoutModule(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(
                nn.Flatten(), nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 4)
            )
            self.accuracy = MulticlassAccuracy(4)
            self.calls = 0
            self.seen: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            inputs, labels = batch
            self.calls += 1
            inputs.mul_(0.9)  # a step may do as it likes with its batch
            logits = self.network(inputs)
            loss = nn.functional.cross_entropy(logits, labels)
            self.seen.append(float(loss.detach()))
            self.accuracy(logits, labels)
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
            self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            return {"loss": loss}

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return DropoutModule()


def batchnorm(base: Any) -> Any:
    """BatchNorm statistics, and random numbers of all three kinds in the step."""

    class BatchNormModule(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
            )

        def training_step(self, batch: Any) -> Tensor:
            inputs, labels = batch
            if random.random() < 0.5:
                inputs = inputs.flip(-1)
            inputs = inputs + float(np.random.normal(scale=0.01)) + 0.01 * torch.randn_like(inputs)
            loss = nn.functional.cross_entropy(self.network(inputs), labels)
            self.log("loss", loss)
            self.log_dict({"mean": self.network.get_buffer("1.running_mean").mean()}, on_step=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return BatchNormModule()
