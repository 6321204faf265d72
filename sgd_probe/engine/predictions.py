"""What the theory predicts for the modes of a window, where it covers the optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sgd_probe.curvature.modes import Mode
from sgd_probe.dynamics.guards import near_stability_edge
from sgd_probe.dynamics.statistics import WindowStatistics
from sgd_probe.engine.optimizers import OptimizerState
from sgd_probe.engine.sampling import Sampling
from sgd_probe.theory import closed_forms
from sgd_probe.theory.closed_forms import SGDDynamics
from sgd_probe.theory.mode import SGDMode
from sgd_probe.theory.sampling import MinibatchSampling

Array = NDArray[np.float64]

#: Epochs of more steps are followed one by one no longer, and over so few displacements hardly matter.
_LONGEST_EPOCH = 1_000
#: An average over the step of the epoch at which a displacement begins takes so many of them.
_STARTS = 24


@dataclass(frozen=True)
class Predictions:
    """The theory at the rates of one window.

    Attributes:
        dynamics: of the optimizer; None where the theory does not cover it.
        sampling: how minibatches are drawn.
        steps: of the window.
    """

    dynamics: SGDDynamics | None
    sampling: MinibatchSampling
    steps: int

    @classmethod
    def of(cls, statistics: WindowStatistics, optimizer: OptimizerState, sampling: Sampling) -> Predictions:
        """Under a schedule: the rate with which the two clocks of the window agree."""
        steps = statistics.steps
        if optimizer.withheld or optimizer.unpredicted or not statistics.diffusion_clock > 0:
            return cls(None, MinibatchSampling(), steps)
        effective = statistics.diffusion_clock / statistics.confinement_clock
        rate = effective * (1 - optimizer.momentum) / (1 - optimizer.dampening)
        draws = sampling.theory()
        if draws.steps_per_epoch > _LONGEST_EPOCH:
            draws = MinibatchSampling()
        return cls(optimizer.dynamics(rate), draws, steps)

    def near_edge(self, curvature: float) -> str:
        """Why nothing is predicted for a mode so stiff; "" where it is."""
        return "" if self.dynamics is None else near_stability_edge(curvature, self.dynamics)

    def covers(self, curvature: float) -> bool:
        """The theory has something to say of a mode of this curvature."""
        return self.dynamics is not None and math.isfinite(curvature) and not self.near_edge(curvature)

    def displacements(self, curvature: float, noise: float, lags: Sequence[int]) -> tuple[Array, Array]:
        """Mean squared displacements at some lags: by the discrete theory, and by the Langevin equation.

        Args:
            curvature: weight decay included.
            noise: noise variance of a step's gradient.
            lags: in steps.

        Returns:
            Two arrays of shape (len(lags),), NaN where nothing is predicted.
        """
        nothing = np.full(len(lags), math.nan)
        if not (self.covers(curvature) and noise >= 0):
            return nothing, nothing
        assert self.dynamics is not None
        mode = SGDMode(curvature, noise, self.dynamics, self.sampling)
        langevin = [
            closed_forms.langevin_mean_squared_displacement(curvature, noise, lag, self.dynamics)
            for lag in lags
        ]
        return mode.mean_squared_displacements(lags, starts=_STARTS), np.array(langevin)

    def growth_ratio(self, mode: Mode, decay: float) -> float:
        """Predicted variance after the window over that of free diffusion, as of independent draws.

        A direction that is no eigenvector is a mixture; its noise follows its curvature.
        """
        if self.dynamics is None or not self.steps:
            return math.nan
        if mode.quadrature is None:
            return closed_forms.growth_ratio(mode.certificate.eigenvalue + decay, self.steps, self.dynamics)
        nodes, weights = mode.quadrature.nodes.tolist(), mode.quadrature.weights.tolist()
        noise = [abs(node) * weight for node, weight in zip(nodes, weights, strict=True)]
        ratios = [closed_forms.growth_ratio(node + decay, self.steps, self.dynamics) for node in nodes]
        total = sum(noise)
        return sum(n * r for n, r in zip(noise, ratios, strict=True)) / total if total > 0 else math.nan
