"""Closed forms of mode-resolved SGD near a critical point, discrete and Langevin.

One mode of eigenvalue ``lambda`` and gradient noise of variance ``sigma^2`` (and where it is said Hessian
noise of variance ``s^2 = Var(v.H_B v)``) at learning rate ``eta``: the discrete update is ``x' = x - eta
(lambda x + xi)``; momentum adds PyTorch's buffer ``b' = mu b + (1 - d) g``. ``x`` is the distance from the
fixed point of the mean (weight decay moves it), and the noise is that found there. Variances are in squared
weight units, lags and times in optimizer steps. The noise of successive steps is independent here;
``sampling`` has what an epoch without replacement changes.

For a constant learning rate the buffer can be eliminated (docs/theory.md):
``x'' = T x' - D x + alpha xi' + beta xi``, an ARMA(2, 1) process, with T and D the trace and the determinant
of the linear step. Every stationary formula below is that of this process (Brockwell and Davis, Time Series:
Theory and Methods, section 3.3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from sgd_probe.theory.dynamics import SGDDynamics as SGDDynamics

Buffer = Literal["empty", "warm"]


def stability_limit(dynamics: SGDDynamics) -> float:
    """Largest stable eigenvalue of the mean, weight decay taken off.

    ``2 (1 + mu) / eta'`` for heavy ball, ``2 (1 + mu) / (eta (1 + 2 mu))`` for Nesterov; decoupled decay
    lowers the 2 to ``2 - w``. Zero and below: nothing is stable.
    """
    mu = dynamics.momentum
    stretch = 1 + 2 * mu if dynamics.nesterov else 1.0
    limit = (1 + mu) * (2 - dynamics.shrinkage) / (dynamics.step * stretch)
    return limit - dynamics.coupled_decay


def stability_interval(dynamics: SGDDynamics, hessian_variance: float = 0.0) -> tuple[float, float]:
    """Eigenvalues between which the variance is bounded, under Hessian noise of variance ``s^2``.

    ``eta (lambda^2 + s^2) < 2 lambda`` for plain SGD; without Hessian noise, the interval of the mean.

    Returns:
        Lowest and highest eigenvalue; NaN twice where Hessian noise leaves none.
    """
    low, high = _mean_interval(dynamics)
    if hessian_variance == 0 or low >= high:
        return (low, high) if low < high else (math.nan, math.nan)

    # 1 = K s^2, a cubic in the eigenvalue: through four points, scaled to [0, 1].
    def excess(share: float) -> float:
        parts = _parts(low + share * (high - low), dynamics)
        return parts.denominator - hessian_variance * parts.numerator

    shares = np.array([0.0, 1 / 3, 2 / 3, 1.0])
    cubic = np.polyfit(shares, [excess(share) for share in shares], 3)
    cubic[abs(cubic) < 1e-13 * abs(cubic).max()] = 0
    real = [root.real for root in np.roots(cubic) if abs(root.imag) < 1e-9]
    roots = sorted(min(max(root, 0.0), 1.0) for root in real if -1e-9 < root < 1 + 1e-9)
    inside = [(a, b) for a, b in itertools.pairwise(roots) if excess((a + b) / 2) > 0]
    if not inside:
        return math.nan, math.nan
    return float(low + inside[0][0] * (high - low)), float(low + inside[-1][1] * (high - low))


def stationary_variance(
    eigenvalue: float, noise_variance: float, dynamics: SGDDynamics, hessian_variance: float = 0.0
) -> float:
    """Variance of the stationary state, for every optimizer that :class:`SGDDynamics` describes.

    Without Hessian noise, and with ``e = eta' lambda``:

    - plain SGD ``eta sigma^2 / (lambda (2 - e))``, which is the next one at ``mu = 0``;
    - heavy ball ``eta' sigma^2 (1 + mu) / (lambda (1 - mu) (2 (1 + mu) - e))``;
    - Nesterov ``eta^2 sigma^2 (1 + mu + e mu (1 + 2 mu)) / (e (1 - mu + e mu) (2 (1 + mu) - e (1 + 2 mu)))``;
    - heavy ball with decoupled decay ``eta'^2 sigma^2 (1 + mu (1 - w)) / ((e + w (1 - mu)) (1 - mu (1 - w))
      (2 (1 + mu) - e - w (1 + mu)))``.

    Each is ``K sigma^2``; Hessian noise makes it ``K sigma^2 / (1 - K s^2)``. Its covariance with the
    gradient noise drops out, because the mean is zero.

    Returns:
        Squared weight units; infinity where there is no stationary state (flat, negative, unstable).
    """
    low, high = _mean_interval(dynamics)
    if not low < eigenvalue < high:
        return math.inf
    parts = _parts(eigenvalue, dynamics)
    left = parts.denominator - hessian_variance * parts.numerator
    return noise_variance * parts.numerator / left if left > 0 else math.inf


def langevin_stationary_variance(
    eigenvalue: float, noise_variance: float, dynamics: SGDDynamics, hessian_variance: float = 0.0
) -> float:
    """Variance of the overdamped Langevin equation of the same noise: ``eta_eff sigma^2 / (2 lambda)``.

    Hessian noise is multiplicative noise in the sense of Ito: ``2 lambda - eta_eff s^2`` below.
    """
    rate, eta = dynamics.relaxation(eigenvalue), dynamics.effective_learning_rate
    left = 2 * rate - eta**2 * hessian_variance
    return eta**2 * noise_variance / left if left > 0 else math.inf


def modified_stationary_variance(eigenvalue: float, noise_variance: float, dynamics: SGDDynamics) -> float:
    """Variance of the second-order modified equation, between Langevin and discrete: plain SGD only.

    ``eta sigma^2 (1 + e) / (lambda (2 + e))``, from the drift ``lambda (1 + e / 2)`` and the diffusion
    ``eta sigma^2 (1 + e)`` that reproduce the discrete step to second order in ``e = eta lambda`` (Zygalakis,
    SIAM J. Sci. Comput. 33, 2011). Correcting the drift alone would move it away from the discrete one.

    Raises:
        ValueError: momentum or decoupled decay.
    """
    _plain(dynamics)
    value = eigenvalue + dynamics.coupled_decay
    pull = dynamics.learning_rate * value
    if pull <= 0:
        return math.inf
    return dynamics.learning_rate * noise_variance * (1 + pull) / (value * (2 + pull))


def free_diffusion(noise_variance: float, dynamics: SGDDynamics) -> float:
    """D of a flat mode, squared weight units per step: ``eta_eff^2 sigma^2 / 2``."""
    return dynamics.effective_learning_rate**2 * noise_variance / 2


def free_mean_squared_displacement(
    noise_variance: float, lag: int, dynamics: SGDDynamics, buffer: Buffer = "warm"
) -> float:
    """MSD of a flat mode without decay.

    A warm buffer gives ``2 D lag`` times :func:`momentum_kernel`; an empty one
    ``eta_eff^2 sigma^2 [t - 2 k mu (1 - mu^t) / (1 - mu) + k^2 mu^2 (1 - mu^(2 t)) / (1 - mu^2)]`` with k = 1
    (Nesterov: mu), and the first kick, which PyTorch does not dampen, larger by ``1 / (1 - d)``.
    """
    twice = 2 * free_diffusion(noise_variance, dynamics)
    mu = dynamics.momentum
    if buffer == "warm" or not mu:
        return twice * lag * momentum_kernel(lag, mu, dynamics.nesterov)
    held = mu * (mu if dynamics.nesterov else 1.0)
    steps = lag - 2 * held * (1 - mu**lag) / (1 - mu) + held**2 * (1 - mu ** (2 * lag)) / (1 - mu**2)
    undamped = (1 - dynamics.dampening) ** -2 - 1
    return twice * (steps + undamped * (1 - mu**lag) ** 2)


def growth_ratio(eigenvalue: float, steps: int, dynamics: SGDDynamics) -> float:
    """Variance after so many steps from a point, over that of a flat mode with the same noise.

    ``(1 - a^(2 t)) / ((1 - a^2) t)`` with ``a = 1 - eta_eff lambda``: 1 for a flat mode, about
    ``1 / (2 kappa)`` for a confined one. Exact without momentum; with it, for times long against its memory.
    """
    rate = dynamics.relaxation(eigenvalue)
    return _geometric(rate * (rate - 2), steps) / steps


def variance_from_point(
    eigenvalue: float,
    noise_variance: float,
    steps: int,
    dynamics: SGDDynamics,
    hessian_variance: float = 0.0,
) -> float:
    """Variance after so many steps of plain SGD from its fixed point: ``eta^2 sigma^2 (1 - q^t) / (1 - q)``.

    ``q = a^2 + eta^2 s^2``. A flat mode under Hessian noise grows geometrically,
    ``(sigma^2 / s^2) ((1 + eta^2 s^2)^t - 1)``.

    Raises:
        ValueError: momentum, which has no neat form: see :class:`~sgd_probe.theory.SGDMode`.
    """
    _plain(dynamics, decoupled=True)
    eta = dynamics.learning_rate
    # q - 1 = r (r - 2) + eta^2 s^2 keeps its digits near a flat mode.
    rate = dynamics.relaxation(eigenvalue)
    excess = rate * (rate - 2) + eta**2 * hessian_variance
    return eta**2 * noise_variance * _geometric(excess, steps)


def scheduled_variance(
    eigenvalue: float, noise_variance: float, schedule: Sequence[float], dynamics: SGDDynamics
) -> float:
    """Variance of plain SGD from a point under a schedule.

    ``sigma^2 sum_k eta_k^2 prod_{u>k} (1 - eta_u lambda)^2``

    Raises:
        ValueError: momentum or decoupled decay, as above.
    """
    _plain(dynamics)
    rates = np.asarray(schedule, dtype=float)
    held = (1 - rates * (eigenvalue + dynamics.coupled_decay)) ** 2
    later = np.append(np.cumprod(held[:0:-1])[::-1], 1.0)
    return float(noise_variance * (rates**2 * later).sum())


def momentum_kernel(lag: int, momentum: float, nesterov: bool = False) -> float:
    """MSD of a flat mode with a warm buffer over ``2 D lag``: ``1 - 2 mu (1 - mu^lag) / (lag (1 - mu^2))``.

    Nesterov: ``1 - 2 mu^2 (1 + mu - mu^2) (1 - mu^lag) / (lag (1 - mu^2))``.
    """
    held = momentum**2 * (1 + momentum - momentum**2) if nesterov else momentum
    return 1 - 2 * held * (1 - momentum**lag) / (lag * (1 - momentum**2))


def mean_squared_displacement(
    eigenvalue: float,
    noise_variance: float,
    lag: int,
    dynamics: SGDDynamics,
    hessian_variance: float = 0.0,
) -> float:
    """MSD over a lag in the stationary state, ``2 V (1 - a^lag)`` without momentum.

    With momentum the autocorrelation follows from the two-step recursion ``r'' = T r' - D r``. A flat mode
    diffuses freely; with negative curvature the mode grows from a point, the buffer warm with noise:
    ``eta^2 sigma^2 (a^(2 lag) - 1) / (a^2 - 1)`` without momentum. Beyond the stability limit it is infinite.

    Raises:
        ValueError: Hessian noise where there is no stationary state: see ``SGDMode``.
    """
    parts = _parts(eigenvalue, dynamics)
    if parts.pull <= 0:
        if hessian_variance:
            raise ValueError(
                "expected no Hessian noise on a flat or unstable mode: SGDMode has the recursion"
            )
        return _unconfined(eigenvalue, noise_variance, lag, dynamics)
    variance = stationary_variance(eigenvalue, noise_variance, dynamics, hessian_variance)
    if math.isinf(variance):
        return math.inf
    # The defect 1 - rho of the correlation is what keeps its digits for tiny curvature.
    one = 1 + parts.determinant
    first = parts.pull / one - parts.alpha * parts.beta * parts.denominator / (parts.numerator * one)
    before, defect = 0.0, first
    for _ in range(lag - 1):
        before, defect = defect, parts.trace * defect - parts.determinant * before + parts.pull
    return 2 * variance * defect


def langevin_mean_squared_displacement(
    eigenvalue: float,
    noise_variance: float,
    lag: int,
    dynamics: SGDDynamics,
    hessian_variance: float = 0.0,
) -> float:
    """MSD of the Langevin equation over ``lag`` steps of length eta_eff.

    Stationary ``2 V (1 - exp(-eta_eff lambda lag))``; from a point where nothing is stationary.
    """
    rate, eta = dynamics.relaxation(eigenvalue), dynamics.effective_learning_rate
    variance = langevin_stationary_variance(eigenvalue, noise_variance, dynamics, hessian_variance)
    if math.isfinite(variance) and rate > 0:
        return -2 * variance * math.expm1(-rate * lag)
    exponent = (eta**2 * hessian_variance - 2 * rate) * lag
    if exponent == 0:
        return eta**2 * noise_variance * lag
    growth = math.expm1(exponent) / exponent if exponent < 700 else math.inf
    return eta**2 * noise_variance * lag * growth if noise_variance else 0.0


class _Parts(NamedTuple):
    """The ARMA(2, 1) process of a mode: ``x'' = trace x' - determinant x + alpha xi' + beta xi``.

    Its variance is ``numerator / denominator`` times that of the noise; ``pull = 1 + determinant - trace``
    and the denominator keep their digits near a flat mode.
    """

    trace: float
    determinant: float
    alpha: float
    beta: float
    pull: float
    numerator: float
    denominator: float


def _parts(eigenvalue: float, dynamics: SGDDynamics) -> _Parts:
    step = dynamics.linear_step()
    value, mu, shrink = eigenvalue + dynamics.coupled_decay, dynamics.momentum, dynamics.shrinkage
    trace = 1 - shrink + step.kick * value + mu
    determinant = (1 - shrink) * mu + (step.kick * mu - step.carry * step.intake) * value
    alpha, beta = step.kick, step.carry * step.intake - mu * step.kick
    pull = dynamics.step * value + shrink * (1 - mu)
    numerator = (alpha**2 + beta**2) * (1 + determinant) + 2 * alpha * beta * trace
    denominator = (1 - determinant) * pull * (1 + determinant + trace)
    return _Parts(trace, determinant, alpha, beta, pull, numerator, denominator)


def _mean_interval(dynamics: SGDDynamics) -> tuple[float, float]:
    """Eigenvalues between which the mean is stable; decay makes some negative ones stable."""
    low = -dynamics.coupled_decay - dynamics.shrinkage * (1 - dynamics.momentum) / dynamics.step
    return low, stability_limit(dynamics)


def _unconfined(eigenvalue: float, noise_variance: float, lag: int, dynamics: SGDDynamics) -> float:
    """Spread from a point with a warm buffer: the sum of squared responses to each kick, before and after."""
    if eigenvalue + dynamics.coupled_decay == 0 and not dynamics.shrinkage:
        return free_mean_squared_displacement(noise_variance, lag, dynamics)
    step, mu = dynamics.linear_step(), dynamics.momentum
    value = eigenvalue + dynamics.coupled_decay
    stay, feed = 1 - step.decay + step.kick * value, step.intake * value

    def respond(position: float, buffer: float) -> tuple[float, float]:
        return stay * position + step.carry * buffer, feed * position + step.memory * buffer

    scale, growth = math.sqrt(noise_variance), 0.0
    kicked, warm = (step.kick * scale, step.intake * scale), (0.0, step.intake * scale)
    for _ in range(lag):
        growth += kicked[0] ** 2 if abs(kicked[0]) < 1e150 else math.inf
        if math.isinf(growth):
            return math.inf
        kicked, warm = respond(*kicked), respond(*warm)
    return growth + warm[0] ** 2 / (1 - mu**2)


def _geometric(excess: float, steps: int) -> float:
    """``1 + q + ... + q^(t - 1)`` with ``q = 1 + excess``, which keeps its digits near 1."""
    if excess == 0:
        return float(steps)
    exponent = steps * (math.log1p(excess) if excess > -1 else -math.inf)
    return math.expm1(exponent) / excess if exponent < 700 else math.inf


def _plain(dynamics: SGDDynamics, *, decoupled: bool = False) -> None:
    if dynamics.momentum or (dynamics.shrinkage and not decoupled):
        raise ValueError(
            f"expected plain SGD, found {dynamics}; SGDMode has the exact recursion for every optimizer"
        )
