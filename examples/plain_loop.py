"""The probe in a plain PyTorch loop: a small network learns blobs, with SGD and a loader with replacement.

It trains twice, without the probe and with it, shows that both end at the same weights to the last bit,
prints the modes of the last window, and writes a report. Offline, on a processor.

    python examples/plain_loop.py            # about twenty seconds
    python examples/plain_loop.py --quick
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _common import assert_same_bits, options, stiff_modes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from sgd_probe import LoopProbe, Verdict, WindowResult

BATCH_SIZE, EPOCH = 32, 100  # minibatches in what the loop calls an epoch


def make_loader() -> DataLoader[Any]:
    """Four overlapping blobs of ten numbers."""
    draws = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (1024,), generator=draws)
    inputs = torch.randn((4, 10), generator=draws)[labels] + torch.randn((1024, 10), generator=draws)
    data = TensorDataset(inputs, labels)
    sampler = RandomSampler(data, replacement=True, num_samples=EPOCH * BATCH_SIZE)
    return DataLoader(data, batch_size=BATCH_SIZE, sampler=sampler)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, label_smoothing=0.1)


def train(epochs: int, window: int, seed: int, run_dir: Path | None) -> tuple[nn.Module, list[WindowResult]]:
    """Half of it with momentum, the rest of plain SGD, which the probe watches where it has a folder."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 4))
    loader = make_loader()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)

    def epoch(batches: Any) -> None:
        for batch in batches:
            loss = loss_fn(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(epochs // 2):
        epoch(loader)
    optimizer.param_groups[0]["momentum"] = 0.0
    left = epochs - epochs // 2
    if run_dir is None:
        for _ in range(left):
            epoch(loader)
        return model, []
    with LoopProbe(
        model,
        optimizer,
        loss_fn,
        planned_steps=left * EPOCH,
        top=8,
        flat=4,
        window=window,
        every_n_steps=window + 500,
        curvature_batches=8,
        run_dir=run_dir,
    ) as probe:
        for _ in range(left):
            epoch(probe.watch(loader))
    return model, probe.results


def main() -> None:
    arguments = options(__file__, __doc__)
    epochs, window = (20, 800) if arguments.quick else (80, 1500)

    without, _ = train(epochs, window, arguments.seed, None)
    model, results = train(epochs, window, arguments.seed, arguments.output)
    assert_same_bits(without, model)

    last = results[-1]
    stiff = stiff_modes(last)
    confined = [mode for mode in stiff if mode.verdict is Verdict.CONFINED]
    assert len(confined) >= 4
    assert 0.6 < stiff[0].measured_curvature.value / stiff[0].held_out_eigenvalue < 1.6
    print(
        f"{len(confined)} of {len(stiff)} stiff modes are confined. The stiffest has curvature "
        f"{stiff[0].held_out_eigenvalue:.3g} by the Hessian, {stiff[0].measured_curvature.value:.3g} by its "
        "motion."
    )


if __name__ == "__main__":
    main()
