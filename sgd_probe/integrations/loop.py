"""The probe in a plain PyTorch loop: a context around it, and one word around its loader."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from sgd_probe.engine import ParameterFilter, ProbeConfig, ProbeEngine, read_sampling
from sgd_probe.flags import Flag
from sgd_probe.integrations.flagging import OnFlag
from sgd_probe.integrations.muting import active_wandb_run, silenced
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

log = logging.getLogger("sgd_probe")


class LoopProbe:
    """Measures how SGD moves along the modes of the loss while a loop of your own trains.

    ::

        with LoopProbe(model, optimizer, loss_fn, planned_steps=epochs * len(loader)) as probe:
            for epoch in range(epochs):
                for batch in probe.watch(loader):
                    loss = loss_fn(model, batch)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()

    Windows open and close between two steps. The training is never changed; a failure switches the probe
    off with one warning, unless it is ``strict``.

    Args:
        model: what is trained; nothing of it is ever changed.
        optimizer: what moves its weights (a wrapper of Accelerate's will do).
        loss_fn: (model, batch) -> loss, a scalar tensor: what the loop goes backward from. It is called for
            batches that were trained on, more than once; all that it changes on the model, in the
            variables around it and in globals of your own files is put back.
        planned_steps: optimizer steps of the whole run, those before ``first_step`` included; what the
            probe may cost is a share of them. ``math.inf`` where nobody knows.
        loader: where batches come from; needed only where they are handed over by :meth:`batch`.
        accumulation: batches gathered into an optimizer step, their losses divided by as many.
        first_step: optimizer steps done already, where a run is resumed.
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
        run_dir: folder of the local results, with their report; by default there is none. A folder that
            holds a run already is left alone and a numbered one taken.
        on_result: called with every result.
        on_flag: called with a flag when a valley begins to diffuse, after the results are written.
        name: prefix of every metric; give each of several probes its own, and watch what the other watches.
        strict: raise failures instead of switching off.
        config: every other knob; the arguments above win over it.

    Raises:
        TypeError: ``model``, ``optimizer`` or a function is not what it should be.
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        planned_steps: float,
        loader: Iterable[Any] | None = None,
        accumulation: int = 1,
        first_step: int = 0,
        top: int | None = None,
        flat: int | None = None,
        params: ParameterFilter = None,
        window: int | Literal["auto"] | None = None,
        max_overhead: float | None = None,
        every_n_steps: int | None = None,
        curvature_batches: int | Literal["auto"] | None = None,
        max_basis_bytes: int | Literal["auto"] | None = None,
        run_dir: str | Path | None = None,
        on_result: Callable[[WindowResult], object] | None = None,
        on_flag: OnFlag | None = None,
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
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected `model` to be a torch module, found {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"expected `loss_fn` to be callable, found {loss_fn!r}")
        for argument, value in (("on_result", on_result), ("on_flag", on_flag)):
            if value is not None and not callable(value):
                raise TypeError(f"expected `{argument}` to be callable, found {value!r}")
        _check_count("accumulation", accumulation, 1)
        _check_count("first_step", first_step, 0)
        if not isinstance(planned_steps, int | float) or not planned_steps > 0:
            raise ValueError(
                "expected `planned_steps` to be a number of optimizer steps, or math.inf, found "
                f"{planned_steps!r}"
            )
        if not name or not isinstance(name, str):
            raise ValueError(f"expected `name` to be a non-empty string, found {name!r}")
        self.name = name
        self._model = model
        self._optimizer = inner_optimizer(optimizer)
        self._loss_fn = loss_fn
        self._loader = loader
        self._planned_steps = planned_steps
        self._accumulation = accumulation
        self._steps = self._first_step = first_step
        self._batches = 0
        self._params = params
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._on_result = on_result
        self._on_flag = on_flag
        self._modes: list[tuple[nn.Module, bool]] = []
        self._strict = strict
        self._session = self._make_session()
        self._session.on = False

    @property
    def results(self) -> list[WindowResult]:
        """The results of the windows that have closed; of more than a hundred, of the last hundred."""
        return self._session.results

    @property
    def flags(self) -> list[Flag]:
        """The flags of those windows: the directions that were found diffusing along a valley."""
        return self._session.flagging.flags

    @property
    def basis(self) -> dict[str, Tensor]:
        """The flagged directions of the last window by mode name: unit vectors, shape (parameters,)."""
        return self._session.flagging.basis

    def __enter__(self) -> Self:
        self._session.stop()
        self._session = self._make_session()
        self._steps, self._batches, self._modes = self._first_step, 0, []
        why = refusal(self._model, self._optimizer)
        if why:
            self._session.stop()
            if self._strict:
                raise ValueError(f"sgd_probe: {why}")
            log.warning("sgd_probe: off for this training: %s.", why)
        else:
            self._session.observe(self._optimizer, self._after_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Of a training that failed, the open window is lost; its own error is the one to be seen.
        with ExitStack() as stack:
            if self._session.on:
                stack.callback(self._session.stop)
                if kind is None:
                    self._session.end(self._steps)
                    self._ask_about_silence()

    def watch(self, loader: Iterable[Any]) -> Watched:
        """The batches of an epoch as they are, each shown to the probe before it is trained on.

        Args:
            loader: as the loop would go through it; how it draws is read off the first one that is watched.
        """
        if self._loader is None:
            self._loader = loader.source if isinstance(loader, Watched) else loader
        return Watched(loader, self)

    def batch(self, batch: Any, index: int) -> None:
        """Show a batch before its forward pass: what :meth:`watch` does, by hand.

        Args:
            batch: as ``loss_fn`` takes it.
            index: of the batch in its epoch.
        """
        self._batches += 1
        self._session.start(self._make_engine)
        self._session.batch(batch, index, self._steps)

    def _after_step(self) -> None:
        self._steps += 1
        # A loop may be evaluating when the next batch comes; the loss is that of its training mode.
        self._modes = [(module, module.training) for module in self._model.modules()]

    def _make_session(self) -> ProbeSession:
        host = Host(sinks=self._make_sinks, others=lambda: [self._loss_fn])
        return ProbeSession(host, self.config, name=self.name, strict=self._strict, on_flag=self._on_flag)

    def _make_engine(self) -> ProbeEngine:
        sampling = read_sampling(self._loader, self.config.sampling)
        return ProbeEngine(
            self._model,
            self._loss,
            self._optimizer,
            self.config,
            sampling=dataclasses.replace(sampling, accumulation=self._accumulation),
            planned_steps=self._planned_steps,
            first_step=self._first_step,
            accumulation=self._accumulation,
            params=self._params,
        )

    def _loss(self, model: nn.Module, batch: Any, _: int) -> Tensor:
        for module, training in self._modes:
            module.training = training
        with silenced():
            return self._loss_fn(model, batch)

    def _make_sinks(self) -> list[Sink]:
        sinks: list[Sink] = []
        if self._run_dir is not None:
            sinks.append(FolderSink(self._run_dir, fresh=True, max_vector_bytes=self.config.max_vector_bytes))
        run = active_wandb_run()
        if run is not None:
            sinks += wandb_sinks(WandbRun(ActiveRun(run)), directions=self.config.log_directions)
        if self._on_result is not None:
            sinks.append(CallbackSink(self._on_result))
        return sinks

    def _ask_about_silence(self) -> None:
        """A loop that shows only half of itself gets no window; say which half is missing."""
        steps = self._steps - self._first_step
        if steps and not self._batches:
            log.warning(
                "sgd_probe: no window: saw %d optimizer steps and no batch; go through the loader with "
                "probe.watch(loader), or call probe.batch(batch, index) before each forward pass.",
                steps,
            )
        elif self._batches and not steps:
            log.warning(
                "sgd_probe: no window: saw %d batches and no step of the %s that it was given; give it the "
                "optimizer that the loop steps.",
                self._batches,
                type(self._optimizer).__name__,
            )


class Watched(Iterable[Any]):
    """A loader whose batches a probe sees on their way; anything else of it is the loader's own.

    Args:
        loader: gives batches.
        probe: is shown them.
    """

    def __init__(self, loader: Iterable[Any], probe: LoopProbe) -> None:
        self._loader = loader
        self._probe = probe

    @property
    def source(self) -> Iterable[Any]:
        """The loader itself, also where several probes watch it."""
        return self._loader.source if isinstance(self._loader, Watched) else self._loader

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self._loader):
            self._probe.batch(batch, index)
            yield batch

    def __len__(self) -> int:
        if not isinstance(self._loader, Sized):
            raise TypeError(f"object of type {type(self._loader).__name__!r} has no len()")
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"expected `{name}` to be an integer of at least {least}, found {value!r}")
