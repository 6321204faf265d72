"""The ten stiffest directions of three networks: sgd_probe beside its peers, on the same loss and batch.

Every run has a process of its own, forked from one that has only imported things; runs alternate between
the solvers, and a gradient is timed in the same process just before and after. What is measured and how is
described in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from _problems import FULL, NAMES, SMALL, Problem, Recipe, build, exact_product, trained
from _solvers import (
    OURS,
    PACKAGES,
    PEERS,
    TOLERANCE,
    Clock,
    is_installed,
    residuals,
    settings_in_hindsight,
    solve,
    training_loss,
)
from torch import Tensor

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.hessian import HessianOperator
from sgd_probe.curvature.modes import find_modes
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.engine.config import ProbeConfig
from sgd_probe.isolation import isolated

COUNT = 10
#: Two sets agree where their eigenvalues do, to this share of |lambda_1|.
SAME = 0.01


@dataclass(frozen=True)
class Run:
    """One run of one solver, in its own process.

    Attributes:
        seconds: from the trained model to the eigenpairs.
        products: Hessian-vector products.
        product_seconds: median of one product alone.
        gradient_seconds: median of one forward and backward pass in the same process.
        megabytes: resident memory at the peak, above what it was before (Linux only).
        vectors: as rows.
    """

    seconds: float
    products: int
    product_seconds: float
    gradient_seconds: float
    megabytes: float
    vectors: Tensor


@dataclass(frozen=True)
class Outcome:
    """All runs of one solver on one problem; no runs where it was over the limit."""

    runs: list[Run]
    quotients: Tensor
    max_residual: float
    sine: float
    limit: float

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs) if self.runs else self.limit

    @property
    def gradients_in_all(self) -> float:
        """Gradients that a product costs, with all that the solver does beside it."""
        return statistics.median(run.seconds / run.products / run.gradient_seconds for run in self.runs)

    @property
    def gradients_alone(self) -> float:
        return statistics.median(run.product_seconds / run.gradient_seconds for run in self.runs)


@dataclass(frozen=True)
class Valley:
    """Near-flat directions: median held-out lambda_eff / |lambda_1|, and products spent on each."""

    curvature: float
    products: float
    samples: int


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    missing = [peer for peer in PEERS if not is_installed(peer)]
    for peer in missing:
        print(f"{peer} is not installed and left out: pip install -c constraints.txt {PACKAGES[peer][1]}")
    solvers = [OURS, *(peer for peer in PEERS if peer not in missing)]
    context = multiprocessing.get_context("forkserver")
    modules = ["scipy.sparse.linalg", "torch", "sgd_probe.curvature.modes", "sgd_probe.engine.config"]
    context.set_forkserver_preload(modules + [PACKAGES[solver][0] for solver in solvers if solver != OURS])
    summary = {}
    for name in options.problems:
        summary[name] = _problem(name, solvers, options, context)
    if options.json:
        print(json.dumps(summary))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller networks, under a minute")
    parser.add_argument("--json", action="store_true", help="print a summary as the last line")
    parser.add_argument("--repeats", type=int, help="alternating runs of each solver (3, or 1 with --quick)")
    parser.add_argument("--problems", nargs="+", choices=NAMES, default=NAMES, help="some of the networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every solver")
    parser.add_argument("--limit", type=float, help="seconds that a run may take (600, or 5 with --quick)")
    options = parser.parse_args()
    options.repeats = options.repeats or (1 if options.quick else 3)
    options.limit = options.limit or (5.0 if options.quick else 600.0)
    return options


def _problem(
    name: str, solvers: list[str], options: argparse.Namespace, context: ForkServerContext
) -> dict[str, Any]:
    """Train, compare, print and summarise one problem."""
    recipe = SMALL[name] if options.quick else FULL[name]
    problem, inputs, targets = trained(name, recipe)
    size = sum(parameter.numel() for parameter in problem.model.parameters())
    loss = float(problem.loss().detach())
    print(f"\n{name}: {size:,} weights, {len(problem.inputs)} samples, loss {loss:.3g}", flush=True)
    settings = settings_in_hindsight(problem, COUNT, [s for s in solvers if s != OURS])
    with tempfile.TemporaryDirectory() as folder:
        content = (vars(recipe), problem.model.state_dict(), problem.inputs, problem.targets)
        torch.save(content, Path(folder) / "problem.pt")
        runs: dict[str, list[Run]] = {solver: [] for solver in solvers}
        over: list[str] = []
        for _ in range(options.repeats):
            for solver in solvers:
                if solver in over:
                    continue
                arguments = (folder, name, solver, settings.get(solver, 0.0), options.threads)
                run = _in_own_process(context, arguments, options.limit)
                took = f"{run.seconds:.2f} s" if run else f"over {options.limit:.0f} s"
                print(f"{name}: {solver} took {took}", file=sys.stderr, flush=True)
                over += [solver] if run is None else []
                runs[solver] += [] if run is None else [run]
    outcomes = _examine(problem, runs, options.limit)
    _print(outcomes, settings)
    if options.quick:
        valley = _valley(problem, inputs, targets, recipe, samples=128)
    else:
        small, inputs, targets = trained(name, SMALL[name])
        valley = _valley(small, inputs, targets, SMALL[name], samples=1024)
    owner = "it" if options.quick else "a smaller sibling"
    print(
        f"  near-flat directions of {owner}, {valley.samples:,} samples: "
        f"held-out lambda_eff/|lambda_1| {valley.curvature:.4f} for {valley.products:.1f} products each",
        flush=True,
    )
    return _summary(outcomes, over, valley)


def _in_own_process(context: ForkServerContext, arguments: tuple[Any, ...], limit: float) -> Run | None:
    """A run, or None where it takes longer than the limit."""
    folder = Path(arguments[0])
    (folder / "started").unlink(missing_ok=True)
    (folder / "run.pt").unlink(missing_ok=True)
    process = context.Process(target=_work, args=arguments)
    process.start()
    while process.is_alive() and not (folder / "started").exists():
        process.join(0.02)
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    if process.exitcode != 0:
        sys.exit(f"{arguments[2]} failed on {arguments[1]}")
    return Run(**torch.load(folder / "run.pt", weights_only=True))


def _work(folder: str, name: str, solver: str, setting: float, threads: int) -> None:
    """In the new process: warm up on a few samples, measure, leave the run in a file."""
    torch.set_num_threads(threads)
    recipe, state, inputs, targets = torch.load(Path(folder) / "problem.pt", weights_only=True)
    model = build(name, Recipe(**recipe))
    model.load_state_dict(state)
    problem = Problem(model, inputs, targets)
    solve(solver, copy.deepcopy(problem.head(2)), 1, min(setting, 4.0), Clock())
    gradients = _time_gradients(problem)
    own = copy.deepcopy(problem)
    clock = Clock()
    before = _resident_megabytes()
    (Path(folder) / "started").touch()
    started = time.perf_counter()
    _, vectors = solve(solver, own, COUNT, setting, clock)
    seconds = time.perf_counter() - started
    peak = _peak_megabytes()
    gradients += _time_gradients(problem)
    run = Run(
        seconds=seconds,
        products=len(clock.seconds),
        product_seconds=statistics.median(clock.seconds),
        gradient_seconds=statistics.median(gradients),
        megabytes=peak - before,
        vectors=vectors.detach().float(),
    )
    torch.save(vars(run), Path(folder) / "run.pt")


def _time_gradients(problem: Problem) -> list[float]:
    clock = Clock()
    timed = clock(problem.gradient)
    for _ in range(6):
        timed()
    return clock.seconds[1:]


def _resident_megabytes() -> float:
    """Resident memory now, with what is free handed back, and the peak counted from here on."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (AttributeError, OSError):
        return math.nan


