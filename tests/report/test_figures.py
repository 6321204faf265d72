"""Every figure holds what the results say, and nothing that was not measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sgd_probe.report.figures import (
    Drawing,
    Figure,
    all_figures,
    autocorrelation,
    density,
    diffusion,
    displacement,
    edge_of_stability,
    lambda_max,
    layers,
    loss_slices,
    noise,
    spectra,
    spectrum,
    verdict_timeline,
)
from sgd_probe.report.figures.drawing import scatter
from sgd_probe.report.wording import VERDICT_STYLES, headline, interval, number, plus_minus
from sgd_probe.result import Interval, LagPoint, LossSlice, Verdict, WindowResult
from tests.helpers.results import make_mode, make_window, without_numbers

OKABE_ITO = {
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#999999",
}
OF_A_WINDOW = [spectrum, displacement, noise, diffusion, loss_slices, layers, density, autocorrelation]


def traces(figure: Figure) -> dict[str, dict[str, Any]]:
    """The figure's named traces as they reach the browser."""
    return {trace["name"]: trace for trace in json.loads(figure.drawing.to_json())["data"] if "name" in trace}


def test_every_figure_says_what_it_shows_in_which_units_and_how_to_read_it() -> None:
    figures = all_figures([make_window(0), make_window(1)])
    assert len({figure.name for figure in figures}) == len(figures) == 12
    for figure in figures:
        assert figure.title
        assert figure.how_to_read.endswith(".") and figure.summary.endswith(".")
        assert figure.plot.layout.xaxis.title.text or figure.name == "layers"
    titles = {figure.name: figure.plot.layout.yaxis.title.text for figure in figures}
    assert "loss / weight²" in titles["spectrum"]
    assert "weight² / optimizer step" in titles["diffusion"]


UNUSUAL = {
    "no mode": [make_window(modes=())],
    "one mode": [make_window(modes=(make_mode(),))],
    "no number": [make_window(modes=tuple(without_numbers(mode) for mode in make_window().modes))],
    "no displacement": [make_window(modes=(make_mode(displacements=()),)), make_window(1)],
    "many windows": [make_window(i, seed=i) for i in range(60)],
    "infinite": [replace(make_window(), curvature=replace(make_window().curvature, lambda_max=-math.inf))],
}


@pytest.mark.parametrize("windows", UNUSUAL.values(), ids=UNUSUAL)
def test_no_result_breaks_a_figure(windows: list[WindowResult]) -> None:
    """JSON is strict, and Plotly, which checks every property, finds nothing to object to or to add."""
    for figure in all_figures(windows):
        assert json.loads(figure.plot.to_json()) == json.loads(figure.drawing.to_json())


def test_a_number_that_is_not_finite_is_no_json() -> None:
    drawing = Drawing({})
    drawing.add_trace(scatter(x=[math.nan]))
    with pytest.raises(ValueError, match="not JSON compliant"):
        drawing.to_json()


@pytest.mark.parametrize("draw", OF_A_WINDOW)
def test_an_empty_figure_says_so(draw: Callable[[WindowResult], Figure]) -> None:
    unknown: dict[str, Any] = {
        "epoch_correlation": math.nan,
        "epoch_correlation_interval": Interval.unknown(),
    }
    bare = make_window(modes=(), slices=(), **unknown)
    columns: dict[str, Any] = dict.fromkeys(("density_nodes", "density_weights", "density_widths"), ())
    bare = replace(bare, curvature=replace(bare.curvature, **columns))
    notes = ("nothing was measured", "no slices were taken", "no direction is flagged in this window")
    assert draw(bare).plot.layout.annotations[0].text in (*notes, "this needs five whole epochs in a window")


def test_figures_without_any_window_are_refused_in_plain_words() -> None:
    with pytest.raises(ValueError, match="expected at least one window result, found none"):
        all_figures([])


