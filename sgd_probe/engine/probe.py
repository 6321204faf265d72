"""The probe without a trainer or a logger: it calls the rooms in order.

A loop hands over batches (:meth:`ProbeEngine.offer`), tells of every optimizer step
(:meth:`ProbeEngine.observe`) and asks at step boundaries whether a window is to open or to close.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.certify import MIN_BATCHES, Revisited, revisit
from sgd_probe.curvature.finite_differences import FiniteDifferenceOperator
from sgd_probe.curvature.hessian import (
    CurvatureError,
    GradientCost,
    HessianOperator,
    LossFunction,
    WrongHessianError,
    gradient_noise_trace,
    measure_gradient,
)
from sgd_probe.curvature.krylov import measure_pass
from sgd_probe.curvature.memory import is_out_of_memory
from sgd_probe.curvature.microbatches import check_pieces, cut
from sgd_probe.curvature.modes import ModeBasis, find_modes
from sgd_probe.curvature.selftest import self_test
from sgd_probe.curvature.sharded import ShardedDifferenceOperator, at_rest
from sgd_probe.curvature.slices import MOST_BATCHES, loss_slices
from sgd_probe.curvature.space import ParameterFilter, ParameterSpace, part
from sgd_probe.dynamics.force import JointStatistics
from sgd_probe.dynamics.noise import Resampled, resample
from sgd_probe.dynamics.projection import Projector
from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.engine.config import ProbeConfig
from sgd_probe.engine.distributed import Processes
from sgd_probe.engine.frugality import Frugality
from sgd_probe.engine.ledger import Ledger, duration
from sgd_probe.engine.measured import Measured, decisive_curvature
from sgd_probe.engine.memory import Means, resident_bytes
from sgd_probe.engine.optimizers import OptimizerState, read_optimizer, read_scales
from sgd_probe.engine.packing import pack, unpack
from sgd_probe.engine.planning import (
    SELF_TEST_GRADIENTS,
    Foretold,
    Schedule,
    basis_passes,
    choose_window,
    closing_gradients,
    finding_products,
    gradients_per_batch,
    steps_in_waiting,
    turning_limit,
    windows_ahead,
)
from sgd_probe.engine.sampling import Sampling
from sgd_probe.engine.summary import summarise
from sgd_probe.engine.verification import Verification
from sgd_probe.engine.window import Window, radial_shares
from sgd_probe.isolation import isolated
from sgd_probe.result import CostResult, LossSlice, WindowResult

log = logging.getLogger("sgd_probe")

#: Windows in a row that may fail to open before the probe gives up.
MAX_FAILURES = 3
#: Steps to wait after a window that failed to open.
RETRY_STEPS = 200
#: Under ``verify`` the user's state is compared at every so many observed steps, once.
VERIFIED_STEPS = 64
#: Of what checkpoints hold of a probe.
STATE_FORMAT = 1
#: Processes of a distributed training settle what is to happen every so many optimizer steps.
CONFER_STEPS = 8
#: Between the seeds of two processes; the batches of one differ by their index.
_SEEDS_APART = 1_000_003


class _Agreed(NamedTuple):
    """What all processes are going to do at this step."""

    collect: bool = False
    open: bool = False
    close: bool = False


class OutOfMeansError(CurvatureError):
    """Memory is too short for a window, whatever is given up."""


class ProbeEngine:
    """Measures the modes of a live training.

    Args:
        module: the user's module; nothing of it is ever changed.
        loss: its training loss on one batch.
        optimizer: what moves the weights.
        config: every knob.
        sampling: what the loader does.
        planned_steps: optimizer steps of the whole run, or infinity.
        first_step: optimizer steps done already.
        accumulation: microbatches in an optimizer step.
        params: which parameters to probe, of those that the optimizer moves.
        processes: those of a distributed training, all of which have an engine; call :meth:`confer` then.

    Raises:
        ValueError: there is nothing to probe.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: LossFunction,
        optimizer: torch.optim.Optimizer,
        config: ProbeConfig,
        *,
        sampling: Sampling,
        planned_steps: float,
        first_step: int = 0,
        accumulation: int = 1,
        params: ParameterFilter = None,
        processes: Processes | None = None,
    ) -> None:
        self._params = params
        self._module = module
        self._optimizer = optimizer
        self._processes = processes
        self.config = config
        self.space = self._trained()
        self.sampling = sampling
        self.ledger = Ledger(self.space.device)
        self._loss = loss
        self._schedule = Schedule(config, first_step, planned_steps)
        self._planned_steps = planned_steps
        self._accumulation = accumulation
        self._first_step = first_step
        self._agreed = _Agreed()
        # Processes that hold parts of a vector draw different parts of it.
        own = processes.rank if processes is not None and self.space.divided else 0
        self._generator = torch.Generator().manual_seed(config.seed + _SEEDS_APART * own)
        self._dtype = _at_least_float32(self.space)
        self._offered = False
        self._differences = self.space.divided or config.second_derivatives == "finite_differences"
        self._pieces_gap: float | None = None
        self._cost: GradientCost | None = None
        self._pass_seconds = 0.0
        self._verification = Verification(module, optimizer) if config.verify else None
        self._frugality = self._frugal()
        self._batches_per_set = 0
        self._window_seconds = 0.0
        self._foretold = Foretold()
        self._pool: list[CurvatureBatch] = []
        self._collecting = False
        self._batch_index = 0
        self._window: Window | None = None
        self._failures = 0
        self._self_test = ""
        self._over_budget_said = False
        self._changed = ""
        self._warm_start: Tensor | None = None
        self._turning_limit = math.inf
        #: Why the last window that was to open did not.
        self.failure = ""
        #: Called with the number of Hessian-vector products so far while a window opens.
        self.on_product: Callable[[int], None] | None = None

    @property
    def basis(self) -> ModeBasis | None:
        """The directions of the open window."""
        return self._window.basis if self._window else None

    @property
    def is_open(self) -> bool:
        """A window is open."""
        return self._window is not None

    @property
    def observed_steps(self) -> int:
        """Steps of the open window so far; 0 where none is open."""
        return self._window.steps if self._window else 0

    @property
    def closing_due(self) -> bool:
        """The open window has seen its planned steps."""
        return self._is_due if self._processes is None else self._agreed.close

    @property
    def _is_due(self) -> bool:
        return self._window is not None and self._window.due

    @property
    def window_seconds(self) -> float:
        """What a window is expected to take: the last one's cost, before it an estimate."""
        return self._window_seconds

    @property
    def expected_products(self) -> int:
        """About how many Hessian-vector products an opening takes before certification."""
        return finding_products(self.config)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from: tensors and plain types. Call it between steps.

        The open window is in it only under ``checkpoint_window``; else a resumed run begins with the next.
        """
        state: dict[str, Any] = {
            "format": STATE_FORMAT,
            "names": list(self.space.names),
            "size": self.space.dimension,
            "opened": self._schedule.opened,
            "next_step": self._schedule.next_step,
            "failures": self._failures,
            "generator": self._generator.get_state(),
            "self_test": self._self_test,
            "turning_limit": self._turning_limit,
            # Of a divided vector the first process, which writes for all, holds a part only.
            "warm_start": None if self.space.divided else self._warm_start,
            "window": None,
            "pool": [],
            "collecting": False,
        }
        # The first process writes for all, and has batches of its own only.
        if self.config.checkpoint_window and self._processes is None:
            try:
                state["pool"] = [pack(batch) for batch in self._pool]
                state["collecting"] = self._collecting
                state["window"] = None if self._window is None else self._window.state()
            except TypeError as error:
                log.warning(
                    "sgd_probe: the open window is not in the checkpoint (%s): a resumed run begins with the "
                    "next one.",
                    error,
                )
                state |= {"pool": [], "collecting": False, "window": None}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; call it before the first step.

        Raises:
            ValueError: it is of other parameters or of another version.
        """
        if state.get("format") != STATE_FORMAT:
            raise ValueError(
                f"expected a probe's state of format {STATE_FORMAT}, found {state.get('format')}"
            )
        if (list(state["names"]), state["size"]) != (list(self.space.names), self.space.dimension):
            raise ValueError(
                f"expected the state of a probe of {self.space.dimension:,} weights of the same names, found "
                f"one of {state['size']:,}"
            )
        try:
            window = state["window"]
            self._window = None if window is None else Window.resumed(window, self.space, self._optimizer)
            self._pool = [unpack(batch) for batch in state["pool"]]
        except (KeyError, TypeError) as error:
            self._window, self._pool = None, []
            raise ValueError(f"expected a probe's state of this version, found another ({error})") from error
        self._collecting = bool(state["collecting"])
        self._schedule.opened, self._schedule.next_step = int(state["opened"]), int(state["next_step"])
        self._failures, self._self_test = int(state["failures"]), str(state["self_test"])
        if not self.space.divided:  # it is the first process's
            self._generator.set_state(state["generator"].cpu())
        self._turning_limit = float(state["turning_limit"])
        warm = state["warm_start"]
        self._warm_start = None if warm is None else warm.to(self.space.device, self.space.dtype)

    def preflight(self, batch: Any, index: int, step: int) -> tuple[str, ...]:
        """Try the loss once on a batch, and say what is going to happen.

        Returns:
            The plan, a sentence an item.

        Raises:
            CurvatureError: the loss cannot be probed.
        """
        with self.ledger.charge(), self._verified("the preflight"):
            with self.shared():
                frozen = self._freeze(batch, index)
            self._size_up(frozen)
        self._batches_per_set = self._frugality.used.batches
        self._foresee(step)
        means, sizes = self._frugality.used, self._frugality.sizes
        config, count, graphs = means.config, means.batches, means.graph_bytes(sizes)
        rebuilt = "" if means.keep_graphs else ", rebuilt for every product"
        stiff = f"{config.top} stiff" + (f", {config.interior} interior" if config.interior else "")
        lines = [
            f"{self.space.dimension:,} weights; {stiff} and {config.flat} near-flat directions from "
            f"2 x {count} training batches ({count * frozen.samples} samples find them, as many certify).",
            f"The first window opens at about optimizer step {self._foretold.step:.0f} and "
            f"pauses the training for about {duration(self._foretold.pause)}; it needs at most "
            f"{self._foretold.bytes / 2**20:,.0f} MB "
            f"({graphs / 2**20:,.0f} MB of graphs{rebuilt}).",
            *(f"Memory is short: {note}." for note in self._frugality.notes),
            *self._ways(),
            self._pace(),
            f"Optimizer: {self._read_optimizer().describe()}.",
            f"Loader: {self.sampling.describe()}.",
        ]
        withheld = self._read_optimizer().withheld or self.sampling.withheld
        if withheld:
            lines.append(f"Verdicts will be withheld: {withheld}.")
        if self._repeats():
            lines.append(self._repeats())
        return tuple(lines)

    def gather(self, accumulation: int) -> None:
        """Batches are gathered into a step, from here on so many.

        Args:
            accumulation: that the loop has now.
        """
        if accumulation == self._accumulation:
            return
        self._accumulation = accumulation
        self.sampling = dataclasses.replace(self.sampling, accumulation=accumulation)
        if self._window is not None:
            self._window.withhold("the number of batches that make a step changed during the window")

    def offer(self, batch: Any, index: int, step: int) -> None:
        """Hand over a training batch before its step; it is cloned while a window is in sight.

        Args:
            batch: as the loop has it.
            index: of the batch in its epoch.
            step: optimizer steps done.
        """
        self._batch_index, self._offered = index, False
        if not self._batches_per_set:
            return
        if not self._collecting:
            self._collecting = self._window_due(step) if self._processes is None else self._agreed.collect
        if self._collecting and len(self._pool) < 2 * self._batches_per_set:
            with self.ledger.charge():
                self._pool.append(self._freeze(batch, index))
                self._offered = True

    def withdraw(self) -> None:
        """The training step gave no loss for the batch that was handed over last: do without it."""
        if self._offered:
            self._pool.pop()
            self._offered = False

    def opening_due(self, step: int) -> bool:
        """Enough batches are there; call :meth:`open_window` if ``step`` optimizer steps are done."""
        return self._ready(step) if self._processes is None else self._agreed.open

    def _ready(self, step: int) -> bool:
        full = self._collecting and len(self._pool) >= 2 * self._batches_per_set
        return full and not self.is_open and step >= self._schedule.next_step

    def confer(self, step: int, failed: bool = False) -> bool:
        """Settle with the other processes what is to happen; call it at every step boundary on all of them.

        They meet every :data:`CONFER_STEPS` steps; windows open and close there. The first process decides
        when batches are collected: the others' clocks run differently.

        Args:
            step: optimizer steps done.
            failed: this process cannot go on.

        Returns:
            Some process has failed: switch off, all do.
        """
        self._agreed = _Agreed()
        if self._processes is None or not self._meet_at(step):
            return False
        lead = self._processes.rank == 0 and not failed and bool(self._batches_per_set)
        collect = lead and not self._collecting and self._window_due(step)
        broken, collect_, not_ready, not_due = self._processes.any(
            failed, collect, not self._ready(step), not self._is_due
        )
        self._agreed = _Agreed(collect=collect_, open=not not_ready, close=not not_due)
        return broken

    def _meet_at(self, step: int) -> bool:
        return (step - self._first_step) % CONFER_STEPS == 0

    def shared(self) -> AbstractContextManager[None]:
        """What fails in the body on one of several processes fails on all of them; none is left waiting."""
        return nullcontext() if self._processes is None else self._processes.shared()

    def settle(self, step: int) -> None:
        """Take up the steps since the last meeting; call it after :meth:`confer`, unless some have failed."""
        window = self._window
        if window is not None and self.space.divided and self._meet_at(step):
            with self.ledger.charge() as charge, self.shared():
                window.settle()
            window.observe_seconds += charge.seconds

    def open_window(self, step: int) -> ModeBasis | None:
        """Find the modes at the present weights and begin to observe.

        Args:
            step: optimizer steps done.

        Returns:
            The basis, or None where the curvature could not be had this time (a warning says why).

        Raises:
            CurvatureError: it failed several times in a row, or nothing is left that takes less memory.
        """
        device = torch.device("cpu") if self._frugality.used.on_cpu else self.space.device
        try:
            before = resident_bytes(device)
            with self.ledger.charge() as charge, self._verified(f"opening a window at step {step}"):
                self._follow(step)
                window = self._open_frugally(step)
        except (WrongHessianError, OutOfMeansError):
            raise  # waiting does not mend it
        except CurvatureError as error:
            self._failures += 1
            self.failure = str(error)
            self._schedule.postpone(step, RETRY_STEPS)
            if self._failures >= MAX_FAILURES:
                raise CurvatureError(f"{error} ({self._failures} windows in a row)") from error
            log.warning(
                "sgd_probe: no window at step %d: %s. It is tried again in %d steps.",
                step,
                error,
                RETRY_STEPS,
            )
            return None
        finally:
            self._pool, self._offered = [], False
            self._collecting = False
        self._failures = 0
        self._schedule.open(step)
        self._window = window
        window.open_seconds = charge.seconds
        window.foretold = self._foretold
        now = resident_bytes(device)
        if before is not None and now is not None and now[1] > before[1]:
            window.peak_bytes = now[1] - before[0]
        log.info(
            "sgd_probe: window %d opens at step %d for %d steps: %s",
            window.index,
            step,
            window.plan.steps,
            window.plan.reason,
        )
        return window.basis

    def observe(self) -> None:
        """Read the step that the optimizer has just done; call it before gradients are zeroed."""
        window = self._window
        if window is None:
            return
        if window.due:  # it waits for the next meeting of the processes
            window.late += 1
            return
        seen = window.steps + window.statistics.skipped
        with self.ledger.charge() as charge, self._verified("reading a step", seen % VERIFIED_STEPS == 0):
            window.observe(self.sampling.draw(self._batch_index))
        window.observe_seconds += charge.seconds

    def close_window(self, step: int) -> tuple[WindowResult, Tensor] | None:
        """Judge the open window.

        Args:
            step: optimizer steps done.

        Returns:
            Its result and its directions (rows in the order of the modes), or None if none is open.
        """
        window, self._window = self._window, None
        self._agreed = self._agreed._replace(close=False)
        if window is None:
            return None
        changed = not _same(self._trained(), window.space)
        if changed:
            window.withhold("which weights are trained changed during the window (frozen, thawed or added)")
        with self.ledger.charge() as charge, self._verified(f"closing a window at step {step}"):
            with self.shared():
                window.settle()
            later = self._revisit(window, changed)
            with self.shared():
                changes, norms = window.preconditioner_changes(), window.norms()
        # The next one has no self-test, which took its share of the first.
        opening = window.open_seconds - window.test_seconds
        took = opening + window.observe_seconds + charge.seconds
        # In a process's first window much is done for the first time: the next is between it and the plan.
        first = window.index == 0 and took > self._window_seconds > 0
        self._window_seconds = (took + self._window_seconds) / 2 if first else took
        self._foretold = dataclasses.replace(self._foretold, pause=opening, step=math.nan)
        cost = CostResult(
            longest_pause_seconds=self.ledger.longest,
            foretold_open_seconds=window.foretold.pause,
            foretold_step=window.foretold.step,
            foretold_bytes=window.foretold.bytes,
            foretold_windows=window.foretold.windows,
            peak_bytes=window.peak_bytes,
            open_seconds=window.open_seconds,
            observe_seconds=window.observe_seconds,
            close_seconds=charge.seconds,
            total_seconds=self.ledger.spent,
            training_seconds=self.ledger.training,
        )
        measured = Measured(
            index=window.index,
            opened_at_step=window.opened_at_step,
            closed_at_step=step,
            planned_steps=window.plan.steps,
            basis=window.basis,
            decays=window.decays,
            end_eigenvalues=later.eigenvalues,
            end_overlap=later.overlap,
            random_noise=window.random_noise(),
            statistics=window.statistics,
            joint=window.joint,
            resampled=window.resampled,
            start_gradient=window.start_gradient,
            radial=window.radial,
            norms=norms,
            preconditioner_changes=changes,
            jumps=window.jumps,
            slices=window.slices,
            optimizer=window.optimizer,
            sampling=self.sampling,
            samples_found=window.samples_found,
            samples_certified=window.samples_certified,
            batches=len(window.certifying),
            parameters=self.space.dimension,
            self_test=self._self_test,
            cost=cost,
            warnings=tuple(window.warnings),
            min_noise_share=self.config.min_noise_share,
            plan=window.plan.reason,
        )
        self._turning_limit = turning_limit(
            window.basis.held_out_overlap, later.overlap, window.statistics.steps
        )
        return summarise(measured), window.basis.vectors

    def _trained(self) -> ParameterSpace:
        """The probed parameters, as the user trains them now."""
        moved = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        at_rest(self._module)
        try:
            found = ParameterSpace.of(self._module, self._params, among=moved)
        except ValueError:
            # None of them needs a gradient between two steps of a training that freezes its parts in turn.
            if hasattr(self, "space"):
                return self.space
            raise
        return _over(self._processes, found, self.config) if found.divided else found

    def _follow(self, step: int) -> None:
        """Turn to the weights that are trained now: people freeze layers, thaw them, prune and add some."""
        found = self._trained()
        if _same(found, self.space):
            return
        self._changed = (
            f"{found.dimension:,} weights are trained and probed from step {step} on, before that "
            f"{self.space.dimension:,} were: some were frozen, thawed or added."
        )
        log.info("sgd_probe: %s", self._changed)
        self.space, self._dtype = found, _at_least_float32(found)
        self._self_test, self._pieces_gap = "", None
        self._warm_start, self._turning_limit = None, math.inf
        self._frugality = self._frugal()
        self._size_up(self._pool[0])

    def _frugal(self) -> Frugality:
        size = self._vector_bytes
        return Frugality(self.config, self.space.device, size, self._processes, in_place=self.space.divided)

    def _size_up(self, batch: CurvatureBatch) -> None:
        """From what a gradient takes, how windows are taken."""
        self._try(batch)
        assert self._cost is not None
        self._frugality.plan(
            self._cost,
            batch.content,
            batch.samples,
            self._planned_steps,
            lambda size: self._pieces_hold([batch], size),
        )

    def _try(self, batch: CurvatureBatch) -> None:
        """Take a gradient and its graph, of a part of the batch where memory is too short for the whole."""
        size, told = self.config.microbatch, ""
        while True:
            try:
                with self.shared(), self._isolated():
                    if size is not None:
                        self._check_pieces([batch], size)
                    self._cost = measure_gradient(
                        self._module, self._loss, batch, self.space, size, self._kind, self._dtype
                    )
                    like = torch.empty(0, dtype=self._dtype or self.space.dtype, device=self.space.device)
                    self._pass_seconds = measure_pass(like, self.space.size)
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                told = _first_line(error)
            samples = batch.samples if self._processes is None else self._processes.least(batch.samples)
            size = 0 if self._differences else min(size or round(samples), round(samples)) // 4
            if not size:
                raise OutOfMeansError(f"memory is too short for a gradient ({told})")
            self._forget_failure()

    def _pieces_hold(self, batches: Sequence[CurvatureBatch], size: int) -> bool:
        """Whether batches may be cut to save memory."""
        try:
            with self.shared(), self._isolated():
                self._check_pieces(batches, size)
        except Exception as error:
            if not (isinstance(error, CurvatureError) or is_out_of_memory(error)):
                raise
            return False
        return True

    def _verified(self, what: str, now: bool = True) -> AbstractContextManager[None]:
        return nullcontext() if self._verification is None or not now else self._verification.around(what)

    def _window_due(self, step: int) -> bool:
        # Under a budget an open window has its own cost to show before the next is thought of.
        if self.is_open and self.config.every_n_steps is None:
            return False
        lead = math.ceil(2 * self._batches_per_set / self._accumulation)
        whole = self.config.microbatch is None
        if whole and self._schedule.opened == 0 and self._schedule.step_seconds is not None:
            # A gradient was timed once, perhaps at a bad moment: it takes no longer than a whole step.
            gradient = self._schedule.step_seconds / self._accumulation
            self._window_seconds = min(self._window_seconds, sum(self._expected_seconds(gradient)))
        spent, training = self.ledger.spent, self.ledger.training
        due = self._schedule.due(step, lead, spent, self._window_seconds, training)
        if self._schedule.unaffordable and not self._over_budget_said:
            self._over_budget_said = True
            log.warning(
                "sgd_probe: no window opens at the present pace: one takes about %s, more than "
                "max_overhead=%g allows for this run. Raise max_overhead, lower curvature_batches, top or "
                "flat, or set every_n_steps.",
                duration(self._window_seconds),
                self.config.max_overhead,
            )
        return due

    def _ways(self) -> list[str]:
        """How the curvature is taken, a sentence an item."""
        found = []
        if self._dtype is not None:
            kind = str(self.space.dtype).removeprefix("torch.")
            found.append(
                f"The weights are in {kind}: curvature is that of the loss in float32 at these weights; "
                f"steps and gradients are those of the {kind} weights, where small steps are rounded away."
            )
        if self.space.divided:
            found.append(
                "Each process holds a part of every weight: Hessian-vector products are finite differences "
                "of gradients, and where they are unreliable, as on ReLU networks in float32, no window "
                "opens; directions are not stored."
            )
        elif self._differences:
            found.append(
                "Hessian-vector products are finite differences of gradients (`second_derivatives`); where "
                "they are unreliable, as on ReLU networks in float32, no window opens."
            )
        if self._pieces_gap is not None:
            piece = self._frugality.used.config.microbatch
            found.append(
                f"Curvature batches are taken in pieces of at most {piece} samples; on one batch, loss and "
                f"gradient agree with those of the whole to {self._pieces_gap:.0e}."
            )
        return found

    def _pace(self) -> str:
        config, windows = self.config, self._foretold.windows
        count = "" if math.isinf(windows) else f"; {windows:.0f} over the run"
        if config.every_n_steps is not None:
            return f"A window opens every {config.every_n_steps} optimizer steps, whatever it costs{count}."
        seconds = self._training_seconds()
        if self._window_seconds > max(config.grace_seconds, config.max_overhead * seconds):
            enough = min(1.2 * self._window_seconds / seconds, 0.99)
            return (
                f"That may be more than {config.max_overhead:.0%} of a run of about {duration(seconds)}: "
                f"then no window opens. max_overhead={enough:.2g} would allow one; every_n_steps opens them "
                "whatever they cost."
            )
        count = "" if math.isinf(windows) else f": about {windows:.0f} over the run"
        return f"Windows open as {config.max_overhead:.0%} of the training's time allows{count}."

    def _training_seconds(self) -> float:
        """About what is left of it: a training step takes about a gradient for each microbatch."""
        assert self._cost is not None
        return self._cost.seconds * self._accumulation * (self._planned_steps - self._schedule.next_step)

    def _expected_seconds(self, gradient: float) -> tuple[float, float]:
        """Pauses of the first window, opening and closing, if a gradient takes so many seconds."""
        means = self._frugality.used
        each, closing = (
            count(means.config, means.keep_graphs) for count in (gradients_per_batch, closing_gradients)
        )
        opening = SELF_TEST_GRADIENTS + (each - closing) * means.batches
        passes = basis_passes(means.config) * self._pass_seconds
        return gradient * opening + passes, gradient * closing * means.batches

    def _foresee(self, step: int) -> None:
        """From what the preflight has measured."""
        assert self._cost is not None
        means, sizes = self._frugality.used, self._frugality.sizes
        pauses = self._expected_seconds(self._cost.seconds)
        self._window_seconds = sum(pauses)
        opening = step + math.ceil(2 * means.batches / self._accumulation)
        windows = windows_ahead(
            self.config, self._planned_steps - opening, self._training_seconds(), self._window_seconds
        )
        self._foretold = Foretold(opening, pauses[0], means.bytes(sizes), windows)

    def _freeze(self, batch: Any, index: int) -> CurvatureBatch:
        rank = 0 if self._processes is None else self._processes.rank  # whose dropout is their own
        return CurvatureBatch.freeze(batch, index, seed=self.config.seed + index + _SEEDS_APART * rank)

    def _read_optimizer(self) -> OptimizerState:
        return read_optimizer(self._optimizer, self.space.parameters)

    def _stored(self) -> str:
        """What is missing from the run folder where nobody holds a whole direction."""
        if not (self.space.divided and self.config.save_vectors):
            return ""
        return (
            "The directions are not stored: each process holds a part of them, and they are never gathered."
        )

    def _repeats(self) -> str:
        """A warning where both curvature sets cannot but hold the same batches."""
        sampling, needed = self.sampling, 2 * self._batches_per_set
        if sampling.scheme == "with_replacement" or sampling.batches is None or sampling.batches >= needed:
            return ""
        return (
            f"An epoch has {sampling.batches} batches where the two curvature sets need {needed}: they may "
            "share samples, and held-out values are then not independent of those on the finding batches."
        )

    @property
    def _vector_bytes(self) -> int:
        return self.space.size * (self._dtype or self.space.dtype).itemsize

    def _operator(
        self, batches: Sequence[CurvatureBatch], space: ParameterSpace, means: Means, alone: bool = False
    ) -> HessianOperator:
        if self.space.divided:
            return self._kind(self._module, self._loss, batches, space)
        options: dict[str, Any] = {} if self._differences else {"retain_graph": means.keep_graphs}
        return self._kind(
            self._module,
            self._loss,
            batches,
            space,
            dtype=self._dtype,
            microbatch=means.config.microbatch,
            ranks=None if alone else self._processes,
            home=torch.device("cpu") if means.on_cpu else None,
            **options,
        )

    @property
    def _kind(self) -> Callable[..., HessianOperator]:
        """How products are taken."""
        if self.space.divided:
            assert self._processes is not None
            return partial(ShardedDifferenceOperator, ranks=self._processes)
        return FiniteDifferenceOperator if self._differences else HessianOperator

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        at_rest(self._module)
        with isolated(self._module, self._optimizer.param_groups):
            yield

    def _scaled_space(self, optimizer: OptimizerState) -> ParameterSpace:
        """The coordinates in which the optimizer is plain SGD."""
        try:
            scales = read_scales(self._optimizer, self.space.parameters, optimizer)
            return self.space if scales is None else self.space.scaled(scales)
        except ValueError as error:
            raise CurvatureError(str(error)) from error

    def _check_pieces(self, batches: Sequence[CurvatureBatch], size: int) -> None:
        """On the first batch that is large enough to be cut.

        Raises:
            CurvatureError: the mean over its pieces is another loss.
        """
        largest = max(batches, key=lambda batch: batch.samples)
        self._pieces_gap = check_pieces(self._module, self._loss, largest, self.space, size, self._dtype)

    def _test_once(self, batches: Sequence[CurvatureBatch], operator: HessianOperator, means: Means) -> None:
        """Ask before the run's first search whether the operator is a Hessian (on one piece, if it cuts)."""
        if self._self_test:
            return
        pieces = cut(batches[0], means.config.microbatch)
        # Whether derivatives are right has nothing to do with how an optimizer scales the weights.
        whole = len(pieces) == 1 and self._processes is None and not means.on_cpu
        if whole and operator.space is self.space:
            self._self_test = self_test(operator, self._generator)
        else:
            kept = dataclasses.replace(means, keep_graphs=not self._differences, on_cpu=False)
            alone = not self.space.divided
            with self._operator(pieces[:1], self.space, kept, alone) as small:
                self._self_test = self_test(small, self._generator)
        level = logging.WARNING if self._self_test.startswith("unverified") else logging.INFO
        log.log(level, "sgd_probe: self-test of the Hessian %s", self._self_test)

    def _open_frugally(self, step: int) -> Window:
        """Open a window; where an allocation fails, try again with less."""
        pool = self._pool

        def pieces_hold(size: int) -> bool:
            return self._pieces_hold(pool, size)

        if self._frugality.refit(pieces_hold):
            self._say(f"memory is short at step {step}: {'; '.join(self._frugality.notes) or 'no longer'}")
        while True:
            try:
                with self.shared(), self._isolated():
                    return self._open(step, self._frugality.used)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                told = _first_line(error)
            # Only here, where the exception has let go of what it held.
            self._forget_failure()
            given_up = self._frugality.shrink(pieces_hold)
            if not given_up:
                raise OutOfMeansError(
                    "memory is too short for a window, whatever is given up "
                    f"({told}): free some, or choose layers with `params`"
                )
            self._say(
                f"memory was short while a window opened at step {step} ({told}); it is tried again, and "
                f"from now on {'; '.join(given_up)}"
            )

    def _say(self, message: str) -> None:
        if self._processes is None or self._processes.rank == 0:
            log.warning("sgd_probe: %s.", message)

    def _forget_failure(self) -> None:
        """Hand back what a failed attempt has left to the collector and to torch's allocator."""
        gc.collect()
        if self.space.device.type == "cuda":
            torch.cuda.empty_cache()

    def _open(self, step: int, means: Means) -> Window:
        # Alternating, so that both sets see the same stretch of the training data.
        sets = (self._pool[0::2], self._pool[1::2])
        finding, certifying = (batches[: means.batches] for batches in sets)
        config = means.config
        optimizer = self._read_optimizer()
        space = self._scaled_space(optimizer)
        if config.microbatch is not None and self._pieces_gap is None:
            self._check_pieces(self._pool, config.microbatch)
        with (
            self._operator(finding, space, means) as operator,
            self._operator(certifying, space, means) as held_out,
        ):
            with self.ledger.charge() as testing:
                self._test_once(finding, operator, means)
            trace = gradient_noise_trace(operator)
            basis = find_modes(
                operator,
                held_out,
                top=config.top,
                flat=config.flat,
                interior=config.interior,
                tolerance=config.tolerance,
                flat_curvature=lambda eigenvalues: self._flat_curvature(eigenvalues, step),
                flat_dimension=config.flat_dimension,
                generator=self._generator,
                max_vectors=means.vectors,
                start=self._warm_start,
                on_product=self.on_product,
            )
            resampled, start_gradient = self._resample(held_out, basis)
        self._warm_start = basis.vectors[: config.top].sum(0)
        decays = _decays(basis, space, optimizer)
        curvatures = [decisive_curvature(m, d) for m, d in zip(basis.modes, decays, strict=True)]
        plan = choose_window(
            config,
            [c for c, mode in zip(curvatures, basis.modes, strict=True) if mode.kind == "top"],
            [c for c, mode in zip(curvatures, basis.modes, strict=True) if mode.kind == "flat"],
            optimizer.effective_learning_rate,
            self._schedule.steps_left(step),
            self._turning_limit,
            optimizer.momentum,
        )
        variances = [math.nan] * len(basis.modes)
        if resampled is not None:
            variances = [interval.value for interval in resampled.variance]
        of_random = trace / self._accumulation / space.dimension
        length = _diffusion_length(basis, variances, of_random, optimizer, plan.steps)
        sliced = certifying[:MOST_BATCHES]
        wall = _wall(basis, variances[0] * self._accumulation / len(sliced))
        slices, unsliced = self._slices(basis, sliced, space, means, _REACH * max(length, wall))
        return Window(
            index=self._schedule.opened,
            opened_at_step=step,
            plan=plan,
            basis=basis,
            space=space,
            live=self._optimizer,
            optimizer=optimizer,
            certifying=certifying,
            samples_found=operator.samples,
            samples_certified=held_out.samples,
            noise_trace=trace / self._accumulation,
            decays=decays,
            resampled=resampled,
            start_gradient=start_gradient,
            radial=radial_shares(basis.vectors, space),
            statistics=WindowStatistics.empty(len(basis.modes), plan.steps),
            joint=JointStatistics.empty(sum(mode.kind == "top" for mode in basis.modes)),
            projector=Projector(
                basis.vectors,
                space.parameters,
                None if space.scaling is None else space.scaling.to(basis.vectors.device),
                optimizer.decay_is_preconditioned,
                basis.images,
                part=part,
                reduce=space.reduce,
                together=steps_in_waiting(config, means.vectors, self._vector_bytes),
            ),
            slices=slices,
            warnings=[
                note
                for note in (
                    *(f"Memory was short: {given_up}." for given_up in self._frugality.notes),
                    self._changed,
                    self._repeats(),
                    self._stored(),
                    _difference_note(operator, held_out),
                    unsliced,
                )
                if note
            ],
            test_seconds=testing.seconds,
        )

    def _slices(
        self,
        basis: ModeBasis,
        batches: Sequence[CurvatureBatch],
        space: ParameterSpace,
        means: Means,
        reach: float,
    ) -> tuple[tuple[LossSlice, ...], str]:
        """The loss along the stiffest and the flattest direction, and what to say where it failed."""
        if not self.config.slices or not 0 < reach < math.inf:
            return (), ""
        chosen = [0] if (flattest := _flattest(basis)) is None else [0, flattest]
        try:
            with self._operator(batches, space, dataclasses.replace(means, keep_graphs=False)) as operator:
                found = loss_slices(operator, basis.vectors[chosen], reach)
        except WrongHessianError:
            raise
        except CurvatureError as error:
            return (), f"The loss along its directions could not be measured: {error}."
        names = (basis.modes[index].name for index in chosen)
        return tuple(
            LossSlice(name, s.offsets, s.rises, s.errors, s.loss)
            for name, s in zip(names, found, strict=True)
        ), ""

    def _resample(
        self, operator: HessianOperator, basis: ModeBasis
    ) -> tuple[Resampled | None, tuple[float, ...]]:
        """Noise at fixed weights from the certifying batches, and how far the mean gradient is from zero.

        Every process has a minibatch gradient of its own, before they are averaged: so many more of them.
        """
        parts = operator.parts_of_batch
        count = len(operator.batches) * parts
        if count < MIN_BATCHES:
            return None, (math.nan,) * len(basis.modes)
        rows = torch.stack([(basis.vectors @ gradient).double() for gradient in operator.own_gradients()])
        if self._processes is not None and parts > 1:
            rows = self._processes.gathered(rows).flatten(0, 1)
        gradients = operator.space.reduce(rows).cpu().numpy()
        spread = gradients.std(0, ddof=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            score = gradients.mean(0) * math.sqrt(count) / spread
        # A step takes the mean over so many minibatches, which has the less noise.
        return resample(gradients / math.sqrt(self._accumulation * parts)), tuple(score.tolist())

    def _flat_curvature(self, eigenvalues: Tensor, step: int) -> float:
        """What flat directions aim at: half a relaxation time over the window that is to be expected."""
        config, optimizer = self.config, self._read_optimizer()
        aim = config.flat_curvature * float(eigenvalues.abs().max())
        rate = optimizer.effective_learning_rate
        if rate > 0 and not optimizer.withheld:
            left = self._schedule.steps_left(step)
            limit, momentum = self._turning_limit, optimizer.momentum
            steps = choose_window(config, eigenvalues.tolist(), [], rate, left, limit, momentum).steps
            aim = min(aim, 0.5 / (rate * steps))
        return max(aim, torch.finfo(torch.float64).tiny)

    def _revisit(self, window: Window, changed: bool) -> Revisited:
        nothing, reason = Revisited((), math.nan), ""
        top = 0 if math.isnan(window.basis.held_out_overlap) else window.top
        away = window.basis.vectors.device != window.space.device
        means = dataclasses.replace(self._frugality.used, on_cpu=away)
        # A basis that is held stays; products may take less.
        for frugal in (means, dataclasses.replace(means, keep_graphs=False)):
            try:
                with self.shared(), self._isolated():
                    if why := self._strayed(window, changed):
                        window.warnings.append(f"{why}: the curvature at the window's end was not measured.")
                        return nothing
                    with self._operator(window.certifying, window.space, frugal) as operator:
                        return revisit(operator, window.basis.vectors, top)
            except Exception as error:
                short = is_out_of_memory(error)
                if not short and not isinstance(error, CurvatureError):
                    raise
                reason = _first_line(error) if short else str(error)
            if not short or not means.keep_graphs:
                break
            self._forget_failure()
        window.warnings.append(f"The curvature at the window's end could not be measured: {reason}.")
        return nothing

    def _strayed(self, window: Window, changed: bool) -> str:
        """Why the weights are not where the window's steps have brought them; "" where they are."""
        why = "Other weights are trained than when it opened" if changed else window.moved_otherwise()
        if self._processes is not None and self._processes.total([float(bool(why))])[0]:
            return why or "The weights of another process are not where its steps have brought them"
        return why


def _first_line(error: BaseException) -> str:
    """Of an allocator's message, which may go on about its pools."""
    line = (str(error).strip().splitlines() or ["no message"])[0]
    found = line.rpartition("DefaultCPUAllocator: ")[2].partition(" Error code")[0]
    return f"{type(error).__name__}: {found[:160].rstrip('.')}"


#: A slice of the loss reaches to either side so many times as far as what it has to show: how far the
#: flattest direction diffuses, and where the wall of the stiffest stands out ...
_REACH = 3.0
#: ... from the error of the mean gradient (so many times that error over the curvature): at the end of the
#: slice they are as 4 to 1.
_WALL = 2.5


def _flattest(basis: ModeBasis) -> int | None:
    flat = [index for index, mode in enumerate(basis.modes) if mode.flat]
    curvature = [mode.certificate.effective_curvature for mode in basis.modes]
    return min(flat, key=curvature.__getitem__) if flat else None


def _wall(basis: ModeBasis, error_square: float) -> float:
    """Where the stiffest direction rises clear of its gradient's error (squared; NaN where unknown: 0)."""
    curvature = abs(basis.modes[0].certificate.eigenvalue)
    return _WALL * math.sqrt(error_square) / curvature if error_square > 0 and curvature > 0 else 0.0


def _diffusion_length(
    basis: ModeBasis, variances: Sequence[float], of_random: float, optimizer: OptimizerState, steps: int
) -> float:
    """How far the flattest direction is expected to diffuse in its window.

    Args:
        basis: without a flat direction, a random one counts.
        variances: of the noise of a step's gradient along each mode; NaN where unknown.
        of_random: that along a random direction.
        optimizer: as it stands.
        steps: of the window.
    """
    flattest = _flattest(basis)
    variance = math.nan if flattest is None else variances[flattest]
    if not variance > 0:
        variance = of_random
    return optimizer.effective_learning_rate * math.sqrt(max(variance, 0.0) * steps)


def _decays(basis: ModeBasis, space: ParameterSpace, optimizer: OptimizerState) -> tuple[float, ...]:
    """Weight decay along each mode: v.Wv."""
    factors = optimizer.decay_factors
    if not any(factors):
        return (0.0,) * len(basis.modes)
    scaling = space.scaling if optimizer.decay_is_preconditioned else None
    shares = []
    for where in space.slices:  # one at a time: the whole basis in float64 would be as much as two of it
        rows = basis.vectors[:, where].double()
        shares.append((rows if scaling is None else rows * scaling[where].to(rows)).square().sum(1))
    weights = torch.tensor(factors, dtype=torch.float64, device=basis.vectors.device)
    return tuple(space.reduce(weights @ torch.stack(shares)).tolist())


def _same(one: ParameterSpace, other: ParameterSpace) -> bool:
    """Both are of the same parameters under the same names."""
    return one.names == other.names and all(
        a is b for a, b in zip(one.parameters, other.parameters, strict=True)
    )


def _at_least_float32(space: ParameterSpace) -> torch.dtype | None:
    """Precision of the curvature where it is not that of the weights.

    Weights in half precision: their curvature is that of the loss in float32, at those very weights.
    """
    return torch.float32 if torch.finfo(space.dtype).bits < 32 else None


def _difference_note(*operators: HessianOperator) -> str:
    """What to say of products that were no double backward."""
    apart = [o.disagreement for o in operators if isinstance(o, FiniteDifferenceOperator)]
    if not apart:
        return ""
    why = "the weights are divided" if operators[0].space.divided else "`second_derivatives`"
    return (
        f"The curvature comes from finite differences of gradients ({why}), at two steps that agreed to "
        f"{max(apart):.0e} or better."
    )


def _over(processes: Processes | None, space: ParameterSpace, config: ProbeConfig) -> ParameterSpace:
    """A space whose weights are divided, with its products summed over the processes.

    Raises:
        ValueError: it cannot be probed like that.
    """
    if processes is None:
        raise ValueError("expected to be told of the processes that hold the other parts of the weights")
    meshes = [cast(Any, parameter).device_mesh.size() for parameter in space.parameters]
    if set(meshes) != {processes.size}:
        raise ValueError(
            f"expected weights divided among all {processes.size} processes, found them divided among "
            f"{', '.join(map(str, sorted(set(meshes))))}"
        )
    if config.microbatch is not None:
        raise ValueError(
            f"expected no `microbatch` where weights are divided among processes, found {config.microbatch}: "
            "a batch is evaluated as in the training, in its memory"
        )
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in space.parameters):
        raise ValueError(
            "expected no hooks on gradients (register_post_accumulate_grad_hook), found some: where weights "
            "are divided, an evaluation of the probe would call them"
        )
    return dataclasses.replace(space, reduce=processes.sums)