def _peak_megabytes() -> float:
    return _status("VmHWM") if Path("/proc/self/status").exists() else math.nan


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _examine(problem: Problem, runs: dict[str, list[Run]], limit: float) -> dict[str, Outcome]:
    """Hold every solver's last vectors against an independent product in float64."""
    product = exact_product(copy.deepcopy(problem), torch.float64)
    ours = torch.linalg.qr(runs[OURS][-1].vectors.double().T).Q
    outcomes = {}
    for solver, done in runs.items():
        quotients, errors, sine = torch.zeros(0), torch.tensor([math.nan]), math.nan
        if done:
            quotients, errors = residuals(product, done[-1].vectors)
            theirs = torch.linalg.qr(done[-1].vectors.double().T).Q
            sine = float(torch.linalg.matrix_norm(theirs - ours @ (ours.T @ theirs), 2))
        outcomes[solver] = Outcome(done, quotients, float(errors.max()), sine, limit)
    return outcomes


def _is_right(outcome: Outcome, outcomes: dict[str, Outcome]) -> bool:
    """No solver found larger ones: a Rayleigh quotient can fall short of an eigenvalue, not exceed it."""
    best = torch.stack([other.quotients.abs() for other in outcomes.values() if other.runs]).amax(dim=0)
    return bool((best - outcome.quotients.abs() <= SAME * best[0]).all())


