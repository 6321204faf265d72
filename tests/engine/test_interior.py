"""Interior modes on request: from the configuration of a real Trainer's callback to the page of its run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sgd_probe import ModeKind, ProbeConfig, SGDProbe, WindowResult
from sgd_probe.curvature.hessian import CurvatureError
from sgd_probe.curvature.lanczos import smallest_basis
from sgd_probe.report.html import build_report
from tests.helpers.quadratic import Quadratic, make_engine
from tests.integrations.harness import RecordingDataset, fit, loader, mlp

#: Of the harness's optimizer; it acts along every direction.
WEIGHT_DECAY = 1e-3
NAMES = ["top_01", "top_02", "top_03", "interior_01", "interior_02", "interior_03", "flat_01", "flat_02"]


def data(**options: Any) -> DataLoader[Any]:
    return loader(RecordingDataset((6,)), **options)


def train(folder: Path, interior: int) -> tuple[list[WindowResult], Any]:
    """Two windows and a rest of a third on a small network."""
    probe = SGDProbe(
        top=3,
        flat=2,
        window=60,
        every_n_steps=80,
        curvature_batches=8,
        strict=True,
        run_dir=folder / "run",
        config=ProbeConfig(interior=interior),
    )
    _, trainer = fit("pytorch_lightning", mlp, data, [probe], folder)
    return probe.results, trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[WindowResult], Any, Path]:
    folder = tmp_path_factory.mktemp("interior")
    return *train(folder, 3), folder / "run"


def test_every_window_has_them_between_top_and_flat(run: tuple[list[WindowResult], Any, Path]) -> None:
    results = run[0]
    assert len(results) >= 2
    for result in results:
        assert [mode.name for mode in result.modes] == NAMES
        assert sum(result.counts().values()) == len(NAMES)
        assert result.curvature.orthogonality < 1e-5
        between = [mode for mode in result.modes if mode.kind is ModeKind.INTERIOR]
        sizes = [abs(mode.eigenvalue) for mode in (result.modes[2], *between)]
        assert sizes == sorted(sizes, reverse=True)
        for mode in between:
            assert mode.held_out_standard_error > 0 and mode.batch_curvature_variance > 0
            assert math.isfinite(mode.noise_weighted_curvature.value)
            size = mode.effective_curvature if mode.mixed else abs(mode.held_out_eigenvalue)
            curvature = math.copysign(size, mode.held_out_eigenvalue) + WEIGHT_DECAY
            assert mode.relaxation_times == pytest.approx(curvature * result.confinement_clock, rel=1e-4)
            assert math.isfinite(mode.growth_ratio) and math.isfinite(mode.end_eigenvalue)
            assert mode.reason
    assert any(mode.mixed for result in results for mode in result.modes[3:6])


def test_they_are_written_and_read_back(run: tuple[list[WindowResult], Any, Path]) -> None:
    results, _, folder = run
    lines = (folder / "windows.jsonl").read_text().splitlines()
    for line, result in zip(lines, results, strict=True):
        again = WindowResult.from_dict(json.loads(line))
        assert [(m.name, m.kind, m.converged, m.mixed) for m in again.modes] == [
            (m.name, m.kind, m.converged, m.mixed) for m in result.modes
        ]
        assert again.to_dict() == result.to_dict()
    assert json.loads((folder / "run.json").read_text())["config"]["interior"] == 3
    with np.load(sorted(folder.glob("basis_*.npz"))[0]) as stored:
        rows = np.stack([stored[name] for name in NAMES])
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(NAMES)), atol=1e-5)


def test_their_metrics_are_named_as_those_of_the_others(run: tuple[list[WindowResult], Any, Path]) -> None:
    results, trainer, _ = run
    keys = {key.removeprefix("sgd_probe/") for key in trainer.callback_metrics}
    top, interior = (
        {key.split("/")[1] for key in keys if key.startswith(f"{name}/")}
        for name in ("top_01", "interior_01")
    )
    assert interior == top and "eigenvalue" in interior
    logged = float(trainer.callback_metrics["sgd_probe/interior_02/eigenvalue"])
    assert logged == pytest.approx(results[-1].modes[4].held_out_eigenvalue)


def test_the_page_shows_them(run: tuple[list[WindowResult], Any, Path]) -> None:
    page = build_report(run[2])
    for name in NAMES:
        assert page.count(f'<th scope="row">{name}') == 1
    assert "then the interior and the near-flat ones" in page


def test_without_them_the_others_are_the_same(
    run: tuple[list[WindowResult], Any, Path], tmp_path: Path
) -> None:
    """The top modes of the first window, before the searches' random numbers part."""
    plain, _ = train(tmp_path, 0)
    assert [mode.name for mode in plain[0].modes] == NAMES[:3] + NAMES[6:]
    for one, other in zip(plain[0].modes[:3], run[0][0].modes[:3], strict=True):
        assert one.eigenvalue == pytest.approx(other.eigenvalue, rel=1e-4)
        assert one.held_out_eigenvalue == pytest.approx(other.held_out_eigenvalue, rel=1e-3)
        assert one.noise_variance.value == pytest.approx(other.noise_variance.value, rel=1e-3)
        assert one.verdict is other.verdict


def test_the_plan_says_so_and_pays_for_it() -> None:
    module = Quadratic((8.0, 4.0, 2.0, 1.0))
    batch = module.draw(torch.Generator().manual_seed(0))
    plain, some = (make_engine(module, top=1, interior=count) for count in (0, 2))
    assert "1 stiff and 0 near-flat directions" in plain.preflight(batch, 0, 0)[0]
    assert "1 stiff, 2 interior and 0 near-flat directions" in some.preflight(batch, 0, 0)[0]
    assert some.expected_products == plain.expected_products + 2


def test_a_window_s_length_is_that_of_the_stiff_and_the_flat(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="sgd_probe")
    lengths = []
    for interior in (0, 3):
        probe = SGDProbe(
            top=3,
            flat=2,
            every_n_steps=240,
            curvature_batches=2,
            strict=True,
            run_dir=tmp_path / str(interior),
            config=ProbeConfig(interior=interior),
        )
        fit("pytorch_lightning", mlp, data, [probe], tmp_path)
        lengths.append([result.planned_steps for result in probe.results])
    assert lengths[0] == lengths[1]
    assert "of 3 stiff modes reach" in caplog.text


def test_memory_that_has_no_room_for_them() -> None:
    module = Quadratic((8.0, 4.0, 2.0, 1.0))
    batch = module.draw(torch.Generator().manual_seed(0))
    room = smallest_basis(1) * 4 * torch.float64.itemsize
    make_engine(module, top=1, max_basis_bytes=room).preflight(batch, 0, 0)
    plan = make_engine(module, top=1, interior=2, max_basis_bytes=room).preflight(batch, 0, 0)
    assert "Memory is short: 1 stiff direction in place of 1 stiff and 2 interior." in plan
    with pytest.raises(CurvatureError, match=r"memory for 7 vectors .* found room for 6: free some"):
        make_engine(module, top=1, interior=2, max_basis_bytes=room * 6 // 7).preflight(batch, 0, 0)
