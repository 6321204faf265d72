"""Modes as points: their quantities with intervals, and traces of them in the colours of their verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from sgd_probe.report.figures.drawing import Trace, scatter
from sgd_probe.report.figures.style import bars, finite, hover
from sgd_probe.report.wording import VERDICT_STYLES, interval, number, plus_minus
from sgd_probe.result import Interval, ModeKind, ModeResult

Quantity = Callable[[ModeResult], Interval]


def curvature(mode: ModeResult) -> Interval:
    """The curvature that decides a mode's motion: positive, in loss / weight²."""
    if mode.mixed:
        return bare(mode.effective_curvature)
    return absolute_eigenvalue(mode)


def signed_eigenvalue(mode: ModeResult) -> Interval:
    """Held out, with one standard error."""
    value, error = mode.held_out_eigenvalue, mode.held_out_standard_error
    return Interval(value, value - error, value + error)


def absolute_eigenvalue(mode: ModeResult) -> Interval:
    """Held out, with one standard error."""
    value, error = abs(mode.held_out_eigenvalue), mode.held_out_standard_error
    return Interval(value, value - error, value + error)


def bare(value: float) -> Interval:
    """A value whose interval is unknown."""
    return Interval(value, math.nan, math.nan)


def by_verdict(modes: Sequence[ModeResult], x: Quantity, y: Quantity) -> list[Trace]:
    """One trace of points per verdict that occurs, in the order of the verdicts."""
    traces = []
    for verdict, style in VERDICT_STYLES.items():
        found = [mode for mode in modes if mode.verdict is verdict]
        if not found:
            continue
        symbols = [f"{style.symbol}-open" if _is_negative(mode) else style.symbol for mode in found]
        marker = {"symbol": symbols, "size": 10, "color": style.colour, "line": {"width": 1}}
        traces.append(points(found, x, y, style.label, marker))
    return traces


def points(
    modes: Sequence[ModeResult], x: Quantity, y: Quantity, name: str, marker: dict[str, object]
) -> Trace:
    """One trace of points with their intervals."""
    xs, ys = [x(mode) for mode in modes], [y(mode) for mode in modes]
    return scatter(
        x=finite(value.value for value in xs),
        y=finite(value.value for value in ys),
        error_x=bars(xs),
        error_y=bars(ys),
        name=name,
        mode="markers",
        marker=marker,
        hovertext=[hover(mode, *_summary(mode)) for mode in modes],
        hoverinfo="text",
        showlegend=True,
    )


def curvature_note(modes: Iterable[ModeResult]) -> str:
    """What "curvature" is in a figure of these modes."""
    if has_interior(modes):
        eigenvectors, mixed = "an eigenvector", "a mixed direction (flat, or interior and not converged)"
    else:
        eigenvectors, mixed = "a top mode", "a flat direction"
    return (
        f"Curvature is the held-out |v·Hv| of {eigenvectors} (hollow: it is negative) "
        f"and the effective curvature ‖Hv‖²/|v·Hv| of {mixed}"
    )


def has_interior(modes: Iterable[ModeResult]) -> bool:
    """Some of them lie between stiff and flat."""
    return any(mode.kind is ModeKind.INTERIOR for mode in modes)


def in_words(modes: Sequence[ModeResult], what: str, unit: str, quantity: Quantity) -> str:
    """For each verdict, how many modes have it and the range of a quantity over them."""
    said = []
    for verdict, style in VERDICT_STYLES.items():
        found = [mode for mode in modes if mode.verdict is verdict]
        values = [v for v in (quantity(mode).value for mode in found) if math.isfinite(v)]
        if not found:
            continue
        span = f"{number(min(values))} to {number(max(values))} {unit}" if values else "unknown"
        said.append(f"{len(found)} {style.label}: {what} {span}")
    return f"{'; '.join(said)}." if said else "Nothing was measured."


def _is_negative(mode: ModeResult) -> bool:
    return mode.kind is not ModeKind.FLAT and mode.held_out_eigenvalue < 0


def _summary(mode: ModeResult) -> tuple[str, ...]:
    return (
        f"curvature {plus_minus(mode.held_out_eigenvalue, mode.held_out_standard_error)}",
        f"effective curvature {number(mode.effective_curvature)}",
        f"noise variance {interval(mode.noise_variance)}",
        f"D per step {interval(mode.diffusion)}",
        f"D predicted {number(mode.predicted_diffusion)}, free {number(mode.free_diffusion)}",
    )
