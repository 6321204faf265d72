"""One mode of SGD near a critical point: the exact recursion of its mean and variance, and Langevin's.

Every optimizer step is linear in the state (weight x, momentum buffer b), so first and second moments close:
``m' = F m`` and ``V' = F V F^T + q Q`` with ``q = sigma^2 + s^2 (V_xx + M^2) + 2 c M``. What an epoch without
replacement remembers, the summed noise of the samples drawn so far, is one more linear state. There is no
expansion in the learning rate and no assumption on the shape of the noise. ``closed_forms`` has the fixed
points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sgd_probe.theory import closed_forms
from sgd_probe.theory.closed_forms import Buffer
from sgd_probe.theory.dynamics import SGDDynamics
from sgd_probe.theory.sampling import MinibatchSampling

Array = NDArray[np.float64]

# The state: weight, displacement since a marked step, buffer, gradient noise gathered in this step, and the
# summed noise of the samples that this epoch has drawn.
_X, _Y, _B, _G, _C = range(5)
_SIZE = 5


class Moments(NamedTuple):
    """Mean and variance of a mode.

    Attributes:
        mean: after 0, 1, ... steps, weight units.
        variance: the same, squared weight units.
    """

    mean: Array
    variance: Array


class Stability(NamedTuple):
    """Whether a mode settles, and up to where it would.

    Attributes:
        mean: the mean decays.
        variance: the variance stays bounded.
        mean_limit: largest eigenvalue of which the mean decays.
        variance_limits: smallest and largest eigenvalue of which the variance stays bounded (NaN: none).
    """

    mean: bool
    variance: bool
    mean_limit: float
    variance_limits: tuple[float, float]


@dataclass(frozen=True)
class SGDMode:
    """One mode under SGD: exact for a quadratic loss, whatever the distribution of the noise.

    Attributes:
        eigenvalue: lambda of the mean Hessian along v.
        noise_variance: ``sigma^2 = Var(v.g_B)`` of a full step's gradient at the fixed point of the mean,
            from which displacements count. Without replacement the loader's own variance, ``(S^2 / B) (1 -
            B / N)``.
        dynamics: the optimizer.
        sampling: how minibatches are drawn; independent ones by default.
        hessian_variance: ``s^2 = Var(v.H_B v)``.
        covariance: ``c = Cov(v.H_B v, v.g_B)``.

    Raises:
        ValueError: an impossible variance or covariance, an epoch of one step without replacement, or Hessian
            noise without replacement, for which second moments do not close.
    """

    eigenvalue: float
    noise_variance: float
    dynamics: SGDDynamics
    sampling: MinibatchSampling = field(default_factory=MinibatchSampling)
    hessian_variance: float = 0.0
    covariance: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.eigenvalue):
            raise ValueError(f"expected a finite eigenvalue, found {self.eigenvalue}")
        for name in ("noise_variance", "hessian_variance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"expected a finite {name} of at least 0, found {getattr(self, name)}")
        bound = math.sqrt(self.noise_variance * self.hessian_variance)
        if not abs(self.covariance) <= bound * (1 + 1e-9):
            raise ValueError(f"expected a covariance of at most {bound:g} in size, found {self.covariance}")
        if not self.sampling.replacement:
            if self.hessian_variance:
                raise ValueError(
                    "expected no Hessian noise without replacement: its second moments do not close; simulate"
                )
            if not self.sampling.noise_variance() > 0:
                raise ValueError("expected at least two steps an epoch without replacement, found one")

    def moments(
        self,
        steps: int,
        *,
        start: float = 0.0,
        buffer: Buffer = "empty",
        schedule: Sequence[float] | None = None,
    ) -> Moments:
        """Mean and variance from a point, an epoch beginning with the first step.

        Args:
            steps: t.
            start: displacement at the start.
            buffer: "empty", as PyTorch begins (the first gradient enters it undamped), or "warm" with the
                noise of earlier steps at the fixed point.
            schedule: learning rate of each step; the constant one of ``dynamics`` otherwise.

        Returns:
            Arrays of shape (steps + 1,); infinite from where they overflow.
        """
        if schedule is not None and len(schedule) < steps:
            raise ValueError(f"expected a learning rate for each of {steps} steps, found {len(schedule)}")
        phases = self.sampling.steps_per_epoch
        mean, covariance = np.zeros(_SIZE), np.zeros((_SIZE, _SIZE))
        mean[_X] = start
        if buffer == "warm":
            covariance[_B, _B] = self._warm_buffer
        means, variances = np.full(steps + 1, np.inf), np.full(steps + 1, np.inf)
        means[0], variances[0] = start, 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for t in range(steps):
                if schedule is None and (t or buffer == "warm" or not self.dynamics.dampening):
                    step = self._epoch[t % phases]
                else:
                    rate = self.dynamics.learning_rate if schedule is None else float(schedule[t])
                    step = self._step(t % phases, rate, first=t == 0 and buffer == "empty")
                covariance = step.move(covariance, self._noise(covariance[_X, _X], mean[_X]))
                mean = step.matrix @ mean
                if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                    break
                means[t + 1], variances[t + 1] = mean[_X], max(covariance[_X, _X], 0.0)
        return Moments(means, variances)

    def variance(
        self,
        steps: int,
        *,
        start: float = 0.0,
        buffer: Buffer = "empty",
        schedule: Sequence[float] | None = None,
    ) -> float:
        """Variance after so many steps: the last of :meth:`moments`."""
        return float(self.moments(steps, start=start, buffer=buffer, schedule=schedule).variance[-1])

    def stationary_variance(self) -> float:
        """Squared weight units, averaged over the steps of an epoch; infinity where nothing is stationary."""
        if self.sampling.is_independent:
            return closed_forms.stationary_variance(
                self.eigenvalue, self.noise_variance, self.dynamics, self.hessian_variance
            )
        if self._settled is None:
            return math.inf
        return float(self._settled[:, _X, _X].mean())

    def mean_squared_displacement(self, lag: int) -> float:
        """MSD over so many steps, averaged over the step of the epoch at which it begins.

        In the stationary state; a mode that has none starts at its critical point, the buffer warm with
        noise. Beyond the upper stability limit it is infinite.
        """
        return float(self.mean_squared_displacements([lag])[0])

    def mean_squared_displacements(self, lags: Sequence[int], starts: int | None = None) -> Array:
        """:meth:`mean_squared_displacement` at several lags, for little more than the longest alone costs.

        Args:
            lags: in steps.
            starts: average over so many steps of the epoch, evenly spaced, instead of all.

        Returns:
            Shape (len(lags),).
        """
        if self.sampling.is_independent and (not self.hessian_variance or self.stability().variance):
            found = [
                closed_forms.mean_squared_displacement(
                    self.eigenvalue, self.noise_variance, lag, self.dynamics, self.hessian_variance
                )
                for lag in lags
            ]
            return np.array(found)
        settled = self._settled
        if settled is None:
            if self.eigenvalue >= closed_forms.stability_limit(self.dynamics):
                return np.full(len(lags), math.inf)
            settled = self._at_critical_point
        phases = len(settled)
        count = phases if starts is None else min(starts, phases)
        chosen = np.arange(count) * phases // count
        covariance = settled[chosen]
        covariance[:, _Y, :] = covariance[:, :, _Y] = 0
        matrices = np.stack([step.matrix for step in self._epoch])
        kicks = np.stack([step.noise for step in self._epoch])
        after = {0: 0.0}
        with np.errstate(over="ignore", invalid="ignore"):
            for t in range(max(lags, default=0)):
                now = (chosen + t) % phases
                noise = self._noise(covariance[:, _X, _X], 0.0)
                forward = matrices[now]
                covariance = forward @ covariance @ forward.transpose(0, 2, 1)
                covariance += kicks[now] * np.reshape(noise, (-1, 1, 1))
                after[t + 1] = float(covariance[:, _Y, _Y].mean())
        found = [after[lag] for lag in lags]
        return np.array([value if math.isfinite(value) else math.inf for value in found])

    def diffusion_coefficient(self) -> float:
        """Long-time D, squared weight units per step: the limit of MSD over twice the lag.

        Zero for a confined mode, ``eta_eff^2 sigma^2 / 2`` for a flat one under independent noise, times the
        ratio that ``sampling`` gives; infinity where the variance grows faster than linearly.
        """
        if self.stability().variance:
            return 0.0
        flat = self.eigenvalue + self.dynamics.coupled_decay == 0 and not self.dynamics.shrinkage
        if not flat or (self.hessian_variance and self.noise_variance):
            return math.inf
        full_step = self.sampling.noise_variance() * self.sampling.batch_size * self.sampling.accumulation
        ratio = self.sampling.diffusion_ratio() / full_step
        return closed_forms.free_diffusion(self.noise_variance, self.dynamics) * ratio

    def stability(self) -> Stability:
        """Limits of the mean and of the variance; sampling without replacement does not move them.

        Hessian noise counts as that of independent full steps.
        """
        low, high = closed_forms.stability_interval(self.dynamics)
        limits = closed_forms.stability_interval(self.dynamics, self.hessian_variance)
        variance = closed_forms.stationary_variance(
            self.eigenvalue, 1.0, self.dynamics, self.hessian_variance
        )
        return Stability(
            mean=low < self.eigenvalue < high,
            variance=math.isfinite(variance),
            mean_limit=closed_forms.stability_limit(self.dynamics),
            variance_limits=limits,
        )

    def langevin(self) -> LangevinMode:
        """The overdamped Langevin equation of the same mode: one unit of time is one step."""
        eta = self.dynamics.effective_learning_rate
        return LangevinMode(
            relaxation=self.dynamics.relaxation(self.eigenvalue),
            kick_variance=eta**2 * self.noise_variance,
            relaxation_variance=eta**2 * self.hessian_variance,
            covariance=eta**2 * self.covariance,
        )

    def _noise(self, variance: Array | float, mean: float) -> Array | float:
        """Variance of a full step's gradient noise, given that of the weight."""
        return self.noise_variance + self.hessian_variance * (variance + mean**2) + 2 * self.covariance * mean

    @cached_property
    def _epoch(self) -> tuple[_Step, ...]:
        rate = self.dynamics.learning_rate
        return tuple(self._step(phase, rate) for phase in range(self.sampling.steps_per_epoch))

    def _step(self, phase: int, rate: float, *, first: bool = False, free: bool = False) -> _Step:
        """The linear map of one optimizer step, its microbatches in turn; ``free`` without curvature."""
        sampling = self.sampling
        sizes, each = sampling.epoch[phase], sampling.accumulation
        unit = sampling.noise_variance()  # of sigma^2 for S^2 = 1
        drawn = phase * each * sampling.batch_size  # all steps before it were full ones
        found = _Step(np.eye(_SIZE), np.zeros((_SIZE, _SIZE)))
        for size in sizes:
            matrix, noise = np.eye(_SIZE), np.zeros((_SIZE, _SIZE))
            kick = np.zeros(_SIZE)
            kick[_G] = 1 / each
            if sampling.replacement or sampling.samples is None:
                noise += np.outer(kick, kick) / (size * unit)
            else:
                left = sampling.samples - drawn
                # The samples left sum to minus those drawn: their mean is expected, the rest is innovation.
                matrix[_G, _C] -= 1 / (each * left)
                matrix[_C, _C] -= size / left
                fresh = sampling.fresh / (size * unit)
                kept = kick.copy()
                kept[_C] = size
                noise += fresh * np.outer(kick, kick)
                noise += (1 - sampling.fresh) / unit * max(1 / size - 1 / left, 0.0) * np.outer(kept, kept)
            drawn += size
            found = found.then(_Step(matrix, noise))
        update = self._update(rate, len(sizes) / each, first=first, free=free)
        if phase == sampling.steps_per_epoch - 1:
            update[_C] = 0
        return found.then(_Step(update, np.zeros((_SIZE, _SIZE))))

    def _update(self, rate: float, weight: float, *, first: bool, free: bool) -> Array:
        """What the optimizer does with the gathered gradient; a partial step has part of the mean one."""
        step = self.dynamics.linear_step(rate, first=first)
        pull = 0.0 if free else self.eigenvalue * weight + self.dynamics.coupled_decay
        decay = 0.0 if free else step.decay
        move = np.zeros(_SIZE)
        move[_X], move[_B], move[_G] = step.kick * pull - decay, step.carry, step.kick
        matrix = np.zeros((_SIZE, _SIZE))
        matrix[_X], matrix[_Y] = move, move
        matrix[_X, _X] += 1
        matrix[_Y, _Y] += 1
        matrix[_B, _X], matrix[_B, _B], matrix[_B, _G] = step.intake * pull, step.memory, step.intake
        matrix[_C, _C] = 1
        return matrix

    @cached_property
    def _settled(self) -> Array | None:
        """Stationary covariance at the start of each step of an epoch, (n, 5, 5); None if there is none."""
        if not self.stability().variance:
            return None
        places = ((_X, _X), (_X, _B), (_B, _B))

        def after_epoch(x: float, xb: float, b: float) -> Array:
            covariance = np.zeros((_SIZE, _SIZE))
            covariance[_X, _X], covariance[_B, _B] = x, b
            covariance[_X, _B] = covariance[_B, _X] = xb
            last = self._path(covariance, self._epoch)[-1]
            return np.array([last[place] for place in places])

        bare = after_epoch(0, 0, 0)
        linear = np.stack([after_epoch(*unit) - bare for unit in np.eye(3)], axis=1)
        if not max(abs(np.linalg.eigvals(linear))) < 1:
            return None
        x, xb, b = np.linalg.solve(np.eye(3) - linear, bare)
        start = np.zeros((_SIZE, _SIZE))
        start[_X, _X], start[_X, _B], start[_B, _X], start[_B, _B] = x, xb, xb, b
        return np.stack(self._path(start, self._epoch)[:-1])

    @cached_property
    def _at_critical_point(self) -> Array:
        """Covariance at each step of an epoch for a weight held at the critical point, (n, 5, 5)."""
        rate = self.dynamics.learning_rate
        free = tuple(self._step(phase, rate, free=True) for phase in range(self.sampling.steps_per_epoch))
        start = np.zeros((_SIZE, _SIZE))
        start[_B, _B] = self._warm_buffer
        found = []
        for step in free:
            start[_X, :] = start[:, _X] = start[_Y, :] = start[:, _Y] = 0
            found.append(start.copy())
            start = step.move(start, self.noise_variance)
        return np.stack(found)

    @cached_property
    def _warm_buffer(self) -> float:
        """Variance of the buffer at the start of an epoch, the weight held at the critical point."""
        rate = self.dynamics.learning_rate
        variances = []
        for before in (0.0, 1.0):
            covariance = np.zeros((_SIZE, _SIZE))
            covariance[_B, _B] = before
            for phase in range(self.sampling.steps_per_epoch):
                step = self._step(phase, rate, free=True)
                covariance = step.move(covariance, self.noise_variance)
            variances.append(float(covariance[_B, _B]))
        return variances[0] / (1 - (variances[1] - variances[0]))

    def _path(self, covariance: Array, steps: Sequence[_Step]) -> list[Array]:
        path = [covariance]
        for step in steps:
            path.append(step.move(path[-1], self._noise(path[-1][_X, _X], 0.0)))
        return path


