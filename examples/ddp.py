"""Two processes with DDP over gloo: they hold one set of modes between them.

Lightning starts the second process by itself. The script trains without the probe and with it, shows
that both end at the same weights to the last bit and that both processes hold the same modes to the last
bit, prints those of the last window, and writes a report. Offline, on a processor.

    pip install ".[examples]"
    python examples/ddp.py            # about half a minute
    python examples/ddp.py --quick
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from _common import QUIET, assert_same_bits, options, stiff_modes, stiffness_by_motion
from pytorch_lightning.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import SGDProbe, Verdict

BATCH_SIZE = 32  # of each process


class MLP(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pixels, digits = batch
        return F.cross_entropy(self.body(pixels), digits, label_smoothing=0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-3)


def train(epochs: int, seed: int, probe: SGDProbe | None = None) -> tuple[pl.Trainer, MLP]:
    pl.seed_everything(seed, verbose=False)
    model = MLP()
    pixels, digits = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits))
    loader: DataLoader[Any] = DataLoader(data, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    two = {**QUIET, "devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[probe] if probe else [], **two)
    trainer.fit(model, loader)
    return trainer, model


def main() -> None:
    arguments = options(__file__, __doc__)
    epochs = 14 if arguments.quick else 100
    _, without = train(epochs, arguments.seed)
    probe = SGDProbe(
        top=10, flat=2, every_n_steps=epochs * 28 // 2, curvature_batches=4, run_dir=arguments.output
    )
    trainer, model = train(epochs, arguments.seed, probe)
    assert_same_bits(without, model)

    last = probe.results[-1]
    theirs = trainer.strategy.broadcast(repr(last.modes))  # those of the first process
    assert repr(last.modes) == theirs
    stiff = stiff_modes(last)
    # A step averages both processes' minibatches, and so does the Hessian.
    assert last.curvature.samples_found == 2 * BATCH_SIZE * last.curvature.batches_found
    confined = [mode for mode in stiff if mode.verdict is Verdict.CONFINED]
    ratio = stiffness_by_motion(confined)
    assert len(confined) >= 6 and 0.5 < ratio < 1.6
    if trainer.is_global_zero:
        print(
            f"Both processes hold the same {len(last.modes)} modes, bit for bit.\n"
            f"{len(confined)} of {len(stiff)} stiff modes are confined; by their motion they are {ratio:.2f} "
            "times as stiff as by the Hessian."
        )


if __name__ == "__main__":
    main()
