"""What logging costs: the time of every sink in the demo's training, keys, and bytes of an offline W&B run.

The demo trains with W&B offline; every call of every sink is timed, with what it imports. All of it, while it
trains and when the fit ends, is put beside the bar of 1% of the training: by the seconds that pass, and by
those that the processors work (all threads of this process), which other programs disturb less. Then the
last window is logged again and again, into offline runs that hold scalars only, or figures only, whose size
on disk says what a window takes. What came out is in docs/wandb.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sgd_probe import WindowResult, demo
from sgd_probe.integrations import lightning
from sgd_probe.sinks import RunInfo, Sink, SinkGroup, scalars
from sgd_probe.sinks.wandb import WandbFigures, WandbRun, WandbSink

#: Times that each window is logged again, so that what a run takes by itself does not count.
REPEATS = 25
INFO = RunInfo(name="sgd_probe", config={}, plan=(), versions={})
#: All logging together shall take less than this share of the training.
BAR = 0.01
TRAINING, END = "while it trains", "when the fit ends"


@dataclass
class Spent:
    """Seconds that passed, and those of the processors."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


#: By sink and by when.
Costs = dict[tuple[str, str], Spent]


class Timed:
    """A sink and a stopwatch."""

    def __init__(self, sink: Sink, costs: Costs) -> None:
        self.sink, self.costs = sink, costs

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.sink, name)
        spent = self.costs[type(self.sink).__name__, END if name == "finish" else TRAINING]

        def timed(*args: Any) -> None:
            begun, cpu = time.perf_counter(), time.process_time()
            method(*args)
            spent.cpu_seconds += time.process_time() - cpu
            spent.seconds += time.perf_counter() - begun

        return timed


def timed_demo(quick: bool, folder: str) -> tuple[list[WindowResult], Costs, Spent]:
    """The windows of the demo, what its sinks took, and what all of it took."""
    costs: Costs = defaultdict(Spent)
    results: list[WindowResult] = []

    class Group(SinkGroup):
        def __init__(self, sinks: Sequence[Sink], strict: bool = False) -> None:
            super().__init__([Timed(sink, costs) for sink in sinks], strict)

        def write(self, result: WindowResult, vectors: Any) -> None:
            super().write(result, vectors)
            results.append(result)

    lightning.SinkGroup = Group
    begun, cpu = time.perf_counter(), time.process_time()
    code = demo.main(["--output", str(Path(folder) / "demo"), *(["--quick"] if quick else [])])
    if code or not results:
        raise SystemExit("expected the demo to give windows, found none")
    return results, costs, Spent(time.perf_counter() - begun, time.process_time() - cpu)


def scalars_again(target: WandbRun, result: WindowResult, repeats: int) -> None:
    """Log the scalars of a window so many times, as one training does."""
    sink = WandbSink(target)
    sink.start(INFO)
    for _ in range(repeats):
        sink.write(result, {})


def figures_again(target: WandbRun, result: WindowResult, repeats: int) -> None:
    """Log so many sets of figures, whatever their pace."""
    for _ in range(repeats):
        sink = WandbFigures(target)
        sink.start(INFO)
        sink.write(result, {})


def offline_bytes(write: Callable[[WandbRun, int], None], folder: Path) -> float:
    """Bytes on disk that one more window takes in an offline run."""
    import wandb

    settings = wandb.Settings(x_disable_stats=True, x_disable_meta=True, console="off", silent=True)
    sizes = []
    for repeats in (1, 1 + REPEATS):
        where = folder / str(repeats)
        where.mkdir(parents=True)
        run = wandb.init(project="p", dir=where, mode="offline", settings=settings)
        write(WandbRun(SimpleNamespace(experiment=run)), repeats)
        run.finish()
        sizes.append(sum(path.stat().st_size for path in where.rglob("*") if path.is_file()))
    return (sizes[1] - sizes[0]) / REPEATS


def _sum(spent: Iterable[Spent]) -> Spent:
    every = list(spent)
    return Spent(sum(s.seconds for s in every), sum(s.cpu_seconds for s in every))


def _row(name: str, spent: Spent, training: Spent) -> str:
    share, cpu_share = spent.seconds / training.seconds, spent.cpu_seconds / training.cpu_seconds
    return (
        f"  {name:<45} {spent.seconds:8.3f} s {share:7.2%}   CPU {spent.cpu_seconds:6.3f} s {cpu_share:7.2%}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the demo's short form")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")
    with tempfile.TemporaryDirectory() as folder:
        results, costs, whole = timed_demo(options.quick, folder)
        last, base = results[-1], Path(folder)
        row = offline_bytes(lambda run, repeats: scalars_again(run, last, repeats), base / "scalars")
        figures = offline_bytes(lambda run, repeats: figures_again(run, last, repeats), base / "figures")
    # The demo computes in one thread, and in its training as much of the time as on the whole.
    seconds = results[-1].cost.training_seconds
    training = Spent(seconds, seconds * whole.cpu_seconds / whole.seconds)
    total = _sum(costs.values())
    print(f"\n{len(results)} windows in {seconds:.1f} s of training ({training.cpu_seconds:.1f} s of CPU)")
    for (sink, when), spent in sorted(costs.items(), key=lambda item: -item[1].seconds):
        print(_row(f"{sink}, {when}", spent, training))
    for when in (TRAINING, END):
        print(
            _row(f"all of it, {when}", _sum(s for (_, other), s in costs.items() if other == when), training)
        )
    print(_row("all of it", total, training))
    share, cpu_share = total.seconds / seconds, total.cpu_seconds / training.cpu_seconds
    print(f"the bar is {BAR:.0%} of the training: {'met' if max(share, cpu_share) < BAR else 'NOT met'}")
    keys = len(scalars(results[-1]))
    print(f"{keys} scalars a window; offline: {row:,.0f} bytes a window, {figures:,.0f} a set of figures")
    if options.json:
        found = {
            "share_of_training": share,
            "cpu_share_of_training": cpu_share,
            "bytes_of_a_window": row,
            "bytes_of_a_set_of_figures": figures,
        }
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
