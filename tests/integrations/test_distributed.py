"""DDP, two processes over gloo: the training is untouched, modes are the same bits, failures shared."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import SGDProbe
from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.krylov import KrylovBasis
from sgd_probe.integrations import lightning
from tests.helpers.probing import is_probing
from tests.helpers.processes import run_processes

pytestmark = pytest.mark.slow

#: Windows open at steps 16, 80 and 144 and close at 72, 136 and 200.
STEPS_PER_EPOCH, EPOCHS, SHORT = 16, 13, 9
#: From this step on something fails, where it is to: before the first window closes, or after.
LATE, LATER = 60, 75


class Classifier(pl.LightningModule):
    """A small network with BatchNorm and dropout; ``fails`` says how the probe's evaluations of it fail."""

    def __init__(self, optimizer: str = "sgd", fails: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.net = nn.Sequential(*layers)
        self.optimizer, self.fails = optimizer, fails

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = F.cross_entropy(self.net(inputs), targets)
        self.log("loss", loss, sync_dist=True)
        if is_probing() and self.fails in ("memory", "loss") and self.trainer.global_step >= LATE:
            raise torch.OutOfMemoryError("no room") if self.fails == "memory" else KeyError("odd batch")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=3e-3)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)


def main(rank: int, folder: Path, runs: list[dict[str, Any]]) -> Any:
    """Trainings of one of the processes, one after the other; what fails does so on the second one."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    found = []
    for number, options in enumerate(runs):
        fails = options.pop("fails", "") if rank == 1 else ""
        options.pop("fails", "")
        found.append(_train(folder / str(number), fails=fails, **options))
    return found


@contextmanager
def _broken(trainer: pl.Trainer, fails: str) -> Iterator[None]:
    """Break what is not the training step's: the solver's memory, the copy of a batch, the terminal."""
    owner, name, error = {
        "solver": (KrylovBasis, "append", torch.OutOfMemoryError("no room for a vector")),
        "batch": (CurvatureBatch, "freeze", TypeError("odd batch")),
        "terminal": (lightning, "announce", BrokenPipeError("nobody listens")),
    }.get(fails, (lightning, "announce", None))
    original = getattr(owner, name)

    def breaking(*arguments: Any, **named: Any) -> Any:
        if error is not None and trainer.global_step >= (LATER if fails == "terminal" else LATE):
            raise error
        return original(*arguments, **named)

    with mock.patch.object(owner, name, breaking), mock.patch.object(lightning, "LONG_PAUSE", 0.0):
        yield


def _train(folder: Path, probed: bool, optimizer: str = "sgd", epochs: int = EPOCHS, fails: str = "") -> Any:
    pl.seed_everything(3, verbose=False)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(16 * 2 * STEPS_PER_EPOCH, 8, generator=generator)
    targets = (inputs[:, 0] + 0.5 * torch.randn(len(inputs), generator=generator) > 0).long()
    loader = DataLoader(TensorDataset(inputs, targets), 16, shuffle=True)
    module = Classifier(optimizer, fails)
    probe = SGDProbe(top=3, flat=2, every_n_steps=60, window=50, curvature_batches=4, run_dir=folder / "run")
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    handler.setLevel(logging.WARNING)
    logging.getLogger("sgd_probe").handlers = [handler]
    trainer = pl.Trainer(
        max_epochs=epochs,
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
    with _broken(trainer, fails):
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
                "resampled": [mode.resampled_noise.value for mode in result.modes],
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


#: How many windows close where something fails, and what the process on which it does says.
FAILURES = {
    "memory": (1, "memory is too short for a window, whatever is given up"),
    "loss": (1, "switched off for the rest of this fit"),
    "solver": (1, "memory is too short for a window, whatever is given up"),
    "terminal": (1, "switched off for the rest of this fit"),
    # At the very step at which all have agreed to close a window.
    "batch": (0, "switched off for the rest of this fit"),
}
RUNS: list[dict[str, Any]] = [
    *({"probed": probed, "optimizer": name} for name in ("sgd", "adamw") for probed in (False, True)),
    {"probed": False, "epochs": SHORT},
    *({"probed": True, "epochs": SHORT, "fails": fails} for fails in FAILURES),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_processes(
        "tests.integrations.test_distributed", tmp_path_factory.mktemp("ddp"), runs=RUNS, timeout=500
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_is_untouched_and_modes_are_the_same_on_all(ranks: Any, optimizer: str) -> None:
    number = RUNS.index({"probed": False, "optimizer": optimizer})
    for found in ranks:
        plain, probed = found[number : number + 2]
        assert probed["warned"] == []
        assert probed["state"] == plain["state"] and probed["loss"] == plain["loss"]
        assert probed["steps"] == plain["steps"] == STEPS_PER_EPOCH * EPOCHS
    first, second = (found[number + 1] for found in ranks)
    assert len(first["windows"]) >= 3
    assert first["windows"] == second["windows"] and first["metric"] == second["metric"] >= 0
    for window in first["windows"]:
        assert window["steps"] == 50 and window["samples"] == 4 * 16 * 2
        assert max(window["residuals"][:3]) <= 1e-2
        assert None not in window["end"] and not any(end != end for end in window["end"])
        # 4 batches of each of 2 processes: enough to say what the noise is at fixed weights.
        assert all(value > 0 for value in window["resampled"])
        assert "512 samples in batches of 32, 16 batches an epoch" in window["sampling"]
    # One folder, written by the first process.
    assert first["folders"] == ["run"]


@pytest.mark.parametrize("fails", FAILURES)
def test_what_fails_on_one_process_stops_the_probe_on_all(ranks: Any, fails: str) -> None:
    windows, said = FAILURES[fails]
    plain, failed = (RUNS.index({"probed": False, "epochs": SHORT}), 5 + list(FAILURES).index(fails))
    for found in ranks:
        assert found[failed]["state"] == found[plain]["state"]
        assert found[failed]["steps"] == found[plain]["steps"] == STEPS_PER_EPOCH * SHORT
        # The window that was open before closes without its end; none opens after.
        assert len(found[failed]["windows"]) == windows
        assert any(said in message for message in found[failed]["warned"]), found[failed]["warned"]
