"""What a window takes on one process and on two, in time, memory and communication, beside the formulas.

A multilayer perceptron is trained by one process, by two under DDP and by two under FSDP2 (fully_shard), over
gloo on this machine. In each, one window opens, watches 50 steps and closes. The formulas are those of
docs/scaling.md, with the numbers of products that the window needed. With --json the last line is one JSON
object: {way: {P: {what: [measured, formula]}}}.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe import ProbeConfig
from sgd_probe.curvature.certify import MIN_BATCHES
from sgd_probe.engine import ProbeEngine, Processes, Sampling
from sgd_probe.engine.planning import DIFFERENCE_VECTORS, most_vectors

WAYS = {"one process": 1, "DDP, two": 2, "FSDP2, two": 2}
#: Hidden units of the networks, and batches in a curvature set.
FULL, QUICK = ((256, 8), (1024, 4)), ((64, 2), (128, 2))
TOP, FLAT, BATCH, STEPS, INPUTS, CLASSES = 2, 1, 32, 50, 64, 10
CONFIG = ProbeConfig(top=TOP, flat=FLAT, window=STEPS, every_n_steps=10**6)
#: A message of at least this share of the weights is one of vectors; shorter ones are a few numbers.
LONG = 0.25


@dataclass(frozen=True)
class Point:
    """What one process measured of one window; bytes are those of float32.

    Attributes:
        weights: P, of all processes together.
        gradient: seconds of one gradient of a training batch, communication not included.
        step: seconds of a training step.
        finding: Hessian-vector products that found the directions.
        directions: k.
        opening: seconds.
        closing: seconds.
        watching: seconds a step.
        vectors_held: peak of memory while it opened, in vectors of this process's weights.
        graph: bytes of the graph of one batch, in the same unit.
        vectors_reduced: all-reduced for the window, in units of P.
        evaluations: of the loss on a batch.
        small: all-reduces of a few numbers.
    """

    weights: int
    gradient: float
    step: float
    finding: int
    directions: int
    opening: float
    closing: float
    watching: float
    vectors_held: float
    graph: float
    vectors_reduced: float
    evaluations: int
    small: int


class Counter:
    """Counts what a process reduces, and how often it evaluates the loss."""

    def __init__(self, weights: int) -> None:
        self.reduced, self.small, self.evaluations = 0.0, 0, 0
        self._weights, all_reduce = weights, dist.all_reduce

        def counted(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            if tensor.numel() >= LONG * self._weights:
                self.reduced += tensor.numel() / self._weights
            else:
                self.small += 1
            return all_reduce(tensor, *arguments, **named)

        dist.all_reduce = counted

    def loss(self, module: nn.Module, batch: Any, index: int) -> Tensor:
        self.evaluations += 1
        return loss(module, batch, index)


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def loss(module: nn.Module, batch: Any, index: int) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(module(inputs), targets)


def batch_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(BATCH, INPUTS, generator=generator)
    return inputs, inputs[:, :CLASSES].argmax(1)


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(rank: int, way: str, width: int, batches: int, folder: str) -> None:
    """One process of one training; the first writes down what it found."""
    torch.set_num_threads(1)
    size, processes = WAYS[way], None
    module = network(width)
    weights = sum(parameter.numel() for parameter in module.parameters())
    trained: nn.Module = module
    if size > 1:
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size)
        processes = Processes(torch.device("cpu"))
    counter = Counter(weights)
    if way.startswith("FSDP2"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (size,))
        for child in (*(c for c in module if isinstance(c, nn.Linear)), module):
            fully_shard(child, mesh=mesh)
    elif size > 1:
        trained = nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    engine = ProbeEngine(
        module,
        counter.loss,
        optimizer,
        replace(CONFIG, curvature_batches=batches),
        sampling=Sampling("with_replacement"),
        planned_steps=1e6,
        processes=processes,
    )
    seconds: list[float] = []

    def train(step: int) -> None:
        started = time.perf_counter()
        optimizer.zero_grad()
        loss(trained, batch_of(step, rank), step).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        engine.observe()

    def meet(step: int) -> None:
        if not engine.confer(step):
            engine.settle(step)

    engine.preflight(batch_of(0, rank), 0, 0)
    counter.reduced, counter.small, counter.evaluations = 0.0, 0, 0
    for step in range(10**4):
        meet(step)
        if engine.opening_due(step):
            before = peak_megabytes()
            basis = engine.open_window(step)
            held = peak_megabytes() - before
        if engine.closing_due:
            closed = engine.close_window(step)
            break
        engine.offer(batch_of(step, rank), step, step)
        train(step)
    assert basis is not None and closed is not None
    cost = closed[0].cost
    point = Point(
        weights=weights,
        gradient=engine._survey.cost.seconds,
        step=sorted(seconds)[len(seconds) // 2],
        finding=basis.products - len(basis.modes),
        directions=len(basis.modes),
        opening=cost.open_seconds,
        closing=cost.close_seconds,
        watching=cost.observe_seconds / STEPS,
        vectors_held=held * 2**20 / 4 / engine.space.size,
        graph=engine._survey.cost.graph_bytes / 4 / engine.space.size,
        vectors_reduced=counter.reduced,
        evaluations=counter.evaluations,
        small=counter.small,
    )
    if rank == 0:
        Path(folder, "point.json").write_text(json.dumps(asdict(point)))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def formulas(way: str, point: Point, n: int) -> dict[str, list[float]]:
    """Measured beside what docs/scaling.md says."""
    k, products = point.directions, point.finding + 2 * point.directions
    # Weighing curvature by noise takes the held-out gradients once for each flat direction, and once more.
    weighed = FLAT + 1 if n >= MIN_BATCHES else 0
    sharded = way.startswith("FSDP2")
    graphs = point.graph if sharded else 2 * n * point.graph
    searched = point.finding - FLAT * CONFIG.flat_dimension
    held = [
        point.vectors_held,
        most_vectors(CONFIG, searched) + (DIFFERENCE_VECTORS if sharded else 0) + graphs,
    ]
    if sharded:
        resampled = 1 if n >= MIN_BATCHES else 0
        evaluations = n * (4 * products + 1 + weighed + resampled)
        # The self-test: two products of one batch, a gradient and two values.
        return {
            "seconds of a window": [point.opening + point.closing, evaluations * point.gradient],
            "evaluations of a batch": [point.evaluations, evaluations + 8 + 3],
            "vectors of P reduced": [point.vectors_reduced, 0.0],
            "vectors held, with graphs": held,
        }
    reduced = point.finding + 1 + (k + weighed) * n + k if way.startswith("DDP") else 0
    return {
        "seconds of a window": [point.opening + point.closing, 2 * n * products * point.gradient],
        "vectors of P reduced": [point.vectors_reduced, reduced],
        "vectors held, with graphs": held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small networks, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    summary: dict[str, dict[str, Any]] = {}
    print(f"batches of {BATCH}, {TOP} stiff and {FLAT} near-flat directions; one thread a process")
    for way, size in WAYS.items():
        for width, batches in QUICK if options.quick else FULL:
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(measure, (way, width, batches, folder), nprocs=size)
                point = Point(**json.loads(Path(folder, "point.json").read_text()))
            found = formulas(way, point, batches)
            summary.setdefault(way, {})[str(point.weights)] = found | {
                "gradient": point.gradient,
                "step": point.step,
                "watching": point.watching,
                "small reductions": point.small,
            }
            print(f"\n{way}, P = {point.weights:,}, n = {batches}: {point.finding} finding products")
            for what, (measured, formula) in found.items():
                print(f"  {what:26} {measured:10.2f}   by formula {formula:10.2f}")
            print(f"  {'a gradient, a step':26} {point.gradient * 1e3:10.2f} {point.step * 1e3:10.2f} ms")
            share = point.watching / point.step
            print(f"  {'watching a step':26} {point.watching * 1e3:10.2f} ms, {share:.0%} of it")
            print(f"  {'small reductions':26} {point.small:10d}")
    if options.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
