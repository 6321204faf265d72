"""What logging costs: the time of every sink in the demo's training, keys, and bytes of an offline W&B run.

The demo trains with W&B offline; every call of a sink is timed. Then its last window is logged again and
again, into offline runs that hold scalars only, or figures only, whose size on disk says what a window takes.
What came out is in docs/wandb.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
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


class Timed:
    """A sink and a stopwatch: seconds by method."""

    def __init__(self, sink: Sink, seconds: dict[str, float]) -> None:
        self.sink, self.seconds = sink, seconds

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.sink, name)

        def timed(*args: Any) -> None:
            begun = time.perf_counter()
            method(*args)
            kind = "when the fit ends" if name == "finish" else "while it trains"
            self.seconds[f"{type(self.sink).__name__}, {kind}"] += time.perf_counter() - begun

        return timed


def timed_demo(quick: bool, folder: str) -> tuple[list[WindowResult], dict[str, float]]:
    """The windows of the demo, and what its sinks took."""
    seconds: dict[str, float] = defaultdict(float)
    results: list[WindowResult] = []

    class Group(SinkGroup):
        def __init__(self, sinks: Sequence[Sink], strict: bool = False) -> None:
            super().__init__([Timed(sink, seconds) for sink in sinks], strict)

        def write(self, result: WindowResult, vectors: Any) -> None:
            super().write(result, vectors)
            results.append(result)

    lightning.SinkGroup = Group
    code = demo.main(["--output", str(Path(folder) / "demo"), *(["--quick"] if quick else [])])
    if code or not results:
        raise SystemExit("expected the demo to give windows, found none")
    return results, dict(seconds)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the demo's short form")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")
    with tempfile.TemporaryDirectory() as folder:
        results, seconds = timed_demo(options.quick, folder)
        last, base = results[-1], Path(folder)
        row = offline_bytes(lambda run, repeats: scalars_again(run, last, repeats), base / "scalars")
        figures = offline_bytes(lambda run, repeats: figures_again(run, last, repeats), base / "figures")
    training = results[-1].cost.training_seconds
    print(f"\n{len(results)} windows in {training:.1f} s of training")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"  {name:<45} {value:8.3f} s  {value / training:7.2%}")
    during = sum(value for name, value in seconds.items() if name.endswith("trains")) / training
    after = sum(value for name, value in seconds.items() if name.endswith("ends"))
    keys = len(scalars(results[-1]))
    print(f"all of it, while it trains: {during:.2%} of the training; when the fit ends: {after:.1f} s")
    print(f"{keys} scalars a window; offline: {row:,.0f} bytes a window, {figures:,.0f} a set of figures")
    if options.json:
        print(
            json.dumps(
                {
                    "share_while_training": during,
                    "seconds_at_the_end": after,
                    "bytes_of_a_window": row,
                    "bytes_of_a_set_of_figures": figures,
                }
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
