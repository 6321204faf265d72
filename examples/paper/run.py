"""The paper's three claims as experiments, on a network that sees and on one that reads.

Everything starts from nothing: it trains the two networks to their minima, runs many seeds of SGD from there,
and writes the results file, the pictures and the tables of docs/paper.md, which explains each experiment.

    python examples/paper/run.py               # two processes, about 25 minutes on two cores
    python examples/paper/run.py --quick       # under a minute; writes nothing unless told where
    python examples/paper/run.py --only        # nothing again: pictures and tables from the results file
    python examples/paper/run.py --only variance loaders
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import beyond
import collapse
import diffusion
import product
import separation
import torch
import variance
from problems import NAMES, Name, load
from report import about, claims, plain, write_tables, written

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS, PAGE = "paper.json", "paper.md"
#: Where the plans of an experiment are, and what runs it.
EXPERIMENTS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "separation": (separation, separation.measure),
    "diffusion": (diffusion, diffusion.measure),
    "variance": (variance, variance.measure),
    "collapse": (collapse, collapse.measure),
    "loaders": (beyond, beyond.loaders),
    "optimizers": (beyond, beyond.optimizers),
    "product": (product, product.measure),
}
#: Any of these takes the pictures.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few seeds and steps, kept minima")
    parser.add_argument(
        "--only", nargs="*", metavar="NAME", help="measure these again, take the rest from the results file"
    )
    parser.add_argument(
        "--output", type=Path, help="folder of results and pictures (docs; with --quick none)"
    )
    options = parser.parse_args()
    output = options.output or (None if options.quick else DOCS)
    if options.only is None:
        results = measure_all(options.quick, list(EXPERIMENTS))
    else:
        if output is None or not set(options.only) <= set(EXPERIMENTS):
            parser.error(f"expected an output folder and names among {', '.join(EXPERIMENTS)}")
        results = json.loads((output / RESULTS).read_text(encoding="utf-8"))
        again = measure_all(options.quick, options.only) if options.only else {}
        for name in NAMES:
            results[name].update(again.get(name, {}))
    results["claims"] = plain(claims(results))
    for claim in results["claims"]:
        print(
            f"{'holds' if claim['holds'] else 'FAILS'}  {claim['where']:<9} {claim['what']}: {claim['found']}"
        )
    print(f"{results['seconds']:.0f} s")
    if output:
        output.mkdir(parents=True, exist_ok=True)
        (output / RESULTS).write_text(written(results), encoding="utf-8")
        if not options.quick:
            publish(results, output)
    if options.quick:
        return 0 if all(claim["holds"] for claim in roughest(results)) else 1
    return 0


def publish(results: dict[str, Any], output: Path) -> None:
    """The pictures, where there is a browser to take them, and the tables of the page, if it lies there."""
    if (output / PAGE).exists():
        write_tables(output / PAGE, results)
    if not any(map(shutil.which, BROWSERS)):
        print(f"No pictures: expected one of {', '.join(BROWSERS)} on PATH; --only makes them later.")
        return
    from figures import draw

    draw(results, output / "images")


def measure_all(quick: bool, chosen: list[str]) -> dict[str, Any]:
    """These experiments on both networks side by side, each network in a process of its own."""
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(NAMES), mp_context=context) as pool:
        parts = list(pool.map(measure, NAMES, [quick] * len(NAMES), [chosen] * len(NAMES)))
    results: dict[str, Any] = dict(zip(NAMES, parts, strict=True))
    results["quick"] = quick
    results["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    results["seconds"] = round(time.perf_counter() - started, 1)
    return results


def measure(name: Name, quick: bool, chosen: list[str]) -> dict[str, Any]:
    """Experiments on one network."""
    torch.set_num_threads(1)  # threads only get in each other's way on tensors this small

    def say(what: str) -> None:
        print(f"{name}: {what} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)

    started = time.perf_counter()
    problem = load(name, anew=not quick and len(chosen) == len(EXPERIMENTS))
    found: dict[str, Any] = {"problem": about(problem)}
    say("at its minimum")
    for key in chosen:
        module, experiment = EXPERIMENTS[key]
        plan = (module.QUICK if quick else module.FULL)[name]
        found[key] = plain(experiment(problem, plan))
        say(key)
    return found


def roughest(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold however few the seeds: Langevin is off by far more than the discrete equation."""
    return [claim for claim in results["claims"] if "Langevin" in claim["what"]]


if __name__ == "__main__":
    sys.exit(main())
