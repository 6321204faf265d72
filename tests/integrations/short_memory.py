"""A training in a process whose memory the system really limits: run by test_short_memory.py."""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe import LoopProbe, ProbeConfig
from sgd_probe.engine import ProbeEngine, frugality

WIDTH, STEPS, BATCH = 512, 75, 64


def network(batch_norm: bool) -> nn.Module:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm1d(WIDTH)] if batch_norm else []
    return nn.Sequential(
        nn.Linear(16, WIDTH), *middle, nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)
    )


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def address_space() -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmSize"))
    return int(line.split()[1]) * 1024


def limit(megabytes: float) -> None:
    """From now on the process may have so much more, no matter what for."""
    room = address_space() + int(megabytes * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))


def train(probed: bool, megabytes: float, planned: bool, batch_norm: bool, config: dict[str, Any]) -> Any:
    """Seventy-five steps, in which a window opens.

    Args:
        probed: with the probe.
        megabytes: that may be taken beyond what the training has when the window opens, or is planned.
        planned: the limit is there, and known, before the preflight; else only when the window opens, and
            what is free was not known.
        batch_norm: with a normalisation over the batch.
        config: of the probe.
    """
    model = network(batch_norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(BATCH, 16, generator=generator), torch.randint(4, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]
    results: list[Any] = []
    if not planned:
        vars(frugality)["free_memory"] = lambda device: 2**40
    opening, preflight = ProbeEngine.open_window, ProbeEngine.preflight

    def limited_opening(self: ProbeEngine, step: int) -> Any:
        if not planned:
            limit(megabytes)
        try:
            return opening(self, step)
        finally:
            if not planned:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def limited_preflight(self: ProbeEngine, batch: Any, index: int, step: int) -> Any:
        if planned:
            limit(megabytes)
        return preflight(self, batch, index, step)

    ProbeEngine.open_window = limited_opening  # type: ignore[method-assign]
    ProbeEngine.preflight = limited_preflight  # type: ignore[method-assign]
    probe = LoopProbe(
        model,
        optimizer,
        loss_fn,
        planned_steps=STEPS,
        window=50,
        every_n_steps=200,
        on_result=results.append,
        config=ProbeConfig(sampling="with_replacement", **config),
    )
    if probed:
        with probe:
            steps(model, optimizer, probe.watch(batches))
    else:
        steps(model, optimizer, batches)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return {
        "weights": digest.hexdigest(),
        "modes": [[mode.name for mode in result.modes] for result in results],
        "residuals": [[mode.residual for mode in result.modes] for result in results],
        "notes": [note for result in results for note in result.warnings if note.startswith("Memory")],
    }


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any) -> None:
    for batch in batches:
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    torch.set_num_threads(1)
    # numpy's BLAS takes its buffers at the first use, and ends the process where it gets none.
    np.linalg.eigh(np.ones((300, 300)) @ np.ones((300, 300)))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    loss_fn(network(False), (torch.randn(2, 16), torch.zeros(2, dtype=torch.long))).backward()  # type: ignore[no-untyped-call]
    print(json.dumps(train(**json.loads(sys.argv[1]))))
