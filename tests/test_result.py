"""The result of a window: written as strict JSON, read back as it was, refused where it is broken."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgd_probe.result import (
    SCHEMA_VERSION,
    CostResult,
    CurvatureResult,
    Interval,
    LagPoint,
    LossSlice,
    ModeKind,
    ModeResult,
    Verdict,
    WindowResult,
)
from tests.helpers.results import make_mode, make_window

# Infinity is written as null and read back as NaN: what could not be measured.
NUMBERS = st.one_of(st.floats(allow_infinity=False), st.just(math.nan))
TEXTS = st.text(max_size=8)
INTERVALS = st.builds(Interval, NUMBERS, NUMBERS, NUMBERS)
POINTS = st.builds(
    LagPoint,
    lag=st.integers(1),
    count=st.integers(1),
    measured=INTERVALS,
    discrete=NUMBERS,
    langevin=NUMBERS,
    free=NUMBERS,
)


def built(cls: type, **special: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Any value of a dataclass whose plain fields are numbers, bool, str or intervals."""
    plain: dict[str, st.SearchStrategy[Any]] = {
        "float": NUMBERS,
        "int": st.integers(),
        "bool": st.booleans(),
        "str": TEXTS,
        "Interval": INTERVALS,
        "tuple[float, ...]": st.lists(NUMBERS, max_size=3).map(tuple),
    }
    fields = dataclasses.fields(cls)
    plainly = {f.name: plain[str(f.type)] for f in fields if f.name not in special}
    return st.builds(cls, **plainly, **special)


MODES = built(
    ModeResult,
    kind=st.sampled_from(ModeKind),
    verdict=st.sampled_from(Verdict),
    marks=st.lists(TEXTS, max_size=2).map(tuple),
    layer_shares=st.dictionaries(TEXTS, NUMBERS, max_size=2),
    noise_correlations=st.dictionaries(TEXTS, NUMBERS, max_size=2),
    displacements=st.lists(POINTS, max_size=2).map(tuple),
)
WINDOWS = built(
    WindowResult,
    slices=st.lists(built(LossSlice), max_size=2).map(tuple),
    curvature=built(CurvatureResult),
    cost=built(CostResult),
    modes=st.lists(MODES, max_size=2).map(tuple),
    warnings=st.lists(TEXTS, max_size=2).map(tuple),
)


def same(one: Any, other: Any) -> bool:
    """Equal, with NaN equal to NaN and no int in the place of a float."""
    if dataclasses.is_dataclass(one) and not isinstance(one, type):
        return type(one) is type(other) and all(
            same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)
        )
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return type(one) is type(other) and bool(one == other)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(window=WINDOWS)
def test_round_trip_through_strict_json(window: WindowResult) -> None:
    text = json.dumps(window.to_dict(), allow_nan=False)
    assert same(window, WindowResult.from_dict(json.loads(text)))


def test_round_trip_of_a_whole_window() -> None:
    window = make_window()
    found = WindowResult.from_dict(json.loads(json.dumps(window.to_dict(), allow_nan=False)))
    assert same(window, found)
    assert WindowResult.from_dict(window.to_dict()).counts() == window.counts()


def test_a_window_of_an_older_version_is_read_and_what_it_lacks_is_unknown() -> None:
    """Fields that came later than the schema are optional."""
    data = make_window().to_dict()
    for name in ("slices", "stability_limit", "epoch_correlation_interval", "joint_curvatures"):
        del data[name]
    for name in ("density_nodes", "density_weights", "density_widths"):
        del data["curvature"][name]
    for mode in data["modes"]:
        del mode["epoch_correlation"]
        for point in mode["displacements"]:
            del point["free"]
    found = WindowResult.from_dict(json.loads(json.dumps(data)))
    assert found.slices == () and found.curvature.density_nodes == ()
    assert math.isnan(found.stability_limit) and math.isnan(found.modes[0].displacements[0].free)


def test_infinity_is_written_as_null() -> None:
    mode = make_mode(predicted_diffusion=math.inf, langevin_diffusion=-math.inf)
    window = make_window(modes=(mode,))
    data = window.to_dict()
    assert data["modes"][0]["predicted_diffusion"] is None
    (found,) = WindowResult.from_dict(data).modes
    assert math.isnan(found.predicted_diffusion) and math.isnan(found.langevin_diffusion)


def test_a_number_without_its_point_is_a_float_again() -> None:
    """Other writers of JSON put 1 for 1.0."""
    data = make_window().to_dict()
    data["learning_rate"] = 1
    found = WindowResult.from_dict(data).learning_rate
    assert found == 1.0 and type(found) is float


