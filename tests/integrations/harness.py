"""Trains a module with and without the probe and takes everything that must not differ."""

from __future__ import annotations

import dataclasses
import random
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchmetrics import Metric

from sgd_probe import SGDProbe

#: What is taken down before and after every training step.
NOTED = ("place", "batch", "outputs", "random numbers", "weights", "gradients")
PACKAGES = {"pytorch_lightning": pytorch_lightning, "lightning.pytorch": lightning.pytorch}


def _no_checksums() -> array[int]:
    return array("L")


@dataclass
class Fingerprint:
    """The world after a fit, down to the bit, and what could be seen of it at every batch.

    Attributes:
        values: plain data by name.
        trace: two rows of checksums a batch, of what is NOTED before and after its training step, one after
            the other.
        rows: what the user logged, with the step of each row.
    """

    values: dict[str, Any] = field(default_factory=dict)
    trace: array[int] = field(default_factory=_no_checksums)
    rows: list[tuple[int | None, dict[str, Any]]] = field(default_factory=list)

    def assert_equal(self, other: Fingerprint) -> None:
        for index, (mine, its) in enumerate(zip(self.trace, other.trace, strict=False)):
            row, column = divmod(index, len(NOTED))
            assert mine == its, f"{NOTED[column]} differs at batch {row // 2}"
        assert len(self.trace) == len(other.trace)
        assert self.values.keys() == other.values.keys()
        for name, value in self.values.items():
            assert value == other.values[name], f"{name} differs: {_apart(value, other.values[name])}"
        for mine_row, its_row in zip(self.rows, other.rows, strict=False):
            assert mine_row == its_row, "a row of the log differs"
        assert len(self.rows) == len(other.rows)


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


def loader(
    dataset: RecordingDataset, replacement: bool = True, batch_size: int = 16, **options: Any
) -> DataLoader[Any]:
    sampler = RandomSampler(dataset, replacement=replacement, generator=options.get("generator"))
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, **options)


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


def witness(package: str) -> Any:
    """A callback that takes down what a training step starts from and what it leaves behind."""

    class Witness(PACKAGES[package].Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.trace = _no_checksums()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self._note(trainer, pl_module, batch, batch_idx, None)

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self._note(trainer, pl_module, batch, batch_idx, outputs)

        def _note(self, trainer: Any, module: Any, batch: Any, batch_idx: int, outputs: Any) -> None:
            noted = (
                [batch_idx, trainer.global_step, trainer.current_epoch],
                batch,
                outputs,
                generators(),
                list(module.state_dict().values()),
                [p.grad for p in module.parameters()],
            )
            self.trace.extend(map(digest, noted))

    return Witness()


def fit(
    package: str,
    make_module: Callable[[Any], Any],
    make_loader: Callable[[], Any],
    callbacks: list[Any],
    root: Any,
    *,
    steps: int = 240,
    logger: Any = None,
    compiled: bool = False,
    **options: Any,
) -> tuple[Fingerprint, Any]:
    """Train and take the fingerprint; the module class is made from the package's LightningModule.

    Args:
        package: of the trainer.
        make_module: from the base class.
        make_loader: its second result, where it gives two, is for validation.
        callbacks: of the trainer.
        root: folder of what the fit writes.
        steps: at most.
        logger: one that keeps rows in memory by default.
        compiled: give the trainer what torch.compile makes of the module.
        options: of the trainer.
    """
    pl = PACKAGES[package]
    pl.seed_everything(11, verbose=False)
    module = make_module(pl.LightningModule)
    data = make_loader()
    train, validation = data if isinstance(data, tuple) else (data, None)
    logger = memory_logger(package) if logger is None else logger
    seen = witness(package)
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "max_epochs": -1,
            "callbacks": [*callbacks, seen],
            "logger": logger,
            "default_root_dir": root,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            **options,
        }
    )
    trainer.fit(torch.compile(module, backend="aot_eager") if compiled else module, train, validation)
    found = take(trainer, module, train, Path(root))
    found.trace = seen.trace
    found.rows = [
        (step, user)
        for step, row in getattr(logger, "rows", [])
        if (user := {name: plain(value) for name, value in row.items() if not _ours(name)})
    ]
    return found, trainer


