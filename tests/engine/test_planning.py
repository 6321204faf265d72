"""When windows open and how long they are, by a simulated clock."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgd_probe.dynamics.verdict import CONFINED_RELAXATION_TIMES
from sgd_probe.engine.config import MIN_WINDOW, ProbeConfig
from sgd_probe.engine.planning import (
    MAX_BATCHES,
    MAX_SAMPLES,
    MAX_WINDOW,
    MIN_SAMPLES,
    Schedule,
    choose_curvature_batches,
    choose_window,
    finding_products,
    gradients_per_batch,
    most_vectors,
    steps_in_waiting,
    turning_limit,
    windows_ahead,
)

CURVATURES = st.lists(st.one_of(st.floats(-10, 1e4), st.just(math.inf)), max_size=10)


class TestWindowLength:
    @given(
        top=st.lists(st.floats(0.5, 100), min_size=1, max_size=10),
        rate=st.floats(1e-3, 0.1),
        left=st.integers(500),
    )
    def test_stiff_modes_reach_the_rule_s_horizon_with_a_margin(
        self, top: list[float], rate: float, left: int
    ) -> None:
        plan = choose_window(ProbeConfig(), top, [], rate, left)
        reach = min(MAX_WINDOW, left)
        able = [c for c in top if 1.25 * CONFINED_RELAXATION_TIMES / (rate * c) <= reach - 1]
        for curvature in able:
            assert plan.steps * rate * curvature >= 1.25 * CONFINED_RELAXATION_TIMES * (1 - 1e-9)
        assert f"of {len(top)} stiff modes" in plan.reason

    @given(
        top=CURVATURES,
        flat=CURVATURES,
        rate=st.one_of(st.just(0.0), st.floats(1e-8, 10)),
        left=st.one_of(st.just(math.inf), st.integers(MIN_WINDOW, 10**7)),
        period=st.one_of(st.none(), st.integers(MIN_WINDOW, 10**6)),
    )
    def test_it_fits_whatever_comes(
        self, top: list[float], flat: list[float], rate: float, left: float, period: int | None
    ) -> None:
        plan = choose_window(ProbeConfig(every_n_steps=period), top, flat, rate, left)
        assert MIN_WINDOW <= plan.steps <= min(left, MAX_WINDOW, period or math.inf)
        assert plan.reason

    def test_the_user_s_word_wins_unless_the_run_ends(self) -> None:
        config = ProbeConfig(window=300)
        assert choose_window(config, [1.0], [], 0.1, math.inf).steps == 300
        cut = choose_window(config, [1.0], [], 0.1, 120)
        assert cut.steps == 120 and "120 steps that are left" in cut.reason

    def test_it_says_where_flat_directions_will_not_stay_flat(self) -> None:
        plan = choose_window(ProbeConfig(), [1.0], [0.5, 1e-9, 0.02], 0.125, math.inf)
        assert (plan.steps, plan.reason) == (200, "1 of 1 stiff modes reach 20 relaxation times")
        plan = choose_window(ProbeConfig(), [1.0], [0.5, 0.0625, 0.02], 0.125, math.inf)
        assert plan.steps == 200
        assert plan.reason.endswith("; half of the flat directions stay flat for 128 steps only")

    def test_a_subspace_that_turned_and_a_momentum_that_remembers(self) -> None:
        # Overlap .8 -> .2 over 400 steps: halved in 200.
        limit = turning_limit(0.8, 0.2, 400)
        assert limit == pytest.approx(200)
        assert turning_limit(0.8, 0.8, 400) == turning_limit(0.8, math.nan, 400) == math.inf
        assert choose_window(ProbeConfig(), [0.2], [], 0.1, math.inf).steps == 1250
        cut = choose_window(ProbeConfig(), [0.2], [], 0.1, math.inf, limit)
        assert cut.steps == 200 and "half of the stiff subspace turns" in cut.reason
        assert choose_window(ProbeConfig(), [0.2], [], 0.1, math.inf, 30).steps == 100
        assert choose_window(ProbeConfig(), [0.2], [], 0.1, math.inf, 30, momentum=0.95).steps == 400
        assert choose_window(ProbeConfig(), [9.0], [], 0.1, math.inf, momentum=0.99).steps == 2000

    def test_a_learning_rate_of_zero_is_no_division_by_zero(self) -> None:
        plan = choose_window(ProbeConfig(), [1.0], [0.1], 0.0, math.inf)
        assert plan.steps == 200 and plan.reason.startswith("0 of 1 stiff modes")


class TestCurvatureBatches:
    @given(samples=st.integers(1, 10**5), steps=st.one_of(st.just(math.inf), st.integers(0, 10**8)))
    def test_bounds(self, samples: int, steps: float) -> None:
        found = choose_curvature_batches(ProbeConfig(), samples, steps)
        # Two at least: one batch alone gives no standard error and no noise.
        assert 2 <= found <= MAX_BATCHES
        assert found * samples >= MIN_SAMPLES or found == MAX_BATCHES
        assert (found - 1) * samples <= MAX_SAMPLES or found == 2

    def test_the_user_s_word_wins(self) -> None:
        assert choose_curvature_batches(ProbeConfig(curvature_batches=77), 64, 10) == 77

    def test_long_runs_afford_more(self) -> None:
        found = [choose_curvature_batches(ProbeConfig(), 64, steps) for steps in (1e3, 1e5, 1e6, math.inf)]
        assert found == sorted(found) and found[0] == 2 and found[-1] == 32

    def test_windows_cost_more_with_more_modes(self) -> None:
        costs = [gradients_per_batch(ProbeConfig(top=t, flat=f)) for t, f in ((5, 0), (10, 0), (10, 4))]
        assert 0 < costs[0] < costs[1] < costs[2]

    def test_windows_cost_more_without_kept_graphs_and_by_finite_differences(self) -> None:
        config = ProbeConfig(slices=False)
        kept, rebuilt = (gradients_per_batch(config, kept) for kept in (True, False))
        assert rebuilt == pytest.approx(1.6 * kept)
        differences = ProbeConfig(second_derivatives="finite_differences", slices=False)
        assert gradients_per_batch(differences, False) == pytest.approx(2 * kept)
        found = [choose_curvature_batches(ProbeConfig(), 64, 2e5, kept) for kept in (True, False)]
        assert found[0] > found[1] >= 2

    def test_a_short_basis_is_not_the_most_that_is_held(self) -> None:
        config = ProbeConfig(top=10, flat=4)
        assert most_vectors(config, 70) == 70 + 4 + 10
        # tests/curvature/test_memory.py measures them.
        assert [most_vectors(config, basis) for basis in (16, 34)] == [34, 54]

    @pytest.mark.parametrize(("basis", "steps"), [(70, 16), (34, 12), (16, 4)])
    def test_steps_wait_in_the_memory_that_an_opening_took(self, basis: int, steps: int) -> None:
        config = ProbeConfig(top=10, flat=4)
        assert steps_in_waiting(config, basis, 4) == steps
        # Directions, two images of each flat one, start, scaling, and the steps that wait.
        assert 14 + 2 * 4 + 2 + 2 * steps <= most_vectors(config, basis)
        assert steps_in_waiting(config, basis, 2**30) == 1

    def test_interior_modes_cost_their_certificates_and_two_products_together(self) -> None:
        found = [finding_products(ProbeConfig(interior=count)) for count in (0, 1, 5)]
        assert [count - found[0] for count in found] == [0, 2, 2]
        costs = [gradients_per_batch(ProbeConfig(interior=count)) for count in (0, 1, 5)]
        assert [cost - costs[0] for cost in costs] == [0, 2 * (2 + 2), 2 * (2 + 5 * 2)]


class Clock:
    """A run in which a window costs the same seconds every time and runs for 100 steps.

    Args:
        step_seconds: of every step, or of the step that is given.
        foretold: what the first window is thought to cost; what it costs by default.
    """

    def __init__(
        self,
        config: ProbeConfig,
        *,
        steps: int,
        step_seconds: float | Callable[[int], float],
        window_seconds: float,
        first: int = 0,
        foretold: float | None = None,
    ) -> None:
        self.opened: list[int] = []
        self.spent = self.training = 0.0
        schedule = Schedule(config, first, steps)
        open_until = first
        for step in range(first, steps):
            cost = window_seconds if self.opened or foretold is None else foretold
            due = step >= open_until and schedule.due(step, 0, self.spent, cost, self.training)
            if due:
                if self.opened and config.every_n_steps is None:
                    assert self.spent + window_seconds <= config.max_overhead * self.training
                schedule.open(step)
                self.opened.append(step)
                self.spent += window_seconds
                open_until = step + 100
            self.training += step_seconds(step) if callable(step_seconds) else step_seconds
        self.schedule = schedule


@pytest.mark.parametrize("window_seconds", [0.01, 1.0, 4.9, 20.0, 300.0])
@pytest.mark.parametrize("step_seconds", [0.001, 0.1, 2.0])
@pytest.mark.parametrize("overhead", [0.01, 0.05, 0.5])
def test_the_budget_is_held(window_seconds: float, step_seconds: float, overhead: float) -> None:
    config = ProbeConfig(max_overhead=overhead)
    clock = Clock(config, steps=5_000, step_seconds=step_seconds, window_seconds=window_seconds)
    grace = window_seconds if window_seconds <= config.grace_seconds else 0.0
    assert clock.spent <= overhead * clock.training * (1 + 1e-6) + grace
    affordable = overhead * clock.training / window_seconds
    if affordable >= 1.05 or grace:
        assert clock.opened and clock.opened[0] <= 50  # the first comes early
    else:
        assert not clock.opened and clock.schedule.unaffordable
    if affordable >= 2:
        # Windows of 100 steps are the other bound.
        assert len(clock.opened) >= min(int(affordable * 0.8), 45)


def slow_start(step: int) -> float:
    """Compiling, workers that start: what the first steps take says nothing of the run."""
    return 5.0 if step < 12 else 0.1


def validated(step: int) -> float:
    return 60.0 if step % 100 == 99 else 0.1


def faster_later(step: int) -> float:
    return 1.0 if step < 1_000 else 0.1


def slower_later(step: int) -> float:
    return 0.1 if step < 1_000 else 1.0


@pytest.mark.parametrize("step_seconds", [slow_start, validated, slower_later])
@pytest.mark.parametrize("overhead", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("window_seconds", [6.0, 40.0])
def test_the_budget_is_held_where_steps_differ(
    step_seconds: Callable[[int], float], overhead: float, window_seconds: float
) -> None:
    config = ProbeConfig(max_overhead=overhead)
    clock = Clock(config, steps=5_000, step_seconds=step_seconds, window_seconds=window_seconds)
    assert clock.spent <= overhead * clock.training


@pytest.mark.parametrize(
    ("step_seconds", "foretold"), [(faster_later, 20.0), (lambda step: 0.2, 5.0)], ids=["faster", "costlier"]
)
def test_what_nobody_could_know_is_paid_back_before_the_next_window(
    step_seconds: Callable[[int], float], foretold: float
) -> None:
    config = ProbeConfig(max_overhead=0.05)
    clock = Clock(
        config, steps=5_000, step_seconds=step_seconds, window_seconds=20.0, first=0, foretold=foretold
    )
    assert clock.opened[0] <= 50
    # Clock asserts that every later one fits into what the training has taken so far.
    assert clock.spent - 20.0 <= 0.05 * clock.training


def test_a_run_without_an_end_pays_its_first_window_later() -> None:
    schedule = Schedule(ProbeConfig(), 0, math.inf)
    assert schedule.due(0, 0, 0.0, 1e4, 0.0)


def test_a_resumed_run_counts_from_where_it_began() -> None:
    clock = Clock(ProbeConfig(), steps=3_000, step_seconds=0.1, window_seconds=6.0, first=1_000)
    assert 1_000 <= clock.opened[0] <= 1_050
    assert clock.spent <= 0.05 * clock.training


@pytest.mark.parametrize("seconds", [(0.001, 100.0), (5.0, 1e-6)])
def test_every_n_steps_does_not_look_at_the_clock(seconds: tuple[float, float]) -> None:
    config = ProbeConfig(every_n_steps=400)
    clock = Clock(config, steps=2_000, step_seconds=seconds[0], window_seconds=seconds[1])
    assert clock.opened == [0, 400, 800, 1200, 1600]


def test_no_window_opens_where_none_would_fit() -> None:
    for config in (ProbeConfig(), ProbeConfig(every_n_steps=100)):
        schedule = Schedule(config, 0, 1_000)
        assert schedule.steps_left(951) == 49
        assert not schedule.due(951, 0, 0.0, 0.0, 1e6)
        assert schedule.due(950, 0, 0.0, 0.0, 1e6)


def test_a_postponed_window_waits() -> None:
    schedule = Schedule(ProbeConfig(), 0, math.inf)
    schedule.postpone(10, 200)
    assert not schedule.due(209, 0, 0.0, 0.0, 1.0)
    assert schedule.due(210, 0, 0.0, 0.0, 1.0)
    assert schedule.opened == 0


@pytest.mark.parametrize(("opened", "left", "due"), [(0, 60, True), (1, 149, False), (1, 150, True)])
def test_the_end_of_the_run_cuts_no_window_but_the_first(opened: int, left: int, due: bool) -> None:
    schedule = Schedule(ProbeConfig(every_n_steps=400, window=200), 0, 1_000)
    schedule.opened = opened
    assert schedule.due(1_000 - left, 0, 0.0, 0.0, 1.0) is due


def test_the_number_of_windows_that_is_announced() -> None:
    fixed = ProbeConfig(every_n_steps=400, window=200)
    # At 0, 400, 800; another at 1,200 would have no steps left.
    assert windows_ahead(fixed, 1_210, 1.0, 1e9) == 3
    assert windows_ahead(fixed, math.inf, math.inf, 1.0) == math.inf
    budgeted = ProbeConfig(window=200, max_overhead=0.05)
    assert windows_ahead(budgeted, 10_000, 4_000.0, 50.0) == 4
    # Windows of 200 steps do not overlap; a short run gets one of at most grace_seconds.
    assert windows_ahead(budgeted, 450, 1e6, 50.0) == 2
    # The first may be cut short by the end of the run, a later one is not opened for that.
    assert windows_ahead(fixed, 130, 1.0, 1e9) == 1
    assert windows_ahead(fixed, 530, 1.0, 1e9) == 1
    assert windows_ahead(fixed, 550, 1.0, 1e9) == 2
    assert windows_ahead(budgeted, 450, 1.0, 4.0) == 1
    assert windows_ahead(budgeted, 450, 1.0, 50.0) == 0