@pytest.mark.parametrize("schema", [None, 0, SCHEMA_VERSION + 1, "1"])
def test_another_schema_is_refused(schema: Any) -> None:
    data = make_window().to_dict() | {"schema": schema}
    with pytest.raises(ValueError, match=f"schema {SCHEMA_VERSION}, found {schema!r}"):
        WindowResult.from_dict(data)
    del data["schema"]
    with pytest.raises(ValueError, match="found None"):
        WindowResult.from_dict(data)


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def apply(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return apply


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def apply(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (drop("steps"), "steps"),
        (drop("modes"), "modes"),
        (drop("curvature", "products"), "products"),
        (drop("modes", 0, "verdict"), "verdict"),
        (drop("modes", 0, "diffusion", "low"), "low"),
        (drop("modes", 0, "displacements", 0, "measured"), "measured"),
        (put(1, "surprise"), "surprise"),
        (put("many", "steps"), "steps should be of type int, not 'many'"),
        (put(None, "steps"), "steps should be of type int, not None"),
        (put(1.5, "steps"), "steps"),
        (put(True, "steps"), "steps"),
        (put(1, "complete"), "complete should be of type bool"),
        (put("fast", "learning_rate"), "learning_rate should be of type float, not 'fast'"),
        (put(False, "learning_rate"), "learning_rate"),
        (put(10**400, "learning_rate"), "too large"),
        (put(7, "optimizer"), "optimizer should be of type str"),
        (put(None, "curvature"), "CurvatureResult should be an object"),
        (put([], "cost"), "CostResult should be an object"),
        (put(None, "modes"), "modes should be a list"),
        (put({}, "modes"), "modes should be a list"),
        (put([None], "modes"), "ModeResult should be an object"),
        (put("warned", "warnings"), "warnings should be a list"),
        (put([1], "warnings"), "warnings should be of type str"),
        (put("wild", "modes", 0, "verdict"), "'wild' is not a valid Verdict"),
        (put("side", "modes", 0, "kind"), "'side' is not a valid ModeKind"),
        (put(1.0, "modes", 0, "diffusion"), "Interval should be an object"),
        (put({"a": "b"}, "modes", 0, "layer_shares"), "'b'"),
        (put(["ab"], "modes", 0, "layer_shares"), "'b'"),
        (put({"a": "b"}, "modes", 0, "noise_correlations"), "'b'"),
        (put(3, "modes", 0, "layer_shares"), "int"),
        (put("marked", "modes", 0, "marks"), "marks should be a list"),
        (put([{"mode": "top_01"}], "slices"), "offsets"),
        (put([["a"]], "slices"), "LossSlice should be an object"),
        (put([0.1, "much"], "curvature", "density_nodes"), "density_nodes should be of type float"),
    ],
)
def test_broken_data_is_refused_by_name(damage: Callable[[dict[str, Any]], None], named: str) -> None:
    data = copy.deepcopy(make_window().to_dict())
    damage(data)
    with pytest.raises(ValueError, match="expected a whole window result") as caught:
        WindowResult.from_dict(data)
    assert named in str(caught.value)


@pytest.mark.parametrize("data", [[], None, "text", 3])
def test_what_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="expected a window result as a JSON object"):
        WindowResult.from_dict(data)


@pytest.mark.parametrize(
    ("kind", "converged", "mixed"),
    [
        (ModeKind.TOP, True, False),
        (ModeKind.TOP, False, False),
        (ModeKind.INTERIOR, True, False),
        (ModeKind.INTERIOR, False, True),
        (ModeKind.FLAT, True, True),
        (ModeKind.FLAT, False, True),
    ],
)
def test_which_directions_are_mixed(kind: ModeKind, converged: bool, mixed: bool) -> None:
    assert make_mode(kind=kind, converged=converged).mixed is mixed


def test_counts_add_up_and_name_every_verdict() -> None:
    window = make_window()
    counts = window.counts()
    assert set(counts) == set(Verdict)
    assert sum(counts.values()) == len(window.modes)
    assert counts[Verdict.CONFINED] == 7
    assert make_window(modes=()).counts() == dict.fromkeys(Verdict, 0)


def test_cost_is_a_fraction_of_the_training_without_the_probe() -> None:
    cost = make_window().cost
    assert cost.fraction == pytest.approx(6.4 / 180)
    assert math.isnan(dataclasses.replace(cost, training_seconds=0.0).fraction)


def test_results_are_frozen() -> None:
    window = make_window()
    with pytest.raises(dataclasses.FrozenInstanceError):
        window.steps = 0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        window.modes[0].verdict = Verdict.DIFFUSIVE  # type: ignore[misc]
