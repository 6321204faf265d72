"""A character transformer under AdamW: the modes that an adaptive optimizer sees.

It learns to write Python from two sources of the standard library, without the probe and with it, shows
that both end at the same weights to the last bit, prints the modes of the last window, and writes a
report. Offline, on a processor; nothing is downloaded.

    python examples/char_transformer.py            # about a minute
    python examples/char_transformer.py --quick
"""

from __future__ import annotations

import argparse
import ast
import inspect
import string
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytorch_lightning as pl
import torch
from _common import QUIET, assert_same_bits, options, stiff_modes, stiffness_by_motion
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler

from sgd_probe import ModeKind, SGDProbe, Verdict

LENGTH, BATCH_SIZE = 32, 16


class Text(Dataset[tuple[Tensor, Tensor]]):
    """A piece from every place of a text, and each character's successor."""

    def __init__(self, modules: Iterable[ModuleType]) -> None:
        codes = {character: code for code, character in enumerate(string.printable)}
        sources = "".join(inspect.getsource(module) for module in modules)
        self.codes = torch.tensor([codes[character] for character in sources if character in codes])

    def __len__(self) -> int:
        return len(self.codes) - LENGTH

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        piece = self.codes[place : place + LENGTH + 1]
        return piece[:-1], piece[1:]

    def loader(self, batches: int) -> DataLoader[Any]:
        """Pieces from random places, drawn with replacement."""
        sampler = RandomSampler(self, replacement=True, num_samples=batches * BATCH_SIZE)
        return DataLoader(self, batch_size=BATCH_SIZE, sampler=sampler)


class CharTransformer(pl.LightningModule):
    def __init__(self, width: int = 32, blocks: int = 2, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.characters = nn.Embedding(len(string.printable), width)
        self.places = nn.Embedding(LENGTH, width)
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, len(string.printable))

    def forward(self, codes: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        x = self.characters(codes) + self.places.weight
        return self.head(self.blocks(x, mask=causal, is_causal=True))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        codes, successors = batch
        return F.cross_entropy(self(codes).flatten(0, 1), successors.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def train(steps: int, seed: int, probe: SGDProbe | None = None) -> CharTransformer:
    pl.seed_everything(seed, verbose=False)
    model = CharTransformer()
    trainer = pl.Trainer(max_epochs=1, callbacks=[probe] if probe else [], **QUIET)
    trainer.fit(model, Text([argparse, ast]).loader(steps))
    return model


def main() -> None:
    arguments = options(__file__, __doc__)
    steps = 300 if arguments.quick else 2500
    without = train(steps, arguments.seed)
    probe = SGDProbe(top=6, flat=2, every_n_steps=steps // 2, curvature_batches=3, run_dir=arguments.output)
    assert_same_bits(without, train(steps, arguments.seed, probe))

    last = probe.results[-1]
    stiff = stiff_modes(last)
    flat = [mode for mode in last.modes if mode.kind is ModeKind.FLAT]
    # AdamW divides gradients by their usual size: these are the coordinates where it is SGD with momentum.
    assert last.coordinates == "weights in AdamW's preconditioned coordinates"
    # Beyond its limit a mode would run away.
    used = stiff[0].held_out_eigenvalue / last.stability_limit
    assert 0 < used < 1
    confined = [mode for mode in stiff if mode.verdict is Verdict.CONFINED]
    ratio = stiffness_by_motion(confined)
    assert len(confined) >= 5 and 0.5 < ratio < 2
    valley = min(mode.effective_curvature for mode in flat)
    assert stiff[-1].held_out_eigenvalue > 5 * valley
    print(
        f"{len(confined)} of {len(stiff)} stiff modes are confined; by their motion they are {ratio:.2f} "
        "times as stiff as by the Hessian.\n"
        f"The stiffest is {stiff[0].held_out_eigenvalue / valley:,.0f} times as stiff as a near-flat "
        f"direction, and has {used:.0%} of the curvature that AdamW bears at this learning rate."
    )


if __name__ == "__main__":
    main()
