"""What an epoch does to the noise: closed forms, the exact recursion, and shuffled epochs of real numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe.theory import MinibatchSampling, SGDDynamics, SGDMode
from sgd_probe.theory.sampling import (
    bridge_variance,
    epoch_factor,
    plain_epoch_factor,
    saturated_displacement,
)
from tests.theory.simulation import Array, Replicas, assert_mean_square, shuffled_steps

REPLICAS = 40_000
WHOLE = MinibatchSampling(30, 3, replacement=False)
SCHEMES = [
    WHOLE,
    MinibatchSampling(31, 3, replacement=False),  # a last batch of one
    MinibatchSampling(32, 3, replacement=False, drop_last=True),
    MinibatchSampling(30, 3, replacement=False, fresh=0.3),
    MinibatchSampling(31, 3, replacement=False, accumulation=2),
    MinibatchSampling(31, 3, replacement=False, accumulation=4, fresh=0.5),  # a last step of three
    MinibatchSampling(31, 3),  # independent draws, but the last batch is noisier
]
OPTIMIZERS = [
    SGDDynamics(0.1),
    SGDDynamics(0.05, momentum=0.8),
    SGDDynamics(0.05, 0.8, nesterov=True, weight_decay=0.5),
]


def path(mode: SGDMode, steps: int, replicas: int = REPLICAS, seed: int = 0) -> Array:
    """Weights from a point after 0, 1, ... steps, (steps + 1, replicas)."""
    rng = np.random.default_rng(seed)
    sample_variance = mode.noise_variance / mode.sampling.noise_variance(1.0)
    noise = shuffled_steps(mode.sampling, replicas, sample_variance, rng)
    moving = Replicas(np.zeros(replicas), mode.dynamics)
    found = [moving.weights]
    for kick, weight in itertools.islice(noise, steps):
        moving.step(weight * mode.eigenvalue * moving.weights + kick)
        found.append(moving.weights)
    return np.array(found)


@pytest.mark.parametrize("eigenvalue", [0.0, 2.0])
@pytest.mark.parametrize("dynamics", OPTIMIZERS)
@pytest.mark.parametrize("sampling", SCHEMES)
def test_every_step_by_shuffled_epochs(
    sampling: MinibatchSampling, dynamics: SGDDynamics, eigenvalue: float
) -> None:
    mode = SGDMode(eigenvalue, sampling.noise_variance(1.3), dynamics, sampling)
    steps = 2 * sampling.steps_per_epoch + 3
    found, expected = path(mode, steps), mode.moments(steps).variance
    for t in range(1, steps + 1):
        if expected[t] < 1e-20:  # a flat mode is back where it was
            np.testing.assert_allclose(found[t], 0, atol=1e-12)
        else:
            assert_mean_square(found[t], expected[t], sigmas=4.5)


@pytest.mark.parametrize("sampling", SCHEMES[:3])
def test_displacements_by_shuffled_epochs(sampling: MinibatchSampling) -> None:
    """Averaged over where in the epoch they begin, in the stationary state."""
    mode = SGDMode(3.0, sampling.noise_variance(1.0), OPTIMIZERS[0], sampling)
    n = sampling.steps_per_epoch
    settled = 4 * n
    found = path(mode, settled + n + 2 * n, replicas=20_000)
    starts = range(settled, settled + n)
    assert_mean_square(found[settled : settled + n].ravel(), mode.stationary_variance())
    for lag in (1, n // 2, n, 2 * n):
        moved = np.concatenate([found[start + lag] - found[start] for start in starts])
        # Displacements of one replica overlap: their squares have fewer degrees of freedom.
        error = (moved**2).std() / math.sqrt(20_000)
        expected = mode.mean_squared_displacement(lag)
        assert abs((moved**2).mean() - expected) < 3 * error
        assert error < 0.02 * expected


@pytest.mark.parametrize("n", [2, 10, 29])
def test_a_flat_mode_is_a_bridge_and_saturates(n: int) -> None:
    sampling = MinibatchSampling(3 * n, 3, replacement=False)
    mode = SGDMode(0.0, 0.7, SGDDynamics(0.1), sampling)
    found = mode.moments(2 * n).variance
    expected = [bridge_variance(0.7, t % n, n, 0.1) for t in range(2 * n + 1)]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-15)
    saturated = saturated_displacement(0.7, n, 0.1)
    for lag in (n, 5 * n + 1, 300):
        assert mode.mean_squared_displacement(lag) == pytest.approx(saturated, rel=1e-9)
    assert mode.diffusion_coefficient() == 0.0


@settings(deadline=None)
@given(
    share=st.floats(0.01, 0.99),
    n=st.integers(2, 40),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    nesterov=st.booleans(),
)
def test_the_factor_of_confined_modes(share: float, n: int, momentum: float, nesterov: bool) -> None:
    """The recursion against the sum over correlations, and against the closed form of plain SGD."""
    dynamics = SGDDynamics(0.1, momentum, nesterov=nesterov and momentum > 0)
    independent = SGDMode(share * 20.0 / (3 if dynamics.nesterov else 1), 1.0, dynamics)
    variance = independent.stationary_variance()
    shuffled = SGDMode(independent.eigenvalue, 1.0, dynamics, MinibatchSampling(2 * n, 2, replacement=False))
    correlations = [1 - independent.mean_squared_displacement(j) / (2 * variance) for j in range(1, n)]
    factor = shuffled.stationary_variance() / variance
    assert factor == pytest.approx(epoch_factor(correlations), rel=1e-8)
    if not momentum:
        assert factor == pytest.approx(plain_epoch_factor(1 - 0.1 * independent.eigenvalue, n), rel=1e-6)


def test_sampling_confines_below_three_over_n_plus_one() -> None:
    """There the stationary variance of independent batches is half the saturated displacement."""
    n = 200
    crossover = 3 / (n + 1)
    variance = 0.1**2 / (crossover * (2 - crossover))
    assert 2 * variance == pytest.approx(saturated_displacement(1.0, n, 0.1), rel=0.01)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (MinibatchSampling(1797, 64, replacement=False), 0.3741),
        (MinibatchSampling(1000, 37, replacement=False), 1.2497),
        (MinibatchSampling(1797, 64, replacement=False, drop_last=True), 5 / 1797),
        (MinibatchSampling(640, 64, replacement=False, fresh=0.3), 0.3),
        (MinibatchSampling(640, 64, replacement=False), 0.0),
        (MinibatchSampling(640, 64), 1.0),
        (MinibatchSampling(), 1.0),
    ],
)
def test_diffusion_of_flat_modes_in_ordinary_loaders(sampling: MinibatchSampling, expected: float) -> None:
    """Against the late slope of the displacement, which the recursion has on its own."""
    assert sampling.diffusion_ratio() == pytest.approx(expected, rel=1e-4)
    dynamics = SGDDynamics(0.1, 0.5)
    mode = SGDMode(0.0, sampling.noise_variance(1.0), dynamics, sampling)
    n = sampling.steps_per_epoch
    late = mode.mean_squared_displacement(60 * n) - mode.mean_squared_displacement(40 * n)
    assert late / (40 * n) == pytest.approx(mode.diffusion_coefficient(), rel=1e-6, abs=1e-12)
    full = dynamics.effective_learning_rate**2 / (2 * sampling.batch_size)
    assert mode.diffusion_coefficient() == pytest.approx(full * expected, rel=1e-4, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "size"), [(1797, 64), (1000, 37)])
def test_diffusion_through_a_partial_last_batch_by_simulation(samples: int, size: int) -> None:
    sampling = MinibatchSampling(samples, size, replacement=False)
    mode = SGDMode(0.0, sampling.noise_variance(1.0), SGDDynamics(0.1), sampling)
    epochs = 3
    found = path(mode, epochs * sampling.steps_per_epoch, replicas=20_000)[-1]
    expected = 2 * mode.diffusion_coefficient() * epochs * sampling.steps_per_epoch
    assert_mean_square(found, expected)


@pytest.mark.parametrize("sampling", [each for each in SCHEMES if not each.fresh])
def test_the_epoch_is_that_of_a_dataloader(sampling: MinibatchSampling) -> None:
    assert sampling.samples is not None
    loader = DataLoader(
        TensorDataset(torch.zeros(sampling.samples)),
        batch_size=sampling.batch_size,
        shuffle=True,
        drop_last=sampling.drop_last,
    )
    sizes = [len(batch) for (batch,) in loader]
    assert list(itertools.chain(*sampling.epoch)) == sizes
    assert sampling.steps_per_epoch == math.ceil(len(sizes) / sampling.accumulation)


def test_what_counts_as_independent() -> None:
    assert MinibatchSampling().is_independent
    assert MinibatchSampling(30, 3).is_independent
    assert MinibatchSampling(31, 3, drop_last=True).is_independent
    assert not MinibatchSampling(31, 3).is_independent
    assert not MinibatchSampling(30, 3, replacement=False).is_independent
    assert not MinibatchSampling(30, 3, accumulation=4).is_independent
    assert MinibatchSampling(30, 3, accumulation=5).is_independent


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"accumulation": 0}, "accumulation"),
        ({"fresh": 1.1}, "fresh"),
        ({"replacement": False}, "number of samples"),
        ({"samples": 3, "batch_size": 4, "drop_last": True}, "at least one batch"),
    ],
)
def test_impossible_sampling_is_refused(options: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MinibatchSampling(**options)  # type: ignore[arg-type]


def test_formulas_of_an_epoch_need_two_steps() -> None:
    with pytest.raises(ValueError, match="two steps"):
        bridge_variance(1.0, 0, 1, 0.1)
    with pytest.raises(ValueError, match="two steps"):
        epoch_factor([])
    with pytest.raises(ValueError, match="in \\(-1, 1\\)"):
        plain_epoch_factor(1.0, 5)
