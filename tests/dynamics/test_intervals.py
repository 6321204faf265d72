"""Intervals of D and of the noise variance: what they say they cover, they cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sgd_probe.dynamics.diffusion import (
    chi_square_interval,
    headline_lag,
    independent_share,
    mean_squared_displacements,
    noise_variance,
    scaled,
)
from sgd_probe.dynamics.verdict import weigh
from sgd_probe.result import Interval, Verdict
from sgd_probe.theory.closed_forms import momentum_kernel
from tests.dynamics.test_verdict import judged
from tests.helpers.simulation import Noise, Truth, constant

REPLICAS = 2_500
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


@pytest.mark.parametrize("relaxation_times", [30.0, 60.0])
def test_coverage_of_the_measured_curvature(relaxation_times: float) -> None:
    truth = Truth(relaxation_times=relaxation_times, rates=constant(500), replicas=REPLICAS, seed=4)
    statistics = truth.statistics()
    found = [e for e, j in judged(statistics) if j.verdict is Verdict.CONFINED]
    hits = [abs(e.slope - truth.curvature) < 1.96 * e.slope_error for e in found]
    # The slope of a confined mode is biased upwards (Dickey and Fuller), by a half of its error at most.
    assert 0.92 <= np.mean(hits) <= COVERED[1]


def test_the_residual_measures_the_noise_of_stiff_modes_too() -> None:
    """Where the plain variance of the gradient is twice the noise."""
    truth = Truth(relaxation_times=300, rates=constant(300), replicas=REPLICAS, seed=5)  # eta lambda = 1
    statistics = truth.statistics()
    measured = np.array([e.noise_variance for e in weigh(statistics, 0.0)])
    assert abs(measured.mean() - 1) < 4 * measured.std() / math.sqrt(REPLICAS)
    plain = statistics.sum_gg / statistics.steps - (statistics.sum_g / statistics.steps) ** 2
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
