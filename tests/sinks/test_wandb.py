from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb

from sgd_probe import find_flags
from sgd_probe.sinks import (
    RunInfo,
    SinkGroup,
    WandbRun,
    WandbSink,
    find_wandb_logger,
    scalars,
    wandb_sinks,
)
from sgd_probe.sinks.wandb.figures import FIGURES, figure_key
from tests.helpers.wandb_file import WandbFile, read_wandb_file
from tests.sinks.conftest import MakeWindow, make_loader, make_module, make_trainer, make_window, warnings_of

STEP = "trainer/global_step"
RESULTS = [make_window(index=0, closed_at_step=2), make_window(index=1, closed_at_step=5)]


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """W&B reads its settings once in a process, so they hold for the whole module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_CONSOLE", "off")
        yield


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """The loss of each step, as the callback saw it."""
    return []


@pytest.fixture(scope="module")
def run_file(
    pl: Any, run_info: RunInfo, losses: list[float], tmp_path_factory: pytest.TempPathFactory
) -> WandbFile:
    """One offline run: six steps that log ``loss``, and two windows whose last steps are 2 and 5.

    The server is at no address: whatever asked it would fail.
    """

    class Writer(pl.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            sinks = wandb_sinks(WandbRun(find_wandb_logger(trainer.loggers)), directions=True)
            self.sink = SinkGroup(sinks, strict=True)
            self.sink.start(run_info)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())
            for result in RESULTS:
                if result.closed_at_step == trainer.global_step:
                    self.sink.write(result, {"top_02": np.ones(6, np.float32)})

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.sink.finish()

    losses.clear()
    folder = tmp_path_factory.mktemp("wandb")
    logger = pl.loggers.WandbLogger(save_dir=folder, project="test", settings=quiet_settings())
    # Longer than a block of the file, so that its reader is tried on records in pieces.
    logger.experiment.config.update({"lr": 0.1, "notes": "x" * 100_000})
    make_trainer(pl, logger=logger, callbacks=[Writer()], max_epochs=1).fit(make_module(pl), make_loader(6))
    logger.experiment.finish()
    (path,) = folder.rglob("run-*.wandb")
    return read_wandb_file(path)


def quiet_settings() -> wandb.Settings:
    # The mode, too: W&B reads its environment once in a process, perhaps in an earlier module's tests.
    return wandb.Settings(mode="offline", x_disable_stats=True, x_disable_meta=True, console="off")


def our_rows(run_file: WandbFile) -> list[dict[str, Any]]:
    return [row for row in run_file.history if "sgd_probe/lambda_max" in row]


def test_one_row_for_each_window_with_the_exact_values(run_file: WandbFile) -> None:
    rows = our_rows(run_file)
    assert len(rows) == len(RESULTS)
    for row, result in zip(rows, RESULTS, strict=True):
        assert {key: value for key, value in row.items() if not key.startswith("_")} == {
            **scalars(result),
            STEP: result.closed_at_step - 1,
        }


def test_the_row_lies_at_the_loss_of_the_step_that_closed_the_window(
    run_file: WandbFile, losses: list[float]
) -> None:
    loss_by_step = {row[STEP]: row["loss"] for row in run_file.history if "loss" in row}
    assert loss_by_step == {step: pytest.approx(loss) for step, loss in enumerate(losses)}
    assert [row[STEP] for row in our_rows(run_file)] == [1, 4]


def test_no_row_of_the_user_is_lost_or_merged(run_file: WandbFile) -> None:
    assert sum("loss" in row for row in run_file.history) == 6
    ours = [row for row in run_file.history if any(key.startswith("sgd_probe/") for key in row)]
    assert not any("loss" in row for row in ours)
    steps = [row["_step"] for row in run_file.history]
    assert steps == list(range(len(steps)))


def test_metrics_are_defined_by_exact_name(run_file: WandbFile) -> None:
    ours = {name for name in run_file.step_metrics if name.startswith("sgd_probe")}
    assert ours == {*scalars(RESULTS[0]), *scalars(RESULTS[1]), *map(figure_key, FIGURES)}
    assert {run_file.step_metrics[name] for name in ours} == {STEP}
    assert not any(glob.startswith("sgd_probe") for glob in run_file.globs)


def test_figures_with_the_first_window_and_the_last(run_file: WandbFile) -> None:
    sets = [row for row in run_file.history if f"{figure_key('spectrum')}/_type" in row]
    assert [row[STEP] for row in sets] == [1, 4]
    assert all(row[f"{figure_key(name)}/_type"] == "plotly-file" for row in sets for name in FIGURES)


def test_a_table_two_plots_and_the_directions_when_the_fit_has_ended(run_file: WandbFile) -> None:
    (table,) = (row for row in run_file.history if "sgd_probe/modes/nrows" in row)
    assert table["sgd_probe/modes/nrows"] == sum(len(result.modes) for result in RESULTS)
    assert {f"sgd_probe/plots/{name}_table/nrows" for name in ("diffusion", "noise")} < table.keys()
    assert run_file.history.index(table) > max(i for i, row in enumerate(run_file.history) if "loss" in row)
    assert any(name.startswith("sgd_probe-directions-") for name in run_file.artifacts)


def test_one_alert_and_one_tag(run_file: WandbFile) -> None:
    ((title, text),) = run_file.alerts
    assert title == "sgd_probe: a direction diffuses"
    assert str(find_flags(RESULTS)[0]) in text
    assert run_file.tags == ["sgd_probe"]


def test_the_configuration_joins_the_users(run_file: WandbFile, run_info: RunInfo) -> None:
    assert run_file.config["sgd_probe"] == run_info.config
    assert run_file.config["lr"] == 0.1
    assert run_file.config["notes"] == "x" * 100_000


def test_a_run_that_cannot_log_is_warned_of_once(
    tmp_path: Path,
    run_info: RunInfo,
    window: MakeWindow,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from pytorch_lightning.loggers import WandbLogger

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise wandb.Error("the server is gone")

    logger = WandbLogger(save_dir=tmp_path, settings=quiet_settings())
    group = SinkGroup([WandbSink(WandbRun(logger))])
    group.start(run_info)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "sgd_probe"):
        patch.setattr(logger.experiment, "log", unreachable)
        group.write(window(index=0), {})
        group.write(window(index=1), {})
        group.finish()
    logger.experiment.finish()
    assert warnings_of(caplog) == [
        "sgd_probe: WandbSink failed in write (Error: the server is gone). "
        "Training and the other outputs go on without it, and results stay in memory (`results`); the next "
        "fit tries it again."
    ]


def test_other_ranks_do_nothing(
    pl: Any, tmp_path: Path, run_info: RunInfo, window: MakeWindow, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_utilities.core.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    sink = WandbSink(WandbRun(pl.loggers.WandbLogger(save_dir=tmp_path)))
    sink.start(run_info)
    sink.write(window(), {})
    sink.finish()
    assert list(tmp_path.iterdir()) == []


def test_finds_the_first_wandb_logger(pl: Any, tmp_path: Path) -> None:
    class Mine(pl.loggers.WandbLogger):  # type: ignore[misc]
        pass

    other = pl.loggers.CSVLogger(tmp_path)
    mine, second = Mine(save_dir=tmp_path), pl.loggers.WandbLogger(save_dir=tmp_path)
    assert find_wandb_logger([other, mine, second]) is mine
    assert find_wandb_logger([other]) is None
    assert find_wandb_logger([]) is None
