"""Runs side by side: told apart by their names, compared by D against the learning rate."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgd_probe.report.compare import build_comparison, compare, write_comparison
from sgd_probe.report.figures.comparison import (
    compared_noise,
    compared_spectra,
    compared_verdicts,
    diffusion_scaling,
)
from sgd_probe.report.scaling import comparable, ratio, run_diffusion
from sgd_probe.result import Interval, ModeResult, Verdict, WindowResult
from tests.helpers.results import make_mode, make_window, run_info, write_run_folder

FLAT = make_mode("flat_01", eigenvalue=0.01, verdict=Verdict.DIFFUSIVE)
WINDOW = make_window()


def spread(value: float, freedom: int, rng: np.random.Generator | None = None) -> Interval:
    """An estimate of a positive number from so many squares, with an interval as wide as it should be."""
    found = value if rng is None else value * rng.chisquare(freedom) / freedom
    error = math.sqrt(2 / freedom)
    return Interval(found, found * math.exp(-1.96 * error), found * math.exp(1.96 * error))


def flat(rate: float, noise: float, rng: np.random.Generator | None = None, **changes: Any) -> ModeResult:
    """A flat mode that diffuses as the theory says."""
    options = {
        "diffusion_per_time": spread(rate * noise / 2, 20, rng),
        "noise_variance": spread(noise, 400, rng),
        **changes,
    }
    return dataclasses.replace(FLAT, **options)


def window(rate: float, modes: tuple[ModeResult, ...], index: int = 0, **changes: Any) -> WindowResult:
    return dataclasses.replace(
        WINDOW,
        index=index,
        modes=modes,
        learning_rate=rate,
        effective_learning_rate=rate,
        stability_limit=2 / rate if rate else math.nan,
        **changes,
    )


def test_only_flat_directions_that_diffuse_at_the_last_learning_rate_count() -> None:
    modes = (
        make_mode("top_01", verdict=Verdict.DIFFUSIVE),
        flat(0.1, 4.0),
        flat(0.1, 9.0),
        flat(0.1, 1e6, verdict=Verdict.UNDETERMINED),
    )
    found = run_diffusion([window(0.3, (flat(0.3, 1e6),)), window(0.1, modes), window(0.1001, modes[:2])])
    assert found.rate == 0.1001 and len(found.modes) == 3
    unbiased = math.exp(1 / 20), math.exp(1 / 20 - 1 / 400)
    assert found.per_time.value == pytest.approx(unbiased[0] * 0.05 * (4.0 * 9.0 * 4.0) ** (1 / 3))
    assert found.per_noise.value == pytest.approx(unbiased[1] * 0.1)
    assert comparable(found)


def test_a_mean_is_as_uncertain_as_its_parts_or_as_their_scatter() -> None:
    alike = run_diffusion([window(0.1, tuple(flat(0.1, 4.0) for _ in range(4)))])
    error = math.sqrt(2 / 20) / 2
    assert math.log(alike.per_time.high / alike.per_time.value) == pytest.approx(1.96 * error)
    apart = run_diffusion([window(0.1, (flat(0.1, 1.0), flat(0.1, 100.0)))])
    assert math.log(apart.per_time.high / apart.per_time.value) == pytest.approx(1.96 * math.log(10))
    assert apart.per_noise.high / apart.per_noise.low < 5  # noise is taken off


@pytest.mark.parametrize(
    "modes",
    [(), (make_mode(),), (flat(0.1, 4.0, diffusion_per_time=Interval.unknown()),)],
    ids=["no mode", "a confined one", "an unknown D"],
)
def test_without_a_direction_that_diffuses_nothing_is_said(modes: tuple[ModeResult, ...]) -> None:
    found = run_diffusion([window(0.1, modes)])
    assert not comparable(found) and math.isnan(found.per_time.value)
    assert run_diffusion([window(0.0, modes)]).modes == ()


def test_the_interval_of_a_ratio_holds_the_ratio_of_learning_rates() -> None:
    """In 300 pairs of runs of four directions each, whose noise differs as much as it likes."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        runs = [
            run_diffusion([window(rate, tuple(flat(rate, float(rng.lognormal()), rng) for _ in range(4)))])
            for rate in (0.1, 0.05)
        ]
        found = ratio(runs[0].per_noise, runs[1].per_noise)
        inside += found.low <= 0.5 <= found.high
    assert 275 <= inside <= 297


def test_the_mean_of_many_estimates_is_unbiased() -> None:
    rng = np.random.default_rng(1)
    found = run_diffusion([window(0.1, tuple(flat(0.1, 4.0, rng) for _ in range(4000)))])
    assert found.per_time.value == pytest.approx(0.2, rel=0.02)
    assert found.per_noise.value == pytest.approx(0.1, rel=0.02)


def folders(tmp_path: Path, *rates: float, noise: float = 4.0) -> list[Path]:
    return [
        write_run_folder(
            tmp_path / f"eta_{rate}" / "sgd_probe",
            [window(rate, (make_mode(), flat(rate, noise), flat(rate, noise)))],
            run_info(config={"top": 10, "flat": 4 if rate > 0.05 else 2}),
        )
        for rate in rates
    ]


