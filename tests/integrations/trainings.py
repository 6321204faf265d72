"""The trainings that people write: a module, its loader and its trainer's options for each feature."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import default_collate

from sgd_probe import SGDProbe
from tests.curvature import obstacles as ob
from tests.integrations.harness import PACKAGES, RecordingDataset, batchnorm, loader, mlp

#: From the package's LightningModule to a module.
MakeModule = Callable[[Any], Any]
#: From a module and its batch to a loss, or whatever its training step returns.
Step = Callable[[Any, Any, int], Any]


def quick_probe(**options: Any) -> SGDProbe:
    """Windows of 60 steps, one every 70."""
    options = {"top": 2, "flat": 1, "window": 60, "every_n_steps": 70, "curvature_batches": 2, **options}
    return SGDProbe(**options)


@dataclass(frozen=True)
class Training:
    """A training and what the probe is expected to do in it.

    Attributes:
        module: made from the base class of a package.
        data: makes the training loader; or that and the one for validation.
        options: of the trainer.
        callbacks: of the user's, made from a package's name.
        plugins: likewise.
        probes: at least one.
        windows: that close in each probe.
        steps: optimizer steps.
        compiled: the trainer gets what torch.compile makes of the module.
        says: what is found in the probe's messages.
    """

    module: MakeModule
    data: Callable[[], Any] = field(default=lambda: vectors())
    options: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[str], list[Any]] = field(default=lambda package: [])
    plugins: Callable[[str], list[Any]] = field(default=lambda package: [])
    probes: Callable[[], list[SGDProbe]] = field(default=lambda: [quick_probe(strict=True)])
    windows: int = 3
    steps: int = 210
    compiled: bool = False
    says: str = ""


def aside(
    module: MakeModule, says: str, data: Callable[[], Any] | None = None, steps: int = 60, **options: Any
) -> Training:
    """A training from which the probe stays away before or at its first window, with its reason."""
    data = data or vectors
    return Training(module, data, options, probes=lambda: [quick_probe()], windows=0, says=says, steps=steps)


def vectors() -> Any:
    return loader(RecordingDataset((6,)))


def with_validation() -> Any:
    return vectors(), loader(RecordingDataset((6,), count=64), replacement=False)


def sgd(module: Any) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def classify(self: Any, batch: Any, batch_idx: int) -> Any:
    loss = F.cross_entropy(self.body(batch[0]), batch[1])
    self.log("loss", loss)
    return loss


def silent(self: Any, batch: Any, batch_idx: int) -> Any:
    """Compilers do not get through Lightning's ``log``."""
    return F.cross_entropy(self.body(batch[0]), batch[1])


def through_forward(self: Any, batch: Any, batch_idx: int) -> Any:
    """By a call of the module itself, which is what fires its hooks."""
    loss = F.cross_entropy(self(batch[0]), batch[1])
    self.log("loss", loss)
    return loss


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4))


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 4))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))


def module(
    body: Callable[[], nn.Module] = network,
    step: Step = classify,
    optimizer: Callable[[Any], Any] = sgd,
    **attributes: Callable[[], Any],
) -> MakeModule:
    """A module with a body, a training step and an optimizer; ``attributes`` are made on it."""

    def make(base: Any) -> Any:
        class Module(base):  # type: ignore[misc]
            shared: dict[str, int] = {"calls": 0}  # noqa: RUF012  (people do keep state on the class)

            def __init__(self) -> None:
                super().__init__()
                self.body = body()
                for name, build in attributes.items():
                    setattr(self, name, build())

            def forward(self, inputs: Tensor) -> Tensor:
                return cast(Tensor, self.body(inputs))

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return step(self, batch, batch_idx)

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

            def configure_optimizers(self) -> Any:
                return optimizer(self)

        return Module()

    return make


# ---- what a training step does on the side


