"""Slices of the loss through a window's start: along which of its directions, and how far."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.hessian import CurvatureError, WrongHessianError
from sgd_probe.curvature.modes import ModeBasis
from sgd_probe.curvature.slices import loss_slices
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.engine.memory import Means
from sgd_probe.engine.optimizers import OptimizerState
from sgd_probe.engine.trained import Trained
from sgd_probe.result import LossSlice

#: A slice of the loss reaches to either side so many times as far as what it has to show: how far the
#: flattest direction diffuses, and where the wall of the stiffest stands out ...
_REACH = 3.0
#: ... from the error of the mean gradient (so many times that error over the curvature): at the end of the
#: slice they are as 4 to 1.
_WALL = 2.5


def slice_loss(
    trained: Trained,
    basis: ModeBasis,
    batches: Sequence[CurvatureBatch],
    space: ParameterSpace,
    means: Means,
    reach: float,
) -> tuple[tuple[LossSlice, ...], str]:
    """The loss along the stiffest and the flattest direction, and what to say where it failed.

    Args:
        trained: the training.
        basis: the directions.
        batches: whose loss it is.
        space: the coordinates of the basis.
        means: how much memory it may take; no graph is kept.
        reach: of :func:`slice_reach`; without one that can be walked there are no slices.

    Raises:
        WrongHessianError: another process has failed for good.
    """
    if not trained.config.slices or not 0 < reach < math.inf:
        return (), ""
    chosen = [0] if (flattest := _flattest(basis)) is None else [0, flattest]
    try:
        with trained.operator(batches, space, dataclasses.replace(means, keep_graphs=False)) as operator:
            found = loss_slices(operator, basis.vectors[chosen], reach)
    except WrongHessianError:
        raise
    except CurvatureError as error:
        return (), f"The loss along its directions could not be measured: {error}."
    names = (basis.modes[index].name for index in chosen)
    return tuple(
        LossSlice(name, s.offsets, s.rises, s.errors, s.loss) for name, s in zip(names, found, strict=True)
    ), ""


def slice_reach(
    basis: ModeBasis,
    variances: Sequence[float],
    of_random: float,
    error_square: float,
    optimizer: OptimizerState,
    steps: int,
) -> float:
    """How far slices go to either side.

    Args:
        basis: without a flat direction, a random one counts.
        variances: of the noise of a step's gradient along each mode; NaN where unknown.
        of_random: that along a random direction.
        error_square: variance of the mean gradient along the stiffest mode; NaN where unknown.
        optimizer: as it stands.
        steps: of the window.
    """
    length = _diffusion_length(basis, variances, of_random, optimizer, steps)
    return _REACH * max(length, _wall(basis, error_square))


def _flattest(basis: ModeBasis) -> int | None:
    flat = [index for index, mode in enumerate(basis.modes) if mode.flat]
    curvature = [mode.certificate.effective_curvature for mode in basis.modes]
    return min(flat, key=curvature.__getitem__) if flat else None


def _wall(basis: ModeBasis, error_square: float) -> float:
    """Where the stiffest direction rises clear of its gradient's error (squared; NaN where unknown: 0)."""
    curvature = abs(basis.modes[0].certificate.eigenvalue)
    return _WALL * math.sqrt(error_square) / curvature if error_square > 0 and curvature > 0 else 0.0


def _diffusion_length(
    basis: ModeBasis, variances: Sequence[float], of_random: float, optimizer: OptimizerState, steps: int
) -> float:
    """How far the flattest direction is expected to diffuse in its window."""
    flattest = _flattest(basis)
    variance = math.nan if flattest is None else variances[flattest]
    if not variance > 0:
        variance = of_random
    return optimizer.effective_learning_rate * math.sqrt(max(variance, 0.0) * steps)