def take(trainer: Any, module: Any, data: Any, root: Path) -> Fingerprint:
    """Everything that the probe may not change."""
    values: dict[str, Any] = {}
    for kind in ("parameters", "buffers"):
        for name, tensor in getattr(module, f"named_{kind}")():
            values[f"{kind}/{name}"] = plain(tensor), tensor.requires_grad, plain(tensor.grad)
    for name, child in module.named_modules():
        values[f"attributes/{name}"] = plain(_own(child))
        if isinstance(child, Metric):
            states = {key: getattr(child, key) for key in child._defaults}
            values[f"metric/{name}"] = plain([states, child._update_count])
    for index, optimizer in enumerate(trainer.optimizers):
        hooks = [len(hooks) for name, hooks in vars(optimizer).items() if name.endswith("_hooks")]
        values[f"optimizer/{index}"] = plain([optimizer.state_dict(), sorted(vars(optimizer)), hooks])
    for index, schedule in enumerate(trainer.lr_scheduler_configs):
        values[f"schedule/{index}"] = plain(
            [schedule.scheduler.state_dict(), sorted(vars(schedule.scheduler))]
        )
    values["precision"] = plain(trainer.precision_plugin.state_dict())
    values |= {f"random numbers/{name}": state for name, state in generators().items()}
    values["loader"] = [
        plain(getattr(part, name, None))
        for part in (data.values() if isinstance(data, dict) else [data])
        for name in ("generator", "sampler")
    ]
    values["order"] = plain(getattr(getattr(data, "dataset", None), "order", None))
    values["progress"] = plain([trainer.fit_loop.state_dict(), trainer.global_step, trainer.should_stop])
    for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        values[name] = plain({k: v for k, v in getattr(trainer, name).items() if not _ours(k)})
    for callback in trainer.callbacks:
        if not isinstance(callback, SGDProbe):
            values[f"callback/{type(callback).__name__}"] = plain(callback.state_dict(), root)
    for path in sorted(root.rglob("*.ckpt")):
        checkpoint = torch.load(path, weights_only=False)
        held = checkpoint.get("callbacks", {})
        checkpoint["callbacks"] = {key: state for key, state in held.items() if "SGDProbe" not in key}
        values[f"checkpoint/{path.name}"] = plain(checkpoint, root)
    return Fingerprint(values)


def _own(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module, without what torch and wandb number over all of a process."""
    others = ("_trainer", "_torchdynamo", "_wandb_hook_names")
    own = {k: v for k, v in vars(module).items() if not k.startswith(others)}
    return {k: list(v.values()) if k.endswith("_hooks") else v for k, v in own.items()}


def _ours(name: str) -> bool:
    """Each probe of the tests has a name that begins so."""
    return name.startswith("sgd_probe")


def generators() -> dict[str, Any]:
    """State of the global generators of random numbers."""
    return {
        "python": hash(random.getstate()),
        "numpy": plain(np.random.get_state()),
        "torch": plain(torch.get_rng_state()),
    }


def plain(value: Any, root: Path | None = None) -> Any:
    """Data that can be compared: tensors and arrays as checksums of their bytes, objects as their state.

    Args:
        value: anything.
        root: a folder whose path is left out of strings.
    """
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), zlib.crc32(_bytes(value))
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, zlib.crc32(np.ascontiguousarray(value).tobytes())
    if isinstance(value, float):
        return value.hex()  # nan is equal to nan
    if isinstance(value, str):
        return value if root is None else value.replace(str(root), "")
    if isinstance(value, Mapping):
        return [(plain(key, root), plain(item, root)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return [plain(item, root) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(plain(item, root)) for item in value)
    if isinstance(value, torch.Generator):
        return plain(value.get_state())
    if isinstance(value, random.Random):
        return hash(value.getstate())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, RandomSampler):
        return plain(value.generator)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain([getattr(value, entry.name) for entry in dataclasses.fields(value)], root)
    return value if value is None or isinstance(value, bool | int | bytes) else type(value).__name__


def digest(value: Any) -> int:
    """One number for any data: a run of thousands of batches has to be kept."""
    return zlib.crc32(repr(plain(value)).encode())


def _apart(mine: Any, its: Any) -> str:
    """The first place where two plain values differ."""
    if isinstance(mine, list) and isinstance(its, list) and len(mine) == len(its):
        return next(_apart(a, b) for a, b in zip(mine, its, strict=True) if a != b)
    if isinstance(mine, tuple) and isinstance(its, tuple) and mine[0] == its[0]:
        return f"{mine[0]}: {_apart(list(mine[1:]), list(its[1:]))}"
    return f"{mine!r} != {its!r}"


def _bytes(tensor: Tensor) -> bytes:
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


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