def remembers(self: Any, batch: Any, batch_idx: int) -> dict[str, Tensor]:
    """Counters, means, queues and generators of its own; nothing of it may be done twice."""
    self.calls += 1
    type(self).shared["calls"] += 1
    noise = torch.randn(batch[0].shape, generator=self.torch_generator)
    factor = self.numpy_generator.normal() + self.python_generator.random()
    loss = F.cross_entropy(self.body(batch[0] + 0.01 * factor * noise), batch[1])
    self.mean_loss = 0.9 * self.mean_loss + 0.1 * loss.detach()
    self.last.append(float(loss.detach()))
    self.log_dict({"loss": loss, "mean": self.mean_loss, "calls": float(self.calls)})
    return {"loss": loss * (1 + 1e-4 * type(self).shared["calls"]), "extra": self.mean_loss}


def none_where(*where: int) -> Step:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx in where else classify(self, batch, batch_idx)

    return step


def moves_schedule(self: Any, batch: Any, batch_idx: int) -> Any:
    self.lr_schedulers().step()
    return classify(self, batch, batch_idx)


def scheduled(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.95)]


# ---- shapes of batches


class Pair(NamedTuple):
    inputs: Tensor
    labels: Tensor


@dataclass
class Record:
    pair: Pair
    names: list[str]


def collated(collate: Callable[[Any], Any]) -> Callable[[], Any]:
    def make() -> Any:
        return loader(RecordingDataset((6,)), collate_fn=lambda samples: collate(default_collate(samples)))

    return make


def from_dict(self: Any, batch: Any, batch_idx: int) -> Any:
    batch["x"].mul_(0.9)
    return classify(self, (batch["x"], batch["nested"]["y"]), batch_idx)


def from_record(self: Any, batch: Any, batch_idx: int) -> Any:
    batch.names.append("seen")
    batch.pair.inputs.add_(0.01)
    return classify(self, batch.pair, batch_idx)


def combined() -> Any:
    """Two loaders of different lengths; the trainer goes round the shorter one again."""
    return {"a": loader(RecordingDataset((6,))), "b": loader(RecordingDataset((6,), count=160))}


def from_both(self: Any, batch: Any, batch_idx: int) -> Any:
    first, second = batch["a"], batch["b"]
    return classify(self, (first[0] + 0.1 * second[0], first[1]), batch_idx)


def workers() -> Any:
    """Two processes, which draw from generators of all three kinds."""
    data = RecordingDataset((6,), count=1024, augment=True)
    return loader(data, num_workers=2, persistent_workers=True)


def own_generator() -> Any:
    return loader(
        RecordingDataset((6,), augment=True), replacement=False, generator=torch.Generator().manual_seed(5)
    )


# ---- optimizers


class SAM(torch.optim.Optimizer):
    """Takes the gradient a little uphill of where it stands: two evaluations of the closure a step."""

    def __init__(self, parameters: Any, lr: float, radius: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr, "radius": radius})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [parameter.clone() for parameter, _ in moved]
        for parameter, group in moved:
            parameter.add_(group["radius"] * parameter.grad / (parameter.grad.norm() + 1e-12))
        closure()
        for (parameter, group), start in zip(moved, before, strict=True):
            parameter.copy_(start - group["lr"] * parameter.grad)
        return loss


# ---- layers


class Compiled(nn.Module):
    """A part of it is compiled."""

    def __init__(self, backend: str = "aot_eager") -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.part = torch.compile(nn.Sequential(nn.Tanh(), nn.Linear(12, 4)), backend=backend)

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.part(self.first(inputs)))


