"""The demo, as a user runs it: a real training run, W&B offline, the report."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgd_probe import Verdict, WindowResult
from tests.helpers.wandb_file import WandbFile, read_wandb_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run it once, with no network to be had; returns its folder and what it printed."""
    output = tmp_path_factory.mktemp("demo") / "demo_run"
    dead = "http://127.0.0.1:9"
    environment = {**os.environ, "HTTP_PROXY": dead, "HTTPS_PROXY": dead, "WANDB_BASE_URL": dead}
    done = subprocess.run(
        [sys.executable, "-m", "sgd_probe", "demo", "--quick", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output, done.stdout


@pytest.fixture(scope="module")
def results(demo: tuple[Path, str]) -> list[WindowResult]:
    lines = (demo[0] / "sgd_probe" / "windows.jsonl").read_text().splitlines()
    return [WindowResult.from_dict(json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def wandb_run(demo: tuple[Path, str]) -> WandbFile:
    (path,) = (demo[0] / "wandb").glob("offline-run-*/run-*.wandb")
    return read_wandb_file(path)


def test_confined_and_diffusive_modes_both_appear(results: list[WindowResult]) -> None:
    last = results[-1]
    counts = last.counts()
    assert counts[Verdict.CONFINED] >= 6
    assert counts[Verdict.DIFFUSIVE] >= 1
    assert last.curvature.converged
    assert last.curvature.orthogonality < 1e-4


def test_stiff_modes_are_confined_by_the_curvature_that_was_predicted(results: list[WindowResult]) -> None:
    """The slope of the used gradients knows nothing of the Hessian, and finds its eigenvalues."""
    confined = [m for m in results[-1].modes if m.verdict is Verdict.CONFINED and m.relaxation_times > 40]
    assert len(confined) >= 3
    decay = 1e-3
    inside = [
        m.measured_curvature.low - 3 * m.held_out_standard_error
        <= m.held_out_eigenvalue + decay
        <= m.measured_curvature.high + 3 * m.held_out_standard_error
        for m in confined
    ]
    assert sum(inside) >= len(inside) - 1


def test_the_measured_diffusion_agrees_with_the_theory(results: list[WindowResult]) -> None:
    ratios = [
        math.log(m.diffusion.value / m.predicted_diffusion)
        for m in results[-1].modes
        if m.verdict in (Verdict.CONFINED, Verdict.DIFFUSIVE) and math.isfinite(m.predicted_diffusion)
    ]
    assert abs(sum(ratios) / len(ratios)) < math.log(2)


def test_the_table_the_counts_the_cost_and_the_places_are_printed(
    demo: tuple[Path, str], results: list[WindowResult]
) -> None:
    output, text = demo
    for mode in results[-1].modes:
        (row,) = (line for line in text.splitlines() if line.startswith(mode.name))
        assert mode.verdict.value in row
    assert f"{results[-1].counts()[Verdict.CONFINED]} confined" in text
    assert "the probe had cost" in text
    assert "offline-run-" in text
    report = output / "sgd_probe" / "report.html"
    assert str(report) in text
    assert report.stat().st_size < 6_000_000


def test_the_wandb_run_has_our_rows_on_the_axis_of_the_loss(
    wandb_run: WandbFile, results: list[WindowResult]
) -> None:
    ours = [row for row in wandb_run.history if "sgd_probe/lambda_max" in row]
    losses = [row["trainer/global_step"] for row in wandb_run.history if "loss" in row]
    assert [row["trainer/global_step"] for row in ours] == [r.closed_at_step - 1 for r in results]
    assert min(losses) < ours[0]["trainer/global_step"] < max(losses) + 50
    for row, result in zip(ours, results, strict=True):
        assert row["sgd_probe/lambda_max"] == pytest.approx(result.curvature.lambda_max)
        counts = {verdict: row[f"sgd_probe/n_{verdict.value}"] for verdict in Verdict}
        assert counts == result.counts()
        assert sum(counts.values()) == len(result.modes)
        first = result.modes[0]
        assert row["sgd_probe/top_01/eigenvalue"] == pytest.approx(first.held_out_eigenvalue)
        assert row["sgd_probe/cost/fraction"] == pytest.approx(result.cost.fraction)
    assert wandb_run.config["sgd_probe"]["top"] == 10
    assert wandb_run.step_metrics["sgd_probe/lambda_max"] == "trainer/global_step"
    assert not any("sgd_probe" in glob for glob in wandb_run.globs)


def test_it_refuses_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    done = subprocess.run(
        [sys.executable, "-m", "sgd_probe", "demo", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "thesis.tex" in done.stderr
    assert (tmp_path / "thesis.tex").exists()
