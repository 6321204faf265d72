"""All that depends on Lightning's insides, for both of its package names."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sgd_probe.engine import CurvatureError, sharded_units
from sgd_probe.integrations import session
from sgd_probe.integrations.muting import nothing, shadowed, silenced, unchanged
from sgd_probe.isolation import capture

if TYPE_CHECKING:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    # `lightning.pytorch` and `pytorch_lightning` are two copies of one code: a class that derives from
    # both is at home in either Trainer.
    def _installed():
        from lightning_utilities.core import rank_zero

        for name, root in (("pytorch_lightning", "pytorch_lightning"), ("lightning.pytorch", "lightning")):
            if importlib.util.find_spec(root) is not None:
                talking = getattr(rank_zero, "log", None)
                fresh = name not in sys.modules
                yield importlib.import_module(name)
                # The second copy takes the first one's place as the one whose logger speaks to the user.
                if fresh and talking is not None:
                    rank_zero.log = talking

    _PACKAGES = tuple(_installed())
    Callback = type("Callback", tuple(package.Callback for package in _PACKAGES), {})
    MisconfigurationException = type(
        "MisconfigurationException",
        tuple(
            dict.fromkeys(
                importlib.import_module(f"{package.__name__}.utilities.exceptions").MisconfigurationException
                for package in _PACKAGES
            )
        ),
        {},
    )
    LightningModule = Trainer = Any

__all__ = [
    "Callback",
    "DrawnBatches",
    "LightningModule",
    "MisconfigurationException",
    "NoLossError",
    "Trainer",
    "announce",
    "batches_per_epoch",
    "divides_weights",
    "draws_itself",
    "planned_steps",
    "progress_bar",
    "refusal",
    "remarks",
    "steps_done",
    "training_loader",
    "training_loss",
]

#: Their callbacks keep nothing of a training step's.
_FRAMEWORKS = ("lightning.", "pytorch_lightning.", "sgd_probe.")
#: Precisions whose forward pass the probe can do in float32 or better.
_PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")


class NoLossError(CurvatureError):
    """The training step gives no loss for a batch; the next may have one."""


def announce(trainer: Trainer, message: str) -> None:
    """Show a message the way in which the trainer shows its own, above a progress bar if there is one."""
    bar: Any = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", False):
        bar.print(message)
        return
    importlib.import_module(f"{_package(trainer)}.utilities.rank_zero").rank_zero_info(message)


def progress_bar(trainer: Trainer, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A bar below the trainer's own, for a long pause; gone afterwards, and not there if that is not."""
    wanted = trainer.is_global_zero and trainer.progress_bar_callback is not None
    return session.progress_bar(total, disable=not wanted)


def planned_steps(trainer: Trainer) -> float:
    """Steps of the probed optimizer in the whole run, or infinity."""
    steps = float(trainer.estimated_stepping_batches)
    batches, epochs, changes = trainer.num_training_batches, trainer.max_epochs, _accumulation(trainer)
    if len(changes) > 1 and epochs is not None and epochs > 0 and math.isfinite(batches):
        # The trainer's own estimate takes the accumulation of the first epoch for that of all.
        ends = [*sorted(changes)[1:], epochs]
        steps = 0.0
        for (first, gathered), end in zip(sorted(changes.items()), ends, strict=True):
            steps += math.ceil(batches / gathered) * max(min(end, epochs) - first, 0)
    if trainer.max_steps >= 0:  # those of all optimizers together
        steps = min(steps, trainer.max_steps / max(len(trainer.optimizers), 1))
    return steps if steps >= 0 else math.inf  # -1: a stream of unknown length


