"""Tests of the quadratic picture: the force along mixed directions, and the stiff modes all at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sgd_probe.dynamics.regression import regressed_out
from sgd_probe.dynamics.statistics import WindowStatistics

Array = NDArray[np.float64]

#: A slope so many standard errors off 1 speaks against a locally quadratic loss.
_FAR = 4.0


@dataclass(frozen=True)
class ForceTest:
    """Slope of g on u = (Hv).(theta - theta_0) for every mode, shape (k,).

    In a locally quadratic loss it is 1 for any direction v, eigenvector or mixture of many.

    Attributes:
        slope: the slope.
        standard_error: of it.
    """

    slope: Array
    standard_error: Array

    @property
    def fails(self) -> NDArray[np.bool_]:
        """Modes along which the loss is not the quadratic that was measured, shape (k,).

        Small-sample bias raises the slope of slow modes by a part of its error; hence the wide margin.
        """
        with np.errstate(invalid="ignore"):
            return np.asarray(np.abs(self.slope - 1) > _FAR * self.standard_error)


def force_test(statistics: WindowStatistics) -> ForceTest:
    """Regress the used gradient on (1, u) over the steps that had u; NaN where there were none.

    A measured Hv has errors of its own, and of a flat direction they are most of it: each of two independent
    estimates is the other's instrument, ``Cov(u, g) / Cov(u_1, u_2)``, so that the slope is not pulled to
    zero (errors in variables: Fuller, Measurement Error Models, chapter 1).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = regressed_out(statistics.force, 0)
        first, second, gradient = 1, 2, 3
        shared, product = rest[first, second], (rest[first, gradient] + rest[second, gradient]) / 2
        square = (rest[first, first] + rest[second, second] + 2 * shared) / 4
        slope = np.where(shared > 0, product / shared, np.nan)
        left = rest[gradient, gradient] - 2 * slope * product + slope**2 * square
        variance = np.maximum(left, 0.0) / (statistics.informative - 2)
        return ForceTest(np.asarray(slope), np.asarray(np.sqrt(variance * square) / shared))


@dataclass(frozen=True)
class JointStatistics:
    """Sums of products between modes, for the stiff ones: O(k^2) memory.

    Attributes:
        steps: used steps.
        products: of (1, x_1 .. x_k, g_1 .. g_k) with each other, shape (2 k + 1, 2 k + 1).
    """

    steps: int
    products: Array

    @classmethod
    def empty(cls, modes: int) -> JointStatistics:
        """The statistics of no step yet."""
        return cls(0, np.zeros((2 * modes + 1, 2 * modes + 1)))

    def update(self, x: Array, g: Array) -> JointStatistics:
        """Take one step in: displacements before it and gradients used by it, shape (k,) each."""
        now = np.concatenate(([1.0], x, g))
        return JointStatistics(self.steps + 1, self.products + now[:, None] * now)

    def merge(self, other: JointStatistics) -> JointStatistics:
        """The statistics of two stretches on the same modes."""
        return JointStatistics(self.steps + other.steps, self.products + other.products)

    def regress(self) -> JointRegression:
        """``g = A x + b + xi`` over all modes at once.

        Raises:
            ValueError: fewer steps than coefficients, or modes that never moved.
        """
        modes = (len(self.products) - 1) // 2
        freedom = self.steps - modes - 1
        if freedom < 1:
            raise ValueError(
                f"expected more than {modes + 1} steps to regress {modes} modes jointly, found {self.steps}"
            )
        centred = self.products[1:, 1:] - np.outer(self.products[0, 1:], self.products[0, 1:]) / self.steps
        xx, xg, gg = centred[:modes, :modes], centred[:modes, modes:], centred[modes:, modes:]
        try:
            inverse = np.linalg.inv(xx)
        except np.linalg.LinAlgError as error:
            raise ValueError("expected modes that move independently, found some that do not") from error
        matrix = (inverse @ xg).T
        noise = (gg - xg.T @ matrix.T) / freedom
        errors = np.sqrt(np.maximum(np.outer(np.diag(noise), np.diag(inverse)), 0.0))
        return JointRegression(matrix, errors, (noise + noise.T) / 2)


@dataclass(frozen=True)
class JointRegression:
    """The Hessian's block on the stiff subspace as the trajectory feels it.

    Attributes:
        matrix: A, shape (k, k).
        standard_errors: of its entries, shape (k, k).
        noise: covariance of the gradient noise between modes, shape (k, k).
    """

    matrix: Array
    standard_errors: Array
    noise: Array

    @property
    def eigenvalues(self) -> Array:
        """Of the symmetric part, largest first: they do not depend on how the subspace is turned."""
        return np.asarray(np.linalg.eigvalsh((self.matrix + self.matrix.T) / 2)[::-1])

    @property
    def noise_correlation(self) -> Array:
        """Noise correlation between modes, shape (k, k)."""
        scale = np.sqrt(np.diag(self.noise))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.noise / np.outer(scale, scale))
