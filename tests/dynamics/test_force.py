"""The quadratic picture: the force along mixtures of eigenvectors, and a turned stiff subspace."""

from __future__ import annotations

import numpy as np
import pytest

from sgd_probe.dynamics.force import JointStatistics, force_test
from sgd_probe.dynamics.statistics import Draw, WindowStatistics

RATE, STEPS = 0.05, 600


def mixed_window(seed: int, stale: float = 1.0) -> WindowStatistics:
    """SGD in a quadratic of 40 curvatures, noise in proportion to them, seen along six random mixtures.

    ``stale`` is what the measured curvatures are of the true ones.
    """
    rng = np.random.default_rng(seed)
    curvatures = np.geomspace(10, 0.01, 40)
    directions = np.linalg.qr(rng.standard_normal((40, 6)))[0].T
    theta, origin = np.zeros(40), np.zeros(40)
    found = WindowStatistics.empty(6, STEPS)
    for step in range(-400, STEPS):
        gradient = curvatures * theta + np.sqrt(curvatures) * rng.standard_normal(40)
        if step == 0:
            origin = theta
        after = theta - RATE * gradient
        if step >= 0:
            x, u = directions @ (theta - origin), stale * directions @ (curvatures * (theta - origin))
            found = found.update(x, directions @ gradient, directions @ (after - origin), RATE, RATE, u)
        theta = after
    return found


def test_the_force_is_its_own_prediction_along_any_mixture() -> None:
    slopes, errors = [], []
    for seed in range(40):
        test = force_test(mixed_window(seed))
        slopes.append(test.slope)
        errors.append(test.standard_error)
        assert not test.fails.any()
    deviations = (np.array(slopes) - 1) / np.array(errors)
    assert abs(np.mean(slopes) - 1) < 0.05
    assert 0.85 < deviations.std() < 1.2
    # The slope on x means nothing there: curvatures of one direction from 0.01 to 10.
    assert np.std([mixed_window(seed).regress().slope for seed in range(5)]) > 0.05


def test_a_curvature_that_is_no_longer_true_is_noticed() -> None:
    """The Hessian has doubled since it was measured: the slope is 2."""
    tests = [force_test(mixed_window(seed, stale=0.5)) for seed in range(10)]
    assert np.mean([test.slope for test in tests]) == pytest.approx(2, abs=0.1)
    assert np.mean([test.fails for test in tests]) > 0.6


def flat_window(seed: int, batches: int | None, errors: float) -> WindowStatistics:
    """A nearly flat direction, its Hv known from two sets of samples with errors of the size of Hv itself."""
    rng = np.random.default_rng(seed)
    size, steps = 30, 1_000
    curvatures = np.geomspace(0.5, 0.02, size)
    directions = np.linalg.qr(rng.standard_normal((size, 3)))[0].T
    images = directions * curvatures + errors * rng.standard_normal((2, 3, size))
    theta, found = np.zeros(size), WindowStatistics.empty(3, steps)
    noise = np.zeros((batches or 1, size))
    for step in range(steps):
        place = step % (batches or 1)
        if place == 0:
            noise = np.sqrt(curvatures) * rng.standard_normal((batches or 1, size))
            noise -= noise.mean(0) if batches else 0
        gradient = curvatures * theta + noise[place]
        after = theta - RATE * gradient
        draw = Draw(batches, first=place == 0) if batches else Draw()
        found = found.update(
            directions @ theta, directions @ gradient, directions @ after, RATE, RATE, images @ theta, draw
        )
        theta = after
    return found


@pytest.mark.parametrize("batches", [None, 25])
def test_errors_of_the_images_do_not_pull_the_slope_to_zero(batches: int | None) -> None:
    tests = [force_test(flat_window(seed, batches, errors=0.02)) for seed in range(60)]
    slopes = np.array([test.slope for test in tests])
    spread = np.array([test.standard_error for test in tests])
    known = np.isfinite(slopes) & (spread < 1)
    assert known.mean() > 0.95
    # Somewhat above 1, by the small-sample bias of slow modes.
    assert np.median(slopes[known]) == pytest.approx(1, abs=0.3)
    assert 0.8 < np.std((slopes[known] - 1) / spread[known]) < 1.4
    assert np.mean([test.fails for test in tests]) < 0.01


def test_without_a_measured_force_there_is_no_test() -> None:
    statistics = WindowStatistics.empty(2, 10)
    for _ in range(10):
        statistics = statistics.update(np.ones(2), np.ones(2), np.ones(2), RATE, RATE)
    test = force_test(statistics)
    assert np.isnan(test.slope).all() and not test.fails.any()


def stiff_window(turn: float, seed: int = 0) -> tuple[JointStatistics, JointStatistics]:
    """Three stiff modes, seen along axes turned by an angle, in one stretch and in two."""
    rng = np.random.default_rng(seed)
    curvatures = np.array([12.0, 8.0, 4.0])
    axes = np.eye(3)
    axes[:2, :2] = [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
    theta, parts = np.zeros(3), [JointStatistics.empty(3), JointStatistics.empty(3)]
    whole = JointStatistics.empty(3)
    for step in range(4_000):
        gradient = curvatures * theta + np.array([2.0, 1.0, 1.0]) * rng.standard_normal(3)
        x, g = axes @ theta, axes @ gradient
        whole = whole.update(x, g)
        parts[step // 2_000] = parts[step // 2_000].update(x, g)
        theta = theta - RATE * gradient
    return whole, parts[0].merge(parts[1])


@pytest.mark.parametrize("turn", [0.0, 0.4, 1.2])
def test_the_stiff_subspace_does_not_mind_being_turned(turn: float) -> None:
    whole, merged = stiff_window(turn)
    found = whole.regress()
    # Standard errors of the slopes are about 0.35, 0.25 and 0.2.
    np.testing.assert_allclose(found.eigenvalues, [12, 8, 4], atol=0.8)
    np.testing.assert_allclose(found.eigenvalues, stiff_window(0.0)[0].regress().eigenvalues, rtol=1e-9)
    np.testing.assert_allclose(merged.products, whole.products, rtol=1e-9, atol=1e-7)
    assert merged.steps == whole.steps == 4_000
    np.testing.assert_allclose(np.linalg.eigvalsh(found.noise), [1, 1, 4], rtol=0.12)
    expected = (
        1.5 * np.sin(2 * turn) * -1 / np.sqrt((2.5 + 1.5 * np.cos(2 * turn)) * (2.5 - 1.5 * np.cos(2 * turn)))
    )
    assert found.noise_correlation[0, 1] == pytest.approx(expected, abs=0.05)


def test_standard_errors_of_the_joint_regression() -> None:
    """Entries of A over replicas, against their stated errors."""
    found = [stiff_window(0.0, seed)[0].regress() for seed in range(25)]
    deviations = [(one.matrix - np.diag([12.0, 8.0, 4.0])) / one.standard_errors for one in found]
    assert 0.8 < np.std(deviations) < 1.2


def test_a_joint_regression_needs_steps_and_motion() -> None:
    few = JointStatistics.empty(3)
    for _ in range(4):
        few = few.update(np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="more than 4 steps to regress 3 modes jointly, found 4"):
        few.regress()
    still = JointStatistics.empty(2)
    for _ in range(10):
        still = still.update(np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match="move independently"):
        still.regress()
