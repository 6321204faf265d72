"""The recipes of the documentation: their script runs, and their code is that of the page."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sgd_probe import Verdict, WindowResult
from tests.helpers.results import make_mode, make_window

ROOT = Path(__file__).resolve().parent.parent


def page_code() -> str:
    """The first block of code of docs/recipes.md, without its training."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    return text.split("```python\n")[1].split("```")[0].split("probe = SGDProbe()")[0]


def window(index: int, stiff: Verdict, *flat: Verdict) -> WindowResult:
    modes = [make_mode(f"top_{i:02d}", verdict=stiff) for i in range(1, 6)]
    modes += [make_mode(f"flat_{i:02d}", verdict=verdict) for i, verdict in enumerate(flat, start=1)]
    return make_window(index, modes=tuple(modes))


def test_the_average_of_the_page_lasts_as_long_as_the_flags() -> None:
    import pytorch_lightning as pl
    import torch

    from sgd_probe import find_flags

    names: dict[str, Any] = {"pl": pl}
    exec(page_code(), names)
    confined, diffusive, drifting = Verdict.CONFINED, Verdict.DIFFUSIVE, Verdict.DRIFTING
    results: list[WindowResult] = []

    class Probe:
        @property
        def results(self) -> list[WindowResult]:
            return results

        @property
        def flags(self) -> list[Any]:
            return list(find_flags(results))

    module = torch.nn.Linear(1, 1, bias=False)
    callback = names["FlaggedAverage"](Probe())

    def step(weight: float) -> float | None:
        torch.nn.init.constant_(module.weight, weight)
        callback.on_train_batch_end(None, module, None, None, 0)
        return None if callback.average is None else float(callback.average.module.weight)

    assert step(1.0) is None
    results.append(window(0, Verdict.UNDETERMINED, diffusive, diffusive))
    assert step(1.0) is None  # the stiff ones are not settled
    results.append(window(1, confined, diffusive, drifting))
    assert step(1.0) == 1.0
    assert step(3.0) == 2.0
    results.append(window(2, confined, drifting, drifting))
    assert step(5.0) is None
    results.append(window(3, confined, diffusive, diffusive))
    assert step(7.0) == 7.0


@pytest.mark.slow
def test_the_script_compares_the_recipe_with_what_it_claims_to() -> None:
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("scikit-learn is not installed")
    script = ROOT / "benchmarks" / "averaging.py"
    command = [sys.executable, str(script), "--seeds", "1", "--steps", "700", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    scored = {"last weights", "average of the last 50%", "average of the last 25%", "recipe"}
    assert scored < summary.keys()
    assert all(0 < summary[name]["loss"] < 3 for name in scored)
    assert "seed 0: 1 windows" in done.stdout
