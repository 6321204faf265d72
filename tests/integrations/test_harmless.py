"""Training with the probe is the training without it, bit for bit, whatever people do in theirs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.wandb_file import read_wandb_file
from tests.integrations.harness import PACKAGES, fit, mlp
from tests.integrations.trainings import (
    SLOW,
    TRAININGS,
    Training,
    module,
    quick_probe,
    through_forward,
    vectors,
)


def compare(training: Training, package: str, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Train twice; all that can be seen must agree, and the windows must have been there."""

    def run(probes: list[Any], name: str) -> tuple[Any, Any]:
        return fit(
            package,
            training.module,
            training.data,
            [*training.callbacks(package), *probes],
            root / name,
            steps=training.steps,
            compiled=training.compiled,
            plugins=training.plugins(package),
            **training.options,
        )

    without, _ = run([], "without")
    probes = training.probes()
    with caplog.at_level(logging.INFO):
        with_probe, _ = run(probes, "with")
    without.assert_equal(with_probe)
    assert training.says in said(caplog, probes)
    for probe in probes:
        closed = [result for result in probe.results if result.complete]
        assert len(closed) >= min(training.windows, 2), "too few windows for this to show anything"
        assert bool(closed) == bool(training.windows)


def said(caplog: pytest.LogCaptureFixture, probes: list[Any]) -> str:
    messages = [record.getMessage() for record in caplog.records if "sgd_probe" in record.getMessage()]
    results = [result for probe in probes for result in probe.results]
    reasons = [mode.reason for result in results for mode in result.modes]
    return "\n".join([*messages, *(line for result in results for line in result.warnings), *reasons])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TRAININGS]
)
def test_training_with_the_probe_is_bit_identical(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compare(TRAININGS[name], "pytorch_lightning", tmp_path, caplog)


#: What the other package's trainer is likeliest to do in another way.
ELSEWHERE = (
    "dropout, metric, schedule, dict",
    "validation, early stopping, checkpoints",
    "dataloader_iter",
    "GAN in turns",
    "fp16 with a scaler",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ELSEWHERE)
def test_so_it_is_with_the_other_package(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compare(TRAININGS[name], "lightning.pytorch", tmp_path, caplog)


@pytest.mark.slow
def test_histograms_of_wandb_watch_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts forward passes and gradients in hooks of its own, and logs by a way of its own."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    quiet = wandb.Settings(mode="offline", x_disable_stats=True, x_disable_meta=True, console="off")
    make = module(step=through_forward)
    found = []
    for name, probes in (("without", []), ("with", [quick_probe(strict=True)])):
        logger = PACKAGES["pytorch_lightning"].loggers.WandbLogger(save_dir=tmp_path / name, settings=quiet)

        # W&B numbers what it watches over all of a process.
        monkeypatch.setattr("wandb.sdk.wandb_watch._global_watch_idx", 0)

        def watched(base: Any, logger: Any = logger) -> Any:
            made = make(base)
            logger.watch(made, log="all", log_freq=7)
            return made

        fingerprint, _ = fit("pytorch_lightning", watched, vectors, probes, tmp_path / name, logger=logger)
        logger.experiment.finish()
        (path,) = (tmp_path / name).rglob("run-*.wandb")
        fingerprint.rows = [(None, _series(read_wandb_file(path).history))]
        found.append(fingerprint)
        assert all(len([result for result in probe.results if result.complete]) >= 2 for probe in probes)
    for kind in ("gradients", "parameters"):
        assert len(found[0].rows[0][1][f"{kind}/body.0.weight/values"]) >= 20
    found[0].assert_equal(found[1])


def _series(history: list[dict[str, Any]]) -> dict[str, Any]:
    """What the user logged, each metric over the trainer's steps.

    Histograms wait for the next row that is written, which may be the probe's: that of the same step.
    """
    series: dict[str, Any] = {}
    for row in history:
        for key, value in row.items():
            if not key.startswith(("sgd_probe", "_", "trainer/")):
                series.setdefault(key, []).append((row["trainer/global_step"], value))
    return dict(sorted(series.items()))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_comparison_sees_a_probe_that_draws_one_random_number(package: str, tmp_path: Path) -> None:
    """It must be able to fail."""

    class Careless(PACKAGES[package].Callback):  # type: ignore[misc]
        def on_train_batch_end(self, *args: Any) -> None:
            if args[-1] == 5:
                torch.rand(())

    without, _ = fit(package, mlp, vectors, [], tmp_path / "a", steps=40)
    careless, _ = fit(package, mlp, vectors, [Careless()], tmp_path / "b", steps=40)
    with pytest.raises(AssertionError, match="random numbers differs at batch 5"):
        without.assert_equal(careless)


def test_the_comparison_sees_an_attribute_that_was_left_behind(tmp_path: Path) -> None:
    class Leaving(PACKAGES["pytorch_lightning"].Callback):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            setattr(trainer.optimizers[0], self.name, None)

    without, _ = fit("pytorch_lightning", module(), vectors, [Leaving("defaults")], tmp_path / "a", steps=5)
    careless, _ = fit("pytorch_lightning", module(), vectors, [Leaving("mark")], tmp_path / "b", steps=5)
    with pytest.raises(AssertionError, match="optimizer/0 differs"):
        without.assert_equal(careless)
