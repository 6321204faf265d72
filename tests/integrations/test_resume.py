"""Checkpoints: a resumed run measures what an uninterrupted one does, and a killed one loses one window."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import ProbeConfig, SGDProbe
from sgd_probe.result import WindowResult
from sgd_probe.sinks.folder import read_run

ROOT = Path(__file__).resolve().parent.parent.parent
EPOCHS, STEPS = 12, 20


class Classifier(pl.LightningModule):
    """A small network whose data and order depend on nothing but seeds."""

    def __init__(self, adaptive: bool = False, slow: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
        self.adaptive, self.slow = adaptive, slow

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.slow)
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.adaptive:
            return torch.optim.AdamW(self.parameters(), lr=3e-3)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5, weight_decay=1e-3)


def loader() -> DataLoader[Any]:
    """In a fixed order, so that a resumed run sees what an uninterrupted one does."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS * 8, 6, generator=generator)
    return DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), 8)


def probe(folder: Path, **config: Any) -> SGDProbe:
    # Windows open at steps 0 + lead, 70, 140 and 210, and are open at the ends of epochs.
    return SGDProbe(
        top=3,
        flat=2,
        every_n_steps=70,
        window=60,
        curvature_batches=4,
        run_dir=folder / "run",
        config=ProbeConfig(sampling="with_replacement", **config),
    )


def trainer(folder: Path, epochs: int, *callbacks: Any, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"enable_checkpointing": False, **options},
    )


def plain(result: WindowResult) -> dict[str, Any]:
    """All of a result but what the clock said."""
    return {k: v for k, v in result.to_dict().items() if k != "cost"}


