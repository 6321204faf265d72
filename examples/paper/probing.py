"""The package itself on a live training: its windows, their directions, and the minibatches that it saw."""

from __future__ import annotations

import io
import logging
import math
import tempfile
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from problems import Problem
from torch import Tensor, nn

from sgd_probe import LoopProbe, ProbeConfig, WindowResult
from sgd_probe.sinks.folder import load_vectors

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Probed:
    """A window of the package's.

    Attributes:
        result: what it found.
        vectors: its directions as columns, float64, in the order of ``result.modes``, (weights, k).
    """

    result: WindowResult
    vectors: Tensor


def batches(problem: Problem, drawn: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Minibatches of the samples with these indices, shape (steps, samples), for an ordinary loop."""
    inputs = problem.inputs.float()
    return [(inputs[rows], problem.targets[rows]) for rows in drawn]


def train(
    problem: Problem,
    rate: float,
    stream: Iterable[Any],
    *,
    steps: int,
    loss: Loss | None = None,
    after: Callable[[nn.Module, list[WindowResult], LoopProbe], object] | None = None,
    **knobs: Any,
) -> list[Probed]:
    """Train an ordinary module from the minimum with an ordinary optimizer while the package watches.

    Args:
        problem: at its minimum.
        rate: learning rate of plain SGD.
        stream: minibatches, or a loader; it is gone through again until the steps are done.
        steps: to do.
        loss: of the module on a batch, without the L2 term, which is the optimizer's weight decay.
        after: called before each step's forward pass, when windows have opened or closed.
        **knobs: of ``ProbeConfig``; the stream draws with replacement where nothing else is said.

    Returns:
        Its windows.
    """
    logging.getLogger("sgd_probe").setLevel(logging.ERROR)
    module = problem.module(dtype=torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, weight_decay=problem.decay)

    def plain(model: nn.Module, batch: Any) -> Tensor:
        return problem.criterion(model(batch[0]), batch[1])

    loss = loss or plain
    knobs = {"sampling": "with_replacement", "summary": "off", "slices": False, **knobs}
    with tempfile.TemporaryDirectory() as folder:
        probe = LoopProbe(
            module,
            optimizer,
            loss,
            planned_steps=math.inf,
            run_dir=Path(folder) / "run",
            strict=True,
            config=ProbeConfig(**knobs),
        )
        done = 0
        with redirect_stderr(io.StringIO()), probe:  # a hundred runs would announce themselves
            while done < steps:
                for batch in probe.watch(stream):
                    if after is not None:
                        after(module, probe.results, probe)
                    loss(module, batch).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    done += 1
                    if done >= steps:
                        break
        return [
            Probed(result, _columns(result, Path(folder) / "run" / f"basis_{result.index:04d}.npz"))
            for result in probe.results
        ]


def _columns(result: WindowResult, path: Path) -> Tensor:
    rows = load_vectors(path)
    return torch.stack([torch.from_numpy(rows[mode.name]).double() for mode in result.modes], dim=1)
