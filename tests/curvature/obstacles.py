"""Small real models, one for every construct that second derivatives may stumble over."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Apply = Callable[[Tensor], Tensor]


def cross_entropy(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def content(samples: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(samples, 6, generator=generator), torch.randint(0, 3, (samples,), generator=generator)


class Mapped(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, function: Apply) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.function(self.first(x))))


class OnceDifferentiable(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cast(Tensor, gradient * (1 - x.tanh().square()))


class InNumpy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(gradient.detach().numpy() * (1 - np.tanh(x.detach().numpy()) ** 2))


class Detached(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cast(Tensor, gradient * (1 - x.detach().tanh().square()))


class TwiceDifferentiable(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cast(Tensor, gradient * (1 - x.tanh().square()))


class StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class InFloat32(Function):
    """A kernel that was written for one precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            raise NotImplementedError(f"the kernel takes float32, not {x.dtype}")
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cast(Tensor, gradient * (1 - x.tanh().square()))


def applied(function: Any) -> nn.Module:
    return Mapped(function.apply)


def alone(function: Any) -> nn.Module:
    """No other curvature around it that could give it away."""

    class Alone(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, function.apply(super().forward(x)))

    return Alone(6, 3)


def weight_norm(wrap: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return nn.Sequential(wrap(nn.Linear(6, 8), **options), nn.Tanh(), wrap(nn.Linear(8, 3), **options))


class HandWritten(nn.Linear):
    """Weight normalisation in plain torch functions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(self.weight.detach().norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.gain * self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.layers = kind(3, 5, num_layers=2, dropout=0.2, batch_first=True)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.layers(x.view(-1, 2, 3))[0][:, -1]))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.again(self.first(x).tanh()).tanh()))


class Checkpointed(nn.Module):
    """A part that is computed once more in the backward pass; ``early``: no weight lies before it."""

    def __init__(self, reentrant: bool, early: bool = False) -> None:
        super().__init__()
        self.reentrant, self.early = reentrant, early
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_() if self.early else self.first(x)
        x = cast(Tensor, checkpoint(self._part, x, use_reentrant=self.reentrant))
        return cast(Tensor, self.last(x))

    def _part(self, x: Tensor) -> Tensor:
        return F.dropout(self.middle(x), 0.2).tanh()


class Tokens(nn.Module):
    """Embedding, positions and what comes after; six numbers are read as six tokens."""

    def __init__(self, body: nn.Module, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, **options)
        nn.init.normal_(self.table.weight)  # a row of padding too
        self.body, self.last = body, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 5).long() % 11
        return cast(Tensor, self.last(self.body(self.table(tokens)).mean(1)))


class Shortened(nn.Module):
    """An embedding whose rows are shortened to a largest norm, in place, where they are used."""

    def __init__(self, max_norm: float) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, max_norm=max_norm)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.table((x.abs() * 5).long() % 11).mean(1).tanh()))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x, x, x, need_weights=False)[0])


class ScaledDotProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projection(x).view(len(x), 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(len(x), 6, 8)


def transformer() -> nn.Module:
    return Tokens(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True))


def image(*layers: nn.Module) -> nn.Module:
    """A convolution on a 2 x 3 image and some layers after it, 4 channels."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2, padding=1),
        *layers,
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def made(module: nn.Module) -> nn.Module:
    """Let lazy layers see an input."""
    module(content()[0])
    return module


class InPlace(nn.Module):
    """Edits its activations and its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.9)
        hidden = self.first(x)
        return cast(Tensor, self.last(hidden.relu_()))


class SoftTarget(nn.Module):
    """Learns from what it says itself: the target is held fixed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.first(x).tanh()))


def self_distillation(module: nn.Module, batch: Any, index: int) -> Tensor:
    target = module(batch[0].roll(1, 0)).detach()
    return F.mse_loss(module(batch[0]), target) + cross_entropy(module, batch, index)


class Teacher(SoftTarget):
    """A target from a copy of the weights, which only moves outside of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = SoftTarget().requires_grad_(False)


class MovingTeacher(Teacher):
    """The training step moves the teacher itself."""


def distillation(module: nn.Module, batch: Any, index: int) -> Tensor:
    assert isinstance(module, Teacher)
    if isinstance(module, MovingTeacher):
        with torch.no_grad():
            for slow, fast in (
                (module.teacher.first, module.first),
                (module.teacher.last, module.last),
            ):
                for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
                    a.mul_(0.996).add_(b, alpha=0.004)
    return F.mse_loss(module(batch[0]), module.teacher(batch[0].roll(1, 0))) + cross_entropy(
        module, batch, index
    )


class Penalised(nn.Module):
    """A critic whose slope by its inputs shall be one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(6, 8), layer, nn.Tanh(), nn.Linear(8, 1))


def gradient_penalty(module: nn.Module, batch: Any, index: int) -> Tensor:
    inputs = batch[0].requires_grad_()
    value = cast(Penalised, module).critic(inputs)
    (slope,) = torch.autograd.grad(value.sum(), inputs, create_graph=True)
    return cast(Tensor, value.mean() + (slope.norm(dim=1) - 1).square().mean())


