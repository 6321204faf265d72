"""What a window says in words and numbers, from windows on a quadratic loss whose truth is known."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from sgd_probe.dynamics.regression import GRADIENT, X
from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.engine import probe
from sgd_probe.engine.measured import Measured, decisive_curvature
from sgd_probe.engine.optimizers import OptimizerState
from sgd_probe.engine.sampling import Sampling
from sgd_probe.engine.summary import summarise
from sgd_probe.result import ModeKind, Verdict, WindowResult
from sgd_probe.theory.closed_forms import SGDDynamics, mean_squared_displacement
from tests.helpers.quadratic import Quadratic, make_engine, run_window

CURVATURES = (8.0, 4.0, 2e-4, 1e-4)
STEPS = 300


def run(
    curvatures: tuple[float, ...] = CURVATURES,
    *,
    noise: float | list[float] = 1.0,
    start: float = 0.0,
    optimizer: dict[str, Any] | None = None,
    steps: int = 10**6,
    sampling: str = "with_replacement",
    seed: int = 1,
    **config: Any,
) -> WindowResult:
    """The result of one window of plain SGD (learning rate 0.05) on a quadratic."""
    module = Quadratic(curvatures, start, noise)
    sgd = torch.optim.SGD(module.parameters(), **{"lr": 0.05, **(optimizer or {})})
    engine = make_engine(module, sgd, sampling=sampling, **{"window": STEPS, **config})
    return run_window(engine, module, sgd, steps=steps, seed=seed)


@pytest.fixture(scope="module")
def measured() -> Measured:
    """What the engine hands over at the end of a window of four modes, the last two of them flat."""
    kept: list[Measured] = []

    def keep(value: Measured) -> WindowResult:
        kept.append(value)
        return summarise(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "summarise", keep)
        run()
    basis = kept[0].basis
    modes = (
        *basis.modes[:2],
        *(dataclasses.replace(m, name=f"flat_{i}", kind="flat") for i, m in enumerate(basis.modes[2:], 1)),
    )
    return dataclasses.replace(kept[0], basis=dataclasses.replace(basis, modes=modes))


def with_modes(measured: Measured, *indices: int, **changes: Any) -> Measured:
    """The same window with changed certificates of some modes."""
    modes = list(measured.basis.modes)
    for index in indices:
        certificate = dataclasses.replace(modes[index].certificate, **changes)
        modes[index] = dataclasses.replace(modes[index], certificate=certificate)
    return dataclasses.replace(measured, basis=dataclasses.replace(measured.basis, modes=tuple(modes)))


def with_statistics(measured: Measured, **changes: Any) -> Measured:
    return dataclasses.replace(measured, statistics=dataclasses.replace(measured.statistics, **changes))


def with_optimizer(measured: Measured, **changes: Any) -> Measured:
    return dataclasses.replace(measured, optimizer=dataclasses.replace(measured.optimizer, **changes))


def assert_undetermined(result: WindowResult, reason: str) -> None:
    assert {mode.verdict for mode in result.modes} == {Verdict.UNDETERMINED}
    for mode in result.modes:
        assert reason.lower() in mode.reason.lower() and mode.reason.endswith(".")
        assert mode.reason[0].isupper()
    assert any(w.startswith("No mode gets a verdict: ") and reason in w for w in result.warnings)
    assert math.isnan(result.expected_false_flags)


class TestVerdicts:
    def test_a_plain_window(self, measured: Measured) -> None:
        result = summarise(measured)
        assert [m.verdict for m in result.modes] == [Verdict.CONFINED] * 2 + [Verdict.DIFFUSIVE] * 2
        assert [m.kind for m in result.modes] == [ModeKind.TOP] * 2 + [ModeKind.FLAT] * 2
        assert result.complete and (result.steps, result.skipped_steps) == (STEPS, 0)
        assert result.warnings == () and all(not mode.marks for mode in result.modes)
        assert result.expected_false_flags == pytest.approx(2 * 0.02 + 2 * 0.05)
        assert result.learning_rate == pytest.approx(0.05)
        assert result.effective_learning_rate == pytest.approx(0.05)
        json.dumps(result.to_dict(), allow_nan=False)

    @pytest.mark.parametrize(
        ("scheme", "reason"),
        [
            ("without_replacement", "without replacement"),
            ("ordered", "fixed order"),
            ("unknown", "is unknown"),
        ],
    )
    def test_withheld_for_the_sampling(self, measured: Measured, scheme: str, reason: str) -> None:
        result = summarise(dataclasses.replace(measured, sampling=Sampling(scheme)))
        assert_undetermined(result, reason)
        # The numbers stay: they are measured all the same.
        assert all(math.isfinite(m.diffusion.low) and m.noise_variance.value > 0 for m in result.modes)

    def test_withheld_for_the_optimizer(self, measured: Measured) -> None:
        other = OptimizerState("AdamW", 0.05, 0.0, 0.0, (0.0,), "its steps are strange")
        result = summarise(dataclasses.replace(measured, optimizer=other))
        assert_undetermined(result, "its steps are strange")
        for mode in result.modes:
            for value in (
                mode.predicted_diffusion,
                mode.langevin_diffusion,
                mode.free_diffusion,
                mode.relaxation_times,
                mode.diffusion_per_time.value,
            ):
                assert math.isnan(value)
            assert math.isfinite(mode.diffusion.value)

    def test_withheld_for_few_steps(self) -> None:
        result = run(steps=39)
        assert_undetermined(result, "only 39 steps were observed, 40 are needed")
        assert not result.complete
        assert f"The run ended after 39 of the window's {STEPS} steps." in result.warnings
        assert all(math.isnan(mode.t_level) for mode in result.modes)

    def test_withheld_for_a_learning_rate_of_zero(self) -> None:
        result = run(optimizer={"lr": 0.0})
        assert_undetermined(result, "the learning rate was zero")
        assert math.isnan(result.effective_learning_rate)

    def test_withheld_for_a_steep_schedule(self, measured: Measured) -> None:
        steep = with_statistics(measured, diffusion_clock=measured.statistics.confinement_clock**2 / 7)
        assert_undetermined(summarise(steep), "no more than 7 equal steps")

    def test_a_window_without_a_step(self, measured: Measured) -> None:
        empty = dataclasses.replace(measured, statistics=WindowStatistics.empty(4, STEPS))
        result = summarise(empty)
        assert_undetermined(result, "only 0 steps")
        assert math.isnan(result.learning_rate)
        assert all(mode.displacements == () for mode in result.modes)
        json.dumps(result.to_dict(), allow_nan=False)


class TestNoNoise:
    def test_a_dead_direction_is_not_called_flat(self) -> None:
        result = run((8.0, 4.0, 0.0), noise=[1.0, 1.0, 0.0])
        dead = result.modes[2]
        assert dead.verdict is Verdict.NO_NOISE
        assert "hardly fluctuates" in dead.reason and "unused weights, perhaps" in dead.reason
        assert dead.marks == ()
        assert [m.verdict for m in result.modes[:2]] == [Verdict.CONFINED] * 2

    def test_where_verdicts_are_withheld_a_dead_direction_is_still_named(self) -> None:
        result = run((8.0, 4.0, 0.0), noise=[1.0, 1.0, 0.0], sampling="without_replacement")
        assert [m.verdict for m in result.modes] == [Verdict.UNDETERMINED] * 2 + [Verdict.NO_NOISE]

    def test_a_direction_that_never_moved(self, measured: Measured) -> None:
        products, position = measured.statistics.products.copy(), measured.statistics.position.copy()
        products[[X, GRADIENT], :, 3] = products[:, [X, GRADIENT], 3] = position[3] = 0
        result = summarise(with_statistics(measured, products=products, position=position))
        assert result.modes[3].verdict is Verdict.NO_NOISE
        assert result.modes[3].noise_variance.value == 0

    def test_full_batches_have_none_at_all(self) -> None:
        result = run(noise=0.0, start=1.0)
        assert {m.verdict for m in result.modes} == {Verdict.NO_NOISE}
        assert all(m.reason == "Its gradient does not fluctuate from batch to batch." for m in result.modes)
        assert all(not m.marks for m in result.modes)

    def test_the_share_is_one_s_own_choice(self, measured: Measured) -> None:
        result = summarise(dataclasses.replace(measured, min_noise_share=0.999999, random_noise=1e6))
        assert {m.verdict for m in result.modes} == {Verdict.NO_NOISE}

    def test_unknown_random_noise_withholds_nothing(self, measured: Measured) -> None:
        """A single curvature batch cannot tell the noise of a random direction."""
        result = summarise(dataclasses.replace(measured, random_noise=math.nan))
        assert result.modes[0].verdict is Verdict.CONFINED
        assert math.isnan(result.modes[0].noise_share)


class TestInterior:
    """The third and fourth mode taken for interior ones."""

    @staticmethod
    def interior(measured: Measured, converged: bool, **certificate: Any) -> Measured:
        changed = with_modes(measured, 2, 3, **certificate)
        modes = tuple(
            dataclasses.replace(m, kind="interior", converged=converged, residual=0.2) if i > 1 else m
            for i, m in enumerate(changed.basis.modes)
        )
        return dataclasses.replace(changed, basis=dataclasses.replace(changed.basis, modes=modes))

    def test_an_eigenvector_goes_by_its_eigenvalue(self, measured: Measured) -> None:
        result = summarise(self.interior(measured, True, eigenvalue=0.5, effective_curvature=2.0))
        for mode in result.modes[2:]:
            assert mode.kind is ModeKind.INTERIOR and not mode.mixed and mode.converged
            assert mode.relaxation_times == pytest.approx(0.5 * 0.05 * STEPS)
            assert not any("eigenvector" in mark for mark in mode.marks)
        assert result.expected_false_flags == pytest.approx(4 * 0.02)

    def test_a_mixture_goes_by_its_effective_curvature(self, measured: Measured) -> None:
        result = summarise(self.interior(measured, False, eigenvalue=0.5, effective_curvature=2.0))
        for mode in result.modes[2:]:
            assert mode.mixed
            assert mode.relaxation_times == pytest.approx(2.0 * 0.05 * STEPS)
            assert "a mixture, not an eigenvector: residual 2.0e-01 of lambda_1" in mode.marks
        assert result.expected_false_flags == pytest.approx(2 * 0.02 + 2 * 0.05)

    def test_a_mixture_about_negative_curvature_is_not_predicted_to_be_confined(
        self, measured: Measured
    ) -> None:
        result = summarise(self.interior(measured, False, eigenvalue=-0.5, effective_curvature=2.0))
        for mode in result.modes[2:]:
            assert mode.relaxation_times == pytest.approx(-2.0 * 0.05 * STEPS)
            assert mode.predicted_diffusion > mode.free_diffusion

    @pytest.mark.parametrize("converged", [True, False])
    def test_a_sign_that_the_samples_do_not_settle(self, measured: Measured, converged: bool) -> None:
        doubtful = summarise(self.interior(measured, converged, eigenvalue=-0.5, standard_error=0.3))
        settled = summarise(self.interior(measured, converged, eigenvalue=-0.5, standard_error=0.2))
        expected = "its held-out curvature, -0.5 ± 0.3, cannot be told from zero"
        assert [expected in mode.marks for mode in doubtful.modes] == [False, False, True, True]
        assert not any("told from zero" in mark for mode in settled.modes for mark in mode.marks)

    def test_only_stiff_modes_are_said_to_rotate(self, measured: Measured) -> None:
        window = self.interior(measured, True, eigenvalue=0.5)
        result = summarise(dataclasses.replace(window, end_eigenvalues=(8.0, 4.0, 0.1, 0.5)))
        assert any("during the window" in mark for mark in result.modes[2].marks)
        assert not any("modes rotate" in warning for warning in result.warnings)


class TestMarks:
    def test_not_an_eigenvector(self, measured: Measured) -> None:
        modes = tuple(
            dataclasses.replace(mode, converged=False, residual=0.2) for mode in measured.basis.modes
        )
        basis = dataclasses.replace(measured.basis, modes=modes, converged=False, message="it gave up")
        result = summarise(dataclasses.replace(measured, basis=basis))
        expected = "not an eigenvector: residual 2.0e-01 of lambda_1"
        # Near-flat directions are not meant to be eigenvectors.
        assert [expected in mode.marks for mode in result.modes] == [True, True, False, False]
        assert "Not every stiff mode converged: it gave up." in result.warnings

    def test_changed_curvature(self, measured: Measured) -> None:
        result = summarise(dataclasses.replace(measured, end_eigenvalues=(8.1, 1.0, 9.0, 9.0)))
        assert [len(mode.marks) for mode in result.modes] == [0, 1, 0, 0]
        assert result.modes[1].marks == ("its curvature went from 4 to 1 during the window",)
        assert result.modes[1].end_eigenvalue == 1.0
        assert any(w.startswith("1 stiff modes changed their curvature") for w in result.warnings)

    def test_unmeasured_end_curvature_is_no_change(self, measured: Measured) -> None:
        result = summarise(dataclasses.replace(measured, end_eigenvalues=()))
        assert all(mode.marks == () and math.isnan(mode.end_eigenvalue) for mode in result.modes)

    def test_heavy_tails(self, measured: Measured) -> None:
        powers = measured.statistics.powers * [[1], [1], [1], [5]]
        result = summarise(with_statistics(measured, powers=powers))
        for mode, plain in zip(result.modes, summarise(measured).modes, strict=True):
            assert mode.noise_kurtosis > 10
            (mark,) = mode.marks
            assert mark.startswith("heavy-tailed noise (kurtosis 1")
            assert mode.noise_variance.low < plain.noise_variance.low
            assert mode.noise_variance.high > plain.noise_variance.high

    def test_diffusive_against_its_certificate(self, measured: Measured) -> None:
        result = summarise(with_modes(measured, 2, 3, effective_curvature=3 / (0.05 * STEPS)))
        for mode in result.modes[2:]:
            assert mode.verdict is Verdict.DIFFUSIVE
            assert mode.relaxation_times == pytest.approx(3)
            assert any("held-out curvature predicts 3.0 relaxation times" in mark for mark in mode.marks)

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_the_edge_of_stability(self, measured: Measured, momentum: float) -> None:
        """The rate that counts is that of the window, not the one it opened with."""
        limit = 2 * (1 + momentum) / (0.05 * (1 - momentum))
        near = with_modes(measured, 0, eigenvalue=0.95 * limit)
        result = summarise(with_optimizer(near, momentum=momentum, learning_rate=1e-6))
        assert "at 95% of the stability limit: predictions withheld" in result.modes[0].marks
        for value in (result.modes[0].predicted_diffusion, result.modes[0].langevin_diffusion):
            assert math.isnan(value)
        assert math.isfinite(result.modes[0].diffusion.value)
        assert math.isfinite(result.modes[1].predicted_diffusion)
        below = summarise(with_modes(measured, 0, eigenvalue=0.8 * 40))
        assert math.isfinite(below.modes[0].predicted_diffusion)
        assert not any("stability" in mark for mark in below.modes[0].marks)


class TestWarnings:
    def test_skipped_steps(self, measured: Measured) -> None:
        result = summarise(with_statistics(measured, skipped=3))
        assert result.skipped_steps == 3
        assert any("3 steps were left out (not finite" in warning for warning in result.warnings)

    def test_negative_curvature(self, measured: Measured) -> None:
        result = summarise(with_modes(measured, 1, eigenvalue=-2.0, standard_error=0.5))
        assert any("negative curvature (-2)" in warning for warning in result.warnings)
        # Within its error it may be positive.
        unsure = summarise(with_modes(measured, 1, eigenvalue=-2.0, standard_error=1.5))
        assert not any("negative curvature" in warning for warning in unsure.warnings)

    def test_a_window_too_short_for_every_stiff_mode(self, measured: Measured) -> None:
        slow = with_modes(measured, 0, 1, eigenvalue=10 / (0.05 * STEPS))
        assert any("(10.0 relaxation times at most, 20 needed)" in w for w in summarise(slow).warnings)
        one = with_modes(measured, 1, eigenvalue=0.1)
        assert not any("relaxation times at most" in w for w in summarise(one).warnings)

    def test_a_window_too_short_for_the_momentum(self, measured: Measured) -> None:
        result = summarise(with_optimizer(measured, momentum=0.98))
        assert_undetermined(result, "too short for this momentum")
        usual = summarise(with_optimizer(measured, momentum=0.9))
        assert not any("momentum" in warning for warning in usual.warnings)

    def test_what_the_engine_noticed_comes_first(self, measured: Measured) -> None:
        noticed = dataclasses.replace(measured, warnings=("Something happened.",), planned_steps=STEPS + 1)
        result = summarise(noticed)
        assert result.warnings[0] == "Something happened."
        assert len(result.warnings) == 2 and not result.complete


class TestNumbers:
    def test_theory_and_measurement_stand_side_by_side(self, measured: Measured) -> None:
        result = summarise(measured)
        dynamics = SGDDynamics(0.05)
        for mode in result.modes:
            curvature = mode.held_out_eigenvalue if mode.kind is ModeKind.TOP else mode.effective_curvature
            assert mode.relaxation_times == pytest.approx(curvature * 0.05 * STEPS)
            noise = mode.noise_variance
            assert noise.low < 1.0 < noise.high
            assert mode.free_diffusion == pytest.approx(0.05**2 * noise.value / 2)
            assert mode.diffusion_per_time.value == pytest.approx(mode.diffusion.value / 0.05)
            for point in mode.displacements:
                expected = mean_squared_displacement(curvature, noise.value, point.lag, dynamics)
                assert point.discrete == pytest.approx(expected)
            (point,) = [p for p in mode.displacements if p.lag == mode.diffusion_lag]
            assert mode.diffusion.value == pytest.approx(point.measured.value / (2 * point.lag))
            assert mode.predicted_diffusion == pytest.approx(point.discrete / (2 * point.lag))
            assert mode.diffusion.low < mode.predicted_diffusion < mode.diffusion.high

    def test_a_curvature_is_measured_for_confined_modes_only(self, measured: Measured) -> None:
        confined, flat = (summarise(measured).modes[i] for i in (0, 2))
        assert confined.measured_curvature.low < 8.0 < confined.measured_curvature.high
        assert math.isnan(flat.measured_curvature.value)

    def test_momentum(self) -> None:
        flats = 12
        result = run((8.0, *[1e-4] * flats), optimizer={"lr": 0.005, "momentum": 0.9}, window=1000)
        assert result.effective_learning_rate == pytest.approx(0.05)
        found = [mode.diffusion for mode in result.modes[1:]]
        exact = 0.05**2 / 2
        assert sum(interval.low < exact < interval.high for interval in found) >= flats - 3
        counts = 1000 // result.modes[1].diffusion_lag
        error = math.sqrt(2 / (counts * flats))
        assert abs(np.mean([interval.value for interval in found]) / exact - 1) < 4 * error
        for mode in result.modes[1:]:
            assert mode.predicted_diffusion == pytest.approx(mode.free_diffusion, rel=0.05)

    def test_dampening(self) -> None:
        """Half the gradient at twice the rate is the same motion, to the last prediction."""
        plain = run(optimizer={"lr": 0.005, "momentum": 0.9}, window=400)
        damped = run(optimizer={"lr": 0.01, "momentum": 0.9, "dampening": 0.5}, window=400)
        assert damped.effective_learning_rate == pytest.approx(0.05)
        assert damped.learning_rate == pytest.approx(2 * plain.learning_rate)
        for one, other in zip(plain.modes, damped.modes, strict=True):
            ratio = other.noise_variance.value / one.noise_variance.value
            assert other.predicted_diffusion == pytest.approx(ratio * one.predicted_diffusion, rel=1e-6)

    def test_weight_decay_confines(self) -> None:
        """The decay of 4 makes flat modes stiff; the certificate alone does not know."""
        result = run((1e-4, 2e-4), optimizer={"weight_decay": 4.0}, start=0.1)
        for mode in result.modes:
            assert mode.held_out_eigenvalue < 1e-3
            assert mode.relaxation_times == pytest.approx(4.0 * 0.05 * STEPS, rel=1e-3)
            assert mode.verdict is Verdict.CONFINED
            assert mode.measured_curvature.low < 4.0 < mode.measured_curvature.high

    def test_decisive_curvature(self, measured: Measured) -> None:
        changed = with_modes(measured, 0, 2, eigenvalue=1.0, effective_curvature=3.0)
        assert decisive_curvature(changed.basis.modes[0], 0.5) == 1.5
        assert decisive_curvature(changed.basis.modes[2], 0.5) == 3.5

    def test_a_basis_of_one_mode(self) -> None:
        assert [mode.name for mode in run((8.0,)).modes] == ["top_01"]