def _accumulation(trainer: Trainer) -> dict[int, int]:
    """Batches gathered into a step, by the epoch from which on they are."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if type(callback).__name__ == "GradientAccumulationScheduler":
            return {0: 1, **callback.scheduling}
    return {0: trainer.accumulate_grad_batches}


def steps_done(trainer: Trainer, module: LightningModule, stepped: bool = False) -> int:
    """Optimizer steps so far, as the trainer's loggers count them.

    ``global_step`` counts the steps of all optimizers. Where there may be several, under manual
    optimisation, the trainer's loggers number their rows by batches.

    Args:
        trainer: that trains.
        module: what it trains.
        stepped: ask for this after a batch's training step, before the trainer counts the batch.
    """
    if module.automatic_optimization:
        return int(trainer.global_step)
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped) + stepped


def batches_per_epoch(trainer: Trainer) -> int | None:
    """Batches that the trainer takes from an epoch, or None for a stream of unknown length."""
    count = trainer.num_training_batches
    return int(count) if math.isfinite(count) else None


def training_loader(trainer: Trainer) -> Any:
    """The training loader as the trainer uses it."""
    return trainer.train_dataloader


def refusal(trainer: Trainer, module: LightningModule, index: int = 0) -> str:
    """Why this training cannot be probed; "" where it can.

    Args:
        trainer: about to train.
        module: what it trains.
        index: of the optimizer to probe.
    """
    if getattr(trainer, "fast_dev_run", False):
        return "it stands aside in a fast_dev_run"
    optimizers = len(trainer.optimizers)
    if module.automatic_optimization and optimizers != 1:
        return f"expected one optimizer, found {optimizers}"
    if index >= optimizers:
        return f"expected `optimizer` to be one of {optimizers}, counted from 0, found {index}"
    strategy = _strategy_refusal(trainer)
    if strategy:
        return strategy
    if trainer.world_size > 1 and not module.automatic_optimization:
        return "manual optimisation on several processes is not supported"
    if not any(group["params"] for group in trainer.optimizers[index].param_groups):
        return "the optimizer moves no weights"
    if isinstance(trainer.optimizers[index], torch.optim.LBFGS):
        return (
            "LBFGS evaluates the loss several times a step and searches along lines; no mode moves by itself"
        )
    if trainer.precision not in _PRECISIONS:
        return f"weights in precision {trainer.precision} are too coarse for second derivatives"
    return ""


_FSDP2 = 'ModelParallelStrategy with fully_shard (FSDP2) and precision="32-true"'
_DDP = 'strategy="ddp" where each process can hold all weights'
#: Why it cannot work under strategies that keep the weights to themselves.
_CANNOT = {
    "FSDPStrategy": (
        "FSDP (version 1) keeps weights in flat pieces that have lost their shapes, and lets no gradient be "
        "taken beside the training's"
    ),
    "DeepSpeedStrategy": "DeepSpeed keeps weights, gradients and the optimizer's step to itself",
}


def _strategy_refusal(trainer: Trainer) -> str:
    """Why this way of dividing the training among processes cannot be probed; "" where it can."""
    name = type(trainer.strategy).__name__
    if divides_weights(trainer):
        return _sharded_refusal(trainer)
    if name in _CANNOT:
        return f"training by {name} is not supported: {_CANNOT[name]}. Use {_FSDP2}, or {_DDP}"
    if trainer.world_size > 1 and name != "DDPStrategy":
        return (
            f"training by {name} is not supported: each process must hold all weights or its rows of each. "
            f"Use {_DDP}, or {_FSDP2}"
        )
    return ""


def _sharded_refusal(trainer: Trainer) -> str:
    """The same of FSDP2: differences of gradients need more digits than half precision has."""
    way_out = (
        "second derivatives are finite differences there, which drown in its rounding. Train in float32 "
        f'(precision="32-true", no MixedPrecisionPolicy), or use {_DDP}'
    )
    if trainer.precision not in ("32-true", "64-true"):
        return (
            f"training by ModelParallelStrategy (FSDP2) in precision {trainer.precision} is not supported: "
            f"{way_out}"
        )
    policies = [unit._get_fsdp_state()._mp_policy for unit in sharded_units(trainer.lightning_module)]
    for dtype in (kind for policy in policies for kind in (policy.param_dtype, policy.reduce_dtype)):
        if dtype is not None and torch.finfo(dtype).bits < 32:
            name = str(dtype).removeprefix("torch.")
            return f"fully_shard with a MixedPrecisionPolicy of {name} is not supported: {way_out}"
    return ""


def divides_weights(trainer: Trainer) -> bool:
    """Each process holds a part of every weight, in the module's own parameters."""
    return type(trainer.strategy).__name__ == "ModelParallelStrategy"


def remarks(trainer: Trainer, module: LightningModule, index: int = 0) -> tuple[str, ...]:
    """What the plan has to say of this kind of training, a sentence an item.

    Args:
        trainer: that trains.
        module: what it trains.
        index: of the probed optimizer.
    """
    if module.automatic_optimization:
        return ()
    line = (
        f"Manual optimisation: the probed loss is what optimizer {index} ({_name(trainer, index)}) has been "
        "given by manual_backward when it steps."
    )
    if len(trainer.optimizers) > 1:
        others = ", ".join(f"{i} ({_name(trainer, i)})" for i in range(len(trainer.optimizers)) if i != index)
        line += f" Its loss may move with the weights of the others: {others}."
    return (line,)


