"""The self-test of the Hessian in real trainings: what it refuses, passes and cannot verify."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from sgd_probe.curvature.hessian import WrongHessianError
from tests.curvature import obstacles as ob
from tests.integrations.harness import fit
from tests.integrations.test_callback import Tiny, data, quick_probe, run


class Probed(Tiny):
    """Trains one of the small models on four classes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.body = body

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((self.body(batch[0]), batch[1]), batch_idx)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "sgd_probe" and r.levelno >= logging.WARNING]


@pytest.mark.parametrize("function", [ob.OnceDifferentiable, ob.InNumpy, ob.Detached, ob.StraightThrough])
def test_training_goes_on_with_one_warning_where_it_refuses(
    function: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make(_: Any) -> Probed:
        return Probed(ob.applied(function))

    without, _ = fit("pytorch_lightning", make, data, [], tmp_path / "a")
    probe = quick_probe()
    with_probe, trainer = fit("pytorch_lightning", make, data, [probe], tmp_path / "b")
    without.assert_equal(with_probe)
    assert trainer.global_step == 240
    assert probe.results == []
    (warning,) = warnings(caplog)
    assert "switched off for the rest of this fit (WrongHessianError" in warning
    assert "loss_fn" in warning
    with pytest.raises(WrongHessianError):
        fit("pytorch_lightning", make, data, [quick_probe(strict=True)], tmp_path / "c")


@pytest.mark.parametrize(
    "make",
    [
        lambda: ob.applied(ob.TwiceDifferentiable),
        lambda: ob.Recurrent(nn.LSTM),
        lambda: ob.Checkpointed(reentrant=False),
        ob.transformer,
    ],
)
def test_the_result_says_that_it_passed(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probe = quick_probe(strict=True)
    run(Probed(make()), probe, tmp_path)
    assert len(probe.results) == 2
    for result in probe.results:
        line = result.curvature.self_test
        assert line.startswith("passed: symmetric to")
        assert "in float64 finite differences agree to" in line
    assert warnings(caplog) == []


def test_the_result_says_what_was_not_verified(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probe = quick_probe(strict=True)
    run(Probed(ob.applied(ob.InFloat32)), probe, tmp_path)
    assert len(probe.results) == 2
    for result in probe.results:
        assert result.curvature.self_test.startswith("unverified: symmetric to")
        assert "the kernel takes float32" in result.curvature.self_test
    (warning,) = warnings(caplog)  # once a run, not once a window
    assert "self-test of the Hessian unverified" in warning


def test_a_loss_fn_is_a_way_around_what_is_refused(tmp_path: Path) -> None:
    def loss(module: Any, batch: Any) -> Tensor:
        hidden = module.body.last(module.body.first(batch[0]).tanh())
        return nn.functional.cross_entropy(module.layer(hidden), batch[1])

    probe = quick_probe(strict=True, loss_fn=loss)
    run(Probed(ob.applied(ob.Detached)), probe, tmp_path)
    assert probe.results[0].curvature.self_test.startswith("passed")
