"""Every knob refuses what is out of range, and says which, what and why."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from sgd_probe.dynamics.verdict import MIN_STEPS
from sgd_probe.engine.config import MIN_WINDOW, ProbeConfig

BAD: dict[str, tuple[Any, ...]] = {
    "top": (0, -1, 2.0, True, "10", None),
    "flat": (-1, 1.5, False, None),
    "interior": (-1, 1.5, True, None, "auto"),
    "window": (MIN_WINDOW - 1, 0, 100.0, True, "long", None),
    "max_overhead": (0, 0.0, 1, 1.5, -0.1, math.nan, math.inf, True, "5%"),
    "every_n_steps": (0, -5, 100.0, True, "auto"),
    "grace_seconds": (-1, math.nan, math.inf, None, "1 s"),
    "curvature_batches": (0, -2, 1.5, True, None, "all"),
    "microbatch": (0, -4, 2.0, True, "auto"),
    "second_derivatives": ("finite differences", "auto", None, True),
    "tolerance": (0.0, 1.0, -1e-3, math.nan, None),
    "flat_dimension": (1, 0, 2.5, True),
    "flat_curvature": (0.0, 1.0, -0.1, math.nan, None),
    "min_noise_share": (-0.1, 1.0, math.nan, None),
    "sampling": ("shuffled", None, 1, True),
    "seed": (-1, 0.5, None, True),
    "slices": (1, 0, None, "flat"),
    "max_graph_bytes": (-1, 1e9, None, "1 GB"),
    "max_vector_bytes": (-1, 1e9, None, "auto"),
    "max_basis_bytes": (0, -1, 1e9, None, "1 GB"),
    "save_vectors": (1, 0, None, "yes"),
    "summary": ("always", None, True, 1),
    "log_directions": (1, 0, None, "yes"),
    "checkpoint_window": (1, 0, None, "always"),
    "verify": (1, 0, None, "always"),
}
GOOD: dict[str, tuple[Any, ...]] = {
    "top": (1, 100),
    "flat": (0, 20),
    "interior": (0, 3, 50),
    "window": ("auto", MIN_WINDOW, 10_000),
    "max_overhead": (1e-6, 0.999),
    "every_n_steps": (None, MIN_WINDOW, 10_000),
    "grace_seconds": (0, 0.0, 60),
    "curvature_batches": ("auto", 1, 32),
    "microbatch": (None, 1, 64),
    "second_derivatives": ("double_backward", "finite_differences"),
    "tolerance": (1e-6, 0.5),
    "flat_dimension": (2, 50),
    "flat_curvature": (1e-6, 0.5),
    "min_noise_share": (0, 0.0, 0.1),
    "sampling": ("auto", "with_replacement", "without_replacement"),
    "seed": (0, 2**32, 2**63),
    "slices": (True, False),
    "max_graph_bytes": ("auto", 0, 2**30),
    "max_vector_bytes": (0, 2**20),
    "max_basis_bytes": ("auto", 1, 2**30),
    "save_vectors": (True, False),
    "summary": ("end", "windows", "off"),
    "log_directions": (True, False),
    "checkpoint_window": (True, False),
    "verify": (True, False),
}


def test_every_knob_is_tested() -> None:
    knobs = {field.name for field in dataclasses.fields(ProbeConfig)}
    assert set(BAD) == set(GOOD) == knobs


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name]])
def test_a_bad_value_is_refused_by_name_value_and_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"expected `{name}` to be .+, found {re.escape(repr(value))}$"):
        ProbeConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in GOOD for value in GOOD[name]])
def test_a_good_value_is_kept(name: str, value: Any) -> None:
    assert getattr(ProbeConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("period", "window", "shortest"), [(99, 100, 100), (MIN_WINDOW - 1, "auto", MIN_WINDOW), (1, 500, 500)]
)
def test_windows_that_would_overlap_are_refused(period: int, window: Any, shortest: int) -> None:
    with pytest.raises(
        ValueError, match=f"`every_n_steps` to be at least `window`, {shortest} steps"
    ) as caught:
        ProbeConfig(every_n_steps=period, window=window)
    assert f"every_n_steps={period} and window={window!r}" in str(caught.value)
    ProbeConfig(every_n_steps=shortest, window=window)


def test_the_shortest_window_carries_the_rule() -> None:
    assert MIN_WINDOW >= MIN_STEPS
