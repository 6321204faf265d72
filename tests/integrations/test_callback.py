"""The callback on real Trainers: what it refuses, what it survives, what it delivers."""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any, cast

import lightning.fabric.utilities.exceptions
import lightning_fabric.utilities.exceptions
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import ProbeConfig, SGDProbe, Verdict
from sgd_probe.dynamics.statistics import Draw, WindowStatistics
from sgd_probe.integrations.session import RESULTS_KEPT, keep
from tests.integrations.harness import PACKAGES, RecordingDataset, fit, loader, mlp


def quick_probe(**options: Any) -> SGDProbe:
    options = {"top": 3, "flat": 2, "window": 60, "every_n_steps": 80, "curvature_batches": 2, **options}
    return SGDProbe(**options)


def data(**options: Any) -> DataLoader[Any]:
    return loader(RecordingDataset((6,)), **options)


def test_memory_holds_the_results_of_the_last_windows() -> None:
    kept: list[Any] = []
    for index in range(3 * RESULTS_KEPT):
        keep(kept, cast(Any, index))
    assert kept == list(range(2 * RESULTS_KEPT, 3 * RESULTS_KEPT))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"top": 0}, "`top`"),
        ({"top": 2.5}, "`top`"),
        ({"flat": -1}, "`flat`"),
        ({"max_overhead": 2}, "`max_overhead`"),
        ({"max_overhead": 0.0}, "`max_overhead`"),
        ({"max_overhead": math.nan}, "`max_overhead`"),
        ({"window": 3}, "`window`"),
        ({"window": "long"}, "`window`"),
        ({"every_n_steps": 0}, "`every_n_steps`"),
        ({"every_n_steps": 100, "window": 200}, "`every_n_steps`"),
        ({"curvature_batches": 0}, "`curvature_batches`"),
        ({"name": ""}, "`name`"),
        ({"config": {"top": 3}}, "`config`"),
        ({"run_dir": 5}, "`run_dir`"),
        ({"loss_fn": 3}, "`loss_fn`"),
        ({"optimizer": -1}, "`optimizer`"),
        ({"optimizer": True}, "`optimizer`"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_value(options: dict[str, Any], named: str) -> None:
    with pytest.raises(lightning_fabric.utilities.exceptions.MisconfigurationException) as caught:
        SGDProbe(**options)
    message = str(caught.value)
    assert named in message
    assert "found" in message
    for value in options.values():
        assert str(value) in message or repr(value) in message


def test_the_refusal_is_both_packages_exception() -> None:
    with pytest.raises(lightning.fabric.utilities.exceptions.MisconfigurationException):
        SGDProbe(top=0)


def test_arguments_win_over_the_config() -> None:
    probe = SGDProbe(top=3, config=ProbeConfig(top=7, flat=5, seed=9))
    assert (probe.config.top, probe.config.flat, probe.config.seed) == (3, 5, 9)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_run_delivers_modes_metrics_and_a_folder(package: str, tmp_path: Path) -> None:
    probe = quick_probe(strict=True, run_dir=tmp_path / "run")
    _, trainer = fit(package, mlp, data, [probe], tmp_path)
    assert len(probe.results) == 3
    for result in probe.results:
        assert [mode.name for mode in result.modes] == ["top_01", "top_02", "top_03", "flat_01", "flat_02"]
        assert sum(result.counts().values()) == 5
        assert result.steps == 60 or not result.complete
        for mode in result.modes:
            assert 0 <= mode.residual < 0.5
            assert math.isfinite(mode.held_out_eigenvalue)
            assert mode.held_out_standard_error >= 0
            assert mode.noise_variance.low <= mode.noise_variance.value <= mode.noise_variance.high
            assert mode.diffusion.low <= mode.diffusion.value <= mode.diffusion.high
            assert mode.reason
            assert math.isclose(sum(mode.layer_shares.values()), 1.0, abs_tol=1e-4)
    metrics = trainer.callback_metrics
    last = probe.results[-1]
    assert float(metrics["sgd_probe/lambda_max"]) == pytest.approx(last.curvature.lambda_max)
    assert sum(float(metrics[f"sgd_probe/n_{verdict.value}"]) for verdict in Verdict) == 5
    lines = (tmp_path / "run" / "windows.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2]
    assert (tmp_path / "run" / "report.html").stat().st_size > 1_000_000
    rows = [row for _, row in trainer.logger.rows if "sgd_probe/lambda_max" in row]
    steps = [step for step, row in trainer.logger.rows if "sgd_probe/lambda_max" in row]
    assert len(rows) == 3
    assert steps == [result.closed_at_step - 1 for result in probe.results]


def test_windows_open_exactly_every_n_steps(tmp_path: Path) -> None:
    accumulated: dict[str, Any] = {"accumulate_grad_batches": 3}
    for options in ({}, accumulated):
        probe = quick_probe(strict=True, window=60, every_n_steps=60)
        fit("pytorch_lightning", mlp, data, [probe], tmp_path, **options)
        opened = [result.opened_at_step for result in probe.results]
        assert [b - a for a, b in itertools.pairwise(opened)] == [60] * (len(opened) - 1)
        assert len(opened) >= 3
        assert all(r.closed_at_step - r.opened_at_step == 60 for r in probe.results[:-1])


def test_momentum_that_changes_in_a_window_leaves_its_predictions_out(tmp_path: Path) -> None:
    def cycled(base: Any) -> Any:
        module = mlp(base)

        def configure() -> Any:
            optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=300)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        module.configure_optimizers = configure
        return module

    # Ten times as long as a momentum of .95 remembers.
    probe = quick_probe(strict=True, window=225, every_n_steps=225)
    fit("pytorch_lightning", cycled, data, [probe], tmp_path)
    (result,) = probe.results
    assert any("momentum changed" in warning for warning in result.warnings)
    for mode in result.modes:
        assert math.isnan(mode.predicted_diffusion)
        assert math.isfinite(mode.diffusion.value)


def test_sparse_gradients_are_read(tmp_path: Path) -> None:
    class Sparse(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 6, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, labels = batch
            return super().training_step((inputs + self.table(labels), labels), batch_idx)

    probe = quick_probe(strict=True)
    run(Sparse(), probe, tmp_path)
    assert len(probe.results) == 2


def test_a_run_under_every_n_steps_is_reproducible(tmp_path: Path) -> None:
    results = []
    for name in ("a", "b"):
        probe = quick_probe(strict=True)
        fit("pytorch_lightning", mlp, data, [probe], tmp_path / name)
        results.append([_without_cost(result.to_dict()) for result in probe.results])
    assert results[0] == results[1]


def _without_cost(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "cost"}


def test_without_replacement_the_steps_of_an_epoch_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: list[Draw] = []
    update = WindowStatistics.update

    def spy(self: WindowStatistics, *arguments: Any, **named: Any) -> WindowStatistics:
        draws.append(named["draw"])
        return update(self, *arguments, **named)

    monkeypatch.setattr(WindowStatistics, "update", spy)
    probe = quick_probe(strict=True)
    shuffled = data(replacement=False)
    fit("pytorch_lightning", mlp, lambda: shuffled, [probe], tmp_path)
    assert probe.results
    for result in probe.results:
        assert "without replacement" in result.sampling
        assert not any("without replacement" in mode.reason for mode in result.modes)
    assert shuffled.batch_size is not None
    batches = len(shuffled.dataset) / shuffled.batch_size  # type: ignore[arg-type]
    assert {draw.batches for draw in draws} == {batches}
    gaps = np.diff(np.flatnonzero([draw.first for draw in draws]))
    assert min(gaps) == len(shuffled)  # more where no window was open


def test_adamw_gets_verdicts_in_its_own_coordinates(tmp_path: Path) -> None:
    def adamw(base: Any) -> Any:
        module = mlp(base)
        module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1e-3)
        return module

    probe = quick_probe(strict=True, window=110, every_n_steps=110)
    fit("pytorch_lightning", adamw, data, [probe], tmp_path)
    assert len(probe.results) == 2
    assert any(mode.verdict is not Verdict.UNDETERMINED for mode in probe.results[0].modes)
    for mode in probe.results[0].modes:
        assert math.isfinite(mode.diffusion.value)
        assert mode.predicted_diffusion > 0


class Tiny(pl.LightningModule):
    """A module whose parts a test replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.poison_after: int | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.layer(inputs), labels)
        if self.poison_after is not None and self.global_step >= self.poison_after:
            loss = loss * math.nan
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def run(module: Any, probe: SGDProbe, tmp_path: Path, steps: int = 200, **options: Any) -> pl.Trainer:
    options = {"logger": False, "enable_checkpointing": False, **options}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[probe, *options.pop("callbacks", [])],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data())
    return trainer


def test_a_nan_loss_is_survived_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Tiny()
    module.poison_after = 0
    probe = quick_probe()
    trainer = run(module, probe, tmp_path)
    assert trainer.global_step == 200
    assert probe.results == []
    warnings = [
        r.getMessage() for r in caplog.records if r.name == "sgd_probe" and r.levelno >= logging.WARNING
    ]
    assert len(warnings) == 1
    assert "finite loss" in warnings[0]
    assert not (tmp_path / "sgd_probe_run").exists()


def test_a_loss_that_turns_nan_during_a_window_is_reported(tmp_path: Path) -> None:
    module = Tiny()
    module.poison_after = 60
    probe = quick_probe(run_dir=tmp_path / "run", window=100, every_n_steps=100)
    trainer = run(module, probe, tmp_path)
    assert trainer.global_step == 200
    result = probe.results[0]
    assert result.skipped_steps > 30
    assert any("left out" in warning for warning in result.warnings)
    assert any("was not measured" in warning for warning in result.warnings)
    json.loads((tmp_path / "run" / "windows.jsonl").read_text().splitlines()[0], parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} in what must be strict JSON")


def test_a_failing_training_step_in_isolation_leaves_training_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fragile(Tiny):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # Only the trainer's own calls have the real loggers and log.
            if "log" in vars(self):
                raise ValueError("cannot be called twice")
            return super().training_step(batch, batch_idx)

    trainer = run(Fragile(), quick_probe(), tmp_path)
    assert trainer.global_step == 200
    messages = [r.getMessage() for r in caplog.records if r.name == "sgd_probe"]
    assert any("switched off" in message and "cannot be called twice" in message for message in messages)
    with pytest.raises(ValueError, match="cannot be called twice"):
        run(Fragile(), quick_probe(strict=True), tmp_path)


def test_a_model_without_trainable_parameters_is_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Frozen(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.layer.requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx).requires_grad_()

    trainer = run(Frozen(), quick_probe(), tmp_path)
    assert trainer.global_step == 200
    assert "no trainable parameter" in caplog.text

    class NoOptimizer(Frozen):
        def configure_optimizers(self) -> None:
            return None

    assert run(NoOptimizer(), quick_probe(), tmp_path, steps=20).global_step == 20


def test_a_trainer_without_a_logger_still_gets_results(tmp_path: Path) -> None:
    probe = quick_probe(strict=True)
    run(Tiny(), probe, tmp_path, logger=False)
    assert len(probe.results) == 2
    assert (tmp_path / "sgd_probe_run" / "report.html").exists()


def test_it_stands_aside_in_a_fast_dev_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probe = quick_probe(strict=True)
    run(Tiny(), probe, tmp_path, fast_dev_run=3)
    assert probe.results == []
    assert "fast_dev_run" in caplog.text
    assert not (tmp_path / "sgd_probe_run").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_other_callbacks_can_monitor_it(package: str, tmp_path: Path) -> None:
    packaged = PACKAGES[package]
    stopper = packaged.callbacks.EarlyStopping("sgd_probe/n_undetermined", patience=10_000)
    saver = packaged.callbacks.ModelCheckpoint(
        tmp_path, monitor="sgd_probe/lambda_max", every_n_train_steps=90, save_top_k=2
    )
    module = mlp(packaged.LightningModule)
    module.validation_step = lambda batch, batch_idx: None
    trainer = packaged.Trainer(
        accelerator="cpu",
        max_steps=200,
        max_epochs=-1,
        callbacks=[stopper, saver, quick_probe(strict=True)],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=16,
    )
    trainer.fit(module, data(), data())
    assert trainer.global_step == 200
    assert saver.best_model_score is not None
    assert float(saver.best_model_score) > 0
    assert stopper.best_score == 0.0


def test_a_monitor_does_not_fail_the_fit_where_the_probe_stands_aside(tmp_path: Path) -> None:
    class NanFromTheStart(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.poison_after = 0

    saver = ModelCheckpoint(tmp_path, monitor="sgd_probe/n_diffusive", every_n_train_steps=50)
    stopper = EarlyStopping("sgd_probe/n_diffusive", patience=10_000, check_on_train_epoch_end=True)
    trainer = run(
        NanFromTheStart(), quick_probe(), tmp_path, callbacks=[saver, stopper], enable_checkpointing=True
    )
    assert trainer.global_step == 200


def test_an_interrupt_in_the_middle_of_lanczos_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    class Interrupted(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.isolated_calls: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if "log" in vars(self):
                with calls.open("a") as file:  # all else would be put back
                    file.write(".")
                if calls.stat().st_size == 4:
                    raise KeyboardInterrupt
                self.isolated_calls.append(1)
            return super().training_step(batch, batch_idx)

    calls = tmp_path / "calls"
    module = Interrupted()
    probe = quick_probe()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(module, probe, tmp_path)
    assert module.isolated_calls == []
    assert "log" not in vars(module)


def test_a_user_exception_lets_go_of_the_optimizer(tmp_path: Path) -> None:
    class Failing(Tiny):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.global_step == 100:
                raise ZeroDivisionError

    module, probe = Failing(), quick_probe(run_dir=tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        run(module, probe, tmp_path)
    assert len(probe.results) == 1
    optimizer = module.trainer.optimizers[0]
    assert not optimizer._optimizer_step_post_hooks
    assert (tmp_path / "run" / "report.html").exists()


def test_a_second_fit_starts_anew_and_overwrites_nothing(tmp_path: Path) -> None:
    probe = quick_probe(strict=True)
    for _ in range(2):
        run(Tiny(), probe, tmp_path)
        assert [result.index for result in probe.results] == [0, 1]
    assert (tmp_path / "sgd_probe_run" / "windows.jsonl").exists()
    assert (tmp_path / "sgd_probe_run_1" / "windows.jsonl").exists()


def test_params_restrict_the_space(tmp_path: Path) -> None:
    probe = quick_probe(strict=True, params="*.bias")
    run(Tiny(), probe, tmp_path)
    assert probe.results[0].curvature.parameters == 4
    assert set(probe.results[0].modes[0].layer_shares) == {"layer.bias"}
    # Four weights have room for three stiff modes and one flat direction.
    assert [mode.name for mode in probe.results[0].modes] == ["top_01", "top_02", "top_03", "flat_01"]


def test_a_loss_function_replaces_the_training_step(tmp_path: Path) -> None:
    def ridge(module: Any, batch: Any) -> Tensor:
        weight: Tensor = module.layer.weight
        return weight.square().sum()

    probe = quick_probe(strict=True, loss_fn=ridge, params="*.weight")
    run(Tiny(), probe, tmp_path)
    for mode in probe.results[0].modes:
        assert mode.held_out_eigenvalue == pytest.approx(2.0, rel=1e-5)


def test_a_budget_opens_windows_and_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probe = SGDProbe(top=2, flat=1, window=60, curvature_batches=2, max_overhead=0.5, strict=True)
    with caplog.at_level(logging.INFO):
        run(Tiny(), probe, tmp_path, steps=400)
    assert len(probe.results) >= 1
    assert "The first window opens" in caplog.text
    cost = probe.results[-1].cost
    assert cost.total_seconds > 0
    assert cost.training_seconds > 0


def test_a_window_that_can_never_be_paid_for_is_not_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ProbeConfig(grace_seconds=0.0, max_overhead=1e-6, curvature_batches=2, top=2, flat=1)
    probe = SGDProbe(config=config, strict=True)
    run(Tiny(), probe, tmp_path, steps=100)
    assert probe.results == []
    assert caplog.text.count("no window opens at the present pace: one") == 1


def test_a_dataset_as_batches_of_plain_tensors(tmp_path: Path) -> None:
    class OneTensor(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def training_step(self, batch: Any) -> dict[str, Tensor]:
            return {"loss": self.layer(batch[0]).square().mean()}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    probe = quick_probe(strict=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=150,
        max_epochs=-1,
        callbacks=[probe],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(OneTensor(), DataLoader(TensorDataset(torch.randn(128, 5)), batch_size=8, shuffle=True))
    assert len(probe.results) >= 1
