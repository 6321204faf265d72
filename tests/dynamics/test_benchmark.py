"""benchmarks/verdicts.py: it runs, and sums up in one JSON line."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sgd_probe.result import Verdict

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "verdicts.py"


@pytest.fixture
def verdicts() -> Any:
    return importlib.import_module("verdicts")


@pytest.mark.slow
def test_summary() -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--json", "--only", "gaussian, T=300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary.keys() == {f"gaussian, T=300, kappa={kappa}" for kappa in (0, 20, 30)}
    for rates in summary.values():
        assert sum(rates.values()) == pytest.approx(1)
    assert summary["gaussian, T=300, kappa=0"]["diffusive"] > 0.8
    assert summary["gaussian, T=300, kappa=30"]["confined"] > 0.97


@pytest.mark.parametrize(("momentum", "least", "most"), [(0.0, 0.975, 0.99), (0.9, 0.885, 0.925)])
def test_what_no_test_can_do_better(verdicts: Any, momentum: float, least: float, most: float) -> None:
    """Twenty relaxation times in ten memories of momentum 0.9: the window is at fault, not the rule."""
    truth = verdicts.Truth(kappa=20, steps=100, momentum=momentum)
    bound = verdicts.most_confined(truth, verdicts.FALSE_CONFINED, 20_000, 0)
    assert least < bound < most
    flat, confined = (
        verdicts.Scenario("", verdicts.Truth(kappa=kappa, steps=100, momentum=momentum)).rates(4_000, 3)
        for kappa in (0, 20)
    )
    assert flat[Verdict.CONFINED] < verdicts.FALSE_CONFINED + 0.01
    assert confined[Verdict.CONFINED] < bound + 0.01


def test_what_cannot_be_had_is_not_called_missed(verdicts: Any) -> None:
    truth = verdicts.Truth(kappa=20, steps=100, momentum=0.9)
    asked, rates = verdicts.at_least(0.93, Verdict.CONFINED), {Verdict.CONFINED: 0.88}
    said = verdicts.Scenario("", truth).outcome(asked, rates, 10_000, 0)
    assert said.startswith("beyond reach (no rule has more than ")
    for within_reach in (verdicts.Truth(kappa=20, steps=100), verdicts.Truth(kappa=20, student=True)):
        assert verdicts.Scenario("", within_reach).outcome(asked, rates, 10_000, 0) == "missed"
