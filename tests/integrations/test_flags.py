"""Flags in a training: one stiff direction, and two along which nothing but noise moves the weights."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from sgd_probe import Flag, LoopProbe, ProbeConfig, SGDProbe, find_flags
from sgd_probe.sinks.folder import load_vectors
from tests.helpers.quadratic import BATCH, Quadratic
from tests.sinks.conftest import warnings_of

CURVATURES = (4.0, 1e-4, 2e-5)
STEPS = 460
OPTIONS: dict[str, Any] = {
    "top": 3,
    "flat": 0,
    "window": 200,
    "every_n_steps": 210,
    "curvature_batches": 4,
    "strict": True,
}


def noise() -> DataLoader[Any]:
    """Drawn with replacement from samples that come in opposite pairs: there is no drift."""
    half = torch.randn(256, len(CURVATURES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = TensorDataset(torch.cat([half, -half]))
    sampler = RandomSampler(data, replacement=True, generator=torch.Generator().manual_seed(1))
    return DataLoader(data, BATCH, sampler=sampler)


def loss(model: Quadratic, batch: Any) -> Tensor:
    return model.loss(batch[0])


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.quadratic = Quadratic(CURVATURES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss(self.quadratic, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, module: Module | None = None, **options: Any) -> tuple[SGDProbe, Module]:
    module = module or Module()
    probe = SGDProbe(run_dir=folder / "run", **{**OPTIONS, **options})
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=[probe],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, noise())
    return probe, module


def loop(**options: Any) -> tuple[LoopProbe, Quadratic]:
    model = Quadratic(CURVATURES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = noise()
    with LoopProbe(model, optimizer, loss, planned_steps=STEPS, **{**OPTIONS, **options}) as probe:
        done = 0
        while done < STEPS:
            for batch in probe.watch(data):
                torch.autograd.backward([loss(model, batch)])
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                if done == STEPS:
                    break
    return probe, model


def test_a_fit_raises_flags_and_tells_of_their_onset(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Flag] = []
    with caplog.at_level(logging.INFO):
        probe, _ = fit(tmp_path, on_flag=told.append)
    assert len(probe.results) == 2
    assert tuple(probe.flags) == find_flags(probe.results)
    assert {flag.mode for flag in probe.flags if flag.window == 0} == {"top_02", "top_03"}
    assert (
        told == [flag for flag in probe.flags if flag.is_onset] == [f for f in probe.flags if f.window == 0]
    )
    messages = [record.getMessage() for record in caplog.records if "wander along a valley" in record.message]
    assert len(messages) == 1
    assert all(str(flag) in messages[0] for flag in told)


def test_the_flagged_directions_are_at_hand_by_name(tmp_path: Path) -> None:
    probe, _ = fit(tmp_path)
    last = probe.results[-1].index
    names = {flag.mode for flag in probe.flags if flag.window == last}
    assert probe.basis.keys() == names != set()
    stored = load_vectors(tmp_path / "run" / f"basis_{last:04d}.npz")
    for name, vector in probe.basis.items():
        torch.testing.assert_close(vector, torch.from_numpy(stored[name]), rtol=0, atol=0)
        assert abs(float(vector[0])) < 1e-3  # of the stiff coordinate there is nothing in it


def test_directions_beyond_their_limit_are_not_kept(tmp_path: Path) -> None:
    probe, _ = fit(tmp_path, config=ProbeConfig(max_vector_bytes=8))
    assert probe.flags
    assert probe.basis == {}


def test_a_loop_raises_flags_too(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[Flag] = []
    probe, _ = loop(on_flag=told.append)
    assert tuple(probe.flags) == find_flags(probe.results)
    assert told == [flag for flag in probe.flags if flag.is_onset] != []
    assert probe.basis.keys() == {flag.mode for flag in probe.flags if flag.window == probe.results[-1].index}
    assert capsys.readouterr().err.count("wander along a valley") == 1


def test_a_function_that_fails_is_not_called_again_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Flag] = []

    def broken(flag: Flag) -> None:
        calls.append(flag)
        raise RuntimeError("the pager is out of battery")

    expected = copy.deepcopy(fit(tmp_path / "whole")[1].state_dict())
    probe, module = fit(tmp_path / "broken", on_flag=broken, strict=False)
    assert len(calls) == 1
    assert len(probe.results) == 2
    (warning,) = warnings_of(caplog)
    assert warning.startswith("sgd_probe: on_flag failed on top_0")
    assert "RuntimeError: the pager is out of battery" in warning
    assert all(torch.equal(expected[name], value) for name, value in module.state_dict().items())


def test_strict_raises_it(tmp_path: Path) -> None:
    def broken(flag: Flag) -> None:
        raise RuntimeError("the pager is out of battery")

    with pytest.raises(RuntimeError, match="out of battery"):
        fit(tmp_path, on_flag=broken)
    with pytest.raises(RuntimeError, match="out of battery"):
        loop(on_flag=broken)


def test_the_function_may_change_the_training(tmp_path: Path) -> None:
    """It is called between two steps: what it sets holds from the next one on."""
    module = Module()

    def stop(flag: Flag) -> None:
        for group in module.trainer.optimizers[0].param_groups:
            group["lr"] = 0.0

    probe, _ = fit(tmp_path, module, on_flag=stop)
    first, second = probe.results
    assert first.learning_rate == pytest.approx(0.1)
    assert second.learning_rate == 0


def test_a_function_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="expected `on_flag` to be callable"):
        SGDProbe(on_flag=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected `on_flag` to be callable"):
        loop(on_flag=3)


def test_the_last_fits_flags_are_gone_with_the_next(tmp_path: Path) -> None:
    probe, _ = fit(tmp_path / "first")
    assert probe.flags
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", callbacks=[probe], logger=False, enable_checkpointing=False
    )
    trainer.fit(Module(), noise())
    assert probe.flags == [] and probe.basis == {}