def _name(trainer: Trainer, index: int) -> str:
    return type(trainer.optimizers[index]).__name__


def draws_itself(module: LightningModule) -> bool:
    """Whether the training step is handed the loader's iterator in place of a batch."""
    return "dataloader_iter" in inspect.signature(module.training_step).parameters


class DrawnBatches:
    """Sees the batches of a training step that draws them itself, on their way to it.

    Until the next training step is called, one of ours stands on the module in its place; it puts the
    user's back at once and hands it the iterator that it was given, which calls back for each batch.

    Args:
        module: whose training step takes a ``dataloader_iter``.
        drawn: called with the batch, its index, and how many the step has drawn before it.
    """

    def __init__(self, module: LightningModule, drawn: Callable[[Any, int, int], None]) -> None:
        self._module = module
        self._drawn = drawn
        #: A copy of the first batch that was drawn, with its index.
        self.first: tuple[Any, int] | None = None

    def await_step(self) -> None:
        """See what the next training step draws."""
        self.release()
        step = self._module.training_step

        def training_step(dataloader_iter: Iterator[Any]) -> Any:
            self.release()
            return step(_Watched(dataloader_iter, self._see))

        vars(self._module)["training_step"] = self._standing = training_step

    def release(self) -> None:
        """Put the user's training step back, if it is not there."""
        own = vars(self._module)
        if own.get("training_step") is not None and own["training_step"] is getattr(self, "_standing", None):
            del own["training_step"]

    def _see(self, batch: Any, index: int, before: int) -> None:
        if self.first is None:
            self.first = copy.deepcopy(batch), index
        self._drawn(batch, index, before)


class _Watched(Iterator[Any]):
    """The loader's iterator, which tells of every batch that is drawn from it."""

    def __init__(self, drawn_from: Iterator[Any], see: Callable[[Any, int, int], None]) -> None:
        self._iterator = drawn_from
        self._see = see
        self._count = 0

    def __next__(self) -> Any:
        item = next(self._iterator)
        batch, index, _ = item
        self._see(batch, index, self._count)
        self._count += 1
        return item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


class _OneBatch(Iterator[Any]):
    """What Lightning would hand a training step that draws for itself, if the loader held one batch."""

    def __init__(self, batch: Any, index: int) -> None:
        self._left = [(batch, index, 0)]
        self.length = 1

    @property
    def done(self) -> bool:
        return not self._left

    @property
    def fetched(self) -> int:
        return 1 - len(self._left)

    def __next__(self) -> Any:
        if not self._left:
            raise CurvatureError(
                "expected a training_step that draws one batch from its dataloader_iter, found it drawing "
                "more: give the probe a loss_fn"
            )
        return self._left.pop()


def training_loss(
    trainer: Trainer, loss_fn: Callable[[Any, Any], Tensor] | None, index: int = 0
) -> Callable[[nn.Module, Any, int], Tensor]:
    """The user's own training step as a loss, with every way to log from it closed meanwhile.

    Args:
        trainer: the trainer that runs it.
        loss_fn: (module, batch) -> loss, instead of ``training_step``.
        index: of the optimizer whose loss is meant, under manual optimisation.
    """
    plugin = trainer.precision_plugin
    native = trainer.precision in ("32-true", "64-true")

    def loss(module: nn.Module, batch: Any, batch_index: int) -> Tensor:
        # Second derivatives want full precision: an autocast forward would drown them in rounding, and
        # weights in half precision come as copies in float32.
        precision = plugin.forward_context() if native else nullcontext()
        dtype = nullcontext() if native else shadowed(module, "_dtype", torch.float32)
        with _kept(trainer, loss_fn), muted(trainer, module), precision, dtype:
            if loss_fn is not None:
                return loss_fn(module, batch)
            step: Callable[..., Any] = module.training_step  # type: ignore[assignment]
            given = _arguments(step, batch, batch_index)
            if not module.automatic_optimization:
                return _manual_loss(trainer, module, index, lambda: step(*given))
            return _loss_of(step(*given))

    return loss


def _arguments(step: Callable[..., Any], batch: Any, index: int) -> tuple[Any, ...]:
    """What Lightning calls this training step with."""
    if "dataloader_iter" in inspect.signature(step).parameters:
        return (_OneBatch(batch, index),)
    return (batch, index) if _takes_index(step) else (batch,)


class _Stepped(BaseException):
    """Leaves a training step where the probed optimizer would step; no ``except Exception`` holds it."""