def test_runs_are_called_by_the_part_of_their_paths_that_differs(tmp_path: Path) -> None:
    assert list(compare(folders(tmp_path, 0.1, 0.05)).runs) == ["eta_0.1", "eta_0.05"]
    other = write_run_folder(tmp_path / "other", [make_window()])
    assert list(compare([*folders(tmp_path, 0.1), other]).runs) == ["sgd_probe", "other"]


def test_every_run_is_checked_against_the_first(tmp_path: Path) -> None:
    found = compare(folders(tmp_path, 0.1, 0.05, 0.2)).checks()
    assert [check.split(":")[0] for check in found] == ["eta_0.05 against eta_0.1", "eta_0.2 against eta_0.1"]
    assert "the learning rate is 0.500 times as large, D per unit time 0.500 [" in found[0]
    assert all(check.endswith("this agrees with D ∝ η.") for check in found)


def test_what_is_not_proportional_is_said(tmp_path: Path) -> None:
    one, other = folders(tmp_path, 0.1, 0.05)
    stuck = flat(0.05, 4.0, diffusion_per_time=spread(0.05 * 4 / 2 / 20, 20))
    write_run_folder(other, [window(0.05, (stuck, stuck))])
    (check,) = compare([one, other]).checks()
    assert check.endswith("this does not agree with D ∝ η.")


def test_a_run_in_which_nothing_diffuses_cannot_be_checked(tmp_path: Path) -> None:
    one, other = folders(tmp_path, 0.1, 0.05)
    write_run_folder(other, [window(0.05, (make_mode(),))])
    found = compare([one, other])
    (check,) = found.checks()
    assert "eta_0.05 has no near-flat direction that diffuses" in check
    page = build_comparison(found)
    assert check.replace("'", "&#x27;") in page and "nan" not in page.split("<script")[0].lower()


def test_the_page_has_the_runs_their_settings_and_the_check(tmp_path: Path) -> None:
    page = build_comparison(compare(folders(tmp_path, 0.1, 0.05)))
    for text in (
        "2 runs side by side",
        'scope="col">eta_0.05',
        "this agrees with D ∝ η",
        "Samples a batch",
        "<td>64</td>",
        "with replacement, 1000 batches an epoch",
        'scope="row">flat</th><td>4</td><td>2</td>',
        "weight²",
    ):
        assert text in page
    assert 'scope="row">top<' not in page  # the same in both
    assert len(page.encode()) < 3_000_000


def test_what_cannot_be_compared_is_refused_in_plain_words(tmp_path: Path) -> None:
    one, other = folders(tmp_path, 0.1, 0.05)
    with pytest.raises(ValueError, match="at least two run folders to compare, found 1"):
        compare([one])
    with pytest.raises(ValueError, match="one of them twice"):
        compare([one, one / ".." / "sgd_probe"])
    write_run_folder(other)
    with pytest.raises(ValueError, match=r"found none in eta_0\.05"):
        compare([one, other])
    with pytest.raises(FileNotFoundError, match="expected a run folder"):
        compare([one, tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="found the folder"):
        write_comparison(folders(tmp_path, 0.1, 0.2), tmp_path)


def test_figures_tell_runs_apart_by_colour_and_symbol(tmp_path: Path) -> None:
    found = compare(folders(tmp_path, 0.1, 0.05, 0.2))
    for figure in (compared_spectra(found.last), compared_noise(found.last)):
        markers = [(trace.marker.color, trace.marker.symbol) for trace in figure.plot.data]
        assert len({colour for colour, _ in markers}) == len({symbol for _, symbol in markers}) == 3
        assert [trace.name for trace in figure.plot.data] == list(found.runs)
    verdicts, scaling = compared_verdicts(found.last), diffusion_scaling(found.diffusion)
    for figure in (compared_spectra(found.last), compared_noise(found.last), verdicts, scaling):
        assert json.loads(figure.plot.to_json()) == json.loads(figure.drawing.to_json())
    assert list(verdicts.plot.layout.xaxis.ticktext) == list(found.runs)
    means = {trace.name: trace for trace in scaling.plot.data if trace.name}
    assert means["eta_0.05"].x == (0.05,) and means["eta_0.05"].y[0] == pytest.approx(0.05, rel=0.1)
    assert list(means["the theory: η"].x) == list(means["the theory: η"].y)


def test_hostile_names_stay_words(tmp_path: Path) -> None:
    one = folders(tmp_path, 0.1)[0]
    evil = write_run_folder(tmp_path / "<img src=x onerror=alert(1)>", [make_window()])
    assert "<img" not in build_comparison(compare([one, evil]))


def test_a_scatter_of_runs_without_any_diffusion_says_so() -> None:
    nothing = run_diffusion([window(0.1, ())])
    assert "no run has" in diffusion_scaling({"a": nothing}).plot.layout.annotations[0].text