def test_each_verdict_has_its_own_colour_symbol_and_words() -> None:
    assert set(VERDICT_STYLES) == set(Verdict)
    styles = VERDICT_STYLES.values()
    assert {style.colour for style in styles} <= OKABE_ITO
    for attribute in ("colour", "symbol", "label", "code", "meaning"):
        assert len({getattr(style, attribute) for style in styles}) == len(Verdict)


@pytest.mark.parametrize("draw", [spectrum, noise, diffusion])
def test_points_carry_the_colour_of_their_verdict(draw: Callable[[WindowResult], Figure]) -> None:
    window = make_window()
    drawn = traces(draw(window))
    for verdict, count in window.counts().items():
        style = VERDICT_STYLES[verdict]
        assert len(drawn[style.label]["x"]) == count
        assert drawn[style.label]["marker"]["color"] == style.colour


def test_spectrum_shows_held_out_values_flat_ones_by_effective_curvature_and_negative_ones_hollow() -> None:
    top = make_mode("top_01", eigenvalue=8.0, held_out_standard_error=0.5)
    negative = make_mode("top_02", eigenvalue=-3.0, verdict=Verdict.UNSTABLE)
    flat = make_mode("flat_01", eigenvalue=0.01, verdict=Verdict.DIFFUSIVE, effective_curvature=0.04)
    drawn = traces(spectrum(make_window(modes=(top, negative, flat))))
    confined, unstable, diffusive = drawn["confined"], drawn["unstable"], drawn["diffusive"]
    assert confined["y"] == [8.0]
    assert confined["error_y"]["array"] == [0.5]
    assert unstable["y"] == [3.0]
    assert unstable["marker"]["symbol"] == ["star-open"]
    assert "−3.0" in unstable["hovertext"][0]
    assert diffusive["y"] == [0.04]
    assert diffusive["error_y"]["array"] == [None]
    assert drawn["|v·Hv|, flat"]["y"] == [0.01]


def test_spectrum_tells_converged_interior_directions_from_mixed_ones() -> None:
    top = make_mode("top_01", eigenvalue=8.0)
    converged = make_mode("interior_01", eigenvalue=2.0, effective_curvature=2.01)
    mixed = make_mode("interior_02", eigenvalue=-0.3, effective_curvature=0.5, converged=False)
    flat = make_mode("flat_01", eigenvalue=0.01, effective_curvature=0.04)
    figure = spectrum(make_window(modes=(top, converged, mixed, flat)))
    drawn = traces(figure)
    assert drawn["confined"]["y"] == [8.0, 2.0, 0.5, 0.04]
    assert drawn["confined"]["marker"]["symbol"] == ["circle", "circle", "circle-open", "circle"]
    assert drawn["|v·Hv|, mixed"]["y"] == [0.3, 0.01]
    assert "an eigenvector" in figure.how_to_read and "interior and not converged" in figure.how_to_read
    assert "interior" not in spectrum(make_window()).how_to_read


def test_displacement_shows_one_direction_per_verdict_and_leaves_the_others_to_the_legend() -> None:
    window = make_window()
    data = json.loads(displacement(window).plot.to_json())["data"]
    by_mode: dict[str, list[dict[str, Any]]] = {}
    for trace in data:
        if "legendgroup" in trace:
            by_mode.setdefault(trace["legendgroup"], []).append(trace)
    assert set(by_mode) == {mode.name for mode in window.modes}
    shown = [name for name, group in by_mode.items() if group[0]["visible"] is True]
    assert len(shown) == len({mode.verdict for mode in window.modes})
    for group in by_mode.values():
        assert len({trace["visible"] for trace in group}) == 1
        assert [trace.get("line", {}).get("dash") for trace in group] == ["solid", "dash", "dot", None]


def test_displacement_draws_measured_points_with_intervals_beside_both_predictions() -> None:
    points = (
        LagPoint(1, 100, Interval(2.0, 1.5, 2.6), 2.1, 1.9, 2.5),
        LagPoint(10, 10, Interval.unknown(), math.nan, 4.0),
    )
    drawn = json.loads(displacement(make_window(modes=(make_mode(displacements=points),))).plot.to_json())
    discrete, langevin, free, measured = drawn["data"][-4:]
    assert (discrete["y"], langevin["y"], free["y"]) == ([2.1, None], [1.9, 4.0], [2.5, None])
    assert measured["y"] == [2.0, None]
    assert measured["error_y"]["array"] == pytest.approx([0.6, None])
    assert measured["error_y"]["arrayminus"] == pytest.approx([0.5, None])


