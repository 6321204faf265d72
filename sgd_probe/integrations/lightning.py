"""SGDProbe: the Lightning callback. Hooks in, engine between, sinks out; no numerics here."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

import torch
from torch import Tensor

from sgd_probe.engine import (
    CurvatureError,
    ParameterFilter,
    ProbeConfig,
    ProbeEngine,
    Processes,
    duration,
    read_sampling,
)
from sgd_probe.flags import Flag
from sgd_probe.integrations.flagging import Flagging, OnFlag
from sgd_probe.integrations.lightning_compat import (
    Callback,
    DrawnBatches,
    LightningModule,
    MisconfigurationException,
    NoLossError,
    Trainer,
    announce,
    batches_per_epoch,
    divides_weights,
    draws_itself,
    planned_steps,
    progress_bar,
    refusal,
    remarks,
    steps_done,
    training_loader,
    training_loss,
)
from sgd_probe.integrations.session import (
    LONG_PAUSE,
    MIN_STEPS_AT_END,
    keep,
    named_vectors,
    observe_steps,
    one_line,
    with_overrides,
)
from sgd_probe.result import WindowResult
from sgd_probe.sinks.base import RunInfo, Sink, SinkGroup, speaker, verdict_counts
from sgd_probe.sinks.folder import RUN_FILE, FolderSink
from sgd_probe.sinks.loggers import LoggerSink
from sgd_probe.sinks.metrics import CallbackMetricsSink
from sgd_probe.sinks.terminal import TerminalSink
from sgd_probe.sinks.wandb import WandbRun, find_wandb_logger, wandb_sinks

log = logging.getLogger("sgd_probe")

_P = ParamSpec("_P")
#: Batches for which a training step may give no loss before the probe has seen one.
_MOST_WITHOUT_LOSS = 10
#: Steps of the trainer of which the optimizer may tell nothing before the probe says so.
_MOST_UNHEARD = 100


def _guarded(
    hook: Callable[Concatenate[SGDProbe, _P], None],
) -> Callable[Concatenate[SGDProbe, _P], None]:
    """Keep every failure of ours out of the user's fit: warn once, restore, switch off."""

    @functools.wraps(hook)
    def guarded(self: SGDProbe, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        if not self._on or self._failed:
            return
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            if self._processes is None or self._engine is None:  # without an engine, none has one
                self._switch_off()
            else:
                self._failed = True  # the others learn of it when they meet next
            if self._strict:
                raise
            log.warning(
                "sgd_probe: switched off for the rest of this fit (%s: %s). Training goes on untouched; the "
                "next fit has the probe again, and strict=True raises instead.",
                type(error).__name__,
                error,
                exc_info=log.isEnabledFor(logging.DEBUG),
            )

    return guarded


class SGDProbe(Callback):
    """Measures how SGD moves along the modes of the loss while the model trains.

    Add it to the trainer's callbacks, of ``pytorch_lightning`` or ``lightning.pytorch``. It never
    changes the training, and unless ``strict`` never raises into it.

    Args:
        top: number of stiff modes, the Hessian's eigenvectors of largest |eigenvalue| (10).
        flat: number of near-flat directions (4).
        params: which parameters: globs on their names, a compiled pattern, or a rule on
            (name, parameter); all by default.
        window: length of a window in optimizer steps, or "auto".
        max_overhead: the probe's share of the training's wall time, in (0, 1) (0.05).
        every_n_steps: open a window every so many optimizer steps, whatever it costs; makes a run
            reproducible.
        curvature_batches: training batches in each of the two curvature sets, or "auto".
        max_basis_bytes: memory for the eigensolver's vectors, or "auto".
        run_dir: folder of the local results; by default ``sgd_probe_run`` in the trainer's log
            directory. A folder that holds a run already is left alone and a numbered one taken.
        on_flag: called with a :class:`~sgd_probe.flags.Flag` when a valley begins to diffuse: between two
            steps, after the results are written, on every process.
        name: prefix of every metric; give each probe of a trainer its own.
        loss_fn: (module, batch) -> loss, where the training step is not the loss to be probed.
        optimizer: under manual optimisation, the one whose loss and weights are probed, counted from 0
            in the order of ``configure_optimizers``; for another, add another probe (0).
        strict: raise failures, a window that cannot open too, instead of going on without the probe.
        config: every other knob; the arguments above win over it.

    Attributes:
        results: the results of this fit's windows; of more than a hundred, of the last hundred. The run
            folder has them all.

    Raises:
        MisconfigurationException: an argument is out of range; the message names it.
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
        on_flag: OnFlag | None = None,
        name: str = "sgd_probe",
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        optimizer: int = 0,
        strict: bool = False,
        config: ProbeConfig | None = None,
    ) -> None:
        super().__init__()
        try:
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
        except ValueError as error:
            raise MisconfigurationException(f"SGDProbe: {error}") from error
        if not name or not isinstance(name, str):
            raise MisconfigurationException(
                f"SGDProbe: expected `name` to be a non-empty string, found {name!r}"
            )
        if run_dir is not None and not isinstance(run_dir, str | Path):
            raise MisconfigurationException(f"SGDProbe: expected `run_dir` to be a path, found {run_dir!r}")
        for argument, value in (("loss_fn", loss_fn), ("on_flag", on_flag)):
            if value is not None and not callable(value):
                raise MisconfigurationException(
                    f"SGDProbe: expected `{argument}` to be callable, found {value!r}"
                )
        if not isinstance(optimizer, int) or isinstance(optimizer, bool) or optimizer < 0:
            raise MisconfigurationException(
                f"SGDProbe: expected `optimizer` to be an integer of at least 0, found {optimizer!r}"
            )
        self.name = name
        self.results: list[WindowResult] = []
        self._params = params
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._loss_fn = loss_fn
        self._on_flag = on_flag
        self._optimizer = optimizer
        self._strict = strict
        self._flagging = self._no_flags()
        self._on = False
        self._engine: ProbeEngine | None = None
        self._sinks = SinkGroup([])
        self._metrics: CallbackMetricsSink | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._processes: Processes | None = None
        self._failed = False
        self._draws: DrawnBatches | None = None
        self._restored: dict[str, Any] = {}
        self._last_state: dict[str, Any] = {}
        self._folder: Path | None = None
        self._folder_sink: FolderSink | None = None
        self._planned = False
        self._without_loss = 0
        self._steps = 0  # done in the fit, as the trainer's loggers count them
        self._stepped = 1  # of the probed optimizer, on the last batch
        self._heard = 0  # the last of its steps, in the count of the fit; -1 where its silence was told of

    @property
    def flags(self) -> list[Flag]:
        """The flags of this fit's windows: the directions that were found diffusing along a valley."""
        return self._flagging.flags

    @property
    def basis(self) -> dict[str, Tensor]:
        """The flagged directions of the last window by mode name: unit vectors, shape (parameters,)."""
        return self._flagging.basis

    @property
    def state_key(self) -> str:
        """Checkpoints tell probes apart by their name."""
        return f"SGDProbe{{'name': {self.name!r}}}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the training, and stand aside from one that cannot be probed."""
        self._switch_off()
        self.results, self._last_state = [], {}
        self._flagging = self._no_flags()
        # Published even where the probe stands aside: a monitor whose key is missing would raise.
        self._metrics = CallbackMetricsSink(trainer)
        self._metrics.publish(verdict_counts({}, self.name))
        why = refusal(trainer, pl_module, self._optimizer) or self._name_taken(trainer)
        if why:
            log.warning("sgd_probe: off for this fit: %s.", why)
            return
        self._on = True
        self._start(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add when windows open, and on request the open one.

        Not by ``state_dict``: trainers refuse two callbacks that have one and share a key, where a second
        probe of the same name should only stand aside.
        """
        state = self._state()
        if state and "callbacks" in checkpoint:
            checkpoint["callbacks"][self.state_key] = state

    def _state(self) -> dict[str, Any]:
        engine = self._engine
        if not self._on or self._failed or engine is None:
            return dict(self._last_state)
        try:
            folder = "" if self._folder is None else str(self._folder)
            return {**engine.state_dict(), "folder": folder}
        except Exception as error:
            if self._strict:
                raise
            log.warning("sgd_probe: nothing of the probe is in the checkpoint (%s)", error)
            return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken up when the fit begins."""
        self._restored = dict(state_dict)

    def _no_flags(self) -> Flagging:
        return Flagging(self._on_flag, strict=self._strict, max_bytes=self.config.max_vector_bytes)

    def _name_taken(self, trainer: Trainer) -> str:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback is self:
                return ""
            if isinstance(callback, SGDProbe) and callback.name == self.name:
                return f"another SGDProbe of this trainer has the name {self.name!r}: give each its own"
        return ""

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are probes at rest: what belongs to a running fit stays with it."""
        idle = SGDProbe(run_dir=self._run_dir, name=self.name, config=self.config, strict=self._strict)
        running = ("_on", "_engine", "_sinks", "_metrics", "_hook", "_processes", "_failed", "_draws")
        state = {**vars(self), **{name: getattr(idle, name) for name in running}}
        # The trainer lends its callbacks the module's log methods.
        return {key: value for key, value in state.items() if key not in ("log", "log_dict")}

    @_guarded
    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[self._optimizer]
        self._steps, self._stepped = steps_done(trainer, pl_module), 1
        self._heard = self._steps
        if trainer.world_size > 1 or divides_weights(trainer):
            self._processes = Processes(pl_module.device)
        make = functools.partial(self._make_engine, trainer, pl_module, optimizer)
        self._engine = make() if self._processes is None else self._processes.together(make)
        self._planned, self._without_loss = False, 0
        self._resume()
        self._draws = DrawnBatches(pl_module, self._on_draw) if draws_itself(pl_module) else None
        self._hook = observe_steps(optimizer, self._on_optimizer_step)

    def _make_engine(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> ProbeEngine:
        return ProbeEngine(
            pl_module,
            training_loss(trainer, self._loss_fn, self._optimizer),
            optimizer,
            self.config,
            sampling=dataclasses.replace(
                read_sampling(training_loader(trainer), self.config.sampling, batches_per_epoch(trainer)),
                accumulation=trainer.accumulate_grad_batches,
                every_step=pl_module.automatic_optimization,
            ),
            planned_steps=planned_steps(trainer),
            first_step=self._steps,
            accumulation=trainer.accumulate_grad_batches,
            params=self._params,
            processes=self._processes,
        )

    def _resume(self) -> None:
        """Go on from a checkpoint, where the fit began with one."""
        assert self._engine is not None
        state, self._restored, self._folder = self._restored, {}, None
        if not state:
            return
        try:
            self._engine.load_state_dict(state)
            self._folder = Path(state["folder"]) if state.get("folder") else None
        except ValueError as error:
            if self._strict:
                raise
            log.warning("sgd_probe: it begins anew, not where the checkpoint left it: %s", error)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep a clone of the batch where one is needed; open a window where one is due."""
        if not self._on:
            return
        stepped, self._stepped, self._steps = self._stepped, 0, steps_done(trainer, pl_module)
        if stepped and self._processes is not None:
            self._confer(self._steps)
        self._watch(trainer, pl_module, batch, batch_idx, stepped)

    def _confer(self, step: int) -> None:
        """Settle with the other processes what is to happen now; where one has failed, all switch off.

        A process that has failed keeps coming: the others would wait for it.
        """
        assert self._engine is not None
        if self._engine.confer(step, self._failed):
            self._leave()
        else:
            self._settle(self._engine, step)

    @_guarded
    def _settle(self, engine: ProbeEngine, step: int) -> None:
        engine.settle(step)

    def _leave(self) -> None:
        """Switch off, as all processes do now."""
        if not self._failed:
            log.warning(
                "sgd_probe: switched off for the rest of this fit: another process failed, and its log says "
                "why. Training goes on untouched."
            )
        self._switch_off()

    @_guarded
    def _watch(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, stepped: int
    ) -> None:
        assert self._engine is not None
        engine, step = self._engine, self._steps
        engine.gather(trainer.accumulate_grad_batches)
        self._ask_about_silence(trainer)
        if self._draws is None:
            self._plan(trainer, pl_module, batch, batch_idx)
        elif self._draws.first is not None:
            self._plan(trainer, pl_module, *self._draws.first)
        if stepped and engine.opening_due(step):
            self._open(trainer, engine, step)
        if self._draws is None:
            engine.offer(batch, batch_idx, step)
        else:
            self._draws.await_step()

    def _ask_about_silence(self, trainer: Trainer) -> None:
        if 0 <= self._heard <= self._steps - _MOST_UNHEARD:
            log.warning(
                "sgd_probe: no window: the training has gone on for %d steps of which its optimizer %d (%s) "
                "told nothing. It may not step yet; it may wrap another without calling its own __init__ of "
                "torch.optim.Optimizer; or it may have replaced the one that the fit began with.",
                self._steps - self._heard,
                self._optimizer,
                type(trainer.optimizers[self._optimizer]).__name__,
            )
            self._heard = -1

    def _open(self, trainer: Trainer, engine: ProbeEngine, step: int) -> None:
        with ExitStack() as stack:
            with engine.shared():  # a terminal that is gone on one process must not leave the others waiting
                if engine.window_seconds > LONG_PAUSE:
                    self._say(trainer, f"finding directions, about {duration(engine.window_seconds)}")
                    stack.callback(setattr, engine, "on_product", None)
                    engine.on_product = stack.enter_context(progress_bar(trainer, engine.expected_products))
            basis = engine.open_window(step)
        if basis is None and self._strict:
            raise CurvatureError(engine.failure)
        if basis is not None and self._metrics is not None:
            self._metrics.publish({f"{self.name}/lambda_max": basis.lambda_max})

    def _plan(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Once in a fit, on its first batch that has a loss: say what is going to happen."""
        assert self._engine is not None
        if self._planned:
            return
        try:
            plan = self._engine.preflight(batch, batch_idx, self._steps)
        except NoLossError:
            self._without_loss += 1
            if self._without_loss == _MOST_WITHOUT_LOSS or self._draws is not None:
                raise
            return
        self._planned = True
        self._preflight(trainer, (*plan, *remarks(trainer, pl_module, self._optimizer)))

    @_guarded
    def _on_draw(self, batch: Any, batch_idx: int, before: int) -> None:
        """A training step that draws for itself has drawn a batch."""
        assert self._engine is not None
        if before and self._loss_fn is None:
            raise CurvatureError(
                "expected a training_step that draws one batch from its dataloader_iter, found it drawing "
                "more: give the probe a loss_fn"
            )
        self._engine.offer(batch, batch_idx, self._steps)

    def _on_optimizer_step(self) -> None:
        self._stepped += 1
        self._heard = self._steps
        self._observe()

    @_guarded
    def _observe(self) -> None:
        assert self._engine is not None
        self._engine.observe()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close a window that has seen its steps."""
        self._look_at_batch(trainer, pl_module, outputs)
        if self._on and self._engine is not None and self._engine.closing_due:
            self._learn_of_failures()
            self._close(trainer)

    def _learn_of_failures(self) -> None:
        """Ask before a window closes, which takes all processes; one that has failed is there to say so."""
        if self._on and self._processes is not None and self._processes.any(self._failed)[0]:
            self._leave()

    @_guarded
    def _look_at_batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        assert self._engine is not None
        self._steps = steps_done(trainer, pl_module, stepped=True)
        if self._stepped > 1 and not pl_module.automatic_optimization and self._loss_fn is None:
            raise CurvatureError(
                f"expected one step of optimizer {self._optimizer} a batch, found {self._stepped}: their "
                "noise is not independent. Give the probe a loss_fn to have the curvature all the same"
            )
        if not outputs and pl_module.automatic_optimization:  # the training step returned None
            self._engine.withdraw()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close what is open, as far as it got, and let the sinks finish."""
        self._learn_of_failures()
        if self._engine is not None and self._engine.observed_steps >= MIN_STEPS_AT_END:
            self._close(trainer)
        # A checkpoint of the finished run may be written yet.
        self._last_state = self._state()
        self._switch_off()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimizer and let the sinks finish; the open window is lost."""
        self._switch_off()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go, however the fit ended."""
        self._switch_off()

    @_guarded
    def _close(self, trainer: Trainer) -> None:
        assert self._engine is not None
        closed = self._engine.close_window(self._steps)
        if closed is None:
            return
        result, vectors = closed
        keep(self.results, result)
        if len(self.results) == 1 or result.cost.open_seconds > LONG_PAUSE:
            self._say(trainer, one_line(result))
        # Where weights are divided, this process has a part of every direction, and nobody the whole.
        whole = vectors if not self._engine.space.divided else None
        self._flagging.take(result, whole)
        with self._engine.ledger.charge():
            named = {} if whole is None else named_vectors(self.config, result, whole)
            self._sinks.write(result, named)
        self._flagging.tell(functools.partial(self._say, trainer))

    def _say(self, trainer: Trainer, message: str) -> None:
        announce(trainer, f"{speaker(self.name)}: {message}")

    def _preflight(self, trainer: Trainer, plan: tuple[str, ...]) -> None:
        assert self._engine is not None
        sinks = self._make_sinks(trainer)  # first: the processes ask each other
        self._say(trainer, "\n  ".join(plan))
        self._sinks = SinkGroup(sinks, self._strict)
        with self._engine.ledger.charge():
            self._start_sinks(plan)

    def _start_sinks(self, plan: tuple[str, ...]) -> None:
        assert self._engine is not None
        space = self._engine.space
        self._sinks.start(
            RunInfo(
                name=self.name,
                config=dataclasses.asdict(self.config),
                plan=plan,
                versions={
                    package: importlib.metadata.version(package)
                    for package in ("sgd-probe", "torch", "pytorch-lightning", "numpy")
                },
                parameters={
                    name: parameter.numel()
                    for name, parameter in zip(space.names, space.parameters, strict=True)
                },
            )
        )
        if self._folder_sink is not None:
            self._folder = self._folder_sink.path

    def _make_sinks(self, trainer: Trainer) -> list[Sink]:
        assert self._metrics is not None
        sinks: list[Sink] = [self._metrics]
        # Asked on every process, which then ask each other. Not "sgd_probe": in the working directory that
        # would hide the package itself.
        base = self._run_dir or Path(trainer.log_dir or trainer.default_root_dir) / f"{self.name}_run"
        if not trainer.is_global_zero:
            return sinks
        # A resumed run goes on in its folder, if that is still there.
        resumed = self._folder is not None and (self._folder / RUN_FILE).exists()
        self._folder_sink = FolderSink(
            self._folder if resumed and self._folder is not None else base,
            fresh=not resumed,
            max_vector_bytes=self.config.max_vector_bytes,
        )
        sinks.append(self._folder_sink)
        wandb_logger = find_wandb_logger(trainer.loggers)
        sinks += [LoggerSink(logger) for logger in trainer.loggers if logger is not wandb_logger]
        if wandb_logger is not None:
            sinks += wandb_sinks(WandbRun(wandb_logger), directions=self.config.log_directions)
        # Last: it names what the others have written.
        show = functools.partial(announce, trainer)
        sinks.append(TerminalSink(show, self.config.summary, self._folder_sink))
        return sinks

    def _switch_off(self) -> None:
        """Leave nothing behind in the user's objects; safe to call at any time."""
        self._on = self._failed = False
        self._engine = self._processes = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._draws is not None:
            self._draws.release()
            self._draws = None
        sinks, self._sinks, self._metrics = self._sinks, SinkGroup([]), None
        sinks.finish()
