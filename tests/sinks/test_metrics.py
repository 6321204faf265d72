from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sgd_probe.result import Verdict, WindowResult
from sgd_probe.sinks import CallbackMetricsSink, RunInfo, scalars
from tests.sinks.conftest import MakeWindow, make_loader, make_module, make_trainer

BATCHES = 3
N_DIFFUSIVE = "sgd_probe/n_diffusive"


def publisher(pl: Any, run_info: RunInfo, results: list[WindowResult]) -> Any:
    """A callback that publishes each result when its step has been done, and notes what others see."""

    class Publisher(pl.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: dict[str, list[float]] = {}

        def note(self, where: str, trainer: Any) -> None:
            self.seen.setdefault(where, []).append(trainer.callback_metrics[N_DIFFUSIVE].item())

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.sink = CallbackMetricsSink(trainer)
            self.sink.start(run_info)

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.note("batch start", trainer)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            for result in results:
                if result.closed_at_step == trainer.global_step:
                    self.sink.write(result, {})

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                self.note("validation end", trainer)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.note("epoch end", trainer)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.sink.finish()

    return Publisher()


def test_values_last_over_batches_validation_and_epochs(
    pl: Any, run_info: RunInfo, window: MakeWindow
) -> None:
    result = window(closed_at_step=4, verdicts=(Verdict.DIFFUSIVE, Verdict.DIFFUSIVE))
    probe = publisher(pl, run_info, [result])
    trainer = make_trainer(pl, callbacks=[probe], max_epochs=3)
    trainer.fit(make_module(pl), make_loader(BATCHES), make_loader(1))
    assert probe.seen["batch start"] == [0.0] * 4 + [2.0] * 5
    assert probe.seen["validation end"] == [0.0, 2.0, 2.0]
    assert probe.seen["epoch end"] == [0.0, 2.0, 2.0]

    for key, value in scalars(result).items():
        metric = trainer.callback_metrics[key]
        assert (metric.dtype, metric.shape, metric.device.type) == (torch.float32, (), "cpu")
        assert metric.item() == pytest.approx(value, rel=1e-7)
    assert {"loss", "val_loss"} < set(trainer.callback_metrics)


@pytest.mark.parametrize("on_train_epoch_end", [False, True])
def test_early_stopping_stops_on_a_count(
    pl: Any, run_info: RunInfo, window: MakeWindow, on_train_epoch_end: bool
) -> None:
    stop = pl.callbacks.EarlyStopping(
        N_DIFFUSIVE,
        mode="max",
        stopping_threshold=1.5,
        patience=99,
        check_on_train_epoch_end=on_train_epoch_end,
    )
    result = window(closed_at_step=BATCHES + 1, verdicts=(Verdict.DIFFUSIVE, Verdict.DIFFUSIVE))
    trainer = make_trainer(pl, callbacks=[publisher(pl, run_info, [result]), stop], max_epochs=4)
    trainer.fit(make_module(pl), make_loader(BATCHES), make_loader(1))
    assert stop.stopped_epoch == 1
    assert trainer.global_step == 2 * BATCHES


def test_checkpoints_at_batch_end_and_at_validation_end(
    pl: Any, tmp_path: Path, run_info: RunInfo, window: MakeWindow
) -> None:
    def checkpoint(name: str, **kwargs: Any) -> Any:
        return pl.callbacks.ModelCheckpoint(
            tmp_path / name, monitor=N_DIFFUSIVE, mode="max", save_top_k=1, filename="{step}", **kwargs
        )

    at_batch_end = checkpoint("batch", every_n_train_steps=1)
    at_validation_end = checkpoint("validation", save_on_train_epoch_end=False)
    results = [
        window(index=0, closed_at_step=2, verdicts=(Verdict.DIFFUSIVE,)),
        window(index=1, closed_at_step=5, verdicts=(Verdict.DIFFUSIVE, Verdict.DIFFUSIVE)),
    ]
    trainer = make_trainer(
        pl,
        callbacks=[publisher(pl, run_info, results), at_batch_end, at_validation_end],
        enable_checkpointing=True,
        max_epochs=3,
    )
    trainer.fit(make_module(pl), make_loader(BATCHES), make_loader(1))
    assert Path(at_batch_end.best_model_path).name == "step=5.ckpt"
    assert Path(at_validation_end.best_model_path).name == "step=6.ckpt"
    assert at_batch_end.best_model_score == at_validation_end.best_model_score == 2.0


def test_a_metric_can_be_published_as_soon_as_it_is_known(
    pl: Any, run_info: RunInfo, window: MakeWindow
) -> None:
    trainer = make_trainer(pl)
    sink = CallbackMetricsSink(trainer)
    sink.start(run_info)
    assert set(trainer.callback_metrics) == {f"sgd_probe/n_{verdict.value}" for verdict in Verdict}
    assert all(value == 0 for value in trainer.callback_metrics.values())
    sink.publish({"sgd_probe/lambda_max": 2.5})
    assert trainer.callback_metrics["sgd_probe/lambda_max"].item() == 2.5


def test_what_a_window_could_not_measure_keeps_its_last_value(
    pl: Any, run_info: RunInfo, window: MakeWindow
) -> None:
    trainer = make_trainer(pl)
    sink = CallbackMetricsSink(trainer)
    sink.start(run_info)
    sink.publish({"sgd_probe/top_01/predicted_diffusion": 0.5})
    sink.write(window(), {})
    assert trainer.callback_metrics["sgd_probe/top_01/predicted_diffusion"].item() == 0.5
