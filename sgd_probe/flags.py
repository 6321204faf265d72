"""Flags: the directions that diffuse along a valley, and the window in which that began.

A window raises a flag on every mode that it calls diffusive, unless what it says against itself undermines
that verdict. The onset of a flag is the first of the windows in a row in which its valley diffused: a valley
ends with a window that flags no direction of it.

**When is a valley the same?** Near-flat directions are drawn anew in every window from a subspace of many
dimensions: their overlap from one window to the next is that of chance, and names are ranks. Neither can
follow a valley. What can is where it lies: two flags are of one valley if they are of one kind and their
layer shares p and q agree so far that ``sum_l sqrt(p_l q_l) >= 0.7``. By Cauchy and Schwarz that sum bounds
the cosine between the two directions from above, so that flags called different share less than half of
their squared length; those called the same may be two directions of one flat region.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sgd_probe.result import Interval, ModeKind, ModeResult, Verdict, WindowResult

#: Least bound on the cosine of two directions that are taken for one valley.
SAME_VALLEY = 0.7
_LAYERS_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One direction that one window found diffusing.

    Attributes:
        mode: its name in that window (``flat_01``).
        kind: how the direction was chosen.
        window: index of the window.
        onset_window: index of the window in which its valley began to diffuse.
        onset_step: optimizer steps done when that window opened.
        steps: the horizon of the verdict, in optimizer steps.
        epochs: the same in epochs; NaN where the loader has none.
        diffusion: D in squared weight units per optimizer step, with its 95% interval.
        log_likelihood_ratio: log evidence of a flat mode against one of 20 relaxation times.
        expected_false_flags: how many of all flags of that window are expected to be wrong.
        layers: share of each parameter in the direction's squared length, largest first.
    """

    mode: str
    kind: ModeKind
    window: int
    onset_window: int
    onset_step: int
    steps: int
    epochs: float
    diffusion: Interval
    log_likelihood_ratio: float
    expected_false_flags: float
    layers: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_onset(self) -> bool:
        """The window before it did not flag its valley."""
        return self.window == self.onset_window

    def __str__(self) -> str:
        horizon, epochs = f"{self.steps:,} steps", f"{self.epochs:.2g}"
        if self.epochs > 0:
            horizon += f", {epochs} epoch{'s' if epochs != '1' else ''}"
        d, layers = self.diffusion, list(self.layers.items())[:_LAYERS_SHOWN]
        where = ", ".join(f"{name} ({share:.0%})" for name, share in layers)
        return (
            f"{self.mode} of window {self.window} diffuses over {horizon}: "
            f"D = {d.value:.2g} [{d.low:.2g}, {d.high:.2g}] weight² per step, "
            f"log evidence {self.log_likelihood_ratio:.1f} against confinement"
            + (f"; it lies in {where}" if where else "")
        )


def raise_flags(result: WindowResult, earlier: Sequence[Flag] = ()) -> tuple[Flag, ...]:
    """The flags of one window.

    Args:
        result: the window's.
        earlier: the flags of the windows before it, of which those of the last one count.
    """
    before = [flag for flag in earlier if flag.window == result.index - 1]
    return tuple(
        _flag(result, mode, before)
        for mode in result.modes
        if mode.verdict is Verdict.DIFFUSIVE and not mode.undermined
    )


def find_flags(results: Iterable[WindowResult]) -> tuple[Flag, ...]:
    """The flags of a run, in the order of its windows."""
    flags: tuple[Flag, ...] = ()
    for result in results:
        flags += raise_flags(result, flags)
    return flags


def onset_message(flags: Sequence[Flag]) -> str:
    """What to tell of the flags of one window that are onsets, a line each; "" where there are none."""
    new = [flag for flag in flags if flag.is_onset]
    if not new:
        return ""
    lines = [f"window {new[0].window}, from step {new[0].onset_step:,}: the weights wander along a valley."]
    lines += [f"{flag}." for flag in new]
    if math.isfinite(new[0].expected_false_flags):
        lines.append(f"Of this window's flags {new[0].expected_false_flags:.1f} are expected to be wrong.")
    return "\n  ".join(lines)


def cosine_bound(p: Mapping[str, float], q: Mapping[str, float]) -> float:
    """Most that the cosine between two unit directions can be, given their layer shares.

    Only the largest shares may be known. What is left of one direction may lie in layers that the other
    names, or in others; the bound allows for both.
    """
    common = p.keys() & q.keys()
    rest_p, rest_q = (max(1 - sum(shares.values()), 0.0) for shares in (p, q))
    only_p, only_q = (sum(s[n] for n in s.keys() - common) for s in (p, q))
    bound = sum(math.sqrt(p[name] * q[name]) for name in common)
    bound += math.sqrt(only_p * rest_q) + math.sqrt(rest_p * only_q) + math.sqrt(rest_p * rest_q)
    return min(bound, 1.0)


def _flag(result: WindowResult, mode: ModeResult, before: Sequence[Flag]) -> Flag:
    onset = next((flag for flag in before if _same_valley(mode, flag)), None)
    return Flag(
        mode=mode.name,
        kind=mode.kind,
        window=result.index,
        onset_window=result.index if onset is None else onset.onset_window,
        onset_step=result.opened_at_step if onset is None else onset.onset_step,
        steps=result.steps,
        epochs=result.epochs,
        diffusion=mode.diffusion,
        log_likelihood_ratio=-mode.log_bayes_factor,
        expected_false_flags=result.expected_false_flags,
        layers=mode.layer_shares,
    )


def _same_valley(mode: ModeResult, flag: Flag) -> bool:
    return mode.kind is flag.kind and cosine_bound(mode.layer_shares, flag.layers) >= SAME_VALLEY
