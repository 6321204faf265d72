"""Three networks to look for eigenpairs of: data, architecture and a short seeded training."""

from __future__ import annotations

import math
import string
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = ("mlp", "resnet", "transformer")
VOCABULARY = string.printable


@dataclass(frozen=True)
class Recipe:
    """How large a problem is and how long it is trained.

    Attributes:
        width: of the hidden layers, the first convolution or the residual stream.
        depth: hidden layers, convolutions a stage divided by two, or blocks.
        length: pixels along an edge, or tokens.
        samples: in the curvature batch.
        steps: of training.
    """

    width: int
    depth: int
    length: int
    samples: int
    steps: int


FULL = {
    "mlp": Recipe(width=256, depth=2, length=8, samples=512, steps=100),
    "resnet": Recipe(width=16, depth=3, length=32, samples=64, steps=80),
    "transformer": Recipe(width=128, depth=6, length=64, samples=32, steps=80),
}
#: Smaller siblings, trained until the learning rate has decayed to nothing.
SMALL = {
    "mlp": Recipe(width=64, depth=2, length=8, samples=256, steps=400),
    "resnet": Recipe(width=8, depth=1, length=16, samples=32, steps=300),
    "transformer": Recipe(width=48, depth=2, length=32, samples=16, steps=400),
}


@dataclass(frozen=True)
class Problem:
    """A trained network, its criterion is cross entropy, and its data.

    Attributes:
        model: in training mode.
        inputs: of the curvature batch.
        targets: one class per row of the model's output.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.inputs), self.targets)

    def gradient(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(), list(self.model.parameters()))

    def head(self, samples: int) -> Problem:
        """The same network on the first samples."""
        rows = len(self.targets) // len(self.inputs)
        return Problem(self.model, self.inputs[:samples], self.targets[: samples * rows])

    def without_running_statistics(self) -> Problem:
        """The same loss for those who evaluate modules in eval mode or cannot take writes to buffers.

        BatchNorm without running statistics normalises by those of the batch in either mode: the very
        function that training mode differentiates.
        """
        for layer in self.model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        return self


def build(name: str, recipe: Recipe) -> nn.Module:
    """The network of a problem, untrained."""
    return {"mlp": _mlp, "resnet": _resnet, "transformer": Transformer}[name](recipe)


def data(name: str, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """All inputs, shuffled, and the targets of each: shape (n,) or (n, tokens)."""
    return (_text if name == "transformer" else _digits)(name, recipe)


def trained(name: str, recipe: Recipe) -> tuple[Problem, Tensor, Tensor]:
    """A network after its training on all of the data, with that data; seeded."""
    torch.manual_seed(0)
    model = build(name, recipe)
    inputs, targets = data(name, recipe)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    for _ in range(recipe.steps):
        chosen = torch.randint(len(inputs), (min(recipe.samples, 64),))
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[chosen]), targets[chosen].flatten()).backward()
        optimizer.step()
        decay.step()
    optimizer.zero_grad()
    count = recipe.samples
    return Problem(model, inputs[:count], targets[:count].flatten()), inputs, targets


def _digits(name: str, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """scikit-learn's 8x8 digits: flat, or enlarged, each in a colour of its own on a noisy ground."""
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=generator)
    images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16.0
    targets = torch.tensor(digits.target)[order]
    if name == "mlp":
        return images, targets
    edge = recipe.length
    large = F.interpolate(images.view(-1, 1, 8, 8), (edge, edge), mode="bilinear")
    colours = torch.rand((len(images), 3, 1, 1), generator=generator)
    return large * colours + 0.1 * torch.randn((len(images), 3, edge, edge), generator=generator), targets


def _text(name: str, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Pieces of the Python standard library's sources, and each character's successor."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    text = "".join(file.read_text("utf-8", errors="ignore") for file in files)
    codes = {character: code for code, character in enumerate(VOCABULARY)}
    stream = torch.tensor([codes[character] for character in text if character in codes])
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(stream) - recipe.length - 1, (4096,), generator=generator)
    pieces = stream[starts[:, None] + torch.arange(recipe.length + 1)]
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


def _mlp(recipe: Recipe) -> nn.Module:
    widths = [64] + [recipe.width] * recipe.depth
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def _resnet(recipe: Recipe) -> nn.Module:
    """ResNet-20 at depth 3 (three stages of three blocks), ResNet-8 at depth 1."""
    width = recipe.width
    layers: list[nn.Module] = [_convolution(3, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage in range(3):
        for block in range(recipe.depth):
            after = width * 2**stage
            layers.append(ResidualBlock(before, after, 2 if stage and not block else 1))
            before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def _convolution(before: int, after: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut that drops pixels and pads channels."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = _convolution(before, after, stride), nn.BatchNorm2d(after)
        self.second, self.second_norm = _convolution(after, after, 1), nn.BatchNorm2d(after)
        self.stride, self.padding = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu(self.first_norm(self.first(x)))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu(self.second_norm(self.second(inside)) + shortcut)


class Transformer(nn.Module):
    """Predicts every next character; attention is written out, so that all can differentiate it twice."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(VOCABULARY), recipe.width)
        self.places = nn.Parameter(0.02 * torch.randn(recipe.length, recipe.width))
        self.blocks = nn.Sequential(*(AttentionBlock(recipe.width) for _ in range(recipe.depth)))
        self.norm = nn.LayerNorm(recipe.width)
        self.head = nn.Linear(recipe.width, len(VOCABULARY))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places))).flatten(0, 1)


class AttentionBlock(nn.Module):
    """Causal self-attention with four heads, then a hidden layer four times as wide."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.first(x))
        return x + self.hidden(self.second(x))

    def attend(self, x: Tensor) -> Tensor:
        samples, length, width = x.shape
        queries, keys, values = (
            part.view(samples, length, self.heads, -1).transpose(1, 2)
            for part in self.mix(x).split(width, dim=2)
        )
        scores = queries @ keys.transpose(2, 3) / math.sqrt(width / self.heads)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(dim=3)
        return self.out((weights @ values).transpose(1, 2).reshape(samples, length, width))


def exact_product(problem: Problem, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Hessian times vector by plain double backward, with none of any solver's machinery.

    It takes the problem's own model over: give it a copy of its own.
    """
    model = problem.model.to(dtype)
    inputs = problem.inputs.to(dtype) if problem.inputs.is_floating_point() else problem.inputs
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(inputs), problem.targets)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])

    def product(vector: Tensor) -> Tensor:
        parts = torch.autograd.grad(flat, parameters, vector.to(dtype), retain_graph=True)
        return torch.cat([part.reshape(-1) for part in parts])

    return product
