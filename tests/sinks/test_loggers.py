from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from sgd_probe.result import WindowResult
from sgd_probe.sinks import LoggerSink, RunInfo, scalars
from tests.sinks.conftest import MakeWindow, make_loader, make_module, make_trainer

STEPS = 5


def fit(pl: Any, folder: Path, callbacks: list[Any], save_every: int = 1) -> list[dict[str, str]]:
    logger = pl.loggers.CSVLogger(folder, flush_logs_every_n_steps=save_every)
    trainer = make_trainer(pl, logger=logger, callbacks=callbacks, max_epochs=1)
    trainer.fit(make_module(pl), make_loader(STEPS), make_loader(1))
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def writer(pl: Any, run_info: RunInfo, results: list[WindowResult]) -> Any:
    """A callback that writes each result through a LoggerSink when its step has been done."""

    class Writer(pl.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.sink = LoggerSink(trainer.logger)
            self.sink.start(run_info)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            for result in results:
                if result.closed_at_step == trainer.global_step:
                    self.sink.write(result, {})

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.sink.finish()

    return Writer()


def test_csv_rows_of_the_user_stay_as_they_are(
    pl: Any, tmp_path: Path, run_info: RunInfo, window: MakeWindow
) -> None:
    results = [window(index=0, closed_at_step=2), window(index=1, closed_at_step=4)]
    plain = fit(pl, tmp_path / "plain", [])
    probed = fit(pl, tmp_path / "probed", [writer(pl, run_info, results)])

    ours = [row for row in probed if row["sgd_probe/lambda_max"]]
    theirs = [row for row in probed if row not in ours]
    new_columns = set(probed[0]) - set(plain[0])
    assert new_columns == set(scalars(results[0]))
    assert [{key: row[key] for key in plain[0]} for row in theirs] == plain
    assert not any(row[key] for row in theirs for key in new_columns)
    assert [row["step"] for row in ours] == ["1", "3"]
    for row, result in zip(ours, results, strict=True):
        assert {key: float(row[key]) for key in new_columns} == scalars(result)


def test_the_row_has_the_step_of_the_loss_that_closed_the_window(
    pl: Any, tmp_path: Path, run_info: RunInfo, window: MakeWindow
) -> None:
    probed = fit(pl, tmp_path, [writer(pl, run_info, [window(closed_at_step=STEPS)])])
    last_loss_step = [row["step"] for row in probed if row["loss"]][-1]
    assert [row["step"] for row in probed if row["sgd_probe/lambda_max"]] == [last_loss_step]


def test_any_lightning_logger_gets_plain_floats(pl: Any, run_info: RunInfo, window: MakeWindow) -> None:
    class Memory(pl.loggers.logger.Logger):  # type: ignore[misc]
        name = "memory"
        version = 0

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[tuple[int | None, dict[str, float]]] = []
            self.hyperparameters: list[Any] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append((step, metrics))

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            self.hyperparameters.append(params)

    logger = Memory()
    result = window(closed_at_step=7)
    sink = LoggerSink(logger)
    sink.start(run_info)
    sink.write(result, {})
    sink.finish()
    assert logger.rows == [(6, scalars(result))]
    assert {type(value) for value in logger.rows[0][1].values()} == {float}
    assert logger.hyperparameters == []
