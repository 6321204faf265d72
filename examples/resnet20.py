"""A ResNet-20 with BatchNorm under SGD with momentum: when are verdicts worth having?

It learns scikit-learn's digits, without the probe and with it, shows that weights and running statistics
end at the same bits, and looks at the stiff modes early and late: they turn while the network learns
fast, and stay later on. It prints the modes of the last window and writes a report. Offline, on a
processor.

    pip install ".[examples]"
    python examples/resnet20.py            # about a minute
    python examples/resnet20.py --quick
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from _common import QUIET, assert_same_bits, options, stiff_modes, stiffness_by_motion
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import SGDProbe, Verdict, WindowResult


class Block(nn.Module):
    """Two normalised convolutions beside a shortcut that drops pixels and pads channels."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.first_norm, self.second_norm = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.stride, self.padding = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        inside = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu(inside + shortcut)


class ResNet20(pl.LightningModule):
    """Three stages of three blocks (He et al. 2016), a quarter as wide."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        before = width
        for stage in range(3):
            for block in range(3):
                after = width * 2**stage
                layers.append(Block(before, after, stride=2 if stage and not block else 1))
                before = after
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        return F.cross_entropy(self.body(images), digits, label_smoothing=0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def train(epochs: int, seed: int, probe: SGDProbe | None = None) -> ResNet20:
    pl.seed_everything(seed, verbose=False)
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    data = TensorDataset(images, torch.tensor(digits))
    loader: DataLoader[Any] = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    model = ResNet20()
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[probe] if probe else [], **QUIET)
    trainer.fit(model, loader)
    return model


def turning(window: WindowResult) -> str:
    return (
        f"Window {window.index}, from step {window.opened_at_step:,}: the largest curvature is "
        f"{window.curvature.lambda_max:.3g}; of the stiff subspace {window.curvature.end_overlap:.0%} is "
        "left at its end."
    )


def main() -> None:
    arguments = options(__file__, __doc__)
    epochs = 10 if arguments.quick else 40
    without = train(epochs, arguments.seed)
    probe = SGDProbe(
        top=6, flat=1, every_n_steps=epochs * 28 // 2, curvature_batches=2, run_dir=arguments.output
    )
    assert_same_bits(without, train(epochs, arguments.seed, probe))

    first, last = probe.results[0], probe.results[-1]
    stiff = stiff_modes(last)
    print(turning(first), turning(last), sep="\n")
    confined = [mode for mode in stiff if mode.verdict is Verdict.CONFINED]
    ratio = stiffness_by_motion(confined)
    assert len(confined) >= 2
    assert last.curvature.end_overlap > first.curvature.end_overlap + 0.1
    # Where the modes stay as they are, both are the same.
    assert last.curvature.end_overlap < 0.7 or 0.6 < ratio < 1.6
    print(
        f"{len(confined)} of {len(stiff)} stiff modes are confined; by their motion they are {ratio:.2f} "
        "times as stiff as by the Hessian."
    )


if __name__ == "__main__":
    main()