def _print(outcomes: dict[str, Outcome], settings: dict[str, float]) -> None:
    print("  solver               seconds  products  gradients a product    MB above   largest  right  angle")
    print(
        "                                          in all        alone   the model  residual    set  to ours"
    )
    for solver, outcome in outcomes.items():
        if not outcome.runs:
            print(f"  {solver:19} {f'> {outcome.limit:.0f}':>8}  over the limit")
            continue
        memory = statistics.median(run.megabytes for run in outcome.runs)
        right = "yes" if _is_right(outcome, outcomes) else "NO"
        setting = f"  ({_meaning(solver)} {settings[solver]:.3g})" if solver in settings else ""
        print(
            f"  {solver:19} {outcome.seconds:8.2f} {outcome.runs[-1].products:9d}"
            f" {outcome.gradients_in_all:9.2f} {outcome.gradients_alone:12.2f} {memory:11.0f}"
            f" {outcome.max_residual:9.1e} {right:>6}  {outcome.sine:7.1e}{setting}",
            flush=True,
        )


def _meaning(solver: str) -> str:
    return {"curvlinops": "tol", "hessian-eigenthings": "steps"}[solver]


def _valley(problem: Problem, inputs: Tensor, targets: Tensor, recipe: Recipe, samples: int) -> Valley:
    """Find near-flat directions on some samples and certify them on others, as a window does."""
    batches = [
        CurvatureBatch.freeze((x, y.flatten()), index, seed=index)
        for index, (x, y) in enumerate(zip(inputs.split(64), targets.split(64), strict=True))
        if len(x) == 64
    ]
    half = min(samples // 64, len(batches))
    finding_set, certifying_set = batches[:half], batches[half : 2 * half]
    space, config, spent = ParameterSpace.of(problem.model), ProbeConfig(), []

    def aim(eigenvalues: Tensor) -> float:
        spent.append(finding.products)  # those of the top modes, which are found first
        return config.flat_curvature * float(eigenvalues.abs().max())

    with (
        isolated(problem.model),
        HessianOperator(problem.model, training_loss, finding_set, space) as finding,
        HessianOperator(problem.model, training_loss, certifying_set, space) as certifying,
    ):
        found = find_modes(
            finding,
            certifying,
            top=COUNT,
            flat=config.flat,
            tolerance=config.tolerance,
            flat_curvature=aim,
            flat_dimension=config.flat_dimension,
            generator=torch.Generator().manual_seed(0),
        )
    largest = max(abs(mode.certificate.eigenvalue) for mode in found.modes if not mode.flat)
    flat = [mode.certificate.effective_curvature / largest for mode in found.modes if mode.flat]
    return Valley(statistics.median(flat), (finding.products - spent[0]) / len(flat), 64 * half)


def _summary(outcomes: dict[str, Outcome], over: list[str], valley: Valley) -> dict[str, Any]:
    ours = outcomes[OURS]
    peers = {solver: outcome for solver, outcome in outcomes.items() if solver != OURS}
    able = {
        solver: outcome.seconds
        for solver, outcome in peers.items()
        if outcome.runs and outcome.max_residual <= 1.5 * TOLERANCE and _is_right(outcome, outcomes)
    }
    fastest = min(able, key=able.__getitem__) if able else None
    return {
        "fastest_peer": fastest,
        "speedup_vs_fastest_peer": able[fastest] / ours.seconds if fastest else None,
        "speedup_vs_pyhessian": peers["pyhessian"].seconds / ours.seconds if "pyhessian" in peers else None,
        "product_cost_gradients": ours.gradients_alone,
        "run_over_limit": over,
        "max_residual": ours.max_residual,
        "near_flat_effective_curvature": valley.curvature,
        "products_per_flat_direction": valley.products,
    }


if __name__ == "__main__":
    main()
