"""The probe in a Hugging Face ``Trainer``."""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from torch import Tensor, nn

from sgd_probe.engine import CurvatureError, ParameterFilter, ProbeConfig, ProbeEngine, read_sampling
from sgd_probe.flags import Flag
from sgd_probe.integrations.flagging import Flagging, OnFlag
from sgd_probe.integrations.muting import active_wandb_run, nothing, shadowed, silenced, unchanged
from sgd_probe.integrations.session import (
    ActiveRun,
    CallbackSink,
    Host,
    ProbeSession,
    inner_optimizer,
    refusal,
    with_overrides,
)
from sgd_probe.result import WindowResult
from sgd_probe.sinks.base import Sink
from sgd_probe.sinks.folder import FolderSink
from sgd_probe.sinks.wandb import WandbRun, wandb_sinks

if TYPE_CHECKING:

    class TrainerCallback:
        """Of transformers, which may have no types."""
else:
    from transformers import TrainerCallback

log = logging.getLogger("sgd_probe")

__all__ = ["SGDProbeCallback"]

#: Containers of a trainer in which people keep numbers of their own.
_CONTAINERS = (dict, list, set, collections.deque)


class Given(NamedTuple):
    """What a training step was given.

    Attributes:
        inputs: a batch as the collator made it.
        rest: further arguments (the number of items in all batches of the optimizer's step).
        named: further arguments by name.
        gathered: batches of that step.
    """

    inputs: Any
    rest: tuple[Any, ...]
    named: dict[str, Any]
    gathered: int


