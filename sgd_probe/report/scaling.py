"""Does D per unit time grow in proportion to the learning rate, from one run to the next?

A flat mode of plain SGD diffuses by ``eta^2 sigma^2 / 2`` a step and by ``eta sigma^2 / 2`` per unit time
``eta t``: in proportion to the learning rate, where the noise is the same. Runs differ in their noise too
(the batch, the place in the landscape, the directions), so that D is also asked for per noise variance: there
only the learning rate is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sgd_probe.result import Interval, ModeKind, ModeResult, Verdict, WindowResult

_Z95 = 1.96
#: Windows whose learning rate is so near the last one's count with it.
_SAME_RATE = 0.01


@dataclass(frozen=True, slots=True)
class RunDiffusion:
    """How the flat directions of one run diffuse.

    Attributes:
        rate: effective learning rate, momentum included.
        modes: near-flat directions that were found to diffuse, of all windows at that rate.
        per_time: their D per unit time (weight² per unit of ``eta t``), geometric mean with its interval.
        per_noise: that over half of their noise variance: by the theory, ``rate``.
    """

    rate: float
    modes: tuple[ModeResult, ...]
    per_time: Interval
    per_noise: Interval


def run_diffusion(windows: Sequence[WindowResult]) -> RunDiffusion:
    """What the windows of a run at its last learning rate say of diffusion.

    Args:
        windows: of one run, at least one.
    """
    rate = windows[-1].effective_learning_rate
    alike = [w for w in windows if abs(w.effective_learning_rate / rate - 1) < _SAME_RATE] if rate > 0 else []
    modes = tuple(
        mode
        for window in alike
        for mode in window.modes
        if mode.kind is ModeKind.FLAT and mode.verdict is Verdict.DIFFUSIVE
    )
    return RunDiffusion(
        rate=rate,
        modes=modes,
        per_time=_geometric_mean(modes, lambda mode: (mode.diffusion_per_time,)),
        per_noise=_geometric_mean(modes, lambda mode: (mode.diffusion_per_time, mode.noise_variance), 2.0),
    )


def ratio(one: Interval, other: Interval) -> Interval:
    """How many times ``one`` the ``other`` is, with its interval; both are positive and independent."""
    log, error = math.log(other.value / one.value), math.hypot(_log_error(one), _log_error(other))
    return _from_log(log, error)


def comparable(run: RunDiffusion) -> bool:
    """It has directions that diffuse, and an interval for how fast."""
    return all(map(math.isfinite, (run.per_time.value, run.per_time.low, run.per_time.high)))


def _geometric_mean(
    modes: Iterable[ModeResult], quantities: Callable[[ModeResult], Sequence[Interval]], factor: float = 1.0
) -> Interval:
    """Of the first of some quantities over the product of the others, times a factor.

    The interval is that of the modes' own intervals or that of their scatter, whichever is wider. A mean of
    squares has a logarithm that is too small by half of its squared error, which is put back.
    """
    logs, errors = [], []
    for mode in modes:
        found = quantities(mode)
        if all(math.isfinite(q.value) and 0 < q.low <= q.value <= q.high < math.inf for q in found):
            first, *others = [math.log(q.value) + _log_error(q) ** 2 / 2 for q in found]
            logs.append(math.log(factor) + first - math.fsum(others))
            errors.append(math.hypot(*map(_log_error, found)))
    if not logs:
        return Interval.unknown()
    count, mean = len(logs), math.fsum(logs) / len(logs)
    own = math.hypot(*errors) / count
    scatter = 0.0
    if count > 1:
        scatter = math.sqrt(math.fsum((log - mean) ** 2 for log in logs) / (count - 1) / count)
    return _from_log(mean, max(own, scatter))


def _log_error(value: Interval) -> float:
    """Standard error of the logarithm, from a 95% interval."""
    return math.log(value.high / value.low) / (2 * _Z95)


def _from_log(log: float, error: float) -> Interval:
    return Interval(math.exp(log), math.exp(log - _Z95 * error), math.exp(log + _Z95 * error))
