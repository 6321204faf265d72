"""What would convince a sceptical referee: a twin whose modes are known, interventions, nulls, densities.

It starts from the minima of the paper's two networks, one process each, and writes the tables and the figures
of docs/paper-tests.md, which explains each of them.

    python examples/paper/referee.py            # two processes, minutes on two cores
    python examples/paper/referee.py --quick    # few seeds; writes nothing unless told where
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import densities
import interventions
import nulls
import torch
import twin
from problems import NAMES, Name, load
from report import Claim, plain
from shares import table

from sgd_probe import Verdict

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = "paper-tests.md", "paper-tests.json"
PARTS: Mapping[str, ModuleType] = {
    "twin": twin,
    "interventions": interventions,
    "nulls": nulls,
    "densities": densities,
}
SIZES = {"twin": (1200, 560), "interventions": (1200, 600), "nulls": (1500, 520), "densities": (1200, 900)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (all)")
    parser.add_argument("--quick", action="store_true", help="few seeds and steps")
    parser.add_argument("--only", choices=NAMES, help="one of the networks")
    parser.add_argument(
        "--output", type=Path, help="folder of page, results and figures (docs; with --quick none)"
    )
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"expected some of {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    names = (options.only,) if options.only else NAMES
    whole = not options.parts and not options.only
    output = options.output or (ROOT / "docs" if whole and not options.quick else None)
    started = time.perf_counter()
    found = measure_all(names, options.parts or list(PARTS), options.quick)
    claims = [claim for part in found.values() for claim in claimed(part)]
    texts = {f"{key} {name}": text for name in names for key, text in tables(found[name]).items()}
    print("\n\n".join(texts.values()), end="\n\n")
    if options.quick:
        print("Few seeds have no intervals to speak of: what fails here may hold with more of them.\n")
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.where:<9} {claim.what}: {plain(claim.found)}")
    print(f"{time.perf_counter() - started:.0f} s")
    if output:
        write(output, found, claims, texts)
    return 0


def measure_all(names: tuple[Name, ...], parts: list[str], quick: bool) -> dict[str, dict[str, Any]]:
    """Every part on every network, a process for each network."""
    if len(names) == 1:
        return {names[0]: measure(names[0], parts, quick)}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(names), mp_context=context) as pool:
        jobs = [pool.submit(measure, name, parts, quick) for name in names]
        return {name: job.result() for name, job in zip(names, jobs, strict=True)}


def measure(name: Name, parts: list[str], quick: bool) -> dict[str, Any]:
    """Some parts on one network, by the part's name; it tells the processor time so far."""
    torch.set_num_threads(1)  # threads only get in each other's way on tensors this small
    problem, found = load(name), {}
    for key in parts:
        part = PARTS[key]
        found[key] = part.measure(problem, (part.QUICK if quick else part.FULL)[name])
        print(f"{name}: {key} ({time.process_time():.0f} s)", file=sys.stderr, flush=True)
    return found


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """The tables of one network, in Markdown, by part."""
    return {key: PARTS[key].tables(result) for key, result in found.items()}


# What has to hold


def claimed(found: Mapping[str, Any]) -> Iterator[Claim]:
    """The statements that one network's results are held against."""
    judges = {
        "twin": _twin,
        "interventions": _interventions,
        "nulls": _nulls,
        "densities": _densities,
    }
    for key, result in found.items():
        yield from judges[key](result)


def _twin(result: twin.Result) -> Iterator[Claim]:
    where = result.problem
    for label, judged in (("LoopProbe", result.probe), ("all modes", result.modes)):
        confined, free = judged.within(20.0, float("inf")), judged.within(0.0, 1.0)
        share = judged.share(confined, (Verdict.CONFINED,))
        yield Claim(where, f"{label}, kappa >= 20: confined", share, ">= 0.95", share.value >= 0.95)
        if free.sum() >= 20:
            share = judged.share(free, twin.FREE)
            yield Claim(where, f"{label}, kappa < 1: diffusive", share, ">= 0.8", share.value >= 0.8)
        opposed = judged.opposed(judged.within(0.0, float("inf")))
        yield Claim(where, f"{label}: opposite of the twin's", opposed, "<= 0.05", opposed.value <= 0.05)


def _interventions(result: interventions.Result) -> Iterator[Claim]:
    where, tethered = result.problem, result.tethered
    share = tethered.share(1, Verdict.CONFINED, True)
    yield Claim(where, "tethered: confined", share, ">= 0.95", share.value >= 0.95)
    share = tethered.seen_confined()
    yield Claim(where, "... found so by LoopProbe itself", share, ">= 0.95", share.value >= 0.95)
    foretold = float(tethered.foretold[tethered.tied, 1].mean())
    moved = interventions.over(tethered.displacement(1, True), foretold)
    yield Claim(where, "... MSD over the formula", moved, "0.9 to 1.1, or 1 inside", _good(moved))
    less = tethered.less_free()
    inside = not less.high < 0
    yield Claim(where, "released: diffusive, less those left alone", less, "0 inside or below", inside)
    for kicked in (result.kicked, result.alternating):
        for pull, rate in zip(kicked.pulls.tolist(), kicked.rates, strict=True):
            ratio = interventions.over(rate, pull)
            what = f"kick at eta lambda = {pull:.3g}: decay over eta lambda"
            yield Claim(where, what, ratio, "0.95 to 1.05, or 1 inside", _good(ratio, 0.05))


