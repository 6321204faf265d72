"""One training under the probe, whatever loop it runs in: what the integrations have in common.

A loop tells the session of its batches and of its optimizer's steps; the session plans, opens and closes
windows between them, feeds the sinks, and keeps every failure of ours to itself.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sgd_probe.engine import CurvatureError, ProbeConfig, ProbeEngine, duration
from sgd_probe.integrations.flagging import Flagging, OnFlag
from sgd_probe.isolation import capture
from sgd_probe.result import WindowResult
from sgd_probe.sinks.base import RunInfo, Sink, SinkGroup, Vectors, speaker
from sgd_probe.sinks.folder import FolderSink
from sgd_probe.sinks.terminal import TerminalSink

log = logging.getLogger("sgd_probe")

_P = ParamSpec("_P")
#: A window that the end of the training cuts short is worth closing from here on.
MIN_STEPS_AT_END = 40
#: Pauses longer than this many seconds are announced.
LONG_PAUSE = 5.0
#: Results of so many windows stay in memory, the last ones; the run folder has them all.
RESULTS_KEPT = 100
#: Weights coarser than this have no second derivatives worth the name.
_COARSE = (torch.float16, torch.bfloat16)


def announce(message: str) -> None:
    """Show a message on stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


def show(table: str) -> None:
    """Print results on stdout, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(table, file=sys.stdout)


@contextmanager
def progress_bar(total: int, disable: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar for a long pause, on a terminal; it is gone afterwards. Yields what takes the number done."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """Of all bars, the first starts a thread that watches them, and stays."""

        monitor_interval = 0

    with Bar(total=total, desc="sgd_probe", unit=" products", leave=False, disable=disable) as bar:

        def advance(done: int) -> None:
            bar.update(done - bar.n)

        yield advance


def _no_sinks() -> Sequence[Sink]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Host:
    """What a session needs of the loop that it serves.

    Attributes:
        sinks: makes them, when the plan is known.
        others: makes a list of what an evaluation of the loss may change beside the module (the variables
            around a loss function, a trainer's counters); it is put back.
        announce: shows a message to the user.
        progress: a bar for a long pause.
        packages: whose versions a run folder keeps.
    """

    sinks: Callable[[], Sequence[Sink]] = _no_sinks
    others: Callable[[], Iterable[Any]] = tuple
    announce: Callable[[str], None] = announce
    progress: Callable[[int], AbstractContextManager[Callable[[int], None]]] = progress_bar
    packages: tuple[str, ...] = ("sgd-probe", "torch", "numpy")


def _guarded(
    method: Callable[Concatenate[ProbeSession, _P], None],
) -> Callable[Concatenate[ProbeSession, _P], None]:
    """Keep every failure of ours out of the user's loop: warn once, restore, switch off."""

    @functools.wraps(method)
    def guarded(self: ProbeSession, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        if not self.on:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.stop()
            if self._strict:
                raise
            log.warning(
                "sgd_probe: switched off for the rest of this training (%s: %s). Training goes on untouched; "
                "the next one has the probe again, and strict=True raises instead.",
                type(error).__name__,
                error,
                exc_info=log.isEnabledFor(logging.DEBUG),
            )

    return guarded


class ProbeSession:
    """The probe within one training.

    Of its methods only those of a ``strict`` session raise. All do nothing once it is off.

    Args:
        host: the loop.
        config: every knob.
        name: prefix of every metric.
        strict: raise failures instead of switching off.
        on_flag: called with each flag that is an onset.

    Attributes:
        on: it takes part in the training.
        results: of the windows that have closed.
        flagging: the flags that they raised.
    """

    def __init__(
        self,
        host: Host,
        config: ProbeConfig,
        *,
        name: str = "sgd_probe",
        strict: bool = False,
        on_flag: OnFlag | None = None,
    ) -> None:
        self.on = True
        self.results: list[WindowResult] = []
        self.flagging = Flagging(on_flag, strict=strict, max_bytes=config.max_vector_bytes)
        self._host = host
        self._config = config
        self._name = name
        self._strict = strict
        self._engine: ProbeEngine | None = None
        self._hook: RemovableHandle | None = None
        self._sinks = SinkGroup([])
        self._planned = False
        self._stepped = True

    @property
    def planned(self) -> bool:
        """It has seen a batch and said what is going to happen."""
        return self._planned

    @_guarded
    def start(self, make_engine: Callable[[], ProbeEngine]) -> None:
        """Set the engine up, once.

        Args:
            make_engine: it may fail.
        """
        if self._engine is None:
            self._engine = make_engine()

    @_guarded
    def observe(self, optimizer: torch.optim.Optimizer, after_step: Callable[[], None]) -> None:
        """See every step of an optimizer, before any hook of the user's can zero the gradients.

        Args:
            optimizer: a torch optimizer.
            after_step: called first after each step.
        """

        def stepped() -> None:
            after_step()
            self.step()

        self._hook = observe_steps(optimizer, stepped)

    @_guarded
    def batch(self, batch: Any, index: int, step: int) -> None:
        """A batch is about to be trained on: clone it where needed, close or open a window where due.

        Args:
            batch: as the loop has it.
            index: of the batch in its epoch.
            step: optimizer steps done.
        """
        engine, stepped = self._engine, self._stepped
        if engine is None:
            return
        self._stepped = False
        if not self._planned:
            with self._kept():
                plan = engine.preflight(batch, index, step)
            self._planned = True
            self._begin(engine, plan)
        if stepped:
            self._close_if_due(step)
            if engine.opening_due(step):
                self._open(engine, step)
        engine.offer(batch, index, step)

    @_guarded
    def step(self) -> None:
        """The optimizer has made a step; gradients are not zeroed yet."""
        self._stepped = True
        if self._engine is not None:
            self._engine.observe()

    @_guarded
    def between_steps(self, step: int) -> None:
        """Close a window that has seen its steps; :meth:`batch` does it too.

        Args:
            step: optimizer steps done.
        """
        self._close_if_due(step)

    @_guarded
    def end(self, step: int) -> None:
        """The training has ended: close what is open, if it has got far enough.

        Args:
            step: optimizer steps done.
        """
        if self._engine is not None and self._engine.observed_steps >= MIN_STEPS_AT_END:
            self._close(self._engine, step)

    def stop(self) -> None:
        """Leave nothing behind in the user's objects, and let the sinks finish; safe at any time."""
        self.on = False
        self._engine = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        sinks, self._sinks = self._sinks, SinkGroup([])
        sinks.finish()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Put back what the evaluations of the body change beside the module."""
        restore = capture(*self._host.others())
        try:
            yield
        finally:
            restore()

    def _open(self, engine: ProbeEngine, step: int) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._kept())
            if engine.window_seconds > LONG_PAUSE:
                self._say(f"finding directions, about {duration(engine.window_seconds)}")
                stack.callback(setattr, engine, "on_product", None)
                engine.on_product = stack.enter_context(self._host.progress(engine.expected_products))
            basis = engine.open_window(step)
            if basis is None and self._strict:
                raise CurvatureError(engine.failure)

    def _close_if_due(self, step: int) -> None:
        if self._engine is not None and self._engine.closing_due:
            self._close(self._engine, step)

    def _close(self, engine: ProbeEngine, step: int) -> None:
        with self._kept():
            closed = engine.close_window(step)
        if closed is None:
            return
        result, vectors = closed
        keep(self.results, result)
        if len(self.results) == 1 or result.cost.open_seconds > LONG_PAUSE:
            self._say(one_line(result))
        self.flagging.take(result, vectors)
        with engine.ledger.charge():
            self._sinks.write(result, named_vectors(self._config, result, vectors))
        self.flagging.tell(self._say)

    def _say(self, message: str) -> None:
        self._host.announce(f"{speaker(self._name)}: {message}")

    def _begin(self, engine: ProbeEngine, plan: tuple[str, ...]) -> None:
        self._say("\n  ".join(plan))
        space = engine.space
        sinks = list(self._host.sinks())
        folder = next((sink for sink in sinks if isinstance(sink, FolderSink)), None)
        # Last: it names what the others have written.
        sinks.append(TerminalSink(show, self._config.summary, folder))
        self._sinks = SinkGroup(sinks, self._strict)
        self._sinks.start(
            RunInfo(
                name=self._name,
                config=dataclasses.asdict(self._config),
                plan=plan,
                versions={package: importlib.metadata.version(package) for package in self._host.packages},
                parameters={
                    name: parameter.numel()
                    for name, parameter in zip(space.names, space.parameters, strict=True)
                },
            )
        )


class CallbackSink:
    """Hands every result to a function of the user's; the group keeps its failures harmless.

    Args:
        on_result: takes a result.
    """

    def __init__(self, on_result: Callable[[WindowResult], object]) -> None:
        self._on_result = on_result

    def start(self, run: RunInfo) -> None:
        """Nothing to do."""

    def write(self, result: WindowResult, vectors: Vectors) -> None:
        """Call it."""
        self._on_result(result)

    def finish(self) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class ActiveRun:
    """A W&B run where :class:`~sgd_probe.sinks.wandb.WandbSink` expects a logger that has one.

    Attributes:
        experiment: the run.
    """

    experiment: Any


def named_vectors(config: ProbeConfig, result: WindowResult, vectors: Tensor) -> Vectors:
    """The directions of a window by the names of its modes; none where they are not to be stored."""
    if not config.save_vectors or 4 * vectors.numel() > config.max_vector_bytes:
        return {}
    rows = vectors.float().cpu().numpy()
    return {mode.name: row for mode, row in zip(result.modes, rows, strict=True)}


def with_overrides(config: ProbeConfig | None, **given: Any) -> ProbeConfig:
    """A configuration with those knobs in place that are given (not None).

    Raises:
        ValueError: a knob is out of range; the message names it.
    """
    if config is not None and not isinstance(config, ProbeConfig):
        raise ValueError(f"expected `config` to be a ProbeConfig, found {config!r}: write ProbeConfig(...)")
    wins = {key: value for key, value in given.items() if value is not None}
    return dataclasses.replace(config or ProbeConfig(), **wins)


def keep(results: list[WindowResult], result: WindowResult) -> None:
    """Add one to the results that stay in memory."""
    results.append(result)
    del results[:-RESULTS_KEPT]


def observe_steps(optimizer: torch.optim.Optimizer, observe: Callable[[], None]) -> RemovableHandle:
    """Call back after every step of an optimizer, before any hook of the user's can zero the gradients.

    Raises:
        TypeError: the optimizer takes no hooks.
    """

    def stepped(*_: Any) -> None:
        if not _within_a_step(optimizer):
            observe()

    try:
        handle: RemovableHandle = optimizer.register_step_post_hook(stepped)
        hooks: Any = optimizer._optimizer_step_post_hooks  # an OrderedDict, whatever its annotation says
        hooks.move_to_end(handle.id, last=False)
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"expected an optimizer that tells of its steps, found a {type(optimizer).__name__} without step "
            "hooks: let its __init__ call that of torch.optim.Optimizer"
        ) from error
    return handle


def _within_a_step(optimizer: torch.optim.Optimizer) -> bool:
    """The step that has ended is a part of another one of the same optimizer.

    Where a class's step calls that of its base, torch has both tell of it, once anybody in the process has
    made an optimizer of the base.
    """
    hooked = sys._getframe(2)  # the caller of the hooks; every step that tells of itself has such a frame
    frame = hooked.f_back
    while frame is not None:
        if frame.f_code is hooked.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer within wrappers such as Accelerate's, whose own hooks are never called.

    Raises:
        TypeError: there is none.
    """
    found, seen = optimizer, set[int]()
    while (
        isinstance(inner := getattr(found, "optimizer", None), torch.optim.Optimizer)
        and id(inner) not in seen
    ):
        seen.add(id(inner))
        found = inner
    if not isinstance(found, torch.optim.Optimizer):
        raise TypeError(f"expected `optimizer` to be a torch optimizer, found {type(optimizer).__name__}")
    return found


def refusal(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Why a training with these cannot be probed, on any loop; "" where it can."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            return f"training on {processes} processes is not supported yet"
    if isinstance(optimizer, torch.optim.LBFGS):
        return (
            "LBFGS evaluates the loss several times a step and searches along lines; no mode moves by itself"
        )
    coarse = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in _COARSE})
    if coarse:
        return f"weights in {coarse[0].removeprefix('torch.')} are too coarse for second derivatives"
    return ""


def one_line(result: WindowResult) -> str:
    """A window in one line for people."""
    counts = ", ".join(f"{count} {verdict.value}" for verdict, count in result.counts().items() if count)
    return (
        f"window {result.index} (steps {result.opened_at_step} to {result.closed_at_step}): {counts}; "
        f"lambda_max {result.curvature.lambda_max:.3g}"
    )
