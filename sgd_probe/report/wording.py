"""How verdicts look and read, and how numbers are written: one place for figures and pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType

from sgd_probe.result import Interval, Verdict, WindowResult

# Numbers break between a value and its interval only: hence the no-break spaces (U+00A0) below.

#: Plain digits from 0.001 up to 99999; a power of ten outside.
_PLAIN_EXPONENTS = range(-3, 5)
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True)
class VerdictStyle:
    """How one verdict is shown everywhere.

    Attributes:
        label: the verdict in words.
        code: at most two characters, for narrow cells.
        colour: hex colour of the Okabe-Ito palette (with its grey).
        symbol: Plotly marker symbol, so that colour never stands alone; each has an "-open" twin.
        meaning: one plain sentence for readers who do not know the theory.
    """

    label: str
    code: str
    colour: str
    symbol: str
    meaning: str


VERDICT_STYLES: Mapping[Verdict, VerdictStyle] = MappingProxyType(
    {
        Verdict.CONFINED: VerdictStyle(
            "confined",
            "C",
            "#0072B2",
            "circle",
            "The curvature of the loss holds the weights: they fluctuate around a point and do not get away.",
        ),
        Verdict.SAMPLING_CONFINED: VerdictStyle(
            "sampling-confined",
            "S",
            "#56B4E9",
            "square",
            "The weights stay near because every epoch visits each sample once, so that the noise cancels; "
            "curvature does not hold them.",
        ),
        Verdict.DIFFUSIVE: VerdictStyle(
            "diffusive",
            "D",
            "#E69F00",
            "diamond",
            "The weights wander along a valley: the squared displacement keeps growing in proportion to "
            "the number of steps.",
        ),
        Verdict.DRIFTING: VerdictStyle(
            "drifting",
            "Dr",
            "#CC79A7",
            "triangle-up",
            "The weights move one way, further than noise alone would carry them: training still makes "
            "progress along this direction.",
        ),
        Verdict.UNSTABLE: VerdictStyle(
            "unstable",
            "U",
            "#D55E00",
            "star",
            "The weights run away and the gradient pushes them on: negative curvature, or a learning rate "
            "that is too large.",
        ),
        Verdict.UNDETERMINED: VerdictStyle(
            "undetermined",
            "?",
            "#999999",
            "hexagon",
            "This window cannot tell confined from free; a longer window might. It is not a finding.",
        ),
        Verdict.NO_NOISE: VerdictStyle(
            "without noise",
            "0",
            "#000000",
            "cross",
            "The minibatches hardly push along this direction (unused weights, for example), so there is "
            "no motion to judge.",
        ),
    }
)


def number(value: float, digits: int = 3) -> str:
    """Write a value with ``digits`` significant digits; "unknown" where it is not finite."""
    return _with_exponent([value], digits) if math.isfinite(value) else "unknown"


def plus_minus(value: float, error: float, digits: int = 3) -> str:
    """Write ``value ± standard error`` with one common power of ten."""
    if not (math.isfinite(value) and math.isfinite(error)):
        return number(value, digits)
    return _with_exponent([value, error], digits, "{}\u00a0±\u00a0{}", parenthesis=True)


def interval(estimate: Interval, digits: int = 3) -> str:
    """Write ``value [low, high]`` with one common power of ten; bounds that are unknown are left out."""
    bounds = (estimate.value, estimate.low, estimate.high)
    if not all(map(math.isfinite, bounds)):
        return number(estimate.value, digits)
    return _with_exponent(bounds, digits, "{} [{},\u00a0{}]")


def share(fraction: float) -> str:
    """Write a fraction as a percentage; "unknown" where it is not finite."""
    return f"{100 * fraction:.3g}%" if math.isfinite(fraction) else "unknown"


def steps(result: WindowResult) -> str:
    """Write the optimizer steps that a window spans."""
    return f"{result.opened_at_step}–{result.closed_at_step}"


def horizon(result: WindowResult) -> str:
    """Write over how long the verdicts of a window hold."""
    length = f"{result.steps:,} steps"
    if not math.isfinite(result.epochs):
        return length
    epochs = f"{result.epochs:.3g}"
    return f"{length} ({epochs} epoch{'s' if epochs != '1' else ''})"


def headline(result: WindowResult) -> str:
    """Write the verdicts of a window as one sentence."""
    counts = result.counts()
    found = [f"{counts[v]} {style.label}" for v, style in VERDICT_STYLES.items() if counts[v]]
    return f"{', '.join(found) or 'No modes'} in the last window (steps {steps(result)})"


def _with_exponent(
    values: Sequence[float], digits: int, pattern: str = "{}", *, parenthesis: bool = False
) -> str:
    """Fill the pattern with finite values that share the power of ten of the largest."""
    exponent = int(f"{max(map(abs, values)):.{digits - 1}e}".partition("e")[2])
    if exponent in _PLAIN_EXPONENTS:
        return pattern.format(*(_decimal(value, exponent, digits) for value in values))
    # Decimals, because 10**exponent leaves the range of floats before the values do.
    scaled = (_decimal(Decimal(value).scaleb(-exponent), 0, digits) for value in values)
    text = pattern.format(*scaled)
    power = f"10{str(exponent).translate(_SUPERSCRIPTS)}"
    return f"({text})\u00a0×\u00a0{power}" if parenthesis else f"{text}\u00a0×\u00a0{power}"


def _decimal(value: float | Decimal, exponent: int, digits: int) -> str:
    """Write a value to the decimals that ``digits`` significant digits at 10**exponent ask for."""
    return f"{value:.{max(digits - 1 - exponent, 0)}f}".replace("-", "−")
