"""The benchmark script: it runs without the peers, says what is missing, and sums up in one JSON line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "eigenpairs.py"
KEYS = {
    "fastest_peer",
    "speedup_vs_fastest_peer",
    "speedup_vs_pyhessian",
    "product_cost_gradients",
    "run_over_limit",
    "max_residual",
    "near_flat_effective_curvature",
    "products_per_flat_direction",
}


def run(*arguments: str, **environment: str) -> str:
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def no_peers(tmp_path: Path) -> dict[str, str]:
    """An environment in which none of the peers can be imported."""
    hidden = "('curvlinops', 'hessian_eigenthings', 'pyhessian')"
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\n")
    return {"PYTHONPATH": str(tmp_path)}


def test_help_needs_no_peers(no_peers: dict[str, str]) -> None:
    assert "--quick" in run("--help", **no_peers)


@pytest.mark.slow
def test_ours_runs_alone(no_peers: dict[str, str]) -> None:
    output = run("--quick", "--json", "--problems", "mlp", **no_peers)
    for package in ("curvlinops-for-pytorch", "hessian-eigenthings==1.0.0a5", "PyHessian"):
        assert f"pip install -c constraints.txt {package}" in output
    summary = json.loads(output.splitlines()[-1])["mlp"]
    assert summary["fastest_peer"] is None
    assert summary["speedup_vs_pyhessian"] is None
    assert summary["max_residual"] <= 1e-3


@pytest.mark.slow
def test_summary() -> None:
    summary = json.loads(run("--quick", "--json", "--problems", "mlp").splitlines()[-1])
    assert summary.keys() == {"mlp"}
    assert summary["mlp"].keys() == KEYS
    assert summary["mlp"]["max_residual"] <= 1e-3
    assert summary["mlp"]["near_flat_effective_curvature"] > 0
