"""The probe without a trainer or a logger: it calls the rooms in order.

A loop hands over batches (:meth:`ProbeEngine.offer`), tells of every optimizer step
(:meth:`ProbeEngine.observe`) and asks at step boundaries whether a window is to open or to close.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.hessian import CurvatureError, LossFunction, WrongHessianError
from sgd_probe.curvature.modes import ModeBasis
from sgd_probe.curvature.space import ParameterFilter, ParameterSpace
from sgd_probe.engine.config import ProbeConfig
from sgd_probe.engine.distributed import Processes
from sgd_probe.engine.foresight import (
    announcement,
    expected_pauses,
    foretell,
    repetition_note,
    storage_note,
)
from sgd_probe.engine.ledger import Ledger, duration
from sgd_probe.engine.measured import Measured
from sgd_probe.engine.memory import resident_bytes
from sgd_probe.engine.opening import Opening
from sgd_probe.engine.packing import pack, unpack
from sgd_probe.engine.planning import Foretold, Schedule, finding_products, turning_limit
from sgd_probe.engine.sampling import Sampling
from sgd_probe.engine.summary import summarise
from sgd_probe.engine.survey import OutOfMeansError, Survey
from sgd_probe.engine.trained import Trained
from sgd_probe.engine.verification import Verification
from sgd_probe.engine.window import Window
from sgd_probe.result import CostResult, WindowResult

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
        self.config = config
        self.sampling = sampling
        trained = Trained.of(module, loss, optimizer, config, params, processes)
        self.ledger = Ledger(trained.space.device)
        self._processes = processes
        self._schedule = Schedule(config, first_step, planned_steps)
        self._planned_steps = planned_steps
        self._accumulation = accumulation
        self._first_step = first_step
        self._agreed = _Agreed()
        # Processes that hold parts of a vector draw different parts of it.
        own = processes.rank if processes is not None and trained.space.divided else 0
        self._generator = torch.Generator().manual_seed(config.seed + _SEEDS_APART * own)
        self._survey = Survey(trained, self._generator)
        self._offered = False
        self._verification = Verification(module, optimizer) if config.verify else None
        self._batches_per_set = 0
        self._window_seconds = 0.0
        self._foretold = Foretold()
        self._pool: list[CurvatureBatch] = []
        self._collecting = False
        self._batch_index = 0
        self._window: Window | None = None
        self._failures = 0
        self._over_budget_said = False
        self._changed = ""
        self._turning_limit = math.inf
        #: Why the last window that was to open did not.
        self.failure = ""
        #: Called with the number of Hessian-vector products so far while a window opens.
        self.on_product: Callable[[int], None] | None = None

    @property
    def space(self) -> ParameterSpace:
        """The probed parameters, as they are trained now."""
        return self._survey.trained.space

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
            "self_test": self._survey.self_test,
            "turning_limit": self._turning_limit,
            # Of a divided vector the first process, which writes for all, holds a part only.
            "warm_start": None if self.space.divided else self._survey.warm_start,
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
            optimizer = self._survey.trained.optimizer
            self._window = None if window is None else Window.resumed(window, self.space, optimizer)
            self._pool = [unpack(batch) for batch in state["pool"]]
        except (KeyError, TypeError) as error:
            self._window, self._pool = None, []
            raise ValueError(f"expected a probe's state of this version, found another ({error})") from error
        self._collecting = bool(state["collecting"])
        self._schedule.opened, self._schedule.next_step = int(state["opened"]), int(state["next_step"])
        self._failures, self._survey.self_test = int(state["failures"]), str(state["self_test"])
        if not self.space.divided:  # it is the first process's
            self._generator.set_state(state["generator"].cpu())
        self._turning_limit = float(state["turning_limit"])
        warm = state["warm_start"]
        warm = None if warm is None else warm.to(self.space.device, self.space.dtype)
        self._survey.warm_start = warm

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
            self._survey.size_up(frozen, self._planned_steps)
        self._batches_per_set = self._survey.frugality.used.batches
        self._window_seconds = sum(expected_pauses(self._survey, self._survey.cost.seconds))
        self._foretold = foretell(self._survey, self._schedule, self._accumulation, step)
        return announcement(
            self._survey, self._schedule, self.sampling, self._accumulation, self._foretold, frozen.samples
        )

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
        return self._survey.trained.shared()

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
        device = torch.device("cpu") if self._survey.frugality.used.on_cpu else self.space.device
        try:
            before = resident_bytes(device)
            with self.ledger.charge() as charge, self._verified(f"opening a window at step {step}"):
                self._follow(step)
                window = self._survey.open(self._pool, self._opening(step), self.on_product)
        except (WrongHessianError, OutOfMeansError):
            raise  # waiting does not mend it
        except CurvatureError as error:
            self._failures += 1
            self.failure = str(error)
            self._schedule.postpone(step, RETRY_STEPS)
            if self._failures >= MAX_FAILURES:
                raise CurvatureError(f"{error} ({self._failures} windows in a row)") from error
            log.log(
                logging.WARNING if self._failures == 1 else logging.INFO,
                "sgd_probe: no window at step %d: %s. It is tried again every %d steps, %d times in a row at "
                "most.",
                step,
                error,
                RETRY_STEPS,
                MAX_FAILURES,
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
        changed = not self._survey.trained.now().trains(window.space)
        if changed:
            window.withhold("which weights are trained changed during the window (frozen, thawed or added)")
        with self.ledger.charge() as charge, self._verified(f"closing a window at step {step}"):
            with self.shared():
                window.settle()
            later = self._survey.revisit(window, changed)
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
            self_test=self._survey.self_test,
            cost=cost,
            warnings=tuple(window.warnings),
            min_noise_share=self.config.min_noise_share,
            plan=window.plan.reason,
        )
        self._turning_limit = turning_limit(
            window.basis.held_out_overlap, later.overlap, window.statistics.steps
        )
        return summarise(measured), window.basis.vectors

    def _follow(self, step: int) -> None:
        """Turn to the weights that are trained now: people freeze layers, thaw them, prune and add some."""
        trained = self._survey.trained.now()
        if trained.trains(self.space):
            return
        self._changed = (
            f"{trained.space.dimension:,} weights are trained and probed from step {step} on, before that "
            f"{self.space.dimension:,} were: some were frozen, thawed or added."
        )
        log.info("sgd_probe: %s", self._changed)
        survey = Survey(trained, self._generator)
        survey.size_up(self._pool[0], self._planned_steps)
        self._survey, self._turning_limit = survey, math.inf

    def _opening(self, step: int) -> Opening:
        """What is known of a window that opens now."""
        return Opening(
            index=self._schedule.opened,
            step=step,
            steps_left=self._schedule.steps_left(step),
            longest=self._turning_limit,
            accumulation=self._accumulation,
            notes=(
                self._changed,
                repetition_note(self.sampling, self._batches_per_set),
                storage_note(self.space, self.config),
            ),
        )

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
            self._window_seconds = min(self._window_seconds, sum(expected_pauses(self._survey, gradient)))
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

    def _freeze(self, batch: Any, index: int) -> CurvatureBatch:
        rank = 0 if self._processes is None else self._processes.rank  # whose dropout is their own
        return CurvatureBatch.freeze(batch, index, seed=self.config.seed + index + _SEEDS_APART * rank)
