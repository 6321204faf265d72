"""Closed forms of mode-resolved SGD near a critical point, discrete and Langevin.

One mode of eigenvalue ``lambda`` and gradient noise of variance ``sigma^2`` at learning rate ``eta``:
the discrete update is ``x' = x - eta (lambda x + xi)``, heavy ball adds PyTorch's buffer
``b' = mu b + (1 - d) g``. Variances are in squared weight units, lags and times in optimizer steps.
Coupled weight decay adds to the eigenvalue; the caller does that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SGDDynamics:
    """What the optimizer does to one mode.

    Attributes:
        learning_rate: eta, positive and finite.
        momentum: mu of heavy ball, in [0, 1).
        dampening: d of PyTorch's buffer, in [0, 1).

    Raises:
        ValueError: a value is outside its range.
    """

    learning_rate: float
    momentum: float = 0.0
    dampening: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"expected a positive, finite learning rate, found {self.learning_rate}")
        for name in ("momentum", "dampening"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected {name} in [0, 1), found {getattr(self, name)}")

    @property
    def step(self) -> float:
        """Learning rate times (1 - d) with momentum (PyTorch dampens only the buffer), else the rate."""
        return self.learning_rate * (1 - self.dampening) if self.momentum else self.learning_rate

    @property
    def effective_learning_rate(self) -> float:
        """Displacement per unit of constant gradient and step, once the buffer is warm."""
        return self.step / (1 - self.momentum)


def stability_limit(dynamics: SGDDynamics) -> float:
    """Largest stable eigenvalue of the mean: ``2 (1 + mu) / eta'``."""
    return 2 * (1 + dynamics.momentum) / dynamics.step


def stationary_variance(eigenvalue: float, noise_variance: float, dynamics: SGDDynamics) -> float:
    """Variance of the stationary state: ``eta' s^2 (1 + mu) / (lambda (1 - mu) (2 (1 + mu) - eta' lambda))``.

    Returns:
        Squared weight units; infinity where there is no stationary state (flat, negative, unstable).
    """
    if not 0 < eigenvalue < stability_limit(dynamics):
        return math.inf
    eta, mu = dynamics.step, dynamics.momentum
    return eta * noise_variance * (1 + mu) / (eigenvalue * (1 - mu) * (2 * (1 + mu) - eta * eigenvalue))


def langevin_stationary_variance(eigenvalue: float, noise_variance: float, dynamics: SGDDynamics) -> float:
    """Variance of the overdamped Langevin equation of the same noise: ``eta_eff s^2 / (2 lambda)``."""
    if eigenvalue <= 0:
        return math.inf
    return dynamics.effective_learning_rate * noise_variance / (2 * eigenvalue)


def free_diffusion(noise_variance: float, dynamics: SGDDynamics) -> float:
    """D of a flat mode, squared weight units per step: ``eta_eff^2 s^2 / 2``."""
    return dynamics.effective_learning_rate**2 * noise_variance / 2


def free_mean_squared_displacement(noise_variance: float, lag: int, dynamics: SGDDynamics) -> float:
    """MSD of a flat mode with a warm buffer: ``2 D lag`` times :func:`momentum_kernel`."""
    return 2 * free_diffusion(noise_variance, dynamics) * lag * momentum_kernel(lag, dynamics.momentum)


def growth_ratio(eigenvalue: float, steps: int, dynamics: SGDDynamics) -> float:
    """Variance after so many steps from a point, over that of a flat mode with the same noise.

    ``(1 - a^(2 t)) / ((1 - a^2) t)`` with ``a = 1 - eta_eff lambda``: 1 for a flat mode, about
    ``1 / (2 kappa)`` for a confined one. Exact without momentum; with it, for times long against its memory.
    """
    decay = (1 - dynamics.effective_learning_rate * eigenvalue) ** 2
    if decay == 1:
        return 1.0
    exponent = steps * math.log(decay) if decay > 0 else -math.inf
    return math.expm1(exponent) / ((decay - 1) * steps) if exponent < 700 else math.inf


def momentum_kernel(lag: int, momentum: float) -> float:
    """MSD of a flat mode over ``2 D lag``: ``1 - 2 mu (1 - mu^lag) / (lag (1 - mu^2))``."""
    return 1 - 2 * momentum * (1 - momentum**lag) / (lag * (1 - momentum**2))


def mean_squared_displacement(
    eigenvalue: float, noise_variance: float, lag: int, dynamics: SGDDynamics
) -> float:
    """MSD over a lag in the stationary state, ``2 V (1 - a^lag)`` without momentum.

    With momentum the autocovariance follows from the two-step recursion
    ``x'' = (1 + mu - eta' lambda) x' - mu x``. A flat mode diffuses freely; with negative curvature
    the mode grows from a point, the buffer warm with noise: ``eta^2 s^2 (a^(2 lag) - 1) / (a^2 - 1)``
    without momentum. Beyond the stability limit it is infinite.
    """
    if eigenvalue == 0:
        return free_mean_squared_displacement(noise_variance, lag, dynamics)
    mu, pull = dynamics.momentum, dynamics.step * eigenvalue
    turn = 1 + mu - pull
    if eigenvalue < 0:
        # Displacement per kick of the noise, one more step after it each time, and the sum of its squares.
        before, kick, growth = 0.0, dynamics.step * math.sqrt(noise_variance), 0.0
        for _ in range(lag):
            growth += kick * kick
            if math.isinf(growth):
                return math.inf
            before, kick = kick, turn * kick - mu * before
        return growth + (mu * before) ** 2 / (1 - mu**2)
    variance = stationary_variance(eigenvalue, noise_variance, dynamics)
    if math.isinf(variance):
        return math.inf
    # The defect 1 - rho of the correlation is what keeps its digits for tiny curvature.
    before, defect = pull / (1 + mu), 0.0
    for _ in range(lag):
        before, defect = defect, turn * defect - mu * before + pull
    return 2 * variance * defect


def langevin_mean_squared_displacement(
    eigenvalue: float, noise_variance: float, lag: int, dynamics: SGDDynamics
) -> float:
    """MSD of the Langevin equation over ``lag`` steps of length eta_eff.

    Stationary ``2 V (1 - exp(-eta_eff lambda lag))``; for negative curvature from a point.
    """
    eta = dynamics.effective_learning_rate
    if eigenvalue == 0:
        return 2 * free_diffusion(noise_variance, dynamics) * lag
    rate = eta * eigenvalue
    if eigenvalue < 0:
        exponent = -2 * rate * lag
        growth = math.expm1(exponent) / (-2 * rate) if exponent < 700 else math.inf
        return eta**2 * noise_variance * growth
    return -2 * langevin_stationary_variance(eigenvalue, noise_variance, dynamics) * math.expm1(-rate * lag)