class Interruption(pl.Callback):
    """The run breaks off when an epoch begins, after the checkpoint of the one before."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("the power is gone")


def interrupted(folder: Path, epoch: int, adaptive: bool = False, **config: Any) -> Path:
    """A run that breaks off, and its last checkpoint."""
    saving = ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1, filename="{epoch:02d}")
    run = trainer(
        folder, EPOCHS, probe(folder, **config), saving, Interruption(epoch), enable_checkpointing=True
    )
    with pytest.raises(RuntimeError, match="the power is gone"):
        run.fit(Classifier(adaptive), loader())
    return sorted(folder.glob("*.ckpt"))[-1]


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_open_window_goes_on_with_the_same_numbers(tmp_path: Path, adaptive: bool) -> None:
    folders = [tmp_path / name for name in ("whole", "parts")]
    whole = probe(folders[0], checkpoint_window=True)
    trainer(folders[0], EPOCHS, whole).fit(Classifier(adaptive), loader())
    # Step 100: the second window has been open for a while.
    checkpoint = interrupted(folders[1], 5, adaptive, checkpoint_window=True)
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["SGDProbe{'name': 'sgd_probe'}"]
    assert state["window"] is not None and state["opened"] == 2
    resumed = probe(folders[1], checkpoint_window=True)
    trainer(folders[1], EPOCHS, resumed).fit(Classifier(adaptive), loader(), ckpt_path=checkpoint)
    assert len(whole.results) >= 3 and len(resumed.results) == len(whole.results) - 1
    for mine, other in zip(whole.results[1:], resumed.results, strict=True):
        assert plain(mine) == plain(other)
    # One folder: the windows of both parts, and none twice.
    _, windows, note = read_run(folders[1] / "run")
    assert not note and [w.index for w in windows] == [w.index for w in whole.results]
    assert not (folders[1] / "run_1").exists()


def test_without_the_open_window_the_next_one_opens_when_it_would_have(tmp_path: Path) -> None:
    whole = probe(tmp_path / "whole")
    trainer(tmp_path / "whole", EPOCHS, whole).fit(Classifier(), loader())
    checkpoint = interrupted(tmp_path / "parts", 5)
    assert (
        torch.load(checkpoint, weights_only=True)["callbacks"]["SGDProbe{'name': 'sgd_probe'}"]["window"]
        is None
    )
    resumed = probe(tmp_path / "parts")
    trainer(tmp_path / "parts", EPOCHS, resumed).fit(Classifier(), loader(), ckpt_path=checkpoint)
    opened = [w.opened_at_step for w in resumed.results]
    assert opened == [w.opened_at_step for w in whole.results[2:]]
    for mine, other in zip(whole.results[2:], resumed.results, strict=True):
        assert plain(mine) == plain(other)


def test_checkpoints_open_without_the_probe_and_the_other_way_round(tmp_path: Path) -> None:
    checkpoint = interrupted(tmp_path / "with", 5, checkpoint_window=True)
    alone = Classifier()
    trainer(tmp_path / "a", 7).fit(alone, loader(), ckpt_path=checkpoint)
    saving = ModelCheckpoint(tmp_path / "b", save_top_k=-1)
    trainer(tmp_path / "b", 5, saving, enable_checkpointing=True).fit(Classifier(), loader())
    bare = sorted((tmp_path / "b").glob("*.ckpt"))[-1]
    late = probe(tmp_path / "c")
    module = Classifier()
    trainer(tmp_path / "c", 12, late).fit(module, loader(), ckpt_path=bare)
    assert late.results and late.results[0].opened_at_step > 100
    reference = Classifier()
    trainer(tmp_path / "d", 12).fit(reference, loader())
    for mine, other in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_finished_run_is_taken_up_where_it_ended(tmp_path: Path) -> None:
    first = probe(tmp_path)
    run = trainer(tmp_path, 5, first)
    run.fit(Classifier(), loader())
    # The fit's end has cut the second window short.
    assert [w.index for w in first.results] == [0] or [w.index for w in first.results] == [0, 1]
    checkpoint = tmp_path / "end.ckpt"
    run.save_checkpoint(checkpoint)
    later = probe(tmp_path)
    trainer(tmp_path, 10, later).fit(Classifier(), loader(), ckpt_path=checkpoint)
    _, windows, note = read_run(tmp_path / "run")
    assert not note and [w.index for w in windows] == list(range(len(windows)))
    assert len(windows) == len(first.results) + len(later.results) > len(first.results)
    # A second fit of the same probe without a checkpoint is a run of its own.
    trainer(tmp_path, 5, later).fit(Classifier(), loader())
    assert later.results[0].index == 0 and (tmp_path / "run_1").exists()


def test_a_state_of_other_weights_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = interrupted(tmp_path / "with", 5, checkpoint_window=True)
    other = SGDProbe(
        top=2,
        flat=0,
        every_n_steps=70,
        window=60,
        curvature_batches=4,
        params="net.0.*",
        run_dir=tmp_path / "o",
    )
    trainer(tmp_path, EPOCHS, other).fit(Classifier(), loader(), ckpt_path=checkpoint)
    assert "begins anew" in caplog.text and other.results[0].index == 0


KILLED = """
import sys
from pathlib import Path
from tests.integrations.test_resume import *
folder = Path(sys.argv[1])
saving = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=10)
run = trainer(folder, 60, probe(folder), saving, enable_checkpointing=True)
run.fit(Classifier(slow=0.005), loader())
"""


@pytest.mark.slow
@pytest.mark.parametrize("windows", [1, 2])
def test_a_killed_run_keeps_its_folder_and_loses_one_window_at_most(tmp_path: Path, windows: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    written = tmp_path / "run" / "windows.jsonl"
    deadline = time.monotonic() + 120
    while not (written.exists() and len(written.read_text().splitlines()) >= windows):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1 * windows)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = [json.loads(line)["index"] for line in written.read_text().splitlines()]
    checkpoints = sorted(tmp_path.glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    # The very last one may be half written.
    checkpoint = checkpoints[-2]
    resumed = probe(tmp_path)
    trainer(tmp_path, 20, resumed).fit(Classifier(), loader(), ckpt_path=checkpoint)
    _, found, note = read_run(tmp_path / "run")
    assert not note and len(found) > len(kept)
    indices = [w.index for w in found]
    assert indices[: len(kept)] == kept
    # What a checkpoint older than the last window would open again is in the folder once more, not less.
    assert set(range(max(indices) + 1)) - set(indices) <= {len(kept)}


def test_dataclasses_survive_the_checkpoint() -> None:
    """Field by field: what a window is made of is what is stored."""
    from sgd_probe.engine.packing import _CLASSES, pack, unpack
    from sgd_probe.result import Interval

    value = {"a": (1, 2.5, None, "x"), "b": [Interval(1.0, 0.5, 2.0)], "c": torch.ones(2)}
    again = unpack(pack(value))
    assert again["a"] == value["a"] and again["b"] == value["b"] and torch.equal(again["c"], torch.ones(2))
    assert all(dataclasses.is_dataclass(kind) or hasattr(kind, "_fields") for kind in _CLASSES.values())
    with pytest.raises(TypeError, match="plain types, found a set"):
        pack({"a": {1, 2}})