def distance_from_itself(module: nn.Module, batch: Any, index: int) -> Tensor:
    """Both the loss and its gradient vanish where the teacher is a copy."""
    said = cast(Teacher, module).teacher(batch[0]).log_softmax(1)
    return F.kl_div(module(batch[0]).log_softmax(1), said, log_target=True, reduction="batchmean")


def copied() -> nn.Module:
    module = Teacher()
    module.teacher.load_state_dict({k: v for k, v in module.state_dict().items() if "teacher" not in k})
    return module


def nearly_linear(module: nn.Module, batch: Any, index: int) -> Tensor:
    slope = torch.stack([parameter.sum() for parameter in module.parameters()]).sum()
    return 100 * slope + 1e-7 * cross_entropy(module, batch, index)


class Sorted(SoftTarget):
    """Decays the weights that are not in a set of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.free = {self.first.weight}


def sorted_decay(module: nn.Module, batch: Any, index: int) -> Tensor:
    free = cast(Sorted, module).free
    decay = torch.stack([p.square().sum() for p in module.parameters() if p not in free]).sum()
    return cross_entropy(module, batch, index) + 1e-2 * decay


def frozen_in_the_step(module: nn.Module, batch: Any, index: int) -> Tensor:
    cast(SoftTarget, module).first.requires_grad_(False)
    return cross_entropy(module, batch, index)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.EmbeddingBag(11, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.table((x.abs() * 5).long() % 11).tanh()))


class Padded(nn.Module):
    """The row of padding is held still by a function, which no layer tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Parameter(torch.randn(11, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 5).long() % 11
        return cast(Tensor, self.last(F.embedding(tokens, self.table, padding_idx=2).mean(1).tanh()))


def distances(module: nn.Module, batch: Any, index: int) -> Tensor:
    return torch.cdist(module(batch[0]), batch[0][:, :3]).square().mean()


def ctc(module: nn.Module, batch: Any, index: int) -> Tensor:
    rows = module(batch[0]).log_softmax(-1)[:, None]
    return F.ctc_loss(rows, torch.tensor([[1, 2]]), torch.tensor([len(rows)]), torch.tensor([2]))


class LowRank(nn.Module):
    """Weights in a list and a dict, added to those of a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 3).requires_grad_(False)
        self.factors = nn.ParameterList([torch.randn(2, 6), torch.randn(3, 2)])
        self.scales = nn.ParameterDict({"gain": torch.tensor(1.5)})

    def forward(self, x: Tensor) -> Tensor:
        change = self.scales["gain"] * self.factors[1] @ self.factors[0]
        weights = {"weight": self.base.weight + change, "bias": self.base.bias}
        return cast(Tensor, torch.func.functional_call(self.base, weights, (x,))).tanh()


def learning_to_learn(module: nn.Module, batch: Any, index: int, order: int = 2) -> Tensor:
    weights = dict(module.named_parameters())
    loss = cross_entropy(module, batch, index)
    slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=order == 2)
    moved = {name: w - 0.3 * slope for (name, w), slope in zip(weights.items(), slopes, strict=True)}
    logits = torch.func.functional_call(module, moved, (batch[0].roll(1, 0),))
    return F.cross_entropy(logits, batch[1])


class FixedPoint(nn.Module):
    """Only the last of many steps has a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(0.2 * torch.randn(6, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = x
            for _ in range(30):
                z = torch.tanh(z @ self.weight + x)
        return cast(Tensor, self.last(torch.tanh(z @ self.weight + x)))


def label_smoothing(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], label_smoothing=0.1)


def weight_decay(module: nn.Module, batch: Any, index: int) -> Tensor:
    decay = torch.stack([parameter.square().sum() for parameter in module.parameters()]).sum()
    return cross_entropy(module, batch, index) + 1e-2 * decay


CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 3.0])


def class_weights(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], weight=CLASS_WEIGHTS)


def new_class_weights(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 3.0]))


def new_noise(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(torch.rand(16, 6)[: len(batch[0])]), batch[1])


def narrow_output(module: nn.Module, batch: Any, index: int) -> Tensor:
    """Models of transformers do so, whatever their weights are."""
    return F.cross_entropy(module(batch[0]).float().to(dtype=torch.float32), batch[1])


def narrowed_output(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0]).type("torch.FloatTensor"), batch[1])


def noise(module: nn.Module, batch: Any, index: int) -> Tensor:
    x, y = batch
    return F.cross_entropy(module(x + 0.1 * torch.randn_like(x) * math.sqrt(2)), y)


def mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 3))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + x)


def deep() -> nn.Module:
    """Many kinks: half a million units with ReLU on 16 samples."""
    return nn.Sequential(
        nn.Linear(6, 256),
        nn.Unflatten(1, (1, 16, 16)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        *(Residual(16) for _ in range(4)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