def _nulls(result: nulls.Result) -> Iterator[Claim]:
    where, flipped = result.problem, result.flipped.flipped
    share = flipped[Verdict.DIFFUSIVE]
    yield Claim(where, "flipped increments: diffusive", share, ">= 0.8", share.value >= 0.8)
    quiet = sum(counts[Verdict.NO_NOISE.value] for counts in result.frozen.values())
    among = sum(counts.total() for counts in result.frozen.values())
    yield Claim(where, "one batch for ever: no noise", quiet / among, "1", quiet == among)
    both, epochs = result.loaders
    sampled, held = (Verdict.SAMPLING_CONFINED,), (Verdict.SAMPLING_CONFINED, Verdict.CONFINED)
    for loader, what, wanted, least in (
        (both, "called sampling confined", sampled, False),
        (epochs, "called diffusive", (Verdict.DIFFUSIVE,), False),
        (epochs, "held by sampling or curvature", held, True),
    ):
        verdicts = [each for run in loader.flat for each in run]
        found = sum(each in wanted for each in verdicts) / len(verdicts)
        asked, holds = (">= 0.8", found >= 0.8) if least else ("0", found == 0)
        yield Claim(where, f"{loader.name}: near-flat {what}", found, asked, holds)
    spread = epochs.epoch_spread
    what = "without replacement: MSD over an epoch"
    yield Claim(where, what, spread, "<= 0.1 of free", spread.value <= 0.1)
    yield Claim(where, "eta, eta/2, eta: D comes back", result.back, "0.95 to 1.05, or 1 inside",
                _good(result.back, 0.05))  # fmt: skip
    for change in result.changes:
        for what, ratio, expected in zip(
            ("D per step", "D per unit of time", "stiff variance"),
            (change.per_step, change.per_time, change.variance),
            change.expected,
            strict=True,
        ):
            over = interventions.over(ratio, expected)
            yield Claim(where, f"{change.name}: {what} over the formula", over, "0.95 to 1.05, or 1 inside",
                        _good(over, 0.05))  # fmt: skip


def _densities(result: tuple[densities.Density, ...]) -> Iterator[Claim]:
    for found in result:
        where, _, what = found.name.partition(", ")
        master, chance = found.rows[densities.MASTER].distance, found.floor[1]
        asked = f"<= {chance:.3f}, chance"
        yield Claim(where, f"{what}: distance of the master equation", master, asked, master <= chance)
        langevin = found.rows[densities.LANGEVIN].distance
        yield Claim(where, "... of Langevin's", langevin, "> twice that", langevin > 2 * chance)


def _good(ratio: Any, margin: float = 0.1) -> bool:
    """Within a margin of 1, or 1 lies in the interval."""
    return abs(ratio.value - 1) <= margin or ratio.low <= 1 <= ratio.high


# The page


def write(
    output: Path, found: Mapping[str, Mapping[str, Any]], claims: list[Claim], texts: Mapping[str, str]
) -> None:
    """Figures, results, and the tables in their places in the page."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from _figures import picture

    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    for key in next(iter(found.values())):
        results = [part[key] for part in found.values()]
        if key == "densities":
            results = [density for pair in results for density in pair]
        picture(PARTS[key].figure(results), images / f"paper-tests-{key}.png", SIZES[key])
    (output / RESULTS).write_text(json.dumps(plain(claims), indent=1) + "\n", encoding="utf-8")
    page = output / PAGE
    if page.exists():
        fill(page, {**texts, "claims": claim_table(claims)})


def claim_table(claims: list[Claim]) -> str:
    """What was asked and found, in Markdown."""
    rows = [
        [each.where, each.what, _number(each.found), each.asked, "holds" if each.holds else "**fails**"]
        for each in claims
    ]
    return table(["", "statement", "found", "asked", ""], rows)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Put every table between its two marks, ``<!-- table: name -->`` and ``<!-- end -->``.

    Raises:
        ValueError: the page has no place for one.
    """
    text = page.read_text(encoding="utf-8")
    for name, new in tables.items():
        mark = f"<!-- table: {name} -->"
        if mark not in text:
            raise ValueError(f"expected {mark} in {page}, found none: every table has its place there")
        pattern = re.compile(re.escape(mark) + r".*?<!-- end -->", re.DOTALL)
        text = pattern.sub(lambda _, new=new, mark=mark: f"{mark}\n{new}\n<!-- end -->", text)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
