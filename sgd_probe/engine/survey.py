"""Finds the directions of a window in the memory that there is; where an allocation fails, with less."""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.certify import Revisited, revisit
from sgd_probe.curvature.hessian import (
    CurvatureError,
    GradientCost,
    HessianOperator,
    gradient_noise_trace,
    measure_gradient,
)
from sgd_probe.curvature.krylov import measure_pass
from sgd_probe.curvature.memory import is_out_of_memory
from sgd_probe.curvature.microbatches import check_pieces, cut
from sgd_probe.curvature.modes import find_modes
from sgd_probe.curvature.selftest import self_test
from sgd_probe.curvature.slices import MOST_BATCHES
from sgd_probe.curvature.space import part
from sgd_probe.dynamics.force import JointStatistics
from sgd_probe.dynamics.projection import Projector
from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.engine.frugality import Frugality
from sgd_probe.engine.memory import Means
from sgd_probe.engine.opening import Opening, decays_along, difference_note, resample_start
from sgd_probe.engine.planning import steps_in_waiting
from sgd_probe.engine.slicing import slice_loss, slice_reach
from sgd_probe.engine.trained import Trained
from sgd_probe.engine.window import Window, radial_shares

log = logging.getLogger("sgd_probe")


class OutOfMeansError(CurvatureError):
    """Memory is too short for a window, whatever is given up."""


