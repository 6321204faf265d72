"""All that depends on Lightning's insides, for both of its package names."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sgd_probe.engine import CurvatureError

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
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "announce",
    "batches_per_epoch",
    "observe_steps",
    "planned_steps",
    "progress_bar",
    "refusal",
    "training_loader",
    "training_loss",
]

#: Precisions whose weights are held in full precision.
_PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed")


def announce(trainer: Trainer, message: str) -> None:
    """Show a message the way in which the trainer shows its own, above a progress bar if there is one."""
    bar: Any = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", False):
        bar.print(message)
        return
    importlib.import_module(f"{_package(trainer)}.utilities.rank_zero").rank_zero_info(message)


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar below the trainer's own, for a long pause; it is gone afterwards."""
    from tqdm import tqdm  # a dependency of Lightning's

    with tqdm(total=total, desc="sgd_probe", unit=" products", leave=False) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        yield show


def planned_steps(trainer: Trainer) -> float:
    """Optimizer steps of the whole run, or infinity."""
    steps = float(trainer.estimated_stepping_batches)
    return steps if steps >= 0 else math.inf  # -1: a stream of unknown length


def observe_steps(optimizer: torch.optim.Optimizer, observe: Callable[[], None]) -> RemovableHandle:
    """Call back after every step of an optimizer, before any hook of the user's can zero the gradients."""
    handle: RemovableHandle = optimizer.register_step_post_hook(lambda *_: observe())
    hooks: Any = optimizer._optimizer_step_post_hooks  # an OrderedDict, whatever its annotation says
    hooks.move_to_end(handle.id, last=False)
    return handle


def batches_per_epoch(trainer: Trainer) -> int | None:
    """Batches that the trainer takes from an epoch, or None for a stream of unknown length."""
    count = trainer.num_training_batches
    return int(count) if math.isfinite(count) else None


def training_loader(trainer: Trainer) -> Any:
    """The training loader as the trainer uses it."""
    return trainer.train_dataloader


def refusal(trainer: Trainer, module: LightningModule) -> str:
    """Why this training cannot be probed; "" where it can."""
    if getattr(trainer, "fast_dev_run", False):
        return "it stands aside in a fast_dev_run"
    if not module.automatic_optimization:
        return "manual optimisation is not supported yet"
    if len(trainer.optimizers) != 1:
        return f"expected one optimizer, found {len(trainer.optimizers)}"
    if trainer.world_size > 1:
        return f"training on {trainer.world_size} processes is not supported yet"
    if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
        return (
            "LBFGS evaluates the loss several times a step and searches along lines; no mode moves by itself"
        )
    if trainer.precision not in _PRECISIONS:
        return f"weights in precision {trainer.precision} are too coarse for second derivatives"
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        return "a training_step that takes a dataloader_iter is not supported yet"
    return ""


def training_loss(
    trainer: Trainer, loss_fn: Callable[[Any, Any], Tensor] | None
) -> Callable[[nn.Module, Any, int], Tensor]:
    """The user's own training step as a loss, with every way to log from it closed meanwhile.

    Args:
        trainer: the trainer that runs it.
        loss_fn: (module, batch) -> loss, instead of ``training_step``.
    """
    plugin = trainer.precision_plugin
    mixed = "mixed" in str(trainer.precision)

    def loss(module: nn.Module, batch: Any, index: int) -> Tensor:
        # Second derivatives want full precision: an autocast forward would drown them in rounding.
        precision = nullcontext() if mixed else plugin.forward_context()
        with muted(trainer, module), precision:
            if loss_fn is not None:
                return loss_fn(module, batch)
            step: Callable[..., Any] = module.training_step  # type: ignore[assignment]
            output = step(batch, index) if _takes_index(step) else step(batch)
        return _loss_of(output)

    return loss


@contextmanager
def muted(trainer: Trainer, module: nn.Module) -> Iterator[None]:
    """Close every usual way in which a training step logs or prints."""
    with ExitStack() as stack:
        for name in ("log", "log_dict", "print"):
            stack.enter_context(_shadowed(module, name, _nothing))
        stack.enter_context(redirect_stdout(io.StringIO()))
        # A step may ask the trainer to stop.
        stack.callback(setattr, trainer, "should_stop", trainer.should_stop)
        dummies = importlib.import_module(f"{_package(trainer)}.loggers.logger")
        loggers = trainer.loggers
        stack.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [dummies.DummyLogger() for _ in loggers]
        writers = [writer for lg in loggers if (writer := getattr(lg, "_experiment", None)) is not None]
        for name, value in list(vars(module).items()):
            if any(value is writer for writer in writers):
                stack.enter_context(_shadowed(module, name, dummies.DummyExperiment()))
        # Those who call wandb by itself; whoever has not imported it cannot.
        wandb = sys.modules.get("wandb")
        if wandb is not None and getattr(wandb, "run", None) is not None:
            stack.enter_context(_shadowed(wandb, "log", _nothing))
            stack.enter_context(_shadowed(wandb.run, "log", _nothing))
        yield


@contextmanager
def _shadowed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Shadow an attribute on the instance for a while."""
    own = vars(owner)
    missing = name not in own
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if missing:
            own.pop(name, None)
        else:
            own[name] = before


def _nothing(*_: Any, **__: Any) -> None:
    """Log nothing."""


def _takes_index(step: Callable[..., Any]) -> bool:
    """Lightning's own rule: a second argument, or one of that name."""
    parameters = inspect.signature(step).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, dict) else output
    if loss is None:
        raise CurvatureError("expected a loss from training_step, found None for a curvature batch")
    if not isinstance(loss, Tensor):
        raise CurvatureError(f"expected a tensor from training_step, found {type(loss).__name__}")
    return loss


def _package(trainer: Trainer) -> str:
    """The package that a trainer comes from, also where the user derived a class from it."""
    for base in type(trainer).__mro__:
        if base.__module__.startswith("lightning.pytorch"):
            return "lightning.pytorch"
    return "pytorch_lightning"
