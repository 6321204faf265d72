"""What qualifies or withholds what is said of a mode, besides the evidence itself."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sgd_probe.theory.closed_forms import SGDDynamics, stability_limit

#: Predictions are withheld above this share of the stability limit: there a 5% error of the eigenvalue
#: changes the stationary variance several times.
STABILITY_MARGIN = 0.9
#: Change of a parameter group's norm over a window that matters where the loss does not depend on its scale.
NORM_CHANGE = 0.1
#: Squared cosine with the weights from which a direction counts as radial.
_RADIAL = 0.5


def near_stability_edge(curvature: float, dynamics: SGDDynamics) -> str:
    """Why no stationary variance should be predicted; "" where it may be.

    Args:
        curvature: of the mode, weight decay left to ``dynamics``.
        dynamics: the optimizer.
    """
    limit = stability_limit(dynamics)
    share = (curvature + dynamics.coupled_decay) / (limit + dynamics.coupled_decay)
    return f"at {share:.0%} of the stability limit: predictions withheld" if share > STABILITY_MARGIN else ""


def changed_norms(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[str, ...]:
    """Marks for parameter groups whose norm changed by more than a tenth during the window.

    Where a normalisation follows, the loss depends on the direction of a group's weights only, and its
    curvature goes with the inverse square of their norm.
    """
    marks = []
    for name, norm in before.items():
        later = after.get(name, math.nan)
        if norm > 0 and abs(later / norm - 1) > NORM_CHANGE:
            marks.append(
                f"the norm of {name} went from {norm:.3g} to {later:.3g}: where a normalisation follows, "
                f"curvatures changed by {(norm / later) ** 2:.2g} times"
                if later > 0
                else f"the norm of {name} went from {norm:.3g} to {later:.3g}"
            )
    return tuple(marks)


def along_symmetry(radial_cosine: float, noise_share: float, min_noise_share: float) -> bool:
    """A direction along the weights themselves without noise: a symmetry of the loss, not a valley.

    Args:
        radial_cosine: cosine of the direction with the weights of the scale-invariant group.
        noise_share: its noise variance over that of a random direction.
        min_noise_share: below it a mode has no noise.
    """
    return radial_cosine**2 > _RADIAL and noise_share <= min_noise_share
