"""Noise: its variance at fixed weights and from a window, and how an epoch cancels it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from sgd_probe.dynamics.noise import HEAVY_TAILS, agree, epoch_cancellation, noise_variance, resample
from sgd_probe.dynamics.regression import GRADIENT
from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.result import Interval
from tests.dynamics.shuffled import Shuffled


def test_resampled_variances_cover_the_truth() -> None:
    """M minibatch gradients at fixed weights, of several modes with correlated noise."""
    rng = np.random.default_rng(0)
    mix = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 2.0]])
    hits = []
    for _ in range(1_000):
        found = resample(rng.standard_normal((32, 3)) @ mix.T + 5.0)
        truths = np.diag(mix @ mix.T)
        hits.append([i.low <= t <= i.high for i, t in zip(found.variance, truths, strict=True)])
    assert np.all((np.mean(hits, 0) > 0.92) & (np.mean(hits, 0) < 0.975))
    large = resample(rng.standard_normal((20_000, 3)) @ mix.T)
    np.testing.assert_allclose(large.covariance, mix @ mix.T, atol=0.12)
    assert large.correlation[0, 1] == pytest.approx(0.8, abs=0.02)
    np.testing.assert_allclose(large.kurtosis, 3, atol=0.3)
    assert not large.heavy.any()


def test_resampled_moments_are_the_sample_s_own() -> None:
    gradients = np.random.default_rng(1).standard_t(4, (40, 2))
    found = resample(gradients)
    np.testing.assert_allclose(found.covariance, np.cov(gradients.T), rtol=1e-12)
    for mode, interval in enumerate(found.variance):
        variance = float(np.var(gradients[:, mode], ddof=1))
        expected = noise_variance(variance, 40, float(found.kurtosis[mode]))
        for name in ("value", "low", "high"):
            assert getattr(interval, name) == pytest.approx(getattr(expected, name), rel=1e-9)


def test_heavy_tails_are_flagged() -> None:
    spikes = np.zeros((100, 2))
    spikes[0, 0], spikes[:, 1] = 10, np.random.default_rng(0).standard_normal(100)
    found = resample(spikes)
    assert found.kurtosis[0] > HEAVY_TAILS and found.heavy.tolist() == [True, False]


def test_a_mode_without_noise() -> None:
    found = resample(np.ones((10, 2)))
    assert [i.value for i in found.variance] == [0, 0]
    assert np.isnan(found.correlation).all() and not found.heavy.any()


@pytest.mark.parametrize("shape", [(2, 3), (10,)])
def test_too_few_minibatches_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least three minibatches"):
        resample(np.zeros(shape))


def test_agreement() -> None:
    assert agree(Interval(1.0, 0.8, 1.25), Interval(1.2, 1.0, 1.5))
    assert not agree(Interval(1.0, 0.9, 1.1), Interval(1.5, 1.4, 1.6))
    assert not agree(Interval.unknown(), Interval(1.0, 0.9, 1.1))
    assert not agree(Interval(0.0, 0.0, 0.0), Interval(1.0, 0.9, 1.1))


def test_agreement_of_residual_and_resampled_variance() -> None:
    """The two ways to the same noise: along the trajectory, and at fixed weights."""
    statistics = Shuffled(relaxation_times=20, steps=400, batches=50, replicas=1_000).statistics()
    rng, agreed = np.random.default_rng(5), 0
    for variance, kurtosis in zip(statistics.regress().variance, statistics.kurtosis(), strict=True):
        along = noise_variance(float(variance), statistics.informative, float(kurtosis))
        (fixed,) = resample(rng.standard_normal((32, 1))).variance
        agreed += agree(along, fixed)
    assert 0.92 <= agreed / 1_000 <= 0.98


@pytest.mark.parametrize("batches", [10.0, 28.08, 100.0])
@pytest.mark.parametrize("fresh", [0.0, 0.4])
def test_coverage_of_the_noise_variance_without_replacement(batches: float, fresh: float) -> None:
    """Innovations have variance S^2 / B whatever the place in the epoch."""
    statistics = Shuffled(
        relaxation_times=30, steps=300, batches=batches, fresh=fresh, replicas=2_500
    ).statistics()
    found = zip(statistics.regress().variance.tolist(), statistics.kurtosis().tolist(), strict=True)
    hits = [i.low <= 1 <= i.high for i in (noise_variance(v, statistics.informative, k) for v, k in found)]
    assert 0.93 <= np.mean(hits) <= 0.97


class TestCancellation:
    @pytest.mark.parametrize(("batches", "fresh"), [(12.0, 0.0), (12.0, 0.5), (12.3, 0.0), (7.0, 1.0)])
    def test_the_share_that_is_left(self, batches: float, fresh: float) -> None:
        statistics = Shuffled(
            relaxation_times=0, steps=12 * 60, batches=batches, fresh=fresh, replicas=400
        ).statistics()
        found = epoch_cancellation(statistics)
        assert found is not None
        assert found.expected == pytest.approx(max(found.value, 0.02), rel=0.25, abs=0.02)
        steps = math.ceil(batches)
        if not fresh and batches == steps:
            assert found.value == pytest.approx(0, abs=1e-9)
            assert found.correlation.value == pytest.approx(-1 / (steps - 1))

    def test_too_few_epochs(self) -> None:
        few = Shuffled(relaxation_times=0, steps=50, batches=12, replicas=5).statistics()
        assert few.epochs < 5 and epoch_cancellation(few) is None
        assert epoch_cancellation(WindowStatistics.empty(0, 10)) is None

    def test_modes_without_noise(self) -> None:
        still = Shuffled(relaxation_times=0, steps=100, batches=10, replicas=3, fresh=1.0).statistics()
        products = still.products.copy()
        products[GRADIENT] = products[:, GRADIENT] = 0
        assert epoch_cancellation(dataclasses.replace(still, products=products)) is None


def test_noise_without_any_freedom_has_no_interval() -> None:
    """A gradient that never changes but for rounding: an enormous kurtosis, next to no degree of freedom."""
    found = noise_variance(1e-30, 400, 1e17)
    assert found.value == 1e-30 and math.isnan(found.low) and math.isnan(found.high)
