"""The running sums against direct computation on the whole path."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from sgd_probe.dynamics.statistics import WindowStatistics

Array = NDArray[np.float64]


def random_path(steps: int, modes: int, seed: int) -> tuple[Array, Array, Array, Array]:
    """Displacements before and after each step, gradients that depend on them, learning rates."""
    rng = np.random.default_rng(seed)
    after = np.cumsum(rng.standard_normal((steps, modes)), axis=0)
    before = np.vstack([np.zeros((1, modes)), after[:-1]])
    gradient = 0.1 * before + rng.standard_normal((steps, modes)) + 0.3
    return before, gradient, after, rng.uniform(0.01, 0.2, steps)


def collect(path: tuple[Array, Array, Array, Array], planned: int | None = None) -> WindowStatistics:
    before, gradient, after, rates = path
    found = WindowStatistics.empty(before.shape[1], planned or len(rates))
    for x, g, x_after, rate in zip(before, gradient, after, rates.tolist(), strict=True):
        found = found.update(x, g, x_after, rate, 10 * rate)
    return found


@settings(deadline=None)
@given(steps=st.integers(1, 130), modes=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_sums_are_those_of_the_whole_path(steps: int, modes: int, seed: int) -> None:
    path = random_path(steps, modes, seed)
    before, gradient, after, rates = path
    found = collect(path)
    times = np.arange(steps)[:, None]
    direct = {
        "sum_x": before,
        "sum_xx": before**2,
        "sum_g": gradient,
        "sum_gg": gradient**2,
        "sum_xg": before * gradient,
        "sum_tx": times * before,
        "sum_tg": times * gradient,
        "sum_g3": gradient**3,
        "sum_g4": gradient**4,
    }
    for name, terms in direct.items():
        np.testing.assert_allclose(getattr(found, name), terms.sum(0), rtol=1e-9, atol=1e-9, err_msg=name)
    assert (found.steps, found.skipped) == (steps, 0)
    assert found.learning_rates == pytest.approx(rates.sum())
    assert found.confinement_clock == pytest.approx((10 * rates).sum())
    assert found.diffusion_clock == pytest.approx(((10 * rates) ** 2).sum())
    assert found.equal_steps == pytest.approx(rates.sum() ** 2 / (rates**2).sum())
    np.testing.assert_array_equal(found.position, after[-1])


@settings(deadline=None)
@given(steps=st.integers(1, 200), planned=st.integers(1, 400), seed=st.integers(0, 2**32 - 1))
def test_dyadic_lags_are_non_overlapping(steps: int, planned: int, seed: int) -> None:
    path = random_path(steps, 2, seed)
    found = collect(path, planned)
    positions = np.vstack([np.zeros((1, 2)), path[2]])
    levels = len(found.lag_count)
    longest = 2 ** (levels - 1)
    assert longest <= max(planned / 2, 1) < 2 * longest or planned < 4
    for level in range(levels):
        blocks = np.diff(positions[:: 2**level], axis=0)
        assert found.lag_count[level] == len(blocks) == steps // 2**level
        np.testing.assert_allclose(found.lag_square[level], (blocks**2).sum(0), rtol=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(5, 100))
def test_regression_is_least_squares(seed: int, steps: int) -> None:
    path = random_path(steps, 3, seed)
    before, gradient = path[:2]
    found = collect(path)
    for trend in (False, True):
        regression = found.regress(trend)
        for mode in range(3):
            columns = [np.ones(steps), before[:, mode]] + ([np.arange(steps)] if trend else [])
            design = np.column_stack(columns)
            solution, *_ = np.linalg.lstsq(design, gradient[:, mode], rcond=None)
            residual = gradient[:, mode] - design @ solution
            variance = residual @ residual / (steps - design.shape[1])
            error = np.sqrt(variance * np.linalg.inv(design.T @ design)[1, 1])
            for name, expected in (
                ("slope", solution[1]),
                ("variance", variance),
                ("standard_error", error),
                ("t", solution[1] / error),
            ):
                value = getattr(regression, name)[mode]
                assert value == pytest.approx(expected, rel=1e-6, abs=1e-9), name


def test_regression_keeps_its_digits_far_from_the_origin() -> None:
    """A large constant gradient (weight decay on large weights) is no noise."""
    before, gradient, after, rates = random_path(400, 1, seed=1)
    near = collect((before, gradient, after, rates)).regress()
    far = collect((before, gradient + 1e4, after, rates)).regress()
    assert far.variance[0] == pytest.approx(near.variance[0], rel=1e-6)
    assert far.t[0] == pytest.approx(near.t[0], rel=1e-5)


def test_all_of_a_dead_mode_s_variance_is_noise() -> None:
    found = WindowStatistics.empty(2, 64)
    for value in np.random.default_rng(0).standard_normal(64):
        found = found.update(np.zeros(2), np.array([0.0, value]), np.zeros(2), 0.1, 0.1)
    assert found.regress().variance[0] == 0
    assert 0.5 < found.regress().variance[1] < 2
    assert np.isnan(found.regress().slope).all()


def test_kurtosis() -> None:
    path = random_path(500, 3, seed=2)
    found = collect(path).kurtosis()
    np.testing.assert_allclose(found, stats.kurtosis(path[1], axis=0, fisher=False), rtol=1e-9)


def test_update_and_skip_change_nothing_of_what_they_were_given() -> None:
    path = random_path(40, 3, seed=3)
    kept = collect(path)
    copies = {name: np.copy(value) for name, value in vars(kept).items()}
    x, g, after = np.arange(3.0), np.arange(3.0) + 1, np.arange(3.0) + 2
    # The same statistics may be continued in two ways.
    first = kept.update(x, g, after, 0.1, 0.2)
    second = kept.update(x, g, after, 0.1, 0.2).update(x, g, after, 0.1, 0.2).skip()
    for name, value in copies.items():
        np.testing.assert_array_equal(getattr(kept, name), value, err_msg=name)
    for index, value in enumerate((x, g, after)):
        np.testing.assert_array_equal(value, np.arange(3.0) + index)
    assert (first.steps, second.steps, second.skipped) == (41, 42, 1)


def test_a_skipped_step_is_counted_and_nothing_else() -> None:
    kept = collect(random_path(10, 2, seed=4))
    skipped = kept.skip()
    assert dataclasses.replace(skipped, skipped=0) == dataclasses.replace(kept, skipped=0)
    assert skipped.skipped == 1


def test_an_empty_window_has_no_equal_steps() -> None:
    assert WindowStatistics.empty(2, 100).equal_steps == 0