@dataclass(frozen=True)
class LangevinMode:
    """One mode of the overdamped Langevin equation, per step: the counterpart of :class:`SGDMode`.

    ``dx = -r x dt + sqrt(q + 2 c x + h x^2) dW`` in the sense of Ito, where dt = 1 is one step, a time of
    ``eta_eff``. These are moments of its propagator. Its explicit Euler-Maruyama scheme with that step is SGD
    with Gaussian noise and has the discrete variance, so it is no opponent.

    Attributes:
        relaxation: ``r = eta_eff lambda``, weight decay included.
        kick_variance: ``q = eta_eff^2 sigma^2``.
        relaxation_variance: ``h = eta_eff^2 s^2``.
        covariance: ``eta_eff^2 c``.
    """

    relaxation: float
    kick_variance: float
    relaxation_variance: float = 0.0
    covariance: float = 0.0

    def moments(self, steps: int, *, start: float = 0.0, schedule: Sequence[float] | None = None) -> Moments:
        """Mean and variance from a point.

        Args:
            steps: t.
            start: displacement at the start.
            schedule: learning rate of each step, in units of the one that this mode was made with.
        """
        means, seconds = np.full(steps + 1, start), np.full(steps + 1, start**2)
        with np.errstate(over="ignore", invalid="ignore"):
            for t in range(steps):
                scale = 1.0 if schedule is None else float(schedule[t])
                means[t + 1], seconds[t + 1] = self._propagate(means[t], seconds[t], scale)
            variances = seconds - means**2
        variances[~np.isfinite(variances)] = np.inf
        return Moments(means, variances)

    def variance(self, steps: int, *, start: float = 0.0, schedule: Sequence[float] | None = None) -> float:
        """Variance after so many steps: the last of :meth:`moments`."""
        return float(self.moments(steps, start=start, schedule=schedule).variance[-1])

    def stationary_variance(self) -> float:
        """``q / (2 r - h)``, which is ``eta sigma^2 / (2 lambda)``; infinity where there is none."""
        left = 2 * self.relaxation - self.relaxation_variance
        return self.kick_variance / left if left > 0 else math.inf

    def mean_squared_displacement(self, lag: int) -> float:
        """``2 V (1 - exp(-r lag))`` in the stationary state; from the critical point where there is none."""
        variance = self.stationary_variance()
        if math.isfinite(variance):
            return -2 * variance * math.expm1(-self.relaxation * lag)
        return self.kick_variance * lag * _growth((self.relaxation_variance - 2 * self.relaxation) * lag)

    def diffusion_coefficient(self) -> float:
        """Long-time D per step: ``q / 2`` for a flat mode, zero for a confined one, infinite beyond."""
        if self.stability().variance:
            return 0.0
        flat = self.relaxation == 0 and not self.relaxation_variance
        return self.kick_variance / 2 if flat or not self.kick_variance else math.inf

    def stability(self) -> Stability:
        """No upper limit: ``r > 0`` for the mean, ``2 r > h`` for the variance. Limits are in units of r."""
        floor = self.relaxation_variance / 2
        return Stability(self.relaxation > 0, self.relaxation > floor, math.inf, (floor, math.inf))

    def _propagate(self, mean: float, second: float, scale: float) -> tuple[float, float]:
        """Mean and second moment a step later; rates scale by the learning rate, noise by its square."""
        rate = self.relaxation * scale
        kick, hessian = self.kick_variance * scale**2, self.relaxation_variance * scale**2
        loss = 2 * rate - hessian
        cross = 2 * self.covariance * scale**2 * mean
        # The covariance's share: the mean decays by r, what it feeds by 2 r - h. Nothing times infinity is
        # nothing here.
        fed = cross and cross * _exponential(-rate) * _growth(rate - loss)
        held = second and second * _exponential(-loss)
        return mean and mean * _exponential(-rate), held + (kick and kick * _growth(-loss)) + fed


def _exponential(exponent: float) -> float:
    return math.exp(exponent) if exponent < 700 else math.inf


def _growth(exponent: float) -> float:
    """``(e^z - 1) / z``, 1 at 0, infinite beyond the largest float."""
    if exponent == 0:
        return 1.0
    return math.expm1(exponent) / exponent if exponent < 700 else math.inf


class _Step(NamedTuple):
    """``state' = matrix state + noise`` with the covariance of the noise for ``sigma^2 = 1``."""

    matrix: Array
    noise: Array

    def then(self, later: _Step) -> _Step:
        return _Step(later.matrix @ self.matrix, later.matrix @ self.noise @ later.matrix.T + later.noise)

    def move(self, covariance: Array, variance: Array | float) -> Array:
        return np.asarray(self.matrix @ covariance @ self.matrix.T + variance * self.noise)
