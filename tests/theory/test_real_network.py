"""The discrete theory on a network: SGD from a true minimum, in the modes of its dense Hessian.

A small version of benchmarks/real_network.py, which docs/theory.md quotes. The parts that it shares with
examples/paper are held against ordinary PyTorch in tests/test_paper.py.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

#: Of a case; the intervals of the benchmark are narrower.
SEEDS = 64

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network() -> Any:
    """The benchmark as a module."""
    return importlib.import_module("real_network")


@pytest.fixture(scope="module")
def minimum(network: Any) -> Any:
    return network.load("vision")


@pytest.fixture(scope="module")
def slow_runs(network: Any, minimum: Any) -> list[Any]:
    """Of the slow learning rates, each with seeds of its own."""
    return [
        network.simulate(minimum, minimum.rate(pull), batch, SEEDS, torch.Generator().manual_seed(30 + index))
        for index, (pull, batch) in enumerate(network.SLOW_CASES)
    ]


def test_discrete_formula_in_every_group_of_kappa(network: Any, minimum: Any, slow_runs: list[Any]) -> None:
    """Within 10% for eta lambda_1 up to 0.5, where a group's standard error is 1 to 3%."""
    generator = torch.Generator().manual_seed(10)
    fast = network.simulate(minimum, minimum.rate(0.5), network.BATCH, SEEDS, generator)
    for pull, run in ((network.SLOW[2], slow_runs[2]), (0.5, fast)):
        groups = network.compare(minimum, pull, run, generator, None).groups
        large = [group for group in groups if group.modes >= 10]
        assert len(large) >= 3
        assert max(group.kappa[1] for group in groups) == pytest.approx(pull * network.STEPS)
        for group in large:
            assert 0.9 < group.discrete.value < 1.1, (pull, group)


def test_langevin_is_off_by_two_in_the_stiffest_modes(network: Any, minimum: Any) -> None:
    """At eta lambda_1 = 1: one mode's standard error is 5 to 6%, that of six together 2 to 3%."""
    pull, batch = network.ONE
    generator = torch.Generator().manual_seed(20)
    run = network.simulate(minimum, minimum.rate(pull), batch, SEEDS, generator)
    stiff = network.compare(minimum, pull, run, generator, None).stiff
    assert 1.7 < stiff[0].langevin.value < 2.3
    assert np.mean([mode.discrete.value for mode in stiff]) == pytest.approx(1, abs=0.1)
    for mode in stiff:
        eta_lambda = mode.kappa[0] / network.STEPS
        assert mode.discrete.value == pytest.approx(1, abs=0.2)
        assert mode.langevin.value == pytest.approx(2 / (2 - eta_lambda), rel=0.2)
        assert mode.langevin.low > 1


def test_diffusion_is_proportional_to_the_learning_rate(
    network: Any, minimum: Any, slow_runs: list[Any]
) -> None:
    """Slope 1 on logarithmic axes, with an interval no wider than 0.05 on either side."""
    for window in network.WINDOWS:
        line = network.diffusion(minimum, slow_runs, window)
        assert line.modes > 100
        assert abs(line.slope.value - 1) < 0.05
        assert line.slope.value - 0.05 < line.slope.low < line.slope.high < line.slope.value + 0.05
        for point, theory in zip(line.points, line.theory, strict=True):
            assert point.value / theory == pytest.approx(1, abs=0.1)


def test_modes_heat_each_other(network: Any, minimum: Any) -> None:
    """At batch 64 the formula of single modes is too low by over 5%; the recursion of all modes is nearer."""
    pull, batch = network.NOISY
    generator = torch.Generator().manual_seed(40)
    run = network.simulate(minimum, minimum.rate(pull), batch, SEEDS, generator)
    largest = max(
        network.compare(minimum, pull, run, generator, 20).groups, key=lambda group: int(group.modes)
    )
    assert largest.discrete.low > 1.05
    assert abs(largest.together.value - 1) < 0.6 * (largest.discrete.value - 1)


def test_recursion_of_all_modes_where_every_sample_is_quadratic(network: Any, minimum: Any) -> None:
    """SGD on the second-order expansion of each sample's loss, batch 64: 400 modes on average within 8%."""
    rate, batch, generator = minimum.rate(0.5), 64, torch.Generator().manual_seed(50)
    weights, inputs = minimum.weights.float(), minimum.inputs.float()

    def expanded(moved: Tensor, x: Tensor, y: Tensor) -> Tensor:
        def loss(there: Tensor) -> Any:
            return minimum.loss_of(there, x, y)

        pair = jvp(grad(loss), (weights,), (moved,))
        return torch.add(pair[0], pair[1])

    moved = torch.zeros(SEEDS, len(weights))
    for _ in range(network.STEPS):
        drawn = torch.randint(len(inputs), (SEEDS, batch), generator=generator)
        moved = moved - rate * vmap(expanded)(moved, inputs[drawn], minimum.targets[drawn])
    noisiest = np.argsort(minimum.sample_variance.numpy())[-400:]
    measured = (moved.double() @ minimum.vectors).numpy().var(0, ddof=1)[noisiest]
    together = network.predict_together(minimum, rate, batch, [network.STEPS], generator, 10)[-1][noisiest]
    by_itself = network.predict(minimum, rate, batch)[0][-1][noisiest]
    assert float((measured / together).mean()) == pytest.approx(1, abs=0.08)
    assert float((measured / by_itself).mean()) > 1.05


def test_one_seed_has_no_variance(
    network: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["real_network.py", "--seeds", "1"])
    with pytest.raises(SystemExit):
        network.main()
    assert "expected at least two seeds, found 1" in capsys.readouterr().err