class Survey:
    """The curvature of one set of trained weights; begin another one where others are trained.

    Args:
        trained: the training, with the weights.
        generator: of all random directions.

    Attributes:
        frugality: what there is memory for, once sized up.
        cost: of a gradient, once sized up.
        pass_seconds: of reading a vector of weights, once sized up.
        pieces_gap: how well a batch's pieces agreed with the whole; None where none was cut.
        self_test: what the operator's self-test said; "" before it.
        warm_start: where the next search for stiff directions begins.
    """

    cost: GradientCost
    pass_seconds: float

    def __init__(self, trained: Trained, generator: torch.Generator) -> None:
        self.trained = trained
        self._generator = generator
        self.frugality = Frugality(
            trained.config,
            trained.space.device,
            trained.vector_bytes,
            trained.processes,
            in_place=trained.space.divided,
        )
        self.pieces_gap: float | None = None
        self.self_test = ""
        self.warm_start: Tensor | None = None

    def size_up(self, batch: CurvatureBatch, planned_steps: float) -> None:
        """From what a gradient takes, how windows are taken.

        Args:
            batch: of the training.
            planned_steps: of the run.

        Raises:
            CurvatureError: the loss cannot be probed, or not in this memory.
        """
        self._try(batch)
        self.frugality.plan(
            self.cost,
            batch.content,
            batch.samples,
            planned_steps,
            lambda size: self._pieces_hold([batch], size),
        )

    def open(
        self,
        pool: Sequence[CurvatureBatch],
        opening: Opening,
        on_product: Callable[[int], None] | None = None,
    ) -> Window:
        """Find the modes at the present weights; where an allocation fails, try again with less.

        Args:
            pool: batches of the training, for both curvature sets.
            opening: what the run knows of the window.
            on_product: called with the number of Hessian-vector products so far.

        Raises:
            CurvatureError: the curvature could not be had.
            OutOfMeansError: nothing is left that takes less memory.
        """
        step = opening.step

        def pieces_hold(size: int) -> bool:
            return self._pieces_hold(pool, size)

        if self.frugality.refit(pieces_hold):
            self._say(f"memory is short at step {step}: {'; '.join(self.frugality.notes) or 'no longer'}")
        while True:
            try:
                with self.trained.shared(), self.trained.undisturbed():
                    return self._open(pool, opening, self.frugality.used, on_product)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                told = _first_line(error)
            # Only here, where the exception has let go of what it held.
            self._forget_failure()
            given_up = self.frugality.shrink(pieces_hold)
            if not given_up:
                raise OutOfMeansError(
                    "memory is too short for a window, whatever is given up "
                    f"({told}): free some, or choose layers with `params`"
                )
            self._say(
                f"memory was short while a window opened at step {step} ({told}); it is tried again, and "
                f"from now on {'; '.join(given_up)}"
            )

    def revisit(self, window: Window, changed: bool) -> Revisited:
        """The curvature along a window's directions at its end; nothing, with a warning, where it fails.

        Args:
            window: that closes; its warnings are added to.
            changed: other weights are trained than when it opened.
        """
        nothing, reason = Revisited((), math.nan), ""
        top = 0 if math.isnan(window.basis.held_out_overlap) else window.top
        away = window.basis.vectors.device != window.space.device
        means = dataclasses.replace(self.frugality.used, on_cpu=away)
        # A basis that is held stays; products may take less.
        for frugal in (means, dataclasses.replace(means, keep_graphs=False)):
            try:
                with self.trained.shared(), self.trained.undisturbed():
                    if why := self._strayed(window, changed):
                        window.warnings.append(f"{why}: the curvature at the window's end was not measured.")
                        return nothing
                    with self.trained.operator(window.certifying, window.space, frugal) as operator:
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
        processes = self.trained.processes
        if processes is not None and processes.total([float(bool(why))])[0]:
            return why or "The weights of another process are not where its steps have brought them"
        return why

    def _open(
        self,
        pool: Sequence[CurvatureBatch],
        opening: Opening,
        means: Means,
        on_product: Callable[[int], None] | None,
    ) -> Window:
        # Alternating, so that both sets see the same stretch of the training data.
        finding, certifying = (list(batches[: means.batches]) for batches in (pool[0::2], pool[1::2]))
        trained, config, accumulation = self.trained, means.config, opening.accumulation
        optimizer = trained.read_optimizer()
        space = trained.scaled_space(optimizer)
        if config.microbatch is not None and self.pieces_gap is None:
            self._check_pieces(pool, config.microbatch)
        with (
            trained.operator(finding, space, means) as operator,
            trained.operator(certifying, space, means) as held_out,
        ):
            started = time.perf_counter()
            self._test_once(finding, operator, means)
            test_seconds = time.perf_counter() - started
            trace = gradient_noise_trace(operator)
            basis = find_modes(
                operator,
                held_out,
                top=config.top,
                flat=config.flat,
                interior=config.interior,
                tolerance=config.tolerance,
                flat_curvature=lambda eigenvalues: opening.flat_curvature(
                    trained.config, eigenvalues, optimizer
                ),
                flat_dimension=config.flat_dimension,
                generator=self._generator,
                max_vectors=means.vectors,
                start=self.warm_start,
                on_product=on_product,
            )
            resampled, start_gradient = resample_start(held_out, basis, accumulation, trained.processes)
        self.warm_start = basis.vectors[: config.top].sum(0)
        decays = decays_along(basis, space, optimizer)
        plan = opening.plan_for(config, basis, decays, optimizer)
        variances = [math.nan] * len(basis.modes)
        if resampled is not None:
            variances = [interval.value for interval in resampled.variance]
        sliced = certifying[:MOST_BATCHES]
        reach = slice_reach(
            basis,
            variances,
            of_random=trace / accumulation / space.dimension,
            error_square=variances[0] * accumulation / len(sliced),
            optimizer=optimizer,
            steps=plan.steps,
        )
        slices, unsliced = slice_loss(trained, basis, sliced, space, means, reach)
        return Window(
            index=opening.index,
            opened_at_step=opening.step,
            plan=plan,
            basis=basis,
            space=space,
            live=trained.optimizer,
            optimizer=optimizer,
            certifying=certifying,
            samples_found=operator.samples,
            samples_certified=held_out.samples,
            noise_trace=trace / accumulation,
            decays=decays,
            resampled=resampled,
            start_gradient=start_gradient,
            radial=radial_shares(basis.vectors, space),
            statistics=WindowStatistics.empty(len(basis.modes), plan.steps),
            joint=JointStatistics.empty(sum(mode.kind == "top" for mode in basis.modes)),
            projector=Projector(
                basis.rows,
                space.parameters,
                None if space.scaling is None else space.scaling.to(basis.rows.device),
                optimizer.decay_is_preconditioned,
                len(basis.modes),
                part=part,
                reduce=space.reduce,
                together=steps_in_waiting(config, means.vectors, trained.vector_bytes),
            ),
            slices=slices,
            warnings=[
                note
                for note in (
                    *(f"Memory was short: {given_up}." for given_up in self.frugality.notes),
                    *opening.notes,
                    difference_note(operator, held_out),
                    unsliced,
                )
                if note
            ],
            test_seconds=test_seconds,
        )

    def _try(self, batch: CurvatureBatch) -> None:
        """Take a gradient and its graph, of a part of the batch where memory is too short for the whole."""
        trained, told = self.trained, ""
        size, space, processes = trained.config.microbatch, trained.space, trained.processes
        while True:
            try:
                with trained.shared(), trained.undisturbed():
                    if size is not None:
                        self._check_pieces([batch], size)
                    self.cost = measure_gradient(
                        trained.module, trained.loss, batch, space, size, trained.kind, trained.dtype
                    )
                    like = torch.empty(0, dtype=trained.dtype or space.dtype, device=space.device)
                    self.pass_seconds = measure_pass(like, space.size)
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                told = _first_line(error)
            samples = batch.samples if processes is None else processes.least(batch.samples)
            size = 0 if trained.by_differences else min(size or round(samples), round(samples)) // 4
            if not size:
                what = "a gradient" if trained.by_differences else "the graph of a single sample"
                raise OutOfMeansError(f"memory is too short for {what} ({told})")
            self._forget_failure()

    def _pieces_hold(self, batches: Sequence[CurvatureBatch], size: int) -> bool:
        """Whether batches may be cut to save memory."""
        try:
            with self.trained.shared(), self.trained.undisturbed():
                self._check_pieces(batches, size)
        except Exception as error:
            if not (isinstance(error, CurvatureError) or is_out_of_memory(error)):
                raise
            return False
        return True

    def _check_pieces(self, batches: Sequence[CurvatureBatch], size: int) -> None:
        """On the first batch that is large enough to be cut.

        Raises:
            CurvatureError: the mean over its pieces is another loss.
        """
        trained, largest = self.trained, max(batches, key=lambda batch: batch.samples)
        self.pieces_gap = check_pieces(
            trained.module, trained.loss, largest, trained.space, size, trained.dtype
        )

    def _test_once(self, batches: Sequence[CurvatureBatch], operator: HessianOperator, means: Means) -> None:
        """Ask before the run's first search whether the operator is a Hessian (on one piece, if it cuts)."""
        if self.self_test:
            return
        trained = self.trained
        pieces = cut(batches[0], means.config.microbatch)
        # Whether derivatives are right has nothing to do with how an optimizer scales the weights.
        whole = len(pieces) == 1 and trained.processes is None and not means.on_cpu
        if whole and operator.space is trained.space:
            self.self_test = self_test(operator, self._generator)
        else:
            kept = dataclasses.replace(means, keep_graphs=not trained.by_differences, on_cpu=False)
            alone = not trained.space.divided
            with trained.operator(pieces[:1], trained.space, kept, alone) as small:
                self.self_test = self_test(small, self._generator)
        level = logging.WARNING if self.self_test.startswith("unverified") else logging.INFO
        log.log(level, "sgd_probe: self-test of the Hessian %s", self.self_test)

    def _say(self, message: str) -> None:
        if self.trained.processes is None or self.trained.processes.rank == 0:
            log.warning("sgd_probe: %s.", message)

    def _forget_failure(self) -> None:
        """Hand back what a failed attempt has left to the collector and to torch's allocator."""
        gc.collect()
        if self.trained.space.device.type == "cuda":
            torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    """Of an allocator's message, which may go on about its pools."""
    line = (str(error).strip().splitlines() or ["no message"])[0]
    found = line.rpartition("DefaultCPUAllocator: ")[2].partition(" Error code")[0]
    return f"{type(error).__name__}: {found[:160].rstrip('.')}"
