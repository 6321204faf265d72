"""Keeps the windows of a run within its memory: what is planned, what is given up where that was wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from sgd_probe.curvature.batches import leaves_of
from sgd_probe.curvature.hessian import CurvatureError, GradientCost
from sgd_probe.curvature.lanczos import most_products, smallest_basis
from sgd_probe.engine.config import ProbeConfig
from sgd_probe.engine.distributed import Processes
from sgd_probe.engine.memory import Means, Room, Sizes, describe, fitted, free_memory, leaner
from sgd_probe.engine.planning import DIFFERENCE_VECTORS, choose_curvature_batches

#: Shares of the free memory: the rest is for what nobody has counted, and for the training itself.
_GRAPHS, _VECTORS = 0.5, 0.5
#: Where nobody knows what is free.
_GRAPH_BYTES, _VECTOR_BYTES = 2**30, 2**32


class Frugality:
    """Decides how windows are taken; all processes of a training come to the same.

    Args:
        config: what is asked for.
        device: where the weights are.
        vector_bytes: of one vector of weights.
        processes: of a distributed training.
        in_place: products are differences of gradients with the weights moved in place: no graph is kept,
            no batch cut, and directions stay where the weights are.

    Attributes:
        asked: what the user's knobs ask for.
        used: what there is memory for.
        sizes: as measured in the preflight.
    """

    asked: Means
    used: Means
    sizes: Sizes

    def __init__(
        self,
        config: ProbeConfig,
        device: torch.device,
        vector_bytes: int,
        processes: Processes | None,
        in_place: bool = False,
    ) -> None:
        self._config = config
        self._device = device
        self._vector_bytes = vector_bytes
        self._processes = processes
        self._in_place = in_place
        self._cuttable = config.second_derivatives == "double_backward" and not in_place
        self._refused: Means | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What had to be given up, in words."""
        return describe(self.asked, self.used, self.sizes)

    def plan(
        self,
        cost: GradientCost,
        content: Any,
        samples: int,
        planned_steps: float,
        pieces_hold: Callable[[int], bool],
    ) -> None:
        """Choose the means of the first window.

        Args:
            cost: of a gradient, as measured.
            content: of the batch that it was measured on.
            samples: of that batch.
            planned_steps: of the run.
            pieces_hold: whether batches may be cut into pieces of so many samples.

        Raises:
            CurvatureError: not even the least that can be done has room.
        """
        piece = math.ceil(samples / cost.graphs)
        batch = sum(leaf.nbytes for leaf in leaves_of(content))
        found = [float(n) for n in (cost.graph_bytes, piece, samples, batch)]
        graph, piece, samples, batch = map(round, self._largest(found))
        self.sizes = Sizes(
            vector=self._vector_bytes,
            graph=graph,
            graph_samples=piece,
            samples=samples,
            batch=batch,
            beside=DIFFERENCE_VECTORS if self._in_place else 0,
        )
        config, room = self._config, self._room()
        differences = self._in_place or config.second_derivatives == "finite_differences"
        longest = most_products(config.top)
        if room.basis is not None:
            longest = max(min(longest, room.basis), smallest_basis(config.top) + config.interior)
        for kept in (False,) if differences else (True, False):
            self.asked = Means(
                config=config,
                batches=choose_curvature_batches(config, samples, planned_steps, kept),
                vectors=longest,
                keep_graphs=kept,
            )
            if kept and self.asked.graph_bytes(self.sizes) <= room.graphs:
                break
        if not differences and config.max_graph_bytes == "auto":
            self.asked = dataclasses.replace(self.asked, keep_graphs=True)
        if cost.graphs > 1 and config.microbatch is None:  # a whole batch has been too much already
            smaller = dataclasses.replace(config, microbatch=piece)
            self._refused = dataclasses.replace(self.asked, config=smaller, keep_graphs=False)
        self.refit(pieces_hold)

    def refit(self, pieces_hold: Callable[[int], bool]) -> bool:
        """Look at the memory again: the training may have taken or freed some since.

        Args:
            pieces_hold: whether batches may be cut into pieces of so many samples.

        Returns:
            Something else than before is given up.

        Raises:
            CurvatureError: not even the least that can be done has room.
        """
        before = getattr(self, "used", None)
        wanted = self.asked if self._refused is None else self._refused
        while True:
            room = self._room()
            found = fitted(wanted, self.sizes, room)
            if found is None:
                raise CurvatureError(self._nothing_fits(room))
            if self._holds(found, wanted, pieces_hold):
                self.used = found
                return before is not None and dataclasses.replace(found, vectors=before.vectors) != before

    def shrink(self, pieces_hold: Callable[[int], bool]) -> tuple[str, ...]:
        """An allocation has failed: give up the next thing in order, for the rest of the run.

        Args:
            pieces_hold: whether batches may be cut into pieces of so many samples.

        Returns:
            What, in words; empty where there is nothing left.
        """
        while True:
            before = self.used
            found = leaner(
                self.used,
                self.sizes,
                cuttable=self._cuttable,
                on_accelerator=self._elsewhere,
            )
            if found is None:
                return ()
            if self._holds(found, before, pieces_hold):
                self.used = self._refused = found
                return describe(before, found, self.sizes)

    def _holds(self, found: Means, before: Means, pieces_hold: Callable[[int], bool]) -> bool:
        """Whether batches may be cut as these means want it; if not, they are never cut again."""
        piece = found.config.microbatch
        if piece is None or piece == before.config.microbatch or pieces_hold(piece):
            return True
        self._cuttable = False
        return False

    def _room(self) -> Room:
        config, free = self._config, free_memory(self._device)
        known = -1.0 if free is None else float(free)
        elsewhere = float(free_memory(torch.device("cpu")) or 0) if self._elsewhere else 0.0
        if self._processes is not None:
            known, elsewhere = self._processes.least(known), self._processes.least(elsewhere)
        graphs = _GRAPH_BYTES if known < 0 else _GRAPHS * known
        vectors = _VECTOR_BYTES if known < 0 else _VECTORS * known
        bound = config.max_basis_bytes
        return Room(
            graphs=graphs if config.max_graph_bytes == "auto" else config.max_graph_bytes,
            basis=None if bound == "auto" else bound // self._vector_bytes,
            vectors=vectors / self._vector_bytes,
            cpu_vectors=_VECTORS * elsewhere / self._vector_bytes,
            cuttable=self._cuttable,
        )

    @property
    def _elsewhere(self) -> bool:
        """Directions may be held on the CPU in place of where the weights are."""
        return self._device.type != "cpu" and not self._in_place

    def _nothing_fits(self, room: Room) -> str:
        needed = smallest_basis(1)
        found = room.vectors if room.basis is None else room.basis
        return (
            f"expected memory for {needed} vectors of {self._vector_bytes / 2**20:,.0f} MB, the least for "
            f"one stiff direction, found room for {int(found)}: free some, raise `max_basis_bytes` or choose "
            "layers with `params`"
        )

    def _largest(self, numbers: list[float]) -> list[float]:
        return numbers if self._processes is None else self._processes.largest(numbers)
