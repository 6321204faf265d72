"""Adaptive optimizers and groups with rates of their own, against the optimizers themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sgd_probe.result import Verdict, WindowResult
from sgd_probe.theory.dynamics import SGDDynamics
from sgd_probe.theory.mode import SGDMode
from tests.helpers.quadratic import Quadratic, make_engine, run_window

#: Curvatures and noise of eight coordinates; what counts for Adam is curvature over noise.
CURVATURES = (40.0, 1.0, 4.0, 1.0, 1e-3, 1e-5, 1e-4, 1e-6)
NOISE = [4.0, 0.1, 1.0, 2.0, 10.0, 0.1, 1.0, 0.01]
STEPS = 1_500


def settled(
    kind: Any, *, steps: int = 2_000, curvatures: Any = CURVATURES, noise: Any = NOISE, **options: Any
) -> tuple[Quadratic, torch.optim.Optimizer]:
    """A quadratic near its minimum, and an optimizer that has seen many steps of it."""
    module = Quadratic(curvatures, noise=noise)
    optimizer = kind(module.parameters(), **options)
    generator = torch.Generator().manual_seed(99)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward([module.loss(module.draw(generator))])
        optimizer.step()
    return module, optimizer


def window(module: Quadratic, optimizer: torch.optim.Optimizer, seed: int = 0, **config: Any) -> WindowResult:
    engine = make_engine(module, optimizer, **{"curvature_batches": 16, "window": STEPS, **config})
    return run_window(engine, module, optimizer, seed=seed)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"lr": 2e-3, "betas": (0.9, 0.9999), "weight_decay": 0.0}),
        (torch.optim.Adam, {"lr": 2e-3, "betas": (0.9, 0.9999), "amsgrad": True}),
        (torch.optim.RMSprop, {"lr": 2e-3, "alpha": 0.998}),
        (torch.optim.RMSprop, {"lr": 1e-3, "alpha": 0.998, "centered": True, "momentum": 0.5}),
    ],
)
def test_modes_and_verdicts_are_those_of_the_preconditioned_hessian(kind: Any, options: Any) -> None:
    module, optimizer = settled(kind, **options)
    memory = optimizer.state[module.weight]
    square = memory.get("max_exp_avg_sq", memory.get("exp_avg_sq", memory.get("square_avg")))
    if "exp_avg_sq" in memory:
        square = square / (1 - options["betas"][1] ** float(memory["step"]))
    expected = (module.curvatures / square.sqrt()).sort(descending=True).values
    result = window(module, optimizer, flat_dimension=2)
    assert "preconditioned" in result.coordinates
    found = [mode.held_out_eigenvalue for mode in result.modes]
    # The window opens a few steps later than the state was read.
    np.testing.assert_allclose(found[:4], expected[:4], rtol=0.05)
    assert all(m.preconditioner_change == pytest.approx(1, abs=0.25) for m in result.modes)
    for mode in result.modes:
        assert mode.relaxation_times == pytest.approx(
            mode.held_out_eigenvalue * result.confinement_clock, rel=1e-6
        )
        if mode.relaxation_times > 40:
            assert mode.verdict is Verdict.CONFINED
        elif mode.relaxation_times < 0.5:
            assert mode.verdict in (Verdict.DIFFUSIVE, Verdict.UNDETERMINED, Verdict.DRIFTING), mode.reason
    assert {Verdict.CONFINED, Verdict.DIFFUSIVE} <= set(m.verdict for m in result.modes)
    assert not any("Nothing is predicted" in warning for warning in result.warnings)


def test_adam_s_variance_is_that_of_heavy_ball_with_its_own_dampening() -> None:
    """Stationary variance in the frozen coordinates over many windows, against the closed form."""
    options: dict[str, Any] = {"lr": 5e-3, "betas": (0.9, 0.99999), "weight_decay": 0.0}
    module, optimizer = settled(
        torch.optim.AdamW, curvatures=(40.0, 8.0, 2.0), noise=[4.0, 2.0, 1.0], steps=20_000, **options
    )
    memory = optimizer.state[module.weight]
    root = (memory["exp_avg_sq"] / (1 - 0.99999 ** float(memory["step"]))).sqrt()
    eigenvalues, scale = module.curvatures / root, root.rsqrt()
    generator, positions, gradients = torch.Generator().manual_seed(5), [], []
    for _ in range(40_000):
        optimizer.zero_grad()
        torch.autograd.backward([module.loss(module.draw(generator))])
        assert module.weight.grad is not None
        gradients.append(scale * (module.weight.grad - module.curvatures * module.weight.detach()))
        positions.append(module.weight.detach() / scale)
        optimizer.step()
    measured, noise = torch.stack(positions).var(0), torch.stack(gradients).var(0)
    dynamics = SGDDynamics(options["lr"], 0.9, 0.9)
    predicted = [
        SGDMode(float(e), float(n), dynamics).stationary_variance()
        for e, n in zip(eigenvalues, noise, strict=True)
    ]
    # Independent samples: steps over twice the relaxation time, 1 / (.005 * 2) for the slowest.
    np.testing.assert_allclose(measured, predicted, rtol=0.15)


def test_decoupled_decay_confines_what_is_flat_without() -> None:
    """AdamW's decay pulls y back by eta wd a step, whatever the curvature: kappa = wd eta T."""
    curvatures, noise = (50.0, 1e-6, 1e-7), [1.0, 1.0, 2.0]
    base: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.9999)}
    verdicts = {}
    for decay in (0.0, 2.0):
        module, optimizer = settled(
            torch.optim.AdamW, curvatures=curvatures, noise=noise, weight_decay=decay, **base
        )
        result = window(module, optimizer)
        verdicts[decay] = [mode.verdict for mode in result.modes]
        times = [mode.relaxation_times for mode in result.modes]
        assert times[1:] == pytest.approx([decay * 0.02 * STEPS] * 2, abs=0.1)
    assert Verdict.CONFINED not in verdicts[0.0][1:]
    assert verdicts[2.0] == [Verdict.CONFINED] * 3