def with_head(body: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(body(), nn.Linear(3, 4))


class Tokens(nn.Module):
    """Six numbers read as tokens, one of which is for padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 6, padding_idx=0, sparse=True)
        nn.init.normal_(self.table.weight)
        self.last = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.table((inputs.abs() * 2).long().clamp(0, 7)).mean(1).tanh()))


def with_penalty(self: Any, batch: Any, batch_idx: int) -> Any:
    """A loss that holds a gradient of the network."""
    inputs = batch[0].clone().requires_grad_()
    loss = F.cross_entropy(self.body(inputs), batch[1])
    (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
    self.log("loss", loss)
    return loss + slope.square().sum()


# ---- steps that draw their batches, or make their steps, themselves


def drawing(batches: int = 1) -> MakeModule:
    def make(base: Any) -> Any:
        class Drawing(module()(base).__class__):  # type: ignore[misc]
            def training_step(self, dataloader_iter: Any) -> Any:
                losses = []
                for _ in range(batches):
                    batch, _, _ = next(dataloader_iter)
                    batch[0].mul_(0.9)
                    losses.append(F.cross_entropy(self(batch[0]), batch[1]))
                loss = torch.stack(losses).mean()
                self.log("loss", loss, batch_size=16)
                return loss

        return Drawing()

    return make


def gan(step: Step, schedule: bool = False) -> MakeModule:
    """A generator and a discriminator of six numbers, each with its optimizer."""

    def make(base: Any) -> Any:
        class GAN(base):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False
                self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))
                self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

            def training_step(self, batch: Any, batch_idx: int) -> None:
                step(self, batch, batch_idx)

            def fake(self, like: Tensor) -> Tensor:
                return cast(Tensor, self.generator(torch.randn(len(like), 3).to(like)))

            def says(self, samples: Tensor, real: bool) -> Tensor:
                """How wrong the discriminator is about samples."""
                score = self.discriminator(samples)
                return F.binary_cross_entropy_with_logits(score, torch.full_like(score, float(real)))

            def configure_optimizers(self) -> Any:
                optimizers = [
                    torch.optim.SGD(part.parameters(), lr=0.02, momentum=0.5)
                    for part in (self.generator, self.discriminator)
                ]
                schedules = [torch.optim.lr_scheduler.StepLR(o, 50, 0.9) for o in optimizers]
                return (optimizers, schedules) if schedule else optimizers

        return GAN()

    return make


def in_turns(self: Any, batch: Any, batch_idx: int) -> None:
    """The way of Lightning's own example: toggled, clipped, gradients zeroed after the step."""
    for which, optimizer in enumerate(self.optimizers()):
        self.toggle_optimizer(optimizer)
        fake = self.fake(batch[0])
        loss = self.says(fake, True) if which == 0 else self.says(batch[0], True) + self.says(fake, False)
        self.log(f"loss_{which}", loss)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)
    for schedule in self.lr_schedulers():
        schedule.step()


def discriminator_first(self: Any, batch: Any, batch_idx: int) -> None:
    """Gradients that are not wanted are zeroed before; the losses of a step in two parts; a closure."""
    generator, discriminator = self.optimizers()
    fake = self.fake(batch[0])
    discriminator.zero_grad()
    self.manual_backward(self.says(batch[0], True))
    self.manual_backward(self.says(fake.detach(), False))
    discriminator.step()

    def closure() -> None:
        generator.zero_grad()
        self.manual_backward(self.says(fake, True))

    generator.step(closure=closure)


def accumulating(self: Any, batch: Any, batch_idx: int) -> None:
    """Two batches a step of the generator."""
    generator, _ = self.optimizers()
    self.manual_backward(self.says(self.fake(batch[0]), True) / 2)
    if batch_idx % 2:
        generator.step()
        generator.zero_grad()


def several_steps(self: Any, batch: Any, batch_idx: int) -> None:
    generator, _ = self.optimizers()
    for _ in range(3):
        generator.zero_grad()
        self.manual_backward(self.says(self.fake(batch[0]), True))
        generator.step()


def plain_backward(self: Any, batch: Any, batch_idx: int) -> None:
    generator, _ = self.optimizers()
    generator.zero_grad()
    self.says(self.fake(batch[0]), True).backward()
    generator.step()


def both() -> list[SGDProbe]:
    return [
        quick_probe(strict=True),
        quick_probe(strict=True, name="sgd_probe_discriminator", optimizer=1),
    ]


# ---- callbacks


