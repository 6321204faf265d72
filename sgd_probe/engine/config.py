"""Every knob of the probe, its unit, its default and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

#: What the loader does; "auto" reads it off the live loader.
SamplingChoice = Literal["auto", "with_replacement", "without_replacement"]
#: How Hessian-vector products are taken.
SecondDerivatives = Literal["double_backward", "finite_differences"]
#: When the modes are printed.
Summary = Literal["end", "windows", "off"]


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """All knobs. Those that are changed often are arguments of the callback too.

    Attributes:
        top: eigenvectors of largest |eigenvalue|.
        flat: near-flat directions.
        interior: directions at log-spaced levels of |lambda|, from the top down to the smallest that the
            search for the top resolves; fewer where it resolves fewer. They cost two products together and
            certification each. None by default: few converge to eigenvectors, the others are mixtures,
            and one window can seldom tell the fate of what lies between stiff and flat.
        window: length of a window in optimizer steps, or "auto": as long as the stiff modes need to
            show 20 relaxation times, as short as the flat ones need to stay flat.
        max_overhead: the probe's share of the training's wall time, in (0, 1).
        every_n_steps: open a window every so many optimizer steps, whatever it costs; None keeps
            to ``max_overhead``. It makes a run reproducible. At least ``window``.
        grace_seconds: a run too short for its budget still gets one window, if that takes no longer.
        curvature_batches: training batches in each of the two curvature sets, or "auto".
        microbatch: most samples of a piece that a curvature batch is cut into, which bounds the memory of
            a graph; None takes batches whole. It needs a loss that is a mean over samples of which none
            sees another; that is tried on a batch first, and refused where it does not hold.
        second_derivatives: "double_backward", exact, about two gradients a product; or
            "finite_differences" of gradients, for a loss that has no double backward, or a wrong one: four
            gradients a product or more, right to about 1e-3 in float32 where the loss is smooth. Where its
            steps do not agree (ReLU networks in float32) no window opens.
        tolerance: residual bound of eigenvectors relative to |lambda_1|. 1e-2 gives eigenvalues to
            1e-4 of lambda_1, far below their sampling error.
        flat_dimension: Hessian-vector products spent on each flat direction.
        flat_curvature: effective curvature that flat directions aim at, as a share of |lambda_1|; less
            where the window is so long that they would not stay flat over it.
        min_noise_share: a mode with less of a random direction's noise than this is "no noise":
            unused weights look perfectly flat.
        sampling: how the loader draws; set it where "auto" cannot know.
        seed: of the probe's own random vectors.
        slices: evaluate the loss along one stiff and one near-flat direction when a window opens: 13 forward
            passes of each held-out batch, of eight of them at most.
        max_graph_bytes: keep the graphs of all curvature batches, of both sets, up to this size, beyond
            it rebuild them for every product; "auto" takes half of the free memory, and where that is too
            little for one graph, cuts batches into pieces.
        max_basis_bytes: memory for the vectors of the eigensolver, which restarts rather than pass it, or
            finds fewer directions; "auto" takes half of the free memory for all vectors of a window.
        max_vector_bytes: directions of a window are stored in the run folder up to this size.
        save_vectors: store them at all.
        summary: print the table of a window's modes: of the last one when the training ends ("end"), of every
            one ("windows"), or never ("off").
        verify: compare the user's state (weights, buffers, gradients, the optimizer's state, random numbers,
            attributes, metric states, and globals that the module's methods refer to) before and after
            all that the probe does, at every 64th observed step too; what differs is named, put back, and
            the probe is switched off. For doubts: it holds a second copy of that state and reads it twice.
        log_directions: log the flagged directions of all windows to W&B too, as one artifact when the fit
            has ended; those that are stored.
        checkpoint_window: store the open window (its directions, about 20 times the weights, and its
            batches) in the trainer's checkpoints, so that a resumed run goes on with it; else, and always
            on several processes, it is lost and the next one opens when it is due.

    Raises:
        ValueError: a knob is out of range; the message names it, the value and the range.
    """

    top: int = 10
    flat: int = 4
    interior: int = 0
    window: int | Literal["auto"] = "auto"
    max_overhead: float = 0.05
    every_n_steps: int | None = None
    grace_seconds: float = 5.0
    curvature_batches: int | Literal["auto"] = "auto"
    microbatch: int | None = None
    second_derivatives: SecondDerivatives = "double_backward"
    tolerance: float = 1e-2
    flat_dimension: int = 12
    flat_curvature: float = 0.01
    min_noise_share: float = 1e-3
    sampling: SamplingChoice = "auto"
    seed: int = 0
    slices: bool = True
    max_graph_bytes: int | Literal["auto"] = "auto"
    max_basis_bytes: int | Literal["auto"] = "auto"
    max_vector_bytes: int = 64 * 2**20
    save_vectors: bool = True
    summary: Summary = "end"
    log_directions: bool = False
    checkpoint_window: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        for name, check, wanted in _RULES:
            value = getattr(self, name)
            if not check(value):
                raise ValueError(f"expected `{name}` to be {wanted}, found {value!r}")
        period = self.every_n_steps
        shortest = MIN_WINDOW if self.window == "auto" else self.window
        if period is not None and period < shortest:
            raise ValueError(
                f"expected `every_n_steps` to be at least `window`, {shortest} steps or more, found "
                f"every_n_steps={period} and window={self.window!r}: windows do not overlap"
            )


def _integer(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _or(choice: object, check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (value is None if choice is None else value == choice) or check(value)


#: Shortest window that the verdict's rule takes.
MIN_WINDOW = 50

_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("top", _integer(1), "an integer of at least 1"),
    ("flat", _integer(0), "an integer of at least 0"),
    ("interior", _integer(0), "an integer of at least 0"),
    ("window", _or("auto", _integer(MIN_WINDOW)), f'"auto" or an integer of at least {MIN_WINDOW}'),
    ("max_overhead", lambda v: _number(v) and 0 < v < 1, "a number between 0 and 1 (exclusive)"),
    ("every_n_steps", _or(None, _integer(1)), "None or an integer of at least 1"),
    ("grace_seconds", lambda v: _number(v) and v >= 0, "a number of seconds, at least 0"),
    ("curvature_batches", _or("auto", _integer(1)), '"auto" or an integer of at least 1'),
    ("microbatch", _or(None, _integer(1)), "None or an integer of at least 1"),
    (
        "second_derivatives",
        lambda v: v in ("double_backward", "finite_differences"),
        '"double_backward" or "finite_differences"',
    ),
    ("tolerance", lambda v: _number(v) and 0 < v < 1, "a number between 0 and 1 (exclusive)"),
    ("flat_dimension", _integer(2), "an integer of at least 2"),
    ("flat_curvature", lambda v: _number(v) and 0 < v < 1, "a number between 0 and 1 (exclusive)"),
    ("min_noise_share", lambda v: _number(v) and 0 <= v < 1, "a number in [0, 1)"),
    (
        "sampling",
        lambda v: v in ("auto", "with_replacement", "without_replacement"),
        '"auto", "with_replacement" or "without_replacement"',
    ),
    ("seed", _integer(0), "an integer of at least 0"),
    ("slices", lambda v: isinstance(v, bool), "True or False"),
    ("max_graph_bytes", _or("auto", _integer(0)), '"auto" or a number of bytes'),
    ("max_basis_bytes", _or("auto", _integer(1)), '"auto" or a number of bytes'),
    ("max_vector_bytes", _integer(0), "a number of bytes"),
    ("save_vectors", lambda v: isinstance(v, bool), "True or False"),
    ("summary", lambda v: v in ("end", "windows", "off"), '"end", "windows" or "off"'),
    ("log_directions", lambda v: isinstance(v, bool), "True or False"),
    ("checkpoint_window", lambda v: isinstance(v, bool), "True or False"),
    ("verify", lambda v: isinstance(v, bool), "True or False"),
)