def test_noise_line_is_proportional_to_curvature_through_the_median_ratio() -> None:
    modes = tuple(
        make_mode(f"top_{i:02d}", eigenvalue=curvature, noise_variance=Interval(2 * curvature, 1.0, 99.0))
        for i, curvature in enumerate((10.0, 5.0, 1.0))
    )
    line = traces(noise(make_window(modes=modes)))["variance ∝ curvature"]
    assert line["x"] == [1.0, 10.0]
    assert line["y"] == [2.0, 20.0]
    assert "variance ∝ curvature" not in traces(noise(make_window(modes=modes[:1])))


def test_diffusion_shows_measured_predicted_and_free() -> None:
    mode = make_mode(diffusion=Interval(3.0, 2.0, 5.0), predicted_diffusion=3.1, free_diffusion=7.0)
    drawn = traces(diffusion(make_window(modes=(mode,))))
    assert drawn["confined"]["y"] == [3.0]
    assert drawn["confined"]["error_y"]["array"] == [2.0]
    assert drawn["discrete prediction"]["y"] == [3.1]
    assert drawn["free (no curvature)"]["y"] == [7.0]


def test_timeline_has_a_row_per_name_a_column_per_window_and_gaps_where_a_mode_is_missing() -> None:
    first = make_window(0, modes=(make_mode("top_01"), make_mode("flat_01", verdict=Verdict.DIFFUSIVE)))
    second = make_window(1, modes=(make_mode("top_01", verdict=Verdict.UNDETERMINED), make_mode("top_02")))
    drawn = json.loads(verdict_timeline([first, second]).plot.to_json())
    grid = drawn["data"][0]
    order = list(VERDICT_STYLES)
    confined, diffusive, undetermined = (
        order.index(v) for v in (Verdict.CONFINED, Verdict.DIFFUSIVE, Verdict.UNDETERMINED)
    )
    assert drawn["layout"]["yaxis"]["ticktext"] == ["top_01", "top_02", "flat_01"]
    assert grid["z"] == [[confined, undetermined], [None, confined], [diffusive, None]]


def test_timeline_lists_the_kinds_in_their_order() -> None:
    first = make_window(0, modes=(make_mode("top_01"), make_mode("flat_01")))
    second = make_window(1, modes=tuple(map(make_mode, ("top_01", "top_02", "interior_01", "flat_01"))))
    drawn = json.loads(verdict_timeline([first, second]).plot.to_json())
    assert drawn["layout"]["yaxis"]["ticktext"] == ["top_01", "top_02", "interior_01", "flat_01"]


def test_largest_curvature_is_drawn_as_found_and_as_held_out() -> None:
    windows = [make_window(0), make_window(1, modes=())]
    found, held_out = json.loads(lambda_max(windows).plot.to_json())["data"]
    assert found["y"] == [window.curvature.lambda_max for window in windows]
    assert held_out["y"] == [windows[0].modes[0].held_out_eigenvalue, None]


