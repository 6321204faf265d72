"""When to open a window, for how long, and with how many batches."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from sgd_probe.curvature.interior import INTERIOR_PRODUCTS
from sgd_probe.curvature.krylov import BLOCK_ROWS
from sgd_probe.dynamics.evidence import MIN_MEMORIES
from sgd_probe.dynamics.projection import steps_together
from sgd_probe.dynamics.verdict import CONFINED_RELAXATION_TIMES
from sgd_probe.engine.config import MIN_WINDOW, ProbeConfig

#: Hessian-vector products that the search for the top modes takes.
LANCZOS_PRODUCTS = 35
#: What a product costs in gradients: on a graph that is kept, on one that is built for it, by finite
#: differences at two steps (more where those do not agree).
KEPT_PRODUCT, REBUILT_PRODUCT, DIFFERENCE_PRODUCT = 2.0, 3.2, 4.0
#: Vectors beside the solver's that differences in place are taken with: the weights' own bits, the shift, two
#: gradients, and the product at two steps.
DIFFERENCE_VECTORS = 6
#: The self-test before a run's first window, on one batch in float64, in gradients of that batch.
SELF_TEST_GRADIENTS = 40
#: Two slices of the loss, in gradients of a batch: 13 losses, each with a graph that is dropped at once.
SLICE_GRADIENTS = 5.0
#: Windows that a run should have, where its budget allows.
WINDOWS_WANTED = 10
#: Bounds on the samples of a curvature set.
MIN_SAMPLES, MAX_SAMPLES = 128, 2_048
#: A curvature set of many tiny batches costs more in calls than in arithmetic.
MAX_BATCHES = 32
#: Longest window that "auto" chooses, in optimizer steps.
MAX_WINDOW = 2_000
#: The pace of the training is measured over so many steps at least, after the slow first ones, and over so
#: many at most.
WARM_UP_STEPS, PACE_STEPS, PACE_STEPS_KEPT = 5, 20, 100
#: Shortest window to which "auto" is cut because modes turn: flat directions can still be told.
SHORTEST_WINDOW = 100
#: Margin over the relaxation times that the rule needs: the curvature is itself an estimate.
MARGIN = 1.25


@dataclass(frozen=True)
class WindowPlan:
    """Length of a window in optimizer steps, and why."""

    steps: int
    reason: str


@dataclass(frozen=True)
class Foretold:
    """What the preflight says of a run; the pause is that of the next opening.

    Attributes:
        step: optimizer steps done when the first window opens; NaN for later ones.
        pause: seconds for which an opening holds the training up.
        bytes: memory that a window takes at its peak.
        windows: in the whole run.
    """

    step: float = math.nan
    pause: float = math.nan
    bytes: float = math.nan
    windows: float = math.nan


def finding_products(config: ProbeConfig) -> int:
    """About how many Hessian-vector products it takes to find the directions of a window."""
    interior = INTERIOR_PRODUCTS if config.interior else 0
    return LANCZOS_PRODUCTS + interior + config.flat * config.flat_dimension


def product_gradients(config: ProbeConfig, kept: bool) -> float:
    """Cost of a Hessian-vector product on one batch, in gradients of it.

    Args:
        config: how products are taken.
        kept: the batch's graph is kept between products.
    """
    if config.second_derivatives == "finite_differences":
        return DIFFERENCE_PRODUCT
    return KEPT_PRODUCT if kept else REBUILT_PRODUCT


def gradients_per_batch(config: ProbeConfig, kept: bool = True) -> float:
    """Cost of a window per batch of a curvature set, in gradients of one batch.

    Products for the top modes, the interior and the flat ones on the finding set, and one per mode on the
    certifying set, when it opens and again when it closes; slices of the loss on the latter.
    """
    certifying = 2 * (config.top + config.interior + config.flat)
    products = product_gradients(config, kept) * (finding_products(config) + certifying)
    return products + (SLICE_GRADIENTS if config.slices else 0.0)


def closing_gradients(config: ProbeConfig, kept: bool = True) -> float:
    """The part of :func:`gradients_per_batch` that a window costs when it closes: a product a direction."""
    return product_gradients(config, kept) * (config.top + config.interior + config.flat)


def basis_passes(config: ProbeConfig) -> float:
    """Vectors that are read while directions are found: each product is made orthogonal to the basis.

    The search goes over its own basis once a product, the near-flat directions twice over all that it has
    left behind and over what they have of their own.
    """
    flat_products = config.flat * config.flat_dimension
    return LANCZOS_PRODUCTS**2 / 2 + 2 * flat_products * (LANCZOS_PRODUCTS + config.flat_dimension / 2)


def most_vectors(config: ProbeConfig, basis_vectors: int) -> int:
    """Vectors of weights that are held at once while a window opens, at most.

    Either the search holds most, with its basis and room for what is found after it, or the certification:
    the directions, the images of the top ones under two halves of the batches where the basis had room for
    them, and those of the others under both halves; the flat ones twice, and what two graphs at a time hold.

    Args:
        config: how many directions.
        basis_vectors: that the eigensolver may hold.
    """
    rows = config.top + config.interior + config.flat
    overlap = 2 * config.top if 2 * config.top + rows <= basis_vectors else 0
    mixed = 2 * (rows - config.top)
    searching = basis_vectors + config.interior + config.flat + BLOCK_ROWS - 1 + 3
    certifying = rows + overlap + mixed + config.flat + 8
    return max(searching, certifying)


def steps_in_waiting(config: ProbeConfig, basis_vectors: int, vector_bytes: int) -> int:
    """Steps that an open window projects together: it takes no more memory than its opening has.

    It holds directions, images, the weights at its start and their scaling, and two vectors for every step.

    Args:
        config: how many directions.
        basis_vectors: that the eigensolver may hold.
        vector_bytes: of a vector of weights.
    """
    rows = config.top + config.interior + config.flat
    room = most_vectors(config, basis_vectors) - rows - 2 * (rows - config.top) - 2
    return steps_together(vector_bytes, max(room // 2, 1))


def choose_curvature_batches(
    config: ProbeConfig, batch_samples: int, planned_steps: float, kept: bool = True
) -> int:
    """Batches of each curvature set: as many samples as leave about ten windows in the budget.

    Args:
        config: ``curvature_batches`` where it is a number, else the budget decides.
        batch_samples: samples of one training batch.
        planned_steps: optimizer steps of the run, or infinity.
        kept: their graphs are kept between products.
    """
    if config.curvature_batches != "auto":
        return config.curvature_batches
    affordable = config.max_overhead * planned_steps / (WINDOWS_WANTED * gradients_per_batch(config, kept))
    lowest = max(math.ceil(MIN_SAMPLES / batch_samples), 2)
    highest = max(math.ceil(MAX_SAMPLES / batch_samples), lowest)
    return int(min(max(affordable, lowest), highest, MAX_BATCHES))


def choose_window(
    config: ProbeConfig,
    top_curvatures: Sequence[float],
    flat_curvatures: Sequence[float],
    effective_learning_rate: float,
    steps_left: float,
    longest: float = math.inf,
    momentum: float = 0.0,
) -> WindowPlan:
    """Length of the window that opens now; fixed from predictions alone, never from its data.

    As many stiff modes as possible reach :data:`CONFINED_RELAXATION_TIMES`, with a margin, while
    half of the flat directions stay below one relaxation time; the stiff modes win where both
    cannot be had. Interior modes have no say: they lie in between, where no one length suits all.

    Args:
        config: ``window`` where it is a number is the answer, unless the run ends before.
        top_curvatures: held-out curvature of the top modes, decay included.
        flat_curvatures: effective curvature of the flat directions, decay included.
        effective_learning_rate: momentum included.
        steps_left: optimizer steps until the run, or the next window, or infinity.
        longest: what :func:`turning_limit` made of the window before.
        momentum: the rule asks for a number of its memories; "auto" takes twice as many.
    """
    remembers = min(math.ceil(2 * MIN_MEMORIES / (1 - momentum)), MAX_WINDOW)
    room = int(min(steps_left, config.every_n_steps or math.inf, 10**9))
    if config.window != "auto":
        steps, reason = config.window, "set by the user"
    else:
        needs = sorted(
            MARGIN * CONFINED_RELAXATION_TIMES / effective_learning_rate / curvature
            for curvature in top_curvatures
            if curvature > 0 and effective_learning_rate > 0
        )
        needs = [need for need in needs if need <= min(MAX_WINDOW, room)]
        flats = sorted(curvature for curvature in flat_curvatures if curvature > 0)
        stays_flat = math.inf
        if flats and effective_learning_rate > 0:
            stays_flat = 1 / effective_learning_rate / flats[(len(flats) - 1) // 2]
        steps = max(math.ceil(needs[-1]) if needs else 0, 200, remembers)
        reason = (
            f"{len(needs)} of {len(top_curvatures)} stiff modes reach "
            f"{CONFINED_RELAXATION_TIMES:g} relaxation times"
        )
        if steps > stays_flat:
            reason += f"; half of the flat directions stay flat for {int(stays_flat)} steps only"
        if steps > longest:
            steps = max(int(longest), SHORTEST_WINDOW, remembers)
            reason = f"cut to {steps} steps, in which half of the stiff subspace turns, as in the last window"
    if steps > room:
        steps, reason = room, f"cut to the {room} steps that are left"
    return WindowPlan(steps, reason)


def turning_limit(overlap_at_start: float, overlap_at_end: float, steps: int) -> float:
    """Steps in which half of the stiff subspace turns away, at the pace of a window that has closed.

    Args:
        overlap_at_start: of the stiff directions with their images under the held-out Hessian.
        overlap_at_end: the same when the window closed.
        steps: of that window.

    Returns:
        Infinity where it does not turn, or nobody knows.
    """
    if not (steps > 0 and 0 < overlap_at_end < overlap_at_start):
        return math.inf
    return steps * math.log(2) / math.log(overlap_at_start / overlap_at_end)


def windows_ahead(config: ProbeConfig, steps: float, seconds: float, window_seconds: float) -> float:
    """About how many windows a run will have; infinity where it has no end.

    Args:
        config: the knobs.
        steps: optimizer steps from the first opening to the end of the run.
        seconds: that the training takes for them, about.
        window_seconds: what a window takes, about.
    """
    if math.isinf(steps):
        return math.inf
    length = SHORTEST_WINDOW if config.window == "auto" else config.window
    period = config.every_n_steps or length
    most = max(math.floor((steps - _worthwhile(config)) / period) + 1, int(steps >= MIN_WINDOW))
    if config.every_n_steps is not None:
        return most
    affordable = math.floor(config.max_overhead * seconds / window_seconds) if window_seconds > 0 else most
    return min(max(affordable, int(window_seconds <= config.grace_seconds)), most)


def _worthwhile(config: ProbeConfig) -> int:
    """Steps that a window needs so as not to be cut short by much: three quarters of its length."""
    return MIN_WINDOW if config.window == "auto" else max(3 * config.window // 4, MIN_WINDOW)


class Schedule:
    """Decides at which optimizer step the next window may open.

    Under a budget the first window opens at once and is paid for by all steps of the run; later
    ones open when what the probe has cost, with one more window, is within the budget of the
    training so far. ``every_n_steps`` overrides it.

    Args:
        config: the knobs.
        first_step: optimizer steps done when the fit began.
        planned_steps: optimizer steps done when the run will have ended, or infinity.

    Attributes:
        next_step: no window opens before so many optimizer steps are done.
        opened: windows opened so far.
        step_seconds: of a training step, once its pace is known.
        unaffordable: at the pace of the training, not even one window is within its budget.
    """

    def __init__(self, config: ProbeConfig, first_step: int, planned_steps: float) -> None:
        self._config = config
        self._planned = planned_steps
        self._first = self.next_step = first_step
        self._seen: tuple[int, float] | None = None
        self._paced = 0
        self._paces: deque[float] = deque(maxlen=PACE_STEPS_KEPT)
        self.opened = 0
        self.unaffordable = False
        self.step_seconds: float | None = None

    def steps_left(self, step: int) -> float:
        """Optimizer steps until the end of the run, or infinity."""
        return self._planned - step

    def due(self, step: int, lead: int, spent: float, window_cost: float, training: float) -> bool:
        """Whether to prepare a window now; ask before every step.

        Args:
            step: optimizer steps done.
            lead: steps from now until it opens, while its batches are collected.
            spent: probe seconds so far.
            window_cost: estimated seconds of one more window.
            training: training seconds so far, without the probe's.
        """
        self._note_pace(step, training)
        opening = step + lead
        # The end of the run may cut the first window short: it is all that there will be. A later one would
        # only stand in front of windows that are whole.
        least = _worthwhile(self._config) if self.opened else MIN_WINDOW
        if opening < self.next_step or self.steps_left(opening) < least:
            return False
        if self._config.every_n_steps is not None:
            return True
        budget = self._config.max_overhead
        if self.opened > 0:
            return spent + window_cost <= budget * training
        if window_cost <= self._config.grace_seconds or math.isinf(self._planned):
            return True
        if self.step_seconds is None:
            return False
        whole = training + self.steps_left(step) * self.step_seconds
        self.unaffordable = spent + window_cost > budget * whole
        return not self.unaffordable

    def _note_pace(self, step: int, training: float) -> None:
        """At first the median step: what only first steps cost (compiling, workers that start) says nothing.

        Once those are long past it is the mean of the last steps, with the ends of epochs among them.
        """
        if self._seen is not None and step > self._seen[0] >= self._first + WARM_UP_STEPS:
            self._paces.append((training - self._seen[1]) / (step - self._seen[0]))
            self._paced += 1
        if self._seen is None or step > self._seen[0]:
            self._seen = step, training
            if len(self._paces) >= PACE_STEPS:
                settled = self._paced >= 2 * PACE_STEPS_KEPT
                self.step_seconds = (statistics.fmean if settled else statistics.median)(self._paces)

    def open(self, step: int) -> None:
        """Note that a window opens now."""
        self.opened += 1
        if self._config.every_n_steps is not None:
            self.next_step = step + self._config.every_n_steps

    def postpone(self, step: int, steps: int) -> None:
        """Try no window for so many steps."""
        self.next_step = step + steps
