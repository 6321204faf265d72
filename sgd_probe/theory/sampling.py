"""How minibatches are drawn, and what it does to the noise of successive steps.

Without replacement every sample is seen once an epoch: the noise of an epoch sums to zero over its samples,
so that batches of one epoch correlate by ``-1 / (n - 1)`` and a flat mode comes back (finite-population
sampling: Cochran, Sampling Techniques, chapter 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MinibatchSampling:
    """How the loader draws, in PyTorch's words.

    ``S^2`` below is the variance over samples of ``v.g_i``, with N - 1 in its denominator (N with
    replacement).

    Attributes:
        samples: N of the data set; None for an endless stream of independent batches.
        batch_size: B.
        replacement: every sample is drawn from all N (``RandomSampler(replacement=True)``).
        drop_last: leave out the partial last batch. PyTorch's default keeps it; its loss is a mean over fewer
            samples.
        fresh: share of S^2 that is drawn anew each time a sample is seen (augmentation, dropout), in [0, 1].
        accumulation: A microbatches a step. Those left over at the epoch's end make a step of their own with
            the loss still over A, as Lightning does.

    Raises:
        ValueError: a value is outside its range, or the epoch has no step.
    """

    samples: int | None = None
    batch_size: int = 1
    replacement: bool = True
    drop_last: bool = False
    fresh: float = 0.0
    accumulation: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, found {getattr(self, name)}")
        if not 0 <= self.fresh <= 1:
            raise ValueError(f"expected fresh in [0, 1], found {self.fresh}")
        if self.samples is None:
            if not self.replacement:
                raise ValueError("expected the number of samples: sampling without replacement depends on it")
            return
        if self.samples < (self.batch_size if self.drop_last else 1):
            raise ValueError(
                f"expected at least one batch of {self.batch_size}, found {self.samples} samples"
            )

    @property
    def is_independent(self) -> bool:
        """Successive steps have independent noise of one variance."""
        full = (self.batch_size,) * self.accumulation
        return self.replacement and all(step == full for step in self.epoch)

    @property
    def remainder(self) -> int:
        """Samples in the partial last batch, or left out with it; 0 if there is none."""
        return 0 if self.samples is None else self.samples % self.batch_size

    @property
    def epoch(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of the microbatches of each step of an epoch; one full step for a stream."""
        if self.samples is None:
            return ((self.batch_size,) * self.accumulation,)
        sizes = [self.batch_size] * (self.samples // self.batch_size)
        if self.remainder and not self.drop_last:
            sizes.append(self.remainder)
        each = self.accumulation
        return tuple(tuple(sizes[i : i + each]) for i in range(0, len(sizes), each))

    @property
    def steps_per_epoch(self) -> int:
        """n, partial steps included; 1 for a stream."""
        return len(self.epoch)

    def noise_variance(self, sample_variance: float = 1.0) -> float:
        """``sigma^2`` of a full step from ``S^2``: ``(S^2 / A B) (1 - A B / N)`` without replacement."""
        size = self.batch_size * self.accumulation
        if self.replacement or self.samples is None:
            return sample_variance / size
        left = max(1 - size / self.samples, 0.0)
        return sample_variance / size * ((1 - self.fresh) * left + self.fresh)

    def diffusion_ratio(self) -> float:
        """D of a flat mode over that of independent full steps, ``sigma^2 = S^2 / (A B)``.

        With a remainder r of N, without replacement:

        - dropped: ``(r / N)``, and ``f + (1 - f) r / N`` with a fresh share f;
        - kept, mean-reduced over its b = r samples: ``(B / b) (1 - b / B)^2 (1 - b / N) / n``.

        The sum of an epoch's noise has that variance, and epochs are independent. Zero where N is a multiple
        of B and nothing is fresh: a flat mode does not diffuse.
        """
        if self.samples is None:
            return 1.0
        size, total, rest = self.batch_size, self.samples, self.remainder
        batches = total // size
        inverse = batches / size + (1 / rest if rest and not self.drop_last else 0.0)
        if self.replacement:
            summed = inverse
        else:
            if self.drop_last:
                fixed = (batches * size) * (rest / total) / size**2
            else:
                fixed = rest * (1 - rest / total) * (1 / rest - 1 / size) ** 2 if rest else 0.0
            summed = (1 - self.fresh) * fixed + self.fresh * inverse
        return summed * size / (self.accumulation * self.steps_per_epoch)


def bridge_variance(noise_variance: float, step: int, steps_per_epoch: int, learning_rate: float) -> float:
    """Variance of a flat mode m steps into an epoch of n: ``eta^2 sigma^2 m (n - m) / (n - 1)``."""
    m, n = step, _several(steps_per_epoch)
    return learning_rate**2 * noise_variance * m * (n - m) / (n - 1)


def saturated_displacement(noise_variance: float, steps_per_epoch: int, learning_rate: float) -> float:
    """MSD of a flat mode beyond an epoch, from a random step of it: ``eta^2 sigma^2 (n + 1) / 3``."""
    return learning_rate**2 * noise_variance * (_several(steps_per_epoch) + 1) / 3


def epoch_factor(correlations: Sequence[float]) -> float:
    """F: variance of a confined mode without replacement over that with independent batches.

    ``F = 1 - 2 / (n - 1) sum_{j=1}^{n-1} (1 - j / n) rho_j``, for any linear dynamics, averaged over the
    steps of an epoch of n equal batches; ``rho_j`` is the stationary autocorrelation under independent
    noise. Each pair of kicks j steps apart falls into one epoch with probability ``1 - j / n`` and
    correlates by ``-1 / (n - 1)`` there.

    Args:
        correlations: ``rho_1 ... rho_{n-1}``.
    """
    n = len(correlations) + 1
    _several(n)
    return 1 - 2 / (n - 1) * math.fsum((1 - j / n) * rho for j, rho in enumerate(correlations, start=1))


def plain_epoch_factor(held: float, steps_per_epoch: int) -> float:
    """F of plain SGD, ``rho_j = a^j``: ``1 - 2 a [n (1 - a) - (1 - a^n)] / (n (n - 1) (1 - a)^2)``.

    A mode is confined by the sampling rather than by curvature below about ``eta lambda = 3 / (n + 1)``.

    Args:
        held: ``a = 1 - eta lambda``, in (-1, 1).
        steps_per_epoch: n.
    """
    n = _several(steps_per_epoch)
    if not -1 < held < 1:
        raise ValueError(f"expected a = 1 - eta lambda in (-1, 1), found {held}")
    lost = 1 - held
    return 1 - 2 * held * (n * lost - (1 - held**n)) / (n * (n - 1) * lost**2)


def _several(steps: int) -> int:
    if steps < 2:
        raise ValueError(f"expected at least two steps an epoch, found {steps}: with one there is no noise")
    return steps