def ema(package: str) -> list[Any]:
    return [PACKAGES[package].callbacks.EMAWeightAveraging(decay=0.95)]


def swa(package: str) -> list[Any]:
    return [PACKAGES[package].callbacks.StochasticWeightAveraging(0.02, swa_epoch_start=8)]


def watchers(package: str) -> list[Any]:
    callbacks = PACKAGES[package].callbacks
    return [
        callbacks.EarlyStopping("val_loss", patience=25),
        callbacks.ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True, every_n_train_steps=40),
        callbacks.LearningRateMonitor(logging_interval="step"),
    ]


def gathering(package: str) -> list[Any]:
    return [PACKAGES[package].callbacks.GradientAccumulationScheduler({0: 1, 6: 2, 14: 3})]


def thawing(package: str) -> list[Any]:
    """The first layer joins in after some epochs."""

    class Thawing(PACKAGES[package].callbacks.BaseFinetuning):  # type: ignore[misc]
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.body[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 5:
                self.unfreeze_and_add_param_group(pl_module.body[0], optimizer)

    return [Thawing()]


def pruning(package: str) -> list[Any]:
    """At every epoch's end; from the first on the pruned weights have other names."""
    return [PACKAGES[package].callbacks.ModelPruning("l1_unstructured", amount=0.02)]


def scaler(exponent: int = 20) -> Callable[[str], list[Any]]:
    """fp16 with a loss scaler, which a trainer on the CPU takes only as a plugin."""

    def make(package: str) -> list[Any]:
        grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent, growth_interval=50)
        return [PACKAGES[package].plugins.precision.MixedPrecision("16-mixed", "cpu", grad_scaler)]

    return make


#: Some seconds each.
SLOW = ("compiled module", "compiled part, default backend", "several probes", "workers")

