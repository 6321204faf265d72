"""All modes at once: moments under a finite set of quadratic minibatch losses, with their Hessians' noise.

Off the diagonal, Hessian noise couples modes: the spread of a flat one is heat for a stiff one. Mean and
covariance still close, whatever the shape of the noise, because every minibatch moves the state linearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sgd_probe.theory.dynamics import SGDDynamics

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class QuadraticEnsemble:
    """Minibatch losses ``L_B = theta.H_B theta / 2 + g_B.theta``, drawn independently with equal chances.

    The state is (theta, buffer), of size 2 k; without momentum the buffer stays zero.

    Attributes:
        hessians: H_B, symmetric, (batches, k, k).
        gradients: g_B at theta = 0, (batches, k).
        dynamics: the optimizer.

    Raises:
        ValueError: shapes that do not fit.
    """

    hessians: Array
    gradients: Array
    dynamics: SGDDynamics

    def __post_init__(self) -> None:
        batches, size = self.gradients.shape if self.gradients.ndim == 2 else (0, 0)
        if not batches or self.hessians.shape != (batches, size, size):
            raise ValueError(
                f"expected Hessians (batches, k, k) and gradients (batches, k), found {self.hessians.shape} "
                f"and {self.gradients.shape}"
            )

    @property
    def size(self) -> int:
        """Number k of modes."""
        return int(self.gradients.shape[1])

    def step(self, mean: Array, second: Array, *, first: bool = False) -> tuple[Array, Array]:
        """One optimizer step; the first gradient enters PyTorch's buffer undamped.

        Args:
            mean: E z of the state, (2 k,).
            second: E z z^T, not centred, (2 k, 2 k).
            first: this is the optimizer's first step.
        """
        maps, shifts = self._first_maps if first else self._maps
        mixed = np.einsum("bij,j,bk->ik", maps, mean, shifts)
        moved = np.einsum("bij,jk,blk->il", maps, second, maps, optimize=True)
        count = len(maps)
        after = (moved + mixed + mixed.T + shifts.T @ shifts) / count
        return maps.mean(0) @ mean + shifts.mean(0), after

    def moments(self, steps: int, start: Array | None = None) -> tuple[Array, Array]:
        """Mean (k,) and covariance (k, k) of the weights after so many steps from a point, buffer empty."""
        mean = np.zeros(2 * self.size)
        if start is not None:
            mean[: self.size] = start
        second = np.outer(mean, mean)
        for t in range(steps):
            mean, second = self.step(mean, second, first=t == 0)
        return self._weights(mean, second)

    def stationary(self) -> tuple[Array, Array]:
        """Mean (k,) and covariance (k, k) of the weights in the stationary state.

        Solves a linear system of size (2 k)^2, or k^2 without momentum: for small k.

        Raises:
            ValueError: there is none; :meth:`variance_radius` is 1 or more.
        """
        radius = self.variance_radius
        if not radius < 1:
            raise ValueError(
                f"expected a variance radius below 1, found {radius:g}: no stationary covariance"
            )
        maps, shifts = self._maps
        alive = 2 * self.size if self.dynamics.momentum else self.size
        maps, shifts = maps[:, :alive, :alive], shifts[:, :alive]
        mean = np.linalg.solve(np.eye(alive) - maps.mean(0), shifts.mean(0))
        mixed = np.einsum("bij,j,bk->ik", maps, mean, shifts) / len(maps)
        source = mixed + mixed.T + shifts.T @ shifts / len(maps)
        second = np.linalg.solve(np.eye(alive**2) - self._squared, source.ravel()).reshape(alive, alive)
        return self._weights(mean, second)

    @cached_property
    def variance_radius(self) -> float:
        """Growth of the second moments per step: below 1 they settle."""
        return float(max(abs(np.linalg.eigvals(self._squared))))

    @cached_property
    def _squared(self) -> Array:
        maps = self._maps[0]
        alive = 2 * self.size if self.dynamics.momentum else self.size
        maps = maps[:, :alive, :alive]
        return np.asarray(np.einsum("bij,bkl->ikjl", maps, maps).reshape(alive**2, alive**2) / len(maps))

    @cached_property
    def _maps(self) -> tuple[Array, Array]:
        return self._moved(first=False)

    @cached_property
    def _first_maps(self) -> tuple[Array, Array]:
        return self._moved(first=True)

    def _moved(self, *, first: bool) -> tuple[Array, Array]:
        """``z' = map z + shift`` of each batch: (batches, 2 k, 2 k) and (batches, 2 k)."""
        step, k = self.dynamics.linear_step(first=first), self.size
        hessians = self.hessians + self.dynamics.coupled_decay * np.eye(k)
        maps = np.zeros((len(hessians), 2 * k, 2 * k))
        maps[:, :k, :k] = (1 - step.decay) * np.eye(k) + step.kick * hessians
        maps[:, :k, k:] = step.carry * np.eye(k)
        maps[:, k:, :k] = step.intake * hessians
        maps[:, k:, k:] = step.memory * np.eye(k)
        return maps, np.concatenate([step.kick * self.gradients, step.intake * self.gradients], axis=1)

    def _weights(self, mean: Array, second: Array) -> tuple[Array, Array]:
        k = self.size
        centre = mean[:k]
        return centre, second[:k, :k] - np.outer(centre, centre)