class SGDProbeCallback(TrainerCallback):
    """Measures how SGD moves along the modes of the loss while a ``transformers.Trainer`` trains.

    ::

        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        probe = SGDProbeCallback.attach(trainer, top=10, flat=4)
        trainer.train()

    A trainer hands no batches to its callbacks, so the probe stands in ``trainer.training_step`` while it
    trains. The probed loss is what that step gives to ``accelerator.backward``: with label smoothing, a loss
    function or a ``compute_loss`` of your own as it is. The observed gradients are those that the optimizer
    uses: clipped (``max_grad_norm``) and accumulated. The training is never changed; a failure switches the
    probe off with one warning, unless it is ``strict``.

    Args:
        top: number of stiff modes, the Hessian's eigenvectors of largest |eigenvalue| (10).
        flat: number of near-flat directions (4).
        params: which parameters: globs on their names, a compiled pattern, or a rule on
            (name, parameter); all that the optimizer moves by default.
        window: length of a window in optimizer steps, or "auto".
        max_overhead: the probe's share of the training's wall time, in (0, 1) (0.05).
        every_n_steps: open a window every so many optimizer steps, whatever it costs; makes a run
            reproducible.
        curvature_batches: training batches in each of the two curvature sets, or "auto".
        max_basis_bytes: memory for the eigensolver's vectors, or "auto".
        run_dir: folder of the local results; by default ``sgd_probe_run`` in the trainer's output folder.
            A folder that holds a run already is left alone and a numbered one taken.
        on_result: called with every result.
        on_flag: called with a flag when a valley begins to diffuse, after the results are written.
        loss_fn: (model, inputs) -> loss, where the training step is not the loss to be probed.
        name: prefix of every metric.
        strict: raise failures instead of switching off.
        config: every other knob; the arguments above win over it.

    Attributes:
        results: the results of this training's windows; of more than a hundred, of the last hundred.
        flags: their flags, the directions that were found diffusing along a valley.

    Raises:
        TypeError: ``loss_fn``, ``on_result`` or ``on_flag`` cannot be called.
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        top: int | None = None,
        flat: int | None = None,
        *,
        params: ParameterFilter = None,
        window: int | Literal["auto"] | None = None,
        max_overhead: float | None = None,
        every_n_steps: int | None = None,
        curvature_batches: int | Literal["auto"] | None = None,
        max_basis_bytes: int | Literal["auto"] | None = None,
        run_dir: str | Path | None = None,
        on_result: Callable[[WindowResult], object] | None = None,
        on_flag: OnFlag | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        name: str = "sgd_probe",
        strict: bool = False,
        config: ProbeConfig | None = None,
    ) -> None:
        self.config = with_overrides(
            config,
            top=top,
            flat=flat,
            window=window,
            max_overhead=max_overhead,
            every_n_steps=every_n_steps,
            curvature_batches=curvature_batches,
            max_basis_bytes=max_basis_bytes,
        )
        for argument, value in (("loss_fn", loss_fn), ("on_result", on_result), ("on_flag", on_flag)):
            if value is not None and not callable(value):
                raise TypeError(f"expected `{argument}` to be callable, found {value!r}")
        if not name or not isinstance(name, str):
            raise ValueError(f"expected `name` to be a non-empty string, found {name!r}")
        self.name = name
        self.results: list[WindowResult] = []
        self.flags: list[Flag] = []
        self._params = params
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._on_result = on_result
        self._on_flag = on_flag
        self._loss_fn = loss_fn
        self._strict = strict
        self._trainer: Any = None
        self._session: ProbeSession | None = None
        self._flagging: Flagging | None = None
        self._standing = ExitStack()
        self._index = 0

    @classmethod
    def attach(cls, trainer: Any, top: int | None = None, flat: int | None = None, **options: Any) -> Self:
        """Make a probe and add it to a trainer, in place of one that is there already.

        Args:
            trainer: a ``transformers.Trainer``.
            top: see the class.
            flat: see the class.
            options: the class's other arguments.
        """
        probe = cls(top, flat, **options)
        while trainer.pop_callback(cls) is not None:
            pass
        trainer.add_callback(probe)
        probe._trainer = trainer
        return probe

    @property
    def basis(self) -> dict[str, Tensor]:
        """The flagged directions of the last window by mode name: unit vectors, shape (parameters,)."""
        return {} if self._flagging is None else self._flagging.basis

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the training, and stand aside from one that cannot be probed."""
        self._stop()
        self.results, self.flags = [], []
        why = self._refusal(args)
        if why:
            if self._strict:
                raise ValueError(f"sgd_probe: {why}")
            log.warning("sgd_probe: off for this training: %s.", why)
            return
        trainer = self._trainer
        host = Host(
            sinks=self._make_sinks,
            others=lambda: _kept_of(trainer, self._loss_fn),
            packages=("sgd-probe", "torch", "transformers", "accelerate", "numpy"),
        )
        session = ProbeSession(host, self.config, name=self.name, strict=self._strict, on_flag=self._on_flag)
        self._session, self._flagging = session, session.flagging
        self.results, self.flags = session.results, session.flagging.flags
        session.start(lambda: self._make_engine(args, state, kwargs.get("train_dataloader")))
        if session.on:
            session.observe(inner_optimizer(trainer.optimizer), nothing)
            self._stand_in()
        self._index = _batches_skipped(args, state, kwargs.get("train_dataloader"))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count batches from the epoch's first; one that is resumed in its middle, from there."""
        if self._session is not None and self._session.planned:
            self._index = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close a window that has seen its steps, or that can see no more."""
        if self._session is not None:
            if control.should_training_stop:
                self._session.end(state.global_step)
            else:
                self._session.between_steps(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close what is open before the trainer loads the weights of its best model."""
        if self._session is not None and control.should_training_stop:
            self._session.end(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close what is open, as far as it got, and let the sinks finish."""
        if self._session is not None:
            self._session.end(state.global_step)
        self._stop()

    def _stop(self) -> None:
        """Leave nothing behind in the user's objects; safe at any time."""
        session, self._session = self._session, None
        with self._standing.pop_all():
            if session is not None:
                session.stop()

    def _refusal(self, args: Any) -> str:
        trainer = self._trainer
        if trainer is None:
            return "it is not attached: use SGDProbeCallback.attach(trainer) in place of callbacks=[...]"
        if args.world_size > 1 or args.n_gpu > 1:
            return f"training on {max(args.world_size, args.n_gpu)} devices is not supported yet"
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            return "weights that DeepSpeed or FSDP hold in shards are not supported yet"
        return refusal(trainer.model, inner_optimizer(trainer.optimizer))

    def _make_engine(self, args: Any, state: Any, loader: Any) -> ProbeEngine:
        trainer = self._trainer
        return ProbeEngine(
            trainer.model,
            _training_loss(trainer, self._loss_fn),
            inner_optimizer(trainer.optimizer),
            self.config,
            sampling=dataclasses.replace(
                read_sampling(loader, self.config.sampling), accumulation=args.gradient_accumulation_steps
            ),
            planned_steps=state.max_steps,
            first_step=state.global_step,
            accumulation=args.gradient_accumulation_steps,
            params=self._params,
        )

    def _stand_in(self) -> None:
        """See every batch on its way into the training step."""
        trainer = self._trainer
        step = trainer.training_step

        def training_step(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            session = self._session
            if session is None:
                return step(model, inputs, *rest, **named)
            gathered = getattr(trainer, "current_gradient_accumulation_steps", None)
            gathered = gathered or trainer.args.gradient_accumulation_steps
            session.batch(Given(inputs, rest, named, gathered), self._index, trainer.state.global_step)
            self._index += 1
            try:
                return step(model, inputs, *rest, **named)
            except BaseException:
                self._stop()  # no on_train_end will come
                raise

        self._standing.enter_context(shadowed(trainer, "training_step", training_step))

    def _make_sinks(self) -> list[Sink]:
        trainer = self._trainer
        sinks: list[Sink] = []
        if trainer.args.output_dir or self._run_dir:
            base = self._run_dir or Path(trainer.args.output_dir) / f"{self.name}_run"
            sinks.append(FolderSink(base, fresh=True, max_vector_bytes=self.config.max_vector_bytes))
        run = active_wandb_run()
        if run is not None:
            # The trainer's own rows count steps from 1.
            axis = WandbRun(ActiveRun(run), axis="train/global_step", first_step=1)
            sinks += wandb_sinks(axis, directions=self.config.log_directions)
        if self._on_result is not None:
            sinks.append(CallbackSink(self._on_result))
        return sinks


def _training_loss(
    trainer: Any, loss_fn: Callable[[Any, Any], Tensor] | None
) -> Callable[[nn.Module, Given, int], Tensor]:
    """What the trainer's own training step goes backward from, with every way to log from it closed."""
    step = trainer.training_step

    def loss(model: nn.Module, batch: Given, _: int) -> Tensor:
        with (
            silenced(),
            unchanged(trainer),
            shadowed(trainer, "log", nothing),
            _without_autocast(model),
        ):
            if loss_fn is not None:
                model.train()
                return loss_fn(model, trainer._prepare_inputs(batch.inputs))
            return _handed_over(trainer, batch, lambda: step(model, batch.inputs, *batch.rest, **batch.named))

    return loss


def _handed_over(trainer: Any, batch: Given, step: Callable[[], Any]) -> Tensor:
    """The loss that a training step hands over for its backward pass, times the batches that are gathered.

    Of several batches each gives its share of the step's loss: times their number it is a loss whose mean
    over batches is that of the step.

    Raises:
        CurvatureError: it hands over none, or several.
    """
    losses: list[Tensor] = []

    def backward(loss: Tensor, **_: Any) -> None:
        losses.append(loss)

    with (
        shadowed(trainer.accelerator, "backward", backward),
        shadowed(trainer, "current_gradient_accumulation_steps", batch.gathered),
    ):
        step()
    if len(losses) != 1:
        raise CurvatureError(
            "expected a training_step that gives one loss to accelerator.backward, found one that gives "
            f"{len(losses)}: give the probe a loss_fn"
        )
    # Accelerate divides what it is given by a number of its own, 1 in a Trainer.
    loss: Tensor = losses[0] * (batch.gathered / trainer.accelerator.gradient_accumulation_steps)
    return loss


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Second derivatives want full precision: an autocast forward would drown them in rounding."""
    original = vars(model).get("_original_forward")  # Accelerate's, where it has wrapped it for autocast
    if original is None:
        yield
        return
    with shadowed(model, "forward", original):
        yield


def _kept_of(trainer: Any, loss_fn: object) -> Iterable[Any]:
    """What an override of the training step may change on the trainer, beside its plain attributes."""
    kept = [value for value in vars(trainer).values() if isinstance(value, _CONTAINERS)]
    return [trainer.state, trainer.control, loss_fn, *kept]


def _batches_skipped(args: Any, state: Any, loader: Any) -> int:
    """Batches of the first epoch that a resumed training has seen already."""
    try:
        batches = len(loader)
    except TypeError:
        return 0
    if not state.global_step or args.ignore_data_skip or not batches:
        return 0
    gathered = args.gradient_accumulation_steps
    return int(state.global_step % -(-batches // gathered) * gathered)