def test_density_counts_eigenvalues_and_marks_the_directions_with_their_residuals() -> None:
    """Far from zero, where the axis is logarithmic, a lone eigenvalue has height one."""
    window = make_window(modes=(make_mode("top_01", eigenvalue=8.0, residual=0.1),))
    found = replace(
        window.curvature,
        lambda_max=10.0,
        parameters=1000,
        density_nodes=(0.0, 0.5, 10.4),
        density_weights=(0.989, 0.01, 0.001),
        density_widths=(0.001, 0.0, 0.0),
    )
    drawn = traces(density(replace(window, curvature=found)))
    line, mark = drawn["all eigenvalues"], drawn["confined"]

    def height(value: float) -> float:
        place = math.asinh(value / 0.01)
        return float(min(zip(line["x"], line["y"], strict=True), key=lambda xy: abs(xy[0] - place))[1])

    assert height(10.4) == pytest.approx(1.0, rel=0.1)
    assert height(0.5) == pytest.approx(10.0, rel=0.1)
    assert height(0.0) == pytest.approx(989.0, rel=0.1)
    assert height(3.0) < 0.1
    assert mark["x"] == pytest.approx([math.asinh(10.4 / 0.01)])
    assert mark["error_x"]["array"] == pytest.approx([math.asinh(11.4 / 0.01) - math.asinh(10.4 / 0.01)])


def test_spectra_put_a_column_and_the_marks_of_every_window_side_by_side() -> None:
    windows = [make_window(i) for i in range(3)]
    drawn = json.loads(spectra(windows).plot.to_json())["data"]
    assert [len(row) for row in drawn[0]["z"]] == [3] * len(drawn[0]["y"])
    marks = [x for trace in drawn[1:] for x in trace["x"]]
    assert sorted(marks) == sorted(3 * [*range(3)] + [i for i in range(3) for _ in range(11)])


def test_slices_stand_beside_each_other_with_how_far_the_weights_get() -> None:
    stiff = make_mode("top_01", eigenvalue=8.0)
    flat = make_mode(
        "flat_01", eigenvalue=0.01, verdict=Verdict.DIFFUSIVE, diffusion=Interval(2e-3, 1e-3, 4e-3)
    )
    offsets = (-1.0, 0.0, 1.0)
    slices = (
        LossSlice("top_01", offsets, (4.0, 0.0, 4.1), (0.1, 0.0, 0.2), 1.5),
        LossSlice("flat_01", offsets, (0.1, 0.0, math.nan), (math.nan,) * 3, 1.5),
    )
    drawn = traces(loss_slices(make_window(modes=(stiff, flat), slices=slices, steps=1000)))
    assert drawn["top_01 · confined"]["y"] == [4.0, 0.0, 4.1]
    assert drawn["top_01 · confined"]["error_y"]["array"] == pytest.approx([0.1, 0.0, 0.2])
    assert drawn["flat_01 · diffusive"]["y"] == [0.1, 0.0, None]
    assert drawn["diffusion length after 1000 steps ± 2.00"]["x"] == pytest.approx([-2.0, 2.0])
    at_lag = next(p for p in stiff.displacements if p.lag == stiff.diffusion_lag).measured.value
    typical = next(t for name, t in drawn.items() if name.startswith("typical displacement over 10 steps"))
    assert typical["x"][1] == pytest.approx(math.sqrt(at_lag))


def test_slices_of_directions_that_a_window_no_longer_has_are_left_out() -> None:
    slices = (LossSlice("flat_09", (0.0,), (0.0,), (0.0,), 1.0),)
    assert not loss_slices(make_window(slices=slices)).plot.data


def test_layers_are_those_of_the_directions_that_get_away() -> None:
    flat = make_mode("flat_01", verdict=Verdict.DIFFUSIVE, layer_shares={"a.weight": 0.7, "b.weight": 0.2})
    drift = make_mode("flat_02", verdict=Verdict.DRIFTING, layer_shares={"b.weight": 1.0})
    held = make_mode("top_01", layer_shares={"c.weight": 1.0})
    drawn = json.loads(layers(make_window(modes=(held, flat, drift))).plot.to_json())
    assert drawn["layout"]["yaxis"]["ticktext"] == ["b.weight", "a.weight", "all others"]
    assert drawn["data"][0]["z"] == [[0.2, 1.0], [0.7, 0.0], [pytest.approx(0.1), 0.0]]
    assert drawn["layout"]["xaxis"]["ticktext"] == ["flat_01<br>diffusive", "flat_02<br>drifting"]


