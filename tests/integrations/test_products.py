"""Declared ways to a Hessian-vector product in real trainings: pieces of batches, finite differences."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgd_probe import ProbeConfig, SGDProbe, WindowResult
from sgd_probe.curvature.hessian import CurvatureError
from tests.curvature import obstacles as ob
from tests.integrations.harness import RecordingDataset, batchnorm, fit, loader, mlp
from tests.integrations.test_callback import Tiny, quick_probe


def data() -> Any:
    return loader(RecordingDataset((6,)))


def images() -> Any:
    return loader(RecordingDataset((1, 6, 6)))


def smooth(base: Any) -> Tiny:
    module = Tiny()
    module.layer = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))  # type: ignore[assignment]
    return module


def kinked(base: Any) -> Tiny:
    module = Tiny()
    layers = (nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    module.layer = nn.Sequential(*layers)  # type: ignore[assignment]
    return module


def once_differentiable(base: Any) -> Tiny:
    module = Tiny()
    module.layer = nn.Sequential(ob.applied(ob.OnceDifferentiable), nn.Linear(3, 4))  # type: ignore[assignment]
    return module


def summing(base: Any) -> Tiny:
    class Sum(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * len(batch[0])

    return Sum()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "sgd_probe" and r.levelno >= logging.WARNING]


def plan(run: Path) -> str:
    """What was announced before the first window."""
    return " ".join(json.loads((run / "run.json").read_text())["plan"])


def compare(found: WindowResult, expected: WindowResult, rtol: float) -> None:
    """Curvatures that must not depend on the way; the flat directions' are small beside lambda_1."""
    scale = abs(expected.curvature.lambda_max)
    for mode, other in zip(found.modes, expected.modes, strict=True):
        assert mode.eigenvalue == pytest.approx(other.eigenvalue, abs=rtol * scale)
        assert mode.held_out_eigenvalue == pytest.approx(other.held_out_eigenvalue, abs=rtol * scale)
        assert mode.held_out_standard_error == pytest.approx(other.held_out_standard_error, abs=rtol * scale)
        assert mode.noise_variance.value == pytest.approx(other.noise_variance.value, rel=100 * rtol)


def test_pieces_give_the_same_window(tmp_path: Path) -> None:
    results = []
    for size in (None, 5):
        probe = quick_probe(strict=True, config=ProbeConfig(microbatch=size))
        fit("pytorch_lightning", smooth, data, [probe], tmp_path, precision="64-true")
        results.append(probe.results[0])
    compare(results[1], results[0], 1e-6)
    assert results[1].curvature.batches_certified == 2
    assert results[1].curvature.self_test.startswith("passed: symmetric")


def test_training_with_pieces_is_bit_identical(tmp_path: Path) -> None:
    without, _ = fit("pytorch_lightning", mlp, data, [], tmp_path / "a")
    config = ProbeConfig(microbatch=4, max_graph_bytes=0)
    probe = quick_probe(strict=True, run_dir=tmp_path / "run", config=config)
    with_probe, _ = fit("pytorch_lightning", mlp, data, [probe], tmp_path / "b")
    without.assert_equal(with_probe)
    assert len(probe.results) >= 2
    assert "in pieces of at most 4 samples" in plan(tmp_path / "run")
    assert "rebuilt for every product" in plan(tmp_path / "run")


@pytest.mark.parametrize(
    ("make", "make_data", "named"),
    [(batchnorm, images, r"`network.1` (BatchNorm2d)"), (summing, data, "no mean over samples")],
)
def test_pieces_that_make_another_loss_are_refused_before_the_first_window(
    make: Any, make_data: Any, named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def probe(strict: bool) -> SGDProbe:
        return quick_probe(strict=strict, config=ProbeConfig(microbatch=4))

    without, _ = fit("pytorch_lightning", make, make_data, [], tmp_path / "a")
    with_probe, _ = fit("pytorch_lightning", make, make_data, [probe(False)], tmp_path / "b")
    without.assert_equal(with_probe)
    (warning,) = warnings(caplog)
    assert named in warning and "microbatch=None" in warning
    with pytest.raises(CurvatureError, match="microbatch"):
        fit("pytorch_lightning", make, make_data, [probe(True)], tmp_path / "c")


def by_differences(**options: Any) -> SGDProbe:
    return quick_probe(config=ProbeConfig(second_derivatives="finite_differences"), **options)


def test_finite_differences_agree_with_double_backward(tmp_path: Path) -> None:
    """On a smooth network in float64, to 1e-5 of lambda_1: theirs are right to 1e-6."""
    probes = [
        make(strict=True, run_dir=tmp_path / f"run{index}")
        for index, make in enumerate((quick_probe, by_differences))
    ]
    runs = [
        fit("pytorch_lightning", smooth, data, [probe], tmp_path, precision="64-true")[0] for probe in probes
    ]
    runs[0].assert_equal(runs[1])
    for found, expected in zip(probes[1].results, probes[0].results, strict=True):
        compare(found, expected, 1e-5)
        assert found.curvature.self_test.startswith("passed: finite differences, symmetric to")
        assert expected.curvature.self_test.startswith("passed: symmetric to")
        assert any("`second_derivatives`" in warning for warning in found.warnings)
        assert not any("`second_derivatives`" in warning for warning in expected.warnings)
    plans = [plan(tmp_path / f"run{index}") for index in (0, 1)]
    assert ["`second_derivatives`" in text for text in plans] == [False, True]


def test_finite_differences_in_float32_are_right_to_a_thousandth_where_it_is_smooth(tmp_path: Path) -> None:
    probes = [quick_probe(strict=True, flat=0), by_differences(strict=True, flat=0)]
    for index, probe in enumerate(probes):
        fit("pytorch_lightning", smooth, data, [probe], tmp_path / str(index))
    for mode, other in zip(probes[1].results[0].modes, probes[0].results[0].modes, strict=True):
        scale = abs(probes[0].results[0].curvature.lambda_max)
        assert mode.eigenvalue == pytest.approx(other.eigenvalue, abs=2e-3 * scale)


def test_finite_differences_measure_where_double_backward_is_wrong(tmp_path: Path) -> None:
    probe = by_differences(strict=True)
    fit("pytorch_lightning", once_differentiable, data, [probe], tmp_path, precision="64-true")
    assert probe.results[0].curvature.self_test.startswith("passed: finite differences")
    assert probe.results[0].curvature.converged


def test_kinks_in_float32_withhold_the_window_and_say_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without, _ = fit("pytorch_lightning", kinked, data, [], tmp_path / "a", steps=120)
    probe = by_differences()
    with_probe, _ = fit("pytorch_lightning", kinked, data, [probe], tmp_path / "b", steps=120)
    without.assert_equal(with_probe)
    assert probe.results == []
    (warning,) = warnings(caplog)
    assert warning.startswith("sgd_probe: no window at step")
    assert "unreliable: expected finite differences at two steps to agree" in warning
    assert "use float64 weights, or double backward" in warning


def test_a_gradient_that_is_no_slope_is_refused_by_finite_differences_too(tmp_path: Path) -> None:
    def detached_target(base: Any) -> Tiny:
        class Student(Tiny):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                output = torch.tanh(self.layer(batch[0]))
                return (output - 0.5 * output.detach().square()).square().mean()

        return Student()

    probe = by_differences(strict=True)
    with pytest.raises(CurvatureError, match="do not follow the slope of the loss"):
        fit("pytorch_lightning", detached_target, data, [probe], tmp_path, precision="64-true")
