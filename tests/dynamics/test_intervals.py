"""Intervals of D and of the noise variance: what they say they cover, they cover."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from sgd_probe.dynamics.diffusion import (
    anomalous_exponent,
    chi_square_interval,
    diffusion_by_lag,
    green_kubo,
    headline_lag,
    independent_share,
    mean_squared_displacements,
    noise_variance,
    pooled_diffusion,
    scaled,
)
from sgd_probe.dynamics.regression import GRADIENT, ONE
from sgd_probe.dynamics.statistics import LAGS, WindowStatistics
from sgd_probe.dynamics.verdict import weigh
from sgd_probe.result import Interval
from sgd_probe.theory.closed_forms import momentum_kernel
from tests.dynamics.shuffled import Shuffled
from tests.helpers.simulation import Array, Noise, Truth, constant, cosine

REPLICAS = 2_500
FEWER = 800
COVERED = (0.93, 0.97)


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def noise_coverage(truth: Truth) -> float:
    statistics = truth.statistics()
    found = zip(statistics.regress().variance.tolist(), statistics.kurtosis().tolist(), strict=True)
    return float(np.mean([covers(noise_variance(v, statistics.steps, k), 1.0) for v, k in found]))


@pytest.mark.parametrize(("steps", "momentum"), [(100, 0.0), (400, 0.0), (400, 0.9)])
def test_coverage_of_diffusion_at_every_lag_of_a_flat_mode(steps: int, momentum: float) -> None:
    truth = Truth(relaxation_times=0, rates=constant(steps), momentum=momentum, replicas=REPLICAS, seed=1)
    statistics = truth.statistics()
    exact = truth.effective_rates[0] ** 2 / 2
    hits: dict[int, list[bool]] = {}
    values: dict[int, list[float]] = {}
    for mode in range(REPLICAS):
        for lag, count, msd in mean_squared_displacements(statistics, mode, momentum):
            assert count == steps // lag
            diffusion = scaled(msd, 1 / (2 * lag * momentum_kernel(lag, momentum)))
            hits.setdefault(lag, []).append(covers(diffusion, exact))
            values.setdefault(lag, []).append(diffusion.value)
    assert headline_lag(steps, momentum) in hits
    for lag, found in hits.items():
        assert COVERED[0] <= np.mean(found) <= COVERED[1], f"lag {lag}: {np.mean(found)}"
        error = np.std(values[lag]) / math.sqrt(REPLICAS)
        assert abs(np.mean(values[lag]) - exact) < 4 * error, f"lag {lag} is biased"


@pytest.mark.parametrize("relaxation_times", [0.0, 20.0, 60.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_coverage_of_the_noise_variance(relaxation_times: float, momentum: float) -> None:
    truth = Truth(
        relaxation_times=relaxation_times, rates=constant(300), momentum=momentum, replicas=REPLICAS, seed=2
    )
    assert COVERED[0] <= noise_coverage(truth) <= COVERED[1]


@pytest.mark.parametrize(("freedom", "low", "high"), [(5, 0.88, 0.95), (3, 0.70, 0.85)])
def test_heavy_tails_cost_coverage(freedom: float, low: float, high: float) -> None:
    """The interval is widened by the kurtosis of the sample, which heavy tails hide: hence the mark."""
    truth = Truth(relaxation_times=0, rates=constant(1000), noise=Noise(freedom), replicas=REPLICAS, seed=3)
    assert low <= noise_coverage(truth) <= high


@pytest.mark.parametrize(
    ("steps", "momentum", "relaxation_times"),
    [
        (100, 0.0, 20),
        (100, 0.0, 60),
        (300, 0.0, 20),
        (300, 0.0, 60),
        (300, 0.0, 300),
        (500, 0.9, 20),
        (500, 0.9, 60),
    ],
)
def test_the_measured_curvature_has_no_bias(steps: int, momentum: float, relaxation_times: float) -> None:
    """The plain slope is up to 23% too large at 20 relaxation times (Kendall's bias)."""
    truth = Truth(
        relaxation_times=relaxation_times, rates=constant(steps), momentum=momentum, replicas=REPLICAS, seed=4
    )
    found = [e.curvature for e in weigh(truth.statistics(), momentum)]
    values = np.array([one.value for one in found])
    assert values.mean() == pytest.approx(truth.curvature, rel=0.05)
    assert 0.92 <= np.mean([covers(one, truth.curvature) for one in found]) <= COVERED[1]


def test_the_residual_measures_the_noise_of_stiff_modes_too() -> None:
    """Where the plain variance of the gradient is twice the noise."""
    truth = Truth(relaxation_times=300, rates=constant(300), replicas=REPLICAS, seed=5)  # eta lambda = 1
    statistics = truth.statistics()
    measured = np.array([e.noise_variance for e in weigh(statistics, 0.0)])
    assert abs(measured.mean() - 1) < 4 * measured.std() / math.sqrt(REPLICAS)
    mean, square = statistics.products[[ONE, GRADIENT], GRADIENT] / statistics.steps
    plain = square - mean**2
    assert plain.mean() > 1.9


def test_independent_displacements() -> None:
    assert independent_share(1, 0.0) == independent_share(64, 0.0) == 1.0
    # Steps themselves are AR(1) with coefficient mu once the buffer is warm.
    assert independent_share(1, 0.9) == pytest.approx((1 - 0.81) / (1 + 0.81))
    assert 0.95 < independent_share(64, 0.9) < 1
    # However long the optimizer remembers, one displacement is one.
    crawling = Truth(relaxation_times=0, rates=constant(64), momentum=0.999, replicas=1).statistics()
    for _, _, msd in mean_squared_displacements(crawling, 0, 0.999):
        assert 0 < msd.low < msd.value < msd.high < math.inf


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("steps", [1, 3, 50, 100, 999, 1000, 5000])
def test_the_headline_lag_is_long_with_several_counts(steps: int, momentum: float) -> None:
    lag = headline_lag(steps, momentum)
    assert lag & (lag - 1) == 0
    assert steps // lag >= min(4, steps)
    if steps >= 50 / (1 - momentum):
        assert lag >= 4 / (1 - momentum)
        assert lag <= max(steps / 10, 8 / (1 - momentum))


def test_intervals_of_what_cannot_be_measured() -> None:
    for interval in (chi_square_interval(1.0, 0.0), chi_square_interval(math.nan, 10)):
        assert math.isnan(interval.low) and math.isnan(interval.high)
    assert noise_variance(0.0, 100, math.nan).value == 0.0
    wide, usual = noise_variance(1.0, 100, 30.0), noise_variance(1.0, 100, 3.0)
    assert wide.low < usual.low < 1 < usual.high < wide.high


class TestDiffusionByLag:
    @pytest.mark.parametrize(
        ("steps", "momentum", "schedule"),
        [(100, 0.0, constant), (500, 0.0, cosine), (600, 0.9, constant), (600, 0.9, cosine)],
    )
    def test_coverage_in_units_of_the_clock(
        self, steps: int, momentum: float, schedule: Callable[[int], Array]
    ) -> None:
        """Under a schedule too: the long steps decide, and there are fewer of them."""
        truth = Truth(relaxation_times=0, rates=schedule(steps), momentum=momentum, replicas=REPLICAS, seed=6)
        statistics = truth.statistics()
        exact = float((truth.effective_rates**2).mean()) / 2
        in_time = exact * steps / float(truth.effective_rates.sum())
        lag = headline_lag(steps, momentum)
        points = [
            next(p for p in diffusion_by_lag(statistics, mode, momentum) if p.lag == lag)
            for mode in range(REPLICAS)
        ]
        for name, value in (("per_step", exact), ("per_time", in_time), ("detrended", exact)):
            intervals = [getattr(point, name) for point in points]
            assert COVERED[0] <= np.mean([covers(i, value) for i in intervals]) <= 0.975, name
            assert np.mean([i.value for i in intervals]) == pytest.approx(value, rel=0.04), name

    def test_a_slow_drift_does_not_enter_what_is_detrended(self) -> None:
        pull = 4 / (math.sqrt(1000) * 0.05) * 0.05  # four times as far as free diffusion
        truth = Truth(relaxation_times=0, rates=constant(1000), pull=pull, replicas=FEWER, seed=7)
        statistics, exact = truth.statistics(), 0.05**2 / 2
        lag = headline_lag(1000, 0.0)
        points = [next(p for p in diffusion_by_lag(statistics, m, 0.0) if p.lag == lag) for m in range(FEWER)]
        assert np.mean([point.per_step.value for point in points]) > 1.5 * exact
        assert 0.925 <= np.mean([covers(point.detrended, exact) for point in points]) <= 0.975

    def test_nesterov_has_a_memory_of_its_own(self) -> None:
        """Displacements of torch's Nesterov momentum, its buffer warm."""
        rng, rate, mu, count = np.random.default_rng(0), 0.05, 0.9, 1_000
        statistics, x, buffer = WindowStatistics.empty(count, 400), np.zeros(count), np.zeros(count)
        for step in range(-100, 400):
            g = rng.standard_normal(count)
            buffer = mu * buffer + g
            after = x - rate * (g + mu * buffer)
            if step >= 0:
                statistics = statistics.update(x, g, after, rate, rate / (1 - mu))
            x = after
        exact = (rate / (1 - mu)) ** 2 / 2
        for level in (0, 2, 4):
            values = [
                diffusion_by_lag(statistics, m, mu, nesterov=True)[level].per_step for m in range(count)
            ]
            assert np.mean([v.value for v in values]) == pytest.approx(exact, rel=0.05)
            assert COVERED[0] <= np.mean([covers(v, exact) for v in values]) <= COVERED[1]

    def test_without_a_step_there_is_none(self) -> None:
        assert diffusion_by_lag(WindowStatistics.empty(1, 10), 0, 0.0) == ()


class TestGreenKubo:
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("lags", [0, 1, 3])
    def test_coverage(self, momentum: float, lags: int) -> None:
        truth = Truth(relaxation_times=0, rates=constant(600), momentum=momentum, replicas=FEWER, seed=8)
        statistics, exact = truth.statistics(), truth.effective_rates[0] ** 2 / 2
        found = [green_kubo(statistics, mode, lags) for mode in range(FEWER)]
        assert 0.92 <= np.mean([covers(one, exact) for one in found]) <= 0.975
        spread = np.std([one.value for one in found]) / exact
        at_lag = [mean_squared_displacements(statistics, m, momentum)[6][2].value for m in range(FEWER)]
        assert spread < 0.6 * np.std(at_lag) / np.mean(at_lag)

    def test_where_it_does_not_apply(self) -> None:
        statistics = Truth(relaxation_times=0, rates=constant(50), replicas=1).statistics()
        with pytest.raises(ValueError, match=f"0 to {LAGS} lags, found {LAGS + 1}"):
            green_kubo(statistics, 0, LAGS + 1)
        shuffled = Shuffled(relaxation_times=0, steps=50, batches=10, replicas=1).statistics()
        assert math.isnan(green_kubo(shuffled, 0).value)
        still = WindowStatistics.empty(1, 20)
        for _ in range(20):
            still = still.update(np.zeros(1), np.zeros(1), np.zeros(1), 0.1, 0.1)
        assert math.isnan(green_kubo(still, 0).value)


class TestExponent:
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_a_flat_mode_diffuses(self, momentum: float) -> None:
        truth = Truth(relaxation_times=0, rates=constant(1000), momentum=momentum, replicas=FEWER, seed=9)
        statistics = truth.statistics()
        found = [anomalous_exponent(statistics, mode, momentum) for mode in range(FEWER)]
        assert np.mean([one.value for one in found]) == pytest.approx(1, abs=0.02)
        assert 0.93 <= np.mean([covers(one, 1.0) for one in found]) <= 0.99

    def test_a_confined_mode_does_not(self) -> None:
        truth = Truth(relaxation_times=100, rates=constant(1000), replicas=300, seed=9)
        statistics = truth.statistics()
        found = [anomalous_exponent(statistics, mode, 0.0, shortest=32) for mode in range(300)]
        assert np.mean([one.value for one in found]) < 0.1
        assert np.mean([one.high < 1 for one in found]) > 0.65

    def test_too_few_lags(self) -> None:
        statistics = Truth(relaxation_times=0, rates=constant(20), replicas=1).statistics()
        assert math.isnan(anomalous_exponent(statistics, 0, 0.0, shortest=8).value)


class TestPooled:
    def test_coverage_of_independent_modes(self) -> None:
        statistics = Truth(relaxation_times=0, rates=constant(500), replicas=REPLICAS, seed=10).statistics()
        found = [pooled_diffusion(statistics, range(m, m + 5), 0.0) for m in range(0, REPLICAS, 5)]
        assert 0.925 <= np.mean([covers(one, 1.0) for one in found]) <= 0.975
        single = pooled_diffusion(statistics, [0], 0.0)
        assert (found[0].high / found[0].low) < (single.high / single.low)

    def test_modes_that_share_their_noise_count_once(self) -> None:
        statistics = Truth(relaxation_times=0, rates=constant(500), replicas=4, seed=10).statistics()
        together = pooled_diffusion(statistics, range(4), 0.0, correlation=np.ones((4, 4)))
        alone = pooled_diffusion(statistics, [0], 0.0)
        assert together.high / together.low == pytest.approx(alone.high / alone.low)
        assert math.isnan(pooled_diffusion(statistics, [], 0.0).value)

    def test_confined_modes_fall_short_of_free_diffusion(self) -> None:
        statistics = Truth(relaxation_times=60, rates=constant(500), replicas=5, seed=11).statistics()
        assert pooled_diffusion(statistics, range(5), 0.0).high < 0.7
