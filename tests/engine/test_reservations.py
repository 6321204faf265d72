"""What a window says against itself, where loss, noise or optimizer are not what they were at its start."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.engine.optimizers import OptimizerState
from sgd_probe.engine.predictions import Predictions
from sgd_probe.engine.sampling import Sampling
from sgd_probe.engine.window import radial_shares
from sgd_probe.result import Verdict, WindowResult
from tests.helpers.quadratic import Quadratic, make_engine, run_window

STEPS = 400


def run(module: Quadratic, change: Any = lambda step: None, **config: Any) -> WindowResult:
    """A window of plain SGD in which ``change`` is called before every step."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    engine = make_engine(module, optimizer, **{"window": STEPS, "curvature_batches": 16, **config})
    return run_window(engine, module, optimizer, before_step=lambda step: change(step, optimizer), seed=1)


def nothing(step: int, optimizer: torch.optim.Optimizer) -> None:
    """Leave all as it is."""


def test_a_quiet_window_has_none() -> None:
    result = run(Quadratic((8.0, 4.0, 1e-3, 1e-4)), nothing, top=2, flat=2, flat_dimension=2)
    assert result.warnings == () and not any(mode.marks or mode.undermined for mode in result.modes)
    assert result.coordinates == "weights" and result.rate_jumps == 0
    assert (
        result.curvature.held_out_overlap == pytest.approx(result.curvature.end_overlap) == pytest.approx(1)
    )
    for mode in result.modes:
        # Noise at fixed weights, and what is left of the used gradient: the same variance of 1.
        assert mode.resampled_noise.low < 1 < mode.resampled_noise.high
        assert mode.noise_variance.low < 1.05 and mode.noise_variance.high > 0.95
        assert mode.noise_fading == 1 and abs(mode.noise_correlation) < 0.2
        assert mode.drift.low < 0 < mode.drift.high
        assert mode.preconditioner_change == 1
        # Sixteen batches of independent noise.
        assert mode.noise_correlations[mode.name] == pytest.approx(1)
        others = [value for name, value in mode.noise_correlations.items() if name != mode.name]
        assert len(others) == 3 and max(map(abs, others)) < 0.75
    np.testing.assert_allclose(result.joint_curvatures[:2], (8, 4), rtol=0.25)
    flat = result.modes[-1]
    assert flat.verdict is Verdict.DIFFUSIVE
    # D of a flat mode, eta^2 sigma^2 / 2, by three ways.
    for found in (flat.diffusion, flat.detrended_diffusion, flat.green_kubo_diffusion):
        assert found.low < 0.05**2 / 2 < found.high
    assert flat.anomalous_exponent.low < 1 < flat.anomalous_exponent.high