def test_the_correlation_within_an_epoch_stands_beside_what_the_loader_makes_it() -> None:
    mode = make_mode(epoch_correlation=Interval(-0.03, -0.04, -0.01))
    window = make_window(
        modes=(mode, make_mode("top_02", epoch_correlation=Interval.unknown())),
        epoch_correlation_interval=Interval(-0.035, -0.04, -0.02),
        expected_epoch_correlation=-1 / 27,
    )
    drawn = traces(autocorrelation(window))
    assert drawn["confined"]["y"] == [-0.03]  # the other mode has none
    assert drawn["median mode"]["error_y"]["array"] == pytest.approx([0.015])
    assert drawn["−1/(n−1) = −0.0370"]["y"] == [-1 / 27, -1 / 27]


def test_the_edge_is_the_largest_positive_curvature_over_the_limit() -> None:
    modes = (
        make_mode("top_01", eigenvalue=-9.0),
        make_mode("top_02", eigenvalue=8.0, held_out_standard_error=1.0, end_eigenvalue=6.0),
    )
    unknown = make_window(1, modes=modes, stability_limit=math.nan)
    start, end, edge = json.loads(
        edge_of_stability([make_window(0, modes=modes, stability_limit=20.0), unknown]).plot.to_json()
    )["data"]
    assert start["y"] == [0.4, None] and start["error_y"]["array"] == pytest.approx([0.05, None])
    assert end["y"] == [0.3, None] and edge["y"] == [1.0, 1.0]
    note = edge_of_stability([unknown]).plot.layout.annotations[0].text
    assert note == "the theory does not cover this optimizer"


def test_names_from_a_run_are_shown_as_they_are_and_not_read_as_markup() -> None:
    mode = make_mode("<a href='x'>top</a>" + 500 * "x")
    for figure in all_figures([make_window(modes=(mode,))]):
        shown = json.loads(figure.plot.to_json())
        for trace in shown["data"]:
            trace.pop("legendgroup", None)  # a key, never shown
        assert "<a href" not in json.dumps(shown)
        assert 30 * "x" not in json.dumps(shown)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (1260.4, "1260"),
        (-1.9, "−1.90"),
        (0.00123, "0.00123"),
        (1.234e-7, "1.23\u00a0×\u00a010⁻⁷"),
        (math.nan, "unknown"),
        (math.inf, "unknown"),
    ],
)
def test_numbers_are_written_for_people(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("value", [5e-324, -2.2e-308, sys.float_info.max])
def test_the_ends_of_the_float_range_can_be_written(value: float) -> None:
    assert "× 10".replace(" ", "\u00a0") in number(value)


def test_uncertainties_share_the_power_of_ten_of_their_value() -> None:
    assert plus_minus(12.34, 0.56) == "12.3\u00a0±\u00a00.6"
    assert plus_minus(1e-6, 2e-7) == "(1.00\u00a0±\u00a00.20)\u00a0×\u00a010⁻⁶"
    assert plus_minus(1.0, math.nan) == "1.00"
    assert interval(Interval(2e-5, 1e-5, 4e-5)) == "2.00 [1.00,\u00a04.00]\u00a0×\u00a010⁻⁵"
    assert interval(Interval.unknown()) == "unknown"


def test_headline_counts_every_verdict_in_plain_words() -> None:
    modes = (make_mode("top_01"), make_mode("top_02"), make_mode("flat_01", verdict=Verdict.NO_NOISE))
    window = make_window(modes=modes, opened_at_step=4000, closed_at_step=5000)
    assert headline(window) == "2 confined, 1 without noise in the last window (steps 4000–5000)"
    assert headline(make_window(modes=())).startswith("No modes in the last window")


def test_importing_the_package_and_the_command_line_brings_neither_plotly_nor_torch() -> None:
    code = "import sys, sgd_probe, sgd_probe.cli; assert not {'plotly', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_drawing_does_without_plotly() -> None:
    code = (
        "import sys; from sgd_probe.report.figures import all_figures; "
        "from tests.helpers.results import make_window; "
        "[figure.drawing.to_json() for figure in all_figures([make_window()])]; "
        "assert 'plotly' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
