"""What a window keeps for its figures: the loss along directions, the spectrum, the edge of stability."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sgd_probe.curvature.aliased import AliasedLoss
from sgd_probe.engine.packing import pack, unpack
from sgd_probe.result import WindowResult
from tests.helpers.quadratic import Quadratic, make_engine, run_window

CURVATURES = (8.0, 4.0, *[0.02] * 20)


def run(module: Quadratic | None = None, momentum: float = 0.0, **config: Any) -> WindowResult:
    module = module or Quadratic(CURVATURES)
    sgd = torch.optim.SGD(module.parameters(), lr=0.05, momentum=momentum)
    options = {"top": 2, "flat": 2, "window": 200, "curvature_batches": 8, **config}
    return run_window(make_engine(module, sgd, **options), module, sgd, seed=1)


@pytest.fixture(scope="module")
def result() -> WindowResult:
    return run()


def test_the_loss_is_sliced_along_the_stiffest_and_the_flattest_direction(result: WindowResult) -> None:
    stiff, flat = result.slices
    flattest = min(result.modes[2:], key=lambda mode: mode.effective_curvature)
    assert (stiff.mode, flat.mode) == ("top_01", flattest.name)
    assert stiff.offsets == flat.offsets
    # Three lengths that noise of variance one, known to a third from 8 batches, diffuses in 200 steps;
    # the wall of the stiffest stands out sooner.
    assert flat.offsets[-1] == pytest.approx(3 * 0.05 * math.sqrt(200), rel=0.6)
    for curvature, found in ((8.0, stiff), (0.02, flat)):
        both = (found.rises[0] + found.rises[-1]) / 2  # the gradient drops out
        assert both == pytest.approx(curvature * found.offsets[-1] ** 2 / 2, rel=1e-6)


def test_slices_cost_nothing_where_they_are_not_wanted(
    result: WindowResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of ours, not of the loss: what a loss counts is put back.
    evaluate, evaluations = AliasedLoss.evaluate, []

    def counting(self: AliasedLoss, *arguments: Any) -> Any:
        evaluations.append(True)
        return evaluate(self, *arguments)

    monkeypatch.setattr(AliasedLoss, "evaluate", counting)
    counts = []
    for slices in (True, False):
        evaluations.clear()
        found = run(Quadratic(CURVATURES), slices=slices)
        counts.append(len(evaluations))
        assert bool(found.slices) is slices
        assert [m.held_out_eigenvalue for m in found.modes] == [m.held_out_eigenvalue for m in result.modes]
    assert counts[0] - counts[1] == (1 + 2 * 6) * 8  # zero, directions, points beside it, batches


def test_a_loss_without_a_number_on_the_line_costs_the_slices_only() -> None:
    class Walled(Quadratic):
        def loss(self, batch: Tensor) -> Tensor:
            return super().loss(batch) + 0 * torch.sqrt(1 - self.weight[0].square())

    found = run(Walled(CURVATURES, noise=[0.01, *[1.0] * 21]), window=1000)
    assert found.slices == ()
    assert any(w.startswith("The loss along its directions could not be measured") for w in found.warnings)
    assert len(found.modes) == 4


def test_the_spectrum_is_kept_as_the_search_saw_it(result: WindowResult) -> None:
    nodes, weights = result.curvature.density_nodes, result.curvature.density_weights
    assert sum(weights) == pytest.approx(1.0)
    trace = len(CURVATURES) * sum(n * w for n, w in zip(nodes, weights, strict=True))
    assert trace == pytest.approx(sum(CURVATURES), rel=1e-6)
    assert run(flat=0).curvature.density_nodes == ()


@pytest.mark.parametrize(("momentum", "limit"), [(0.0, 2 / 0.05), (0.5, 3 / 0.05)])
def test_the_edge_of_stability_is_that_of_the_optimizer(momentum: float, limit: float) -> None:
    assert run(momentum=momentum).stability_limit == pytest.approx(limit)


def test_a_flat_mode_of_the_same_noise_stands_beside_every_displacement(result: WindowResult) -> None:
    for mode in result.modes:
        for point in mode.displacements:
            assert point.free == pytest.approx(2 * mode.free_diffusion * point.lag, rel=1e-6)


def test_slices_survive_a_checkpoint(result: WindowResult) -> None:
    assert unpack(pack(result.slices)) == result.slices