def _manual_loss(trainer: Trainer, module: nn.Module, index: int, step: Callable[[], Any]) -> Tensor:
    """What an optimizer is about to step on: all losses since its gradients were zeroed.

    Nothing is stepped, no gradient is computed, and the training step ends there.

    Raises:
        CurvatureError: it does not step this optimizer, or without ``manual_backward``.
    """
    wrapped = trainer.strategy._lightning_optimizers
    owed: list[Tensor] = []
    toggled: list[Any] = []

    def probed(optimizer: Any) -> bool:
        return optimizer is wrapped[index] or optimizer is trainer.optimizers[index]

    def manual_backward(loss: Tensor, *_: Any, **__: Any) -> None:
        if not toggled or probed(toggled[-1]):
            owed.append(loss)

    def stepping(optimizer: Any) -> Callable[..., None]:
        def step(closure: Callable[[], Any] | None = None, **_: Any) -> None:
            if closure is not None:
                closure()
            if probed(optimizer):
                raise _Stepped

        return step

    def zeroing(optimizer: Any) -> Callable[..., None]:
        return lambda *_, **__: owed.clear() if probed(optimizer) else None

    with ExitStack() as stack:
        for optimizer in (*wrapped, *trainer.optimizers):
            stack.enter_context(shadowed(optimizer, "step", stepping(optimizer)))
            stack.enter_context(shadowed(optimizer, "zero_grad", zeroing(optimizer)))
        for name, instead in (
            ("manual_backward", manual_backward),
            ("clip_gradients", nothing),
            ("toggle_optimizer", toggled.append),
            ("untoggle_optimizer", lambda *_: toggled.clear()),
        ):
            stack.enter_context(shadowed(module, name, instead))
        try:
            step()
        except _Stepped:
            if owed:
                return torch.stack([loss.reshape(()) for loss in owed]).sum() if len(owed) > 1 else owed[0]
            raise CurvatureError(
                f"expected manual_backward before the step of optimizer {index}, found none: call it in "
                "place of backward, or give the probe a loss_fn"
            ) from None
    raise CurvatureError(
        f"expected a training_step that steps optimizer {index} on every batch, found a batch without: "
        "choose another `optimizer`, or give the probe a loss_fn"
    )


@contextmanager
def _kept(trainer: Trainer, loss_fn: object) -> Iterator[None]:
    """Put back what an evaluation of the loss changes beside the module.

    Callbacks of the user's own, in which a training step may count or remember, and the variables around a
    loss function.
    """
    callbacks = [
        vars(callback)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if not type(callback).__module__.startswith(_FRAMEWORKS)
    ]
    restore = capture(*callbacks, loss_fn)
    try:
        yield
    finally:
        restore()


@contextmanager
def muted(trainer: Trainer, module: nn.Module) -> Iterator[None]:
    """Close every usual way in which a training step logs or prints."""
    with ExitStack() as stack:
        for name in ("log", "log_dict", "print"):
            stack.enter_context(shadowed(module, name, nothing))
        stack.enter_context(silenced())
        # A step may ask the trainer to stop, step a schedule or set a rate.
        stack.enter_context(unchanged(trainer))
        for configured in trainer.lr_scheduler_configs:
            stack.enter_context(shadowed(configured.scheduler, "step", nothing))
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                stack.callback(group.update, dict(group))
        dummies = importlib.import_module(f"{_package(trainer)}.loggers.logger")
        loggers = trainer.loggers
        trainer.loggers = [dummies.DummyLogger() for _ in loggers]
        writers = [writer for lg in loggers if (writer := getattr(lg, "_experiment", None)) is not None]
        for name, value in list(vars(module).items()):
            if any(value is writer for writer in writers):
                stack.enter_context(shadowed(module, name, dummies.DummyExperiment()))
        yield


def _takes_index(step: Callable[..., Any]) -> bool:
    """Lightning's own rule: a second argument, or one of that name."""
    parameters = inspect.signature(step).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, dict) else output
    if loss is None:
        raise NoLossError("expected a loss from training_step, found None for a curvature batch")
    if not isinstance(loss, Tensor):
        raise CurvatureError(f"expected a tensor from training_step, found {type(loss).__name__}")
    return loss


def _package(trainer: Trainer) -> str:
    """The package that a trainer comes from, also where the user derived a class from it."""
    for base in type(trainer).__mro__:
        if base.__module__.startswith("lightning.pytorch"):
            return "lightning.pytorch"
    return "pytorch_lightning"
