"""The running sums against direct computation on the whole path."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from sgd_probe.dynamics.regression import GRADIENT, ONE, X
from sgd_probe.dynamics.statistics import LAGS, PARTS, Draw, WindowStatistics

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
    columns = np.stack([np.ones_like(before), times + 0 * before, before, gradient])
    direct = {
        "products": np.einsum("itk,jtk->ijk", columns, columns),
        "powers": np.stack([(gradient**power).sum(0) for power in (1, 2, 3, 4)]),
    }
    for name, value in direct.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-9, atol=1e-9, err_msg=name)
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
    copies = {name: np.copy(value) for name, value in vars(kept).items() if isinstance(value, np.ndarray)}
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


Path = list[tuple[Any, ...]]


def shuffled_path(seed: int, steps: int, modes: int = 2, *, batches: float = math.inf) -> Path:
    """Arguments of ``update`` for every step, with u and with draws where an epoch is finite."""
    before, gradient, after, rates = random_path(steps, modes, seed)
    rng = np.random.default_rng(seed)
    offset = int(rng.integers(100))
    path: Path = []
    for t in range(steps):
        draw = Draw()
        if math.isfinite(batches):
            count = math.ceil(batches)
            place = (t + offset) % count
            share = batches - count + 1 if place == count - 1 else 1.0
            draw = Draw(batches, share, place == 0, 0.25)
        rate = float(rates[t])
        path.append((before[t], gradient[t], after[t], rate, 2 * rate, 3 * before[t], draw))
    return path


def followed(statistics: WindowStatistics, path: Path) -> WindowStatistics:
    for step in path:
        statistics = statistics.update(*step)
    return statistics


def same_bits(one: WindowStatistics, other: WindowStatistics, *leave: str) -> None:
    for field in dataclasses.fields(one):
        if field.name in leave:
            continue
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if field.name == "epoch":
            assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
        elif field.name == "parts":
            assert len(mine) == len(theirs)
            for part, twin in zip(mine, theirs, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(part, twin, strict=True))
        else:
            assert np.array_equal(mine, theirs), field.name


EPOCHS = st.sampled_from([math.inf, 7.0, 12.4, 40.0])


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(1, 90), split=st.floats(0, 1), seed=st.integers(0, 2**32 - 1), batches=EPOCHS)
def test_a_window_goes_on_to_the_same_bits(steps: int, split: float, seed: int, batches: float) -> None:
    """Through tensors and plain types, as a checkpoint stores them."""
    path = shuffled_path(seed, steps, batches=batches)
    cut = int(split * steps)
    first = followed(WindowStatistics.empty(2, steps), path[:cut])
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    resumed = WindowStatistics.from_state(torch.load(file, weights_only=True))
    same_bits(resumed, first)
    whole = followed(WindowStatistics.empty(2, steps), path)
    same_bits(followed(resumed, path[cut:]), whole)


def test_a_state_is_a_copy() -> None:
    kept = followed(WindowStatistics.empty(2, 60), shuffled_path(0, 60))
    state = kept.state()
    state["products"] += 1
    resumed = WindowStatistics.from_state(kept.state())
    same_bits(resumed, kept)
    assert not np.array_equal(state["products"].numpy(), kept.products)


def test_a_state_of_another_version_is_refused() -> None:
    state = WindowStatistics.empty(1, 10).state()
    with pytest.raises(ValueError, match="differ in draw"):
        WindowStatistics.from_state({name: v for name, v in state.items() if name != "draw"})
    with pytest.raises(ValueError, match="differ in more"):
        WindowStatistics.from_state({**state, "more": 1})


@settings(deadline=None, max_examples=30)
@given(steps=st.integers(0, 60), seed=st.integers(0, 2**32 - 1), batches=EPOCHS)
def test_merging_with_nothing_changes_no_bit(steps: int, seed: int, batches: float) -> None:
    kept = followed(WindowStatistics.empty(2, 60), shuffled_path(seed, steps, batches=batches))
    nothing = WindowStatistics.empty(2, 60)
    same_bits(kept.merge(nothing), kept)
    same_bits(nothing.merge(kept), kept)


@settings(deadline=None, max_examples=30)
@given(
    steps=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    seed=st.integers(0, 2**32 - 1),
    batches=EPOCHS,
)
def test_merged_sums_are_the_same_bits_in_either_order(
    steps: tuple[int, int], seed: int, batches: float
) -> None:
    """All but what tells first from last: the trend, the ends, the running epoch."""
    one, other = (
        followed(WindowStatistics.empty(2, 64), shuffled_path(seed + i, n, batches=batches))
        for i, n in enumerate(steps)
    )
    both, reverse = one.merge(other), other.merge(one)
    for name in ("powers", "lag_square", "lag_net"):
        assert np.array_equal(getattr(both, name), getattr(reverse, name)), name
    timeless = np.ix_([ONE, X, GRADIENT], [ONE, X, GRADIENT])
    assert np.array_equal(both.products[timeless], reverse.products[timeless])
    assert np.array_equal(both.force, reverse.force) and np.array_equal(both.lag_count, reverse.lag_count)
    assert both.steps == reverse.steps == sum(steps)
    assert np.array_equal(both.start, one.start) and np.array_equal(both.position, other.position)


@settings(deadline=None, max_examples=30)
@given(steps=st.integers(20, 120), split=st.floats(0.2, 0.8), seed=st.integers(0, 2**32 - 1))
def test_merged_stretches_are_one_window(steps: int, split: float, seed: int) -> None:
    path = shuffled_path(seed, steps)
    cut = int(split * steps)
    whole = followed(WindowStatistics.empty(2, steps), path)
    halves = (followed(WindowStatistics.empty(2, steps), part) for part in (path[:cut], path[cut:]))
    merged = next(halves).merge(next(halves))
    np.testing.assert_allclose(merged.products, whole.products, rtol=1e-9, atol=1e-6)
    for trend in (False, True):
        np.testing.assert_allclose(merged.regress(trend).t, whole.regress(trend).t, rtol=1e-6, atol=1e-6)
    assert merged.confinement_clock == pytest.approx(whole.confinement_clock)
    assert merged.displacement_clock == pytest.approx(whole.displacement_clock)
    # Products across the seam are in neither half; everything else is.
    columns = np.array([[np.ones(2), np.full(2, float(t)), step[0], step[1]] for t, step in enumerate(path)])
    for j in range(1, LAGS + 1):
        pairs = [(t, t + j) for t in range(steps - j) if (t < cut) == (t + j < cut)]
        direct = sum(np.einsum("ik,jk->ijk", columns[a], columns[b]) for a, b in pairs)
        np.testing.assert_allclose(merged.lagged[j - 1], direct, rtol=1e-9, atol=1e-6)
    ends = [columns[t] for t in (0, cut - 1, cut, steps - 1)]
    direct = sum(np.einsum("ik,jk->ijk", c, c) for c in ends)
    np.testing.assert_allclose(merged.ends(), direct, rtol=1e-9, atol=1e-6)


def test_only_the_same_modes_are_merged() -> None:
    path = shuffled_path(0, 10, modes=3)
    one, other = followed(WindowStatistics.empty(3, 10), path), WindowStatistics.empty(2, 10)
    with pytest.raises(ValueError, match=r"same modes and lags, found \(3, 3\) and \(3, 2\)"):
        one.merge(other)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(LAGS + 1, 60))
def test_lagged_products_parts_and_forces(seed: int, steps: int) -> None:
    path = shuffled_path(seed, steps)
    found = followed(WindowStatistics.empty(2, steps), path)
    columns = np.array([[np.ones(2), np.full(2, float(t)), step[0], step[1]] for t, step in enumerate(path)])
    for j in range(1, LAGS + 1):
        direct = np.einsum("tik,tjk->ijk", columns[:-j], columns[j:])
        np.testing.assert_allclose(found.lagged[j - 1], direct, rtol=1e-9, atol=1e-6)
    assert [part.steps for part in found.parts] == [math.ceil(steps * (p + 1) / PARTS) for p in range(PARTS)]
    for part in found.parts:
        direct = np.einsum("tik,tjk->ijk", columns[: part.steps], columns[: part.steps])
        np.testing.assert_allclose(part.products, direct, rtol=1e-9, atol=1e-6)
        assert part.diffusion_clock == pytest.approx(sum(step[4] ** 2 for step in path[: part.steps]))
    u, g = (np.array([step[i] for step in path]) for i in (5, 1))
    pulls = np.array([np.ones_like(u), u, u, g])
    direct = np.einsum("itk,jtk->ijk", pulls, pulls)
    np.testing.assert_allclose(found.force, direct, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found.start, path[0][0])


class TestInnovations:
    """Against generalised least squares with the dense covariance of an epoch's noise."""

    @staticmethod
    def covariance(draws: list[Draw]) -> Array:
        """``diag(1 / share) - g`` within an epoch, nothing between epochs."""
        epoch = np.cumsum([draw.first for draw in draws])
        same = epoch[:, None] == epoch[None]
        return np.asarray(np.diag([1 / draw.share for draw in draws]) - same * draws[0].memory)

    @pytest.mark.parametrize("fresh", [0.0, 0.3])
    @pytest.mark.parametrize(("batches", "offset"), [(9.0, 0), (9.0, 4), (6.4, 0), (6.4, 5), (200.0, 180)])
    def test_products_are_those_of_generalised_least_squares(
        self, batches: float, offset: int, fresh: float
    ) -> None:
        count, steps = math.ceil(batches), 50
        before, gradient, after, rates = random_path(steps, 2, 0)
        draws = []
        for t in range(steps):
            place = (t + offset) % count
            share = batches - count + 1 if place == count - 1 else 1.0
            draws.append(Draw(batches, share, place == 0, fresh))
        found = WindowStatistics.empty(2, steps)
        for t in range(steps):
            rate = float(rates[t])
            found = found.update(before[t], gradient[t], after[t], rate, rate, None, draws[t])
        covariance = self.covariance(draws)
        # What a whole epoch's other steps tell beforehand says nothing new: it is left out.
        told = np.ones(steps, dtype=bool)
        if not fresh:
            ends = [t for t in range(steps) if (t + offset) % count == count - 1 and t >= count - 1]
            told[ends] = False
        inverse = np.linalg.inv(covariance[np.ix_(told, told)])
        ones, times = np.ones((steps, 2)), np.repeat(np.arange(steps)[:, None], 2, 1)
        columns = np.array([ones, times, before, gradient])[:, told]
        direct = np.einsum("itk,ts,jsk->ijk", columns, inverse, columns)
        np.testing.assert_allclose(found.products, direct, rtol=1e-8, atol=1e-8)
        assert found.displacement_clock == pytest.approx(rates @ covariance @ rates, abs=1e-12)
        assert found.noise_units == pytest.approx(1 - (1 - fresh) / batches)

    def test_with_replacement_nothing_changes(self) -> None:
        path = shuffled_path(3, 40)
        plain = followed(WindowStatistics.empty(2, 40), path)
        marked = [(*step[:-1], Draw(first=t % 8 == 0)) for t, step in enumerate(path)]
        found = followed(WindowStatistics.empty(2, 40), marked)
        np.testing.assert_array_equal(found.products, plain.products)
        assert found.displacement_clock == pytest.approx(found.diffusion_clock)

    def test_whole_epochs(self) -> None:
        path = shuffled_path(1, 70, batches=7.0)
        found = followed(WindowStatistics.empty(2, 70), path)
        starts = [t for t, step in enumerate(path) if step[-1].first]
        direct = np.zeros((3, 3, 2))
        for start in starts[:-1]:
            sums = np.array([[np.ones(2), s[0], s[1]] for s in path[start : start + 7]]).sum(0)
            direct += np.einsum("ik,jk->ijk", sums, sums)
        assert found.epochs == len(starts) - 1
        np.testing.assert_allclose(found.epoch_products, direct, rtol=1e-10)

    def test_a_skipped_step_is_neither_known_nor_missed(self) -> None:
        """The noise of the others is exchangeable without it, also where it was an epoch's first."""
        path = shuffled_path(2, 40, batches=7.0)
        left_out = {3, 11, next(t for t, step in enumerate(path) if step[-1].first and t > 15)}
        found = WindowStatistics.empty(2, 40)
        for t, step in enumerate(path):
            found = found.skip(step[-1]) if t in left_out else found.update(*step)
        kept = [t for t in range(40) if t not in left_out]
        draws = [step[-1] for step in path]
        covariance = self.covariance(draws)[np.ix_(kept, kept)]
        inverse = np.linalg.inv(covariance)
        columns = np.array([[np.ones(2), path[t][0], path[t][1]] for t in kept]).swapaxes(0, 1)
        direct = np.einsum("itk,ts,jsk->ijk", columns, inverse, columns)
        products = found.products[np.ix_([0, 2, 3], [0, 2, 3])]
        np.testing.assert_allclose(products, direct, rtol=1e-8, atol=1e-8)
        assert (found.steps, found.skipped) == (37, 3)
        starts = [t for t, draw in enumerate(draws) if draw.first]
        whole = [t for t in starts[:-1] if not left_out & set(range(t, t + 7))]
        assert found.epochs == len(whole)

    def test_an_epoch_ends_where_its_batches_do(self) -> None:
        """Though nobody marks the first step of the next one."""
        path = [(*step[:-1], Draw(10.0)) for step in shuffled_path(4, 60)]
        marked = [(*step[:-1], Draw(10.0, 1.0, t % 10 == 0)) for t, step in enumerate(path)]
        found, expected = (followed(WindowStatistics.empty(2, 60), steps) for steps in (path, marked))
        np.testing.assert_array_equal(found.products, expected.products)
        assert found.displacement_clock == expected.displacement_clock
        assert found.informative == 54
