"""What is known of an optimizer step before its projections are."""

from __future__ import annotations

from typing import NamedTuple

from sgd_probe.dynamics.statistics import Draw
from sgd_probe.engine.optimizers import OptimizerState


class Step(NamedTuple):
    """A step that has been seen and is not in the running sums yet.

    Attributes:
        draw: how its minibatch was drawn.
        optimizer: as it stood.
    """

    draw: Draw
    optimizer: OptimizerState