def test_a_rate_that_jumps() -> None:
    def change(step: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = 0.05 if step < 300 else 0.005

    result = run(Quadratic((8.0, 1e-4)), change)
    assert result.rate_jumps == 1
    assert any("jumped by more than a tenth at 1 of" in warning for warning in result.warnings)


def test_noise_that_is_not_what_it_was_at_the_start() -> None:
    module = Quadratic((8.0, 4.0, 1e-4))

    def change(step: int, optimizer: torch.optim.Optimizer) -> None:
        if step == 0:
            module.scale = module.scale * 3

    result = run(module, change)
    for mode in result.modes:
        assert any("times that of whole minibatch gradients at the window's start" in m for m in mode.marks)
        assert not mode.undermined


def test_a_force_that_is_not_the_measured_one_undermines_a_mixed_direction() -> None:
    """Curvatures below the top grow tenfold once they have been measured."""
    curvatures = (8.0, 1.0, 0.6, 0.5, 0.4, 0.3, 0.2)
    modules = {factor: Quadratic(curvatures) for factor in (1.0, 10.0)}
    slopes = {}
    for factor, module in modules.items():

        def change(
            step: int, optimizer: torch.optim.Optimizer, m: Quadratic = module, f: float = factor
        ) -> None:
            if step == 0:
                m.curvatures = m.curvatures * torch.tensor([1.0] + [f] * 6)

        result = run(module, change, top=1, flat=2, flat_dimension=2)
        flats = result.modes[1:]
        slopes[factor] = [mode.force_slope.value for mode in flats]
        assert math.isnan(result.modes[0].force_slope.value)
        said = [any("follows the measured curvature" in mark for mark in mode.marks) for mode in flats]
        assert said == [mode.undermined for mode in flats] and any(said) == (factor > 1)
    assert np.mean(slopes[1.0]) == pytest.approx(1, abs=0.3)
    assert np.mean(slopes[10.0]) == pytest.approx(10, rel=0.3)


def test_a_subspace_that_turns_undermines_its_stiff_modes() -> None:
    module = Quadratic((8.0, 6.0, 0.2, 0.1, 0.05, 0.02))

    def change(step: int, optimizer: torch.optim.Optimizer) -> None:
        if step == 100:
            module.curvatures = module.curvatures.flip(0)

    result = run(module, change, top=2)
    assert result.curvature.held_out_overlap > 0.99
    # Images of the old directions stay on their axes in this diagonal Hessian: what changes is the curvature.
    assert all(mode.undermined for mode in result.modes)
    assert any("2 stiff modes changed their curvature" in warning for warning in result.warnings)


def test_a_start_far_from_a_critical_point() -> None:
    result = run(Quadratic((2.0, 1.0, 0.5), start=20.0), nothing)
    assert all(abs(mode.start_gradient_z) > 4 for mode in result.modes)
    assert any("does not start near a critical point" in warning for warning in result.warnings)


def test_shares_that_only_stretch_rows() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(5, 3).double(), nn.Linear(3, 2, bias=False).double()
    module = nn.Sequential(one, two)
    space = ParameterSpace.of(module)
    first = space.slices[0]
    stretch = torch.zeros(space.size, dtype=torch.float64)
    stretch[first] = (one.weight * torch.tensor([[1.0], [-2.0], [0.5]])).detach().flatten()
    bias = torch.zeros_like(stretch)
    bias[space.slices[1]] = 1.0
    across = torch.randn(space.size, dtype=torch.float64)
    rows = torch.stack([v / v.norm() for v in (stretch, bias, across)])
    found = radial_shares(rows, space)
    assert found[:2] == pytest.approx((1, 0))
    dense = torch.zeros(5, space.size, dtype=torch.float64)
    for row in range(3):
        dense[row, first] = torch.nn.functional.pad(one.weight[row].detach(), (5 * row, 10 - 5 * row))
    for row in range(2):
        place = space.slices[2].start + 3 * row
        dense[3 + row, place : place + 3] = two.weight[row].detach()
    dense = dense / dense.norm(dim=1, keepdim=True)
    assert found[2] == pytest.approx(float((dense @ rows[2]).square().sum()))
    # In y = S^-1 theta the weights are theta / S.
    scaled = space.scaled([2.0] + [1.0] * (len(space.parameters) - 1))
    assert radial_shares(rows[:1], scaled)[0] == pytest.approx(1)


def test_predictions_know_how_the_loader_draws() -> None:
    statistics = WindowStatistics.empty(1, 400)
    for _ in range(400):
        statistics = statistics.update(*(np.zeros(1),) * 3, learning_rate=0.1, effective_learning_rate=0.1)
    optimizer = OptimizerState("SGD", 0.1, shares=(1.0,), decays=(0.0,))
    shuffled = Sampling("without_replacement", samples=160, batch_size=8, batches=20)
    lags = [1, 10, 20, 40, 200]
    found = {}
    for sampling in (Sampling("with_replacement"), shuffled):
        predictions = Predictions.of(statistics, optimizer, sampling)
        found[sampling.scheme], langevin = predictions.displacements(1e-9, 1.0, lags)
        np.testing.assert_allclose(langevin, 0.01 * np.array(lags), rtol=1e-3)
    np.testing.assert_allclose(found["with_replacement"], 0.01 * np.array(lags), rtol=1e-3)
    # After whole epochs a flat mode is back where it was, but for where in the epoch the lag began.
    assert (found["without_replacement"][2:] < 0.01 * 20 / 2).all()
    np.testing.assert_allclose(found["without_replacement"][3], found["without_replacement"][4], rtol=0.2)


def test_nothing_is_predicted_near_the_edge_or_for_what_is_not_covered() -> None:
    statistics = WindowStatistics.empty(1, 10)
    for _ in range(10):
        statistics = statistics.update(*(np.zeros(1),) * 3, learning_rate=0.1, effective_learning_rate=0.1)
    covered = OptimizerState("SGD", 0.1, shares=(1.0,), decays=(0.0,))
    predictions = Predictions.of(statistics, covered, Sampling("with_replacement"))
    assert predictions.covers(10.0) and not predictions.covers(19.0)
    assert "95% of the stability limit" in predictions.near_edge(19.0)
    odd = OptimizerState("SGD", 0.1, unpredicted="momentum differs", shares=(1.0,), decays=(0.0,))
    assert not Predictions.of(statistics, odd, Sampling("with_replacement")).covers(1.0)