TRAININGS: dict[str, Training] = {
    "dropout, metric, schedule, dict": Training(mlp),
    "batch norm, random numbers in step and data": Training(
        batchnorm, lambda: loader(RecordingDataset((1, 6, 6), augment=True))
    ),
    "workers": Training(module(), workers),
    "own generator of the loader": Training(module(), own_generator),
    "attributes of the step": Training(
        module(
            step=remembers,
            calls=int,
            mean_loss=lambda: torch.zeros(()),
            last=lambda: deque(maxlen=5),
            torch_generator=lambda: torch.Generator().manual_seed(1),
            numpy_generator=lambda: np.random.default_rng(1),
            python_generator=lambda: random.Random(1),
        )
    ),
    "schedule moved by the step": Training(module(step=moves_schedule, optimizer=scheduled)),
    "None for every second batch": Training(module(step=none_where(*range(0, 16, 2)))),
    "bf16-true": Training(mlp, options={"precision": "bf16-true"}, says="and the float32 product to"),
    "bf16-true, AdamW": Training(
        module(optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2)),
        options={"precision": "bf16-true"},
    ),
    "16-true": Training(mlp, options={"precision": "16-true"}, says="and the float32 product to"),
    "None now and then": Training(module(step=none_where(13))),
    "dict batch, edited": Training(
        module(step=from_dict), collated(lambda pair: {"x": pair[0], "nested": {"y": pair[1]}, "id": "text"})
    ),
    "objects as batch, edited": Training(
        module(step=from_record), collated(lambda pair: Record(Pair(*pair), ["text"]))
    ),
    "combined loaders": Training(module(step=from_both), combined),
    "clipping by norm, accumulation": Training(
        module(), options={"gradient_clip_val": 0.5, "accumulate_grad_batches": 3}
    ),
    "accumulation that changes": Training(
        module(),
        options={"max_epochs": 21, "max_steps": -1},
        callbacks=gathering,
        windows=2,
        says="number of batches that make a step changed",
    ),
    "layers thawed": Training(
        module(optimizer=lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05)),
        callbacks=thawing,
        says="136 weights are trained and probed from step",
    ),
    "pruning": Training(module(), callbacks=pruning, says="which weights are trained changed"),
    "clipping by value": Training(
        module(), options={"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
    ),
    "validation, early stopping, checkpoints": Training(
        module(),
        with_validation,
        {"val_check_interval": 5, "enable_checkpointing": True},
        watchers,
    ),
    "weight averaging (EMA)": Training(module(batch_norm), with_validation, {"val_check_interval": 5}, ema),
    "weight averaging (SWA)": Training(
        module(batch_norm), with_validation, {"max_epochs": 16, "max_steps": -1}, swa
    ),
    "bf16-mixed": Training(mlp, options={"precision": "bf16-mixed"}),
    "64-true": Training(mlp, options={"precision": "64-true"}),
    "fp16 with a scaler": Training(mlp, plugins=scaler()),
    # Fused SGD reads momentum that was never written where the first step is skipped: nothing overflows here.
    "fused SGD under a scaler": Training(
        module(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, fused=True)),
        plugins=scaler(8),
    ),
    "fused SGD": Training(
        module(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, fused=True))
    ),
    "fused AdamW": Training(
        module(optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True))
    ),
    "compiled module": Training(module(dropped, step=silent), compiled=True),
    "compiled part": Training(module(Compiled)),
    "compiled part, default backend": Training(module(lambda: Compiled("inductor"))),
    "checkpointing": Training(module(with_head(lambda: ob.Checkpointed(reentrant=False)))),
    "LSTM": Training(module(with_head(lambda: ob.Recurrent(nn.LSTM)))),
    "weight norm of all": Training(
        module(with_head(lambda: ob.weight_norm(parametrizations.weight_norm, dim=None)))
    ),
    "embedding with max_norm": Training(module(with_head(lambda: ob.Shortened(100.0)))),
    "sparse embedding with padding": Training(module(Tokens)),
    "gradient penalty": Training(module(step=with_penalty)),
    "SAM": Training(module(optimizer=lambda m: SAM(m.parameters(), lr=0.05))),
    "several probes": Training(
        mlp,
        probes=lambda: [
            quick_probe(strict=True),
            quick_probe(strict=True, name="sgd_probe_last", params="network.4.*"),
            quick_probe(strict=True, name="sgd_probe_rest", params=["network.1.*"], every_n_steps=65),
        ],
    ),
    "dataloader_iter": Training(drawing()),
    "GAN in turns": Training(
        gan(in_turns, schedule=True), probes=both, steps=420, says="Manual optimisation"
    ),
    "GAN, discriminator first": Training(gan(discriminator_first), probes=both, steps=420),
    "one batch over and over": Training(mlp, options={"overfit_batches": 1}),
    "part of an epoch": Training(mlp, options={"limit_train_batches": 7, "max_epochs": 30, "max_steps": -1}),
    # From these it stays away.
    "fast_dev_run": aside(mlp, "fast_dev_run", fast_dev_run=5),
    "LBFGS": aside(
        module(optimizer=lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=4)), "LBFGS", steps=20
    ),
    "two batches of a dataloader_iter": aside(drawing(2), "drawing more", steps=60),
    "manual accumulation": aside(gan(accumulating), "a batch without", steps=60),
    "several steps a batch": aside(gan(several_steps), "found 3", steps=60),
    "manual optimisation without manual_backward": aside(gan(plain_backward), "found none", steps=60),
    "no such optimizer": Training(
        gan(in_turns, schedule=True),
        probes=lambda: [quick_probe(optimizer=2)],
        windows=0,
        steps=60,
        says="one of 2",
    ),
    "embedding whose max_norm binds": aside(
        module(with_head(lambda: ob.Shortened(0.5))), "slope of the loss"
    ),
    "weight norm by rows": aside(
        module(with_head(lambda: ob.weight_norm(parametrizations.weight_norm))), "weight_norm"
    ),
    "reentrant checkpointing": aside(
        module(with_head(lambda: ob.Checkpointed(reentrant=True))), "use_reentrant=True"
    ),
}
