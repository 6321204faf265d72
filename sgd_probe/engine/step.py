"""What is known of an optimizer step before its projections are."""

from __future__ import annotations

from typing import NamedTuple

from sgd_probe.dynamics.statistics import Draw


class Step(NamedTuple):
    """A step that has been seen and is not in the running sums yet.

    Attributes:
        draw: how its minibatch was drawn.
        learning_rate: nominal.
        effective_learning_rate: momentum included.
        taken: it had a gradient; the projector keeps its vectors.
        usable: what its weight decay pulled at is known.
    """

    draw: Draw
    learning_rate: float
    effective_learning_rate: float
    taken: bool
    usable: bool
