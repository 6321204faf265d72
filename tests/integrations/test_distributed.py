"""DDP, two processes over gloo: the training is untouched, modes are the same bits, failures shared."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import SGDProbe
from sgd_probe.curvature.krylov import KrylovBasis
from tests.helpers.processes import run_processes

pytestmark = pytest.mark.slow

STEPS_PER_EPOCH, EPOCHS = 16, 16


class Classifier(pl.LightningModule):
    """A small network with BatchNorm and dropout; ``fails_on`` makes the probe's evaluations fail there."""

    def __init__(self, optimizer: str = "sgd", fails_on: int = -1, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.net = nn.Sequential(*layers)
        self.optimizer, self.fails_on, self.kind = optimizer, fails_on, kind
        self.own_steps = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = F.cross_entropy(self.net(inputs), targets)
        self.log("loss", loss, sync_dist=True)
        # In the probe the weights are aliases.
        probing = not isinstance(self.net[0].weight, nn.Parameter)
        failing = self.global_rank == self.fails_on and self.trainer.global_step >= 60
        if probing and failing and self.kind != "basis":
            raise torch.OutOfMemoryError("no room") if self.kind == "memory" else KeyError("odd batch")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=3e-3)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)


def refuse_vectors() -> None:
    """On this process alone, at the second search, the sixth vector has no room."""
    append, found = KrylovBasis.append, {"searches": 0}

    def refusing(self: KrylovBasis, vector: Tensor) -> None:
        found["searches"] += len(self) == 0 and self._first > 3
        if found["searches"] == 2 and len(self) == 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        append(self, vector)

    KrylovBasis.append = refusing  # type: ignore[method-assign]


def main(rank: int, folder: Path, probed: bool, optimizer: str, fails_on: int = -1, kind: str = "") -> Any:
    """One of the processes of a training."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(3, verbose=False)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(16 * 2 * STEPS_PER_EPOCH, 8, generator=generator)
    targets = (inputs[:, 0] + 0.5 * torch.randn(len(inputs), generator=generator) > 0).long()
    loader = DataLoader(TensorDataset(inputs, targets), 16, shuffle=True)
    module = Classifier(optimizer, fails_on, kind)
    probe = SGDProbe(top=3, flat=2, every_n_steps=60, window=50, curvature_batches=4, run_dir=folder / "run")
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    handler.setLevel(logging.WARNING)
    logging.getLogger("sgd_probe").addHandler(handler)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[probe] if probed else [],
    )
    if rank == fails_on and kind == "basis":
        refuse_vectors()
    trainer.fit(module, loader)
    state = [*module.state_dict().values()]
    for group in trainer.optimizers[0].state.values():
        state += [value for value in group.values() if isinstance(value, Tensor)]
    digest = hashlib.sha256()
    for tensor in state:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return {
        "state": digest.hexdigest(),
        "loss": float(trainer.callback_metrics["loss"]),
        "steps": trainer.global_step,
        "windows": [
            {
                "opened": result.opened_at_step,
                "steps": result.steps,
                "eigenvalues": [mode.held_out_eigenvalue for mode in result.modes],
                "end": [mode.end_eigenvalue for mode in result.modes],
                "residuals": [mode.residual for mode in result.modes],
                "noise": [mode.noise_variance.value for mode in result.modes],
                "verdicts": [mode.verdict.value for mode in result.modes],
                "samples": result.curvature.samples_certified,
                "sampling": result.sampling,
            }
            for result in probe.results
        ],
        "warned": warned,
        "folders": sorted(path.name for path in folder.glob("run*")),
        "metric": float(trainer.callback_metrics.get("sgd_probe/n_confined", torch.tensor(-1.0))),
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_is_untouched_and_modes_are_the_same_on_all(tmp_path: Path, optimizer: str) -> None:
    runs = {}
    for probed in (False, True):
        folder = tmp_path / str(probed)
        folder.mkdir()
        runs[probed] = run_processes(
            "tests.integrations.test_distributed", folder, probed=probed, optimizer=optimizer
        )
    for rank in (0, 1):
        plain, probed_run = runs[False][rank], runs[True][rank]
        assert probed_run["warned"] == []
        assert probed_run["state"] == plain["state"] and probed_run["loss"] == plain["loss"]
        assert probed_run["steps"] == plain["steps"] == STEPS_PER_EPOCH * EPOCHS
    first, second = runs[True]
    assert len(first["windows"]) >= 3
    assert first["windows"] == second["windows"] and first["metric"] == second["metric"] >= 0
    for window in first["windows"]:
        assert window["steps"] == 50 and window["samples"] == 4 * 16 * 2
        assert max(window["residuals"][:3]) <= 1e-2
        assert None not in window["end"] and not any(end != end for end in window["end"])
        assert "512 samples in batches of 32, 16 batches an epoch" in window["sampling"]
    # One folder, written by the first process.
    assert first["folders"] == ["run"]


@pytest.mark.parametrize("kind", ["memory", "user"])
def test_what_fails_on_one_process_stops_the_probe_on_all(tmp_path: Path, kind: str) -> None:
    runs = {}
    for fails_on in (-1, 1):
        folder = tmp_path / str(fails_on)
        folder.mkdir()
        runs[fails_on] = run_processes(
            "tests.integrations.test_distributed",
            folder,
            probed=fails_on >= 0,
            optimizer="sgd",
            fails_on=fails_on,
            kind=kind,
        )
    for rank in (0, 1):
        plain, failed = runs[-1][rank], runs[1][rank]
        assert failed["state"] == plain["state"] and failed["steps"] == plain["steps"]
        # The window that was open before closes without its end; none opens after.
        assert len(failed["windows"]) == 1
        assert any("switched off for the rest of this fit" in m for m in failed["warned"]), failed["warned"]
        given_up = [m for m in failed["warned"] if "it is tried again, and from now on" in m]
        # The first process says it for all.
        assert (len(given_up) > 0) == (kind == "memory" and rank == 0)


def test_one_that_is_short_of_vectors_is_waited_for(tmp_path: Path) -> None:
    """The failure lies between two products, where the others are in a reduction already."""
    runs = {}
    for kind, fails_on in (("", -1), ("basis", 1)):
        folder = tmp_path / f"run{kind}"
        folder.mkdir()
        runs[kind] = run_processes(
            "tests.integrations.test_distributed",
            folder,
            probed=True,
            optimizer="sgd",
            fails_on=fails_on,
            kind=kind,
        )
    first, second = runs["basis"]
    assert first["windows"] == second["windows"] and len(first["windows"]) == len(runs[""][0]["windows"])
    for rank in (0, 1):
        assert runs["basis"][rank]["state"] == runs[""][rank]["state"]
    (warning,) = first["warned"]
    assert "memory was short while a window opened at step" in warning and second["warned"] == []