def test_coupled_decay_goes_through_the_preconditioner() -> None:
    """Adam's L2 term is part of the gradient: along a mode its curvature is S^2 wd."""
    module, optimizer = settled(
        torch.optim.Adam,
        curvatures=(50.0, 1e-6),
        noise=[1.0, 0.25],
        lr=0.01,
        betas=(0.9, 0.9999),
        weight_decay=1.0,
    )
    result = window(module, optimizer)
    flat = result.modes[1]
    assert flat.relaxation_times == pytest.approx(1.0 / 0.25 * 0.01 * STEPS, rel=0.1)
    assert flat.verdict is Verdict.CONFINED


class Coupled(Quadratic):
    """Two parameters, coupled by the Hessian."""

    def __init__(self) -> None:
        super().__init__((6.0, 3.0, 1.0, 1e-4))
        self.other = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        more = self.other.square().sum() + 0.8 * (self.weight[:2] * self.other).sum()
        return super().loss(batch) + more + batch.mean(0)[:2] @ self.other * 8**0.5


def test_groups_with_rates_of_their_own() -> None:
    """One parameter ten times as fast as the other: S H S, checked against dense numbers."""
    module = Coupled()
    groups: list[dict[str, Any]] = [{"params": [module.weight]}, {"params": [module.other], "lr": 0.005}]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    hessian = torch.diag(torch.cat([module.curvatures, torch.full((2,), 2.0, dtype=torch.float64)]))
    for i in range(2):
        hessian[i, 4 + i] = hessian[4 + i, i] = 0.8
    scale = torch.tensor([1.0] * 4 + [math.sqrt(0.1)] * 2, dtype=torch.float64)
    expected = torch.linalg.eigvalsh(scale[:, None] * hessian * scale).flip(0)
    result = window(module, optimizer, top=6)
    assert result.coordinates == "weights scaled by the learning rates of their groups"
    found = [mode.held_out_eigenvalue for mode in result.modes]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    for mode in result.modes:
        if mode.relaxation_times > 30:
            assert mode.verdict is Verdict.CONFINED, mode.reason
            assert mode.measured_curvature.low < mode.held_out_eigenvalue < 1.3 * mode.measured_curvature.high


def test_rates_that_part_during_the_window_withhold_its_verdicts() -> None:
    module = Coupled()
    groups: list[dict[str, Any]] = [{"params": [module.weight]}, {"params": [module.other], "lr": 0.01}]
    optimizer = torch.optim.SGD(groups, lr=0.02)
    engine = make_engine(module, optimizer, window=100)

    def before_step(step: int) -> None:
        if step == 50:
            optimizer.param_groups[1]["lr"] = 0.002

    result = run_window(engine, module, optimizer, before_step=before_step)
    assert {mode.verdict for mode in result.modes} <= {Verdict.UNDETERMINED, Verdict.NO_NOISE}
    assert any("changed beside each other" in warning for warning in result.warnings)


def test_a_preconditioner_that_moves_marks_its_modes() -> None:
    """The noise of one coordinate grows tenfold while Adam, with a short memory, follows it."""
    module, optimizer = settled(torch.optim.Adam, lr=1e-3, betas=(0.9, 0.99))
    engine = make_engine(module, optimizer, window=400, curvature_batches=16)

    def before_step(step: int) -> None:
        if step == 50:
            module.scale = module.scale * torch.tensor([1.0, 10.0] + [1.0] * 6)

    result = run_window(engine, module, optimizer, before_step=before_step)
    moved = [mode for mode in result.modes if mode.preconditioner_change < 0.3]
    assert len(moved) == 1 and moved[0].undermined
    assert any("preconditioner along it changed" in mark for mark in moved[0].marks)
    assert moved[0].preconditioner_change == pytest.approx(0.1, rel=0.5)


def test_a_momentum_that_changes_leaves_verdicts_and_withholds_predictions() -> None:
    module, optimizer = settled(
        torch.optim.SGD, lr=0.01, momentum=0.5, curvatures=(8.0, 4.0, 1e-5), noise=1.0
    )
    engine = make_engine(module, optimizer, window=800)

    def before_step(step: int) -> None:
        optimizer.param_groups[0]["momentum"] = 0.5 + 0.3 * step / 800

    result = run_window(engine, module, optimizer, before_step=before_step)
    assert [m.verdict for m in result.modes[:2]] == [Verdict.CONFINED] * 2
    assert all(math.isnan(m.predicted_diffusion) for m in result.modes)
    assert any(w == "Nothing is predicted: its momentum changed during the window." for w in result.warnings)
