"""Least squares from sums of products, for many modes at once.

A step has the columns (1, t, x, g); what is here works on their products summed over steps, shape (4, 4, k),
and never sees a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Places of the columns, and their number.
ONE, TIME, X, GRADIENT = range(4)
COLUMNS = 4
#: What is regressed out before x: a level, or a level and a trend.
AHEAD: dict[bool, tuple[int, ...]] = {False: (ONE,), True: (ONE, TIME)}


@dataclass(frozen=True)
class Regression:
    """Slope of g on x for every mode, shape (k,).

    Attributes:
        slope: the slope, a curvature.
        standard_error: of the slope.
        t: slope over standard error.
        variance: residual variance, the noise variance.
    """

    slope: Array
    standard_error: Array
    t: Array
    variance: Array


def least_squares(products: Array, steps: float, ahead: Sequence[int] = (ONE,), extra: int = 0) -> Regression:
    """Slope of g on x beside other columns.

    Args:
        products: sums of products of (1, t, x, g), shape (4, 4, k).
        steps: how many steps went in.
        ahead: the other columns, by place.
        extra: degrees of freedom that were spent elsewhere.
    """
    rest = products
    for place in ahead:
        rest = regressed_out(rest, place)
    xx, xg, gg = rest[X, X], rest[X, GRADIENT], rest[GRADIENT, GRADIENT]
    freedom = steps - len(ahead) - 1 - extra
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        slope = xg / xx
        # A mode that never moved has no slope; all of its gradient's variance is noise.
        variance = np.maximum(gg - np.where(xx > 0, slope * xg, 0.0), 0.0) / freedom
        error = np.sqrt(variance / xx)
        return Regression(slope=slope, standard_error=error, t=slope / error, variance=variance)


def regressed_out(products: Array, place: int) -> Array:
    """The products of what is left of every column once one of them is regressed out."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = np.where(products[place, place] > 0, products[place] / products[place, place], 0.0)
    return np.asarray(products - products[:, place, None] * share)


def prewhitened(products: Array, lagged: Array, ends: Array, correlation: Array) -> Array:
    """Products as of steps whose noise, ``AR(1)`` with this correlation, has been made white.

    The exact Gaussian likelihood of an AR(1) process has a tridiagonal inverse covariance, so that only the
    products with the step before and those of the two ends are needed.

    Args:
        products: shape (4, 4, k).
        lagged: products of a step (first axis) with the next (second axis), shape (4, 4, k).
        ends: products of the first and the last step with themselves, added up, shape (4, 4, k).
        correlation: of the noise of successive steps, shape (k,).
    """
    both = lagged + lagged.swapaxes(0, 1)
    return np.asarray(products - correlation * both + correlation**2 * (products - ends))
