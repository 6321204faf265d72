"""A GAN with manual optimisation: one probe for each of its two losses.

Generator and discriminator play for eight blobs on a ring. Each has an optimizer and a loss of its own,
so each gets a probe with a name of its own. The script trains without the probes and with them, shows
that both end at the same weights to the last bit, prints the modes of both, and writes two reports.
Offline, on a processor.

    python examples/gan.py            # about a minute
    python examples/gan.py --quick
"""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from _common import QUIET, assert_same_bits, options, stiff_modes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from sgd_probe import SGDProbe, Verdict

BATCH_SIZE, NOISE = 64, 4


def ring(count: int = 4096) -> TensorDataset:
    """Points of eight narrow blobs on a circle."""
    draws = torch.Generator().manual_seed(1)
    angles = torch.randint(8, (count,), generator=draws) * (math.pi / 4)
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    return TensorDataset(points + 0.1 * torch.randn(points.shape, generator=draws))


class GAN(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(NOISE, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (real,) = batch
        generates, discriminates = self.optimizers()
        fake = self.generator(torch.randn(len(real), NOISE))

        wrong = F.softplus(-self.discriminator(real)) + F.softplus(self.discriminator(fake.detach()))
        discriminates.zero_grad()
        self.manual_backward(wrong.mean())
        discriminates.step()

        caught = F.softplus(-self.discriminator(fake))
        generates.zero_grad()
        self.manual_backward(caught.mean())
        generates.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(self.generator.parameters(), lr=0.05),
            torch.optim.SGD(self.discriminator.parameters(), lr=0.05),
        ]


def train(steps: int, seed: int, probes: list[SGDProbe]) -> GAN:
    pl.seed_everything(seed, verbose=False)
    model = GAN()
    data = ring()
    sampler = RandomSampler(data, replacement=True, num_samples=steps * BATCH_SIZE)
    loader: DataLoader[Any] = DataLoader(data, batch_size=BATCH_SIZE, sampler=sampler)
    pl.Trainer(max_epochs=1, callbacks=[*probes], **QUIET).fit(model, loader)
    return model


def main() -> None:
    arguments = options(__file__, __doc__)
    steps = 1200 if arguments.quick else 12000
    without = train(steps, arguments.seed, [])
    probes = [
        SGDProbe(
            top=6,
            flat=2,
            optimizer=index,
            name=name,
            every_n_steps=steps // 2,
            curvature_batches=4,
            run_dir=arguments.output / name,
        )
        for index, name in enumerate(("generator", "discriminator"))
    ]
    assert_same_bits(without, train(steps, arguments.seed, probes))

    for probe in probes:
        last = probe.results[-1]
        stiff = stiff_modes(last)
        assert len(probe.results) == 2
        # Each sees the weights of its own player and no others.
        assert all(name.startswith(probe.name) for mode in last.modes for name in mode.layer_shares)
        falls = sum(mode.held_out_eigenvalue < 0 for mode in stiff)
        confined = sum(mode.verdict is Verdict.CONFINED for mode in stiff)
        print(
            f"The {probe.name}'s loss curves down along {falls} of its {len(stiff)} stiffest directions, and "
            f"{confined} are confined; the largest curvature is {last.curvature.lambda_max:.3g}."
        )
    # The discriminator's own task has a best answer: its stiffest direction is a wall.
    assert probes[1].results[-1].curvature.lambda_max > 0


if __name__ == "__main__":
    main()
