"""FSDP2 by ModelParallelStrategy, two processes over gloo; and what is refused of its kind, by name."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import ProbeConfig, SGDProbe
from sgd_probe.curvature.space import part
from sgd_probe.integrations.lightning_compat import refusal
from tests.helpers.processes import run_processes

#: Windows open at steps 16 and 80 and close at 72 and 136.
STEPS_PER_EPOCH = 20
EPOCHS = {"sgd": 7, "adamw": 4}


class Classifier(pl.LightningModule):
    """A small network with dropout whose layers are sharded; ``coarse`` lets them compute in bfloat16."""

    def __init__(self, optimizer: str, coarse: bool, plain: bool = False) -> None:
        super().__init__()
        self.optimizer, self.coarse, self.plain = optimizer, coarse, plain
        self.seen = 0

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 11), nn.Tanh(), nn.Dropout(0.1), nn.Linear(11, 3))
        if self.plain:
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        assert self.device_mesh is not None
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if self.coarse else MixedPrecisionPolicy()
        mesh = self.device_mesh["data_parallel"]
        for unit in (self.net[0], self.net):
            fully_shard(unit, mesh=mesh, mp_policy=policy)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = F.cross_entropy(self.net(inputs), targets)
        self.log("loss", loss, sync_dist=True)
        self.seen += 1
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("validation", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=3e-3)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5, weight_decay=1e-3)


def main(rank: int, folder: Path, runs: list[dict[str, Any]]) -> Any:
    """Trainings of one of the processes, one after the other."""
    return [_train(folder / str(number), **options) for number, options in enumerate(runs)]


def _train(
    folder: Path, probed: bool, optimizer: str = "sgd", coarse: bool = False, precision: str = "32-true"
) -> Any:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(3, verbose=False)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(16 * 2 * STEPS_PER_EPOCH, 8, generator=generator)
    targets = (inputs[:, 0] + 0.5 * torch.randn(len(inputs), generator=generator) > 0).long()
    data = TensorDataset(inputs, targets)
    module = Classifier(optimizer, coarse)
    config = ProbeConfig(top=2, flat=1, flat_dimension=4, every_n_steps=60, window=50, curvature_batches=2)
    probe = SGDProbe(run_dir=folder / "run", name="probe", config=config)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sgd_probe").handlers = [handler]
    refused = coarse or precision != "32-true"
    trainer = pl.Trainer(
        max_epochs=1 if refused else EPOCHS[optimizer],
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=2,
        callbacks=[probe] if probed else [],
    )
    trainer.fit(
        module, DataLoader(data, 16, shuffle=True), DataLoader(TensorDataset(inputs[:64], targets[:64]), 16)
    )
    state: list[Any] = list(module.parameters())
    for group in trainer.optimizers[0].state.values():
        state += [value for value in group.values() if value is not None]
    digest = hashlib.sha256()
    for tensor in state:
        digest.update(part(tensor).detach().contiguous().numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    stored = [path.name for path in sorted(folder.glob("run/**/*")) if path.is_file()]
    return {
        "state": digest.hexdigest(),
        "logged": {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("probe/")},
        "counted": [module.seen, trainer.global_step],
        "windows": [
            {
                "steps": result.steps,
                "skipped": result.skipped_steps,
                "parameters": result.curvature.parameters,
                "self_test": result.curvature.self_test,
                "eigenvalues": [mode.held_out_eigenvalue for mode in result.modes],
                "end": [mode.end_eigenvalue for mode in result.modes],
                "residuals": [mode.residual for mode in result.modes],
                "noise": [mode.noise_variance.value for mode in result.modes],
                "share": [mode.noise_share for mode in result.modes],
                "warnings": list(result.warnings),
            }
            for result in probe.results
        ],
        "said": said,
        "stored": stored,
    }


@pytest.mark.slow
def test_training_is_untouched_and_windows_are_the_same_on_both(tmp_path: Path) -> None:
    runs = [{"probed": probed, "optimizer": name} for name in EPOCHS for probed in (False, True)]
    runs += [{"probed": True, "coarse": True}, {"probed": True, "precision": "bf16-mixed"}]
    ranks = run_processes("tests.integrations.test_sharded", tmp_path, runs=runs, timeout=500)
    for plain, probed, windows in ((0, 1, 2), (2, 3, 1)):
        for found in ranks:
            for key in ("state", "logged", "counted"):
                assert found[probed][key] == found[plain][key]
            assert found[probed]["said"] == []
        first, second = (found[probed]["windows"] for found in ranks)
        assert len(first) == windows and first == second
        for window in first:
            assert window["steps"] == 50 and window["skipped"] == 0
            assert window["parameters"] == 8 * 11 + 11 + 11 * 3 + 3
            assert max(window["residuals"][:2]) <= 1e-2
            assert all(end == end for end in window["end"])
            assert all(share > 0 for share in window["share"])
            assert "finite differences, symmetric" in window["self_test"]
            said = " ".join(window["warnings"])
            assert "finite differences of gradients (the weights are divided)" in said
            assert "The directions are not stored" in said
        assert "run.json" in ranks[0][probed]["stored"]
    for found in ranks:
        for run, named in ((4, "MixedPrecisionPolicy of bfloat16"), (5, "in precision bf16-mixed")):
            assert found[run]["windows"] == [] and len(found[run]["said"]) == 1
            (message,) = found[run]["said"]
            assert named in message and 'precision="32-true"' in message and 'strategy="ddp"' in message


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (FSDPStrategy, r"FSDPStrategy is not supported: FSDP \(version 1\).*fully_shard \(FSDP2\)"),
        (DeepSpeedStrategy, "DeepSpeedStrategy is not supported: DeepSpeed keeps weights.*fully_shard"),
        (type("OtherStrategy", (DDPStrategy,), {}), "OtherStrategy is not supported: each process must hold"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    tmp_path: Path, strategy: type[DDPStrategy], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path)
    module = Classifier("sgd", coarse=False, plain=True)
    module.configure_model()
    trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)]
    assert refusal(trainer, module) == ""
    # Some of them refuse to be made without a GPU or their package.
    other = object.__new__(strategy)
    vars(other).update(vars(trainer.strategy))
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", other)
    monkeypatch.setattr(type(trainer), "world_size", property(lambda self: 2))
    found = refusal(trainer, module)
    assert re.search(why, found), found
    assert 'strategy="ddp"' in found
