from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgd_probe import Flag, Interval, Verdict, WindowResult, find_flags
from sgd_probe.flags import SAME_VALLEY, cosine_bound, onset_message, raise_flags
from tests.helpers.results import make_mode, make_window

HEAD, BODY = {"head.weight": 1.0}, {"body.weight": 1.0}


def window(index: int, **layers: Mapping[str, float]) -> WindowResult:
    """A window in which the named modes diffuse, each in the given layers, and ``top_01`` is confined."""
    modes = [make_mode("top_01")]
    modes += [make_mode(n, verdict=Verdict.DIFFUSIVE, layer_shares=shares) for n, shares in layers.items()]
    return make_window(index, modes=tuple(modes))


def onsets(flags: tuple[Flag, ...]) -> list[tuple[int, str]]:
    return [(flag.window, flag.mode) for flag in flags if flag.is_onset]


def test_a_flag_says_what_the_window_measured() -> None:
    result = make_window(3, epochs=4.5)
    first, second = raise_flags(result)
    mode = next(mode for mode in result.modes if mode.name == first.mode)
    assert (first.mode, second.mode) == ("flat_01", "flat_02")
    assert first.diffusion == mode.diffusion
    assert first.log_likelihood_ratio == -mode.log_bayes_factor > 0
    assert (first.steps, first.epochs) == (result.steps, 4.5)
    assert (first.window, first.onset_window, first.onset_step) == (3, 3, result.opened_at_step)
    assert first.layers == mode.layer_shares
    assert first.expected_false_flags == result.expected_false_flags
    assert first.is_onset


def test_a_verdict_that_is_undermined_raises_none() -> None:
    shaky = make_mode("flat_01", verdict=Verdict.DIFFUSIVE, undermined=True)
    firm = make_mode("flat_02", verdict=Verdict.DIFFUSIVE)
    drifting = make_mode("flat_03", verdict=Verdict.DRIFTING)
    flags = raise_flags(make_window(modes=(shaky, firm, drifting)))
    assert [flag.mode for flag in flags] == ["flat_02"]


def test_a_valley_goes_on_under_another_name() -> None:
    flags = find_flags([window(0, flat_01=HEAD), window(1, flat_03=HEAD), window(2, flat_02=HEAD)])
    assert onsets(flags) == [(0, "flat_01")]
    assert {flag.onset_step for flag in flags} == {window(0).opened_at_step}


def test_another_valley_is_another_onset() -> None:
    flags = find_flags([window(0, flat_01=HEAD), window(1, flat_01=HEAD, flat_02=BODY)])
    assert onsets(flags) == [(0, "flat_01"), (1, "flat_02")]


def test_a_stiff_direction_is_no_part_of_a_flat_valley() -> None:
    flags = find_flags([window(0, flat_01=HEAD), window(1, top_02=HEAD)])
    assert onsets(flags) == [(0, "flat_01"), (1, "top_02")]


def test_a_valley_ends_with_a_window_that_does_not_flag_it() -> None:
    flags = find_flags([window(0, flat_01=HEAD), window(1, flat_01=BODY), window(2, flat_01=HEAD)])
    assert onsets(flags) == [(0, "flat_01"), (1, "flat_01"), (2, "flat_01")]


def test_window_by_window_it_is_the_same() -> None:
    results = [
        window(0, flat_01=HEAD),
        window(1, flat_01=HEAD, flat_02=BODY),
        window(2),
        window(3, flat_01=BODY),
    ]
    flags: tuple[Flag, ...] = ()
    for result in results:
        flags += raise_flags(result, flags)
    assert flags == find_flags(results)


unit = st.lists(st.floats(-1, 1).filter(lambda x: abs(x) > 1e-3), min_size=12, max_size=12)


@given(unit, unit, st.integers(1, 4))
def test_no_cosine_exceeds_the_bound(first: list[float], second: list[float], known: int) -> None:
    """Four layers of three weights, of which only the largest shares are known."""
    vectors = [np.array(v) / np.linalg.norm(v) for v in (first, second)]
    shares = []
    for vector in vectors:
        layers = {f"layer_{i}": float(part @ part) for i, part in enumerate(vector.reshape(4, 3))}
        shares.append({n: layers[n] for n in sorted(layers, key=layers.__getitem__, reverse=True)[:known]})
    assert abs(vectors[0] @ vectors[1]) <= cosine_bound(*shares) + 1e-9
    assert cosine_bound(*shares) <= 1


def test_the_bound_at_its_ends() -> None:
    assert cosine_bound(HEAD, BODY) == 0
    assert cosine_bound(HEAD, HEAD) == 1
    assert cosine_bound({}, {}) == 1  # nothing is known
    mixed = {"head.weight": 0.5, "body.weight": 0.5}
    assert cosine_bound(HEAD, mixed) == pytest.approx(math.sqrt(0.5))
    assert cosine_bound(HEAD, mixed) > SAME_VALLEY


def test_the_message_names_what_one_needs() -> None:
    flag = raise_flags(make_window(epochs=4.5))[0]
    flag = dataclasses.replace(flag, diffusion=Interval(1.5e-7, 1e-7, 2.25e-7), log_likelihood_ratio=2.1)
    assert onset_message([flag]) == (
        "window 0, from step 200: the weights wander along a valley.\n  flat_01 of window 0 diffuses over "
        "1,000 steps, 4.5 epochs: D = 1.5e-07 [1e-07, 2.2e-07] weight² per step, log evidence 2.1 "
        "against confinement; "
        "it lies in encoder.blocks.0.attention.weight (62%), head.weight (31%), head.bias (7%).\n  "
        "Of this window's flags 0.4 are expected to be wrong."
    )


def test_without_an_onset_there_is_nothing_to_tell() -> None:
    first, second = (window(i, flat_01=HEAD) for i in range(2))
    assert onset_message(raise_flags(second, raise_flags(first))) == ""
    assert onset_message(()) == ""


def test_what_is_unknown_is_not_told() -> None:
    mode = make_mode("flat_01", verdict=Verdict.DIFFUSIVE, layer_shares={})
    window = make_window(modes=(mode,), epochs=math.nan, expected_false_flags=math.nan)
    message = onset_message(raise_flags(window))
    assert not any(word in message for word in ("epochs", "lies in", "expected", "nan"))
