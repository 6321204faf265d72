"""Is this operator a Hessian? Asked before the first Lanczos of a run."""

from __future__ import annotations

import torch

from sgd_probe.curvature.hessian import HessianOperator, WrongHessianError
from sgd_probe.curvature.linear_algebra import inner, norm, random_unit

#: Largest tolerated ``|u.Hw - w.Hu|`` relative to ``|w.Hu|``, in units of sqrt(eps).
SYMMETRY_TOLERANCE = 30.0


def check_symmetry(operator: HessianOperator, generator: torch.Generator) -> str:
    """Compare u.Hw with w.Hu for a random u and the w along Hu; two products.

    (With a random w too, both were small beside the products by the root of the number of weights,
    and so was their difference, whatever is wrong with H.)

    Symmetry catches most second derivatives that are silently wrong, not all of them: a part of the
    loss that was detached stays symmetric.

    Returns:
        One line for people.

    Raises:
        WrongHessianError: the operator is not symmetric, so it is no Hessian.
    """
    space = operator.space
    like = torch.empty(0, dtype=space.dtype, device=space.device)
    u = random_unit(operator.size, like, generator)
    image = operator.matvec(u)
    length = norm(image)
    if length == 0:
        return "the Hessian vanishes on random vectors: a loss that is linear in the weights"
    defect = abs(float(inner(u[None], operator.matvec(image / length))) / length - 1.0)
    if defect > SYMMETRY_TOLERANCE * torch.finfo(space.dtype).eps ** 0.5:
        raise WrongHessianError(
            f"expected a symmetric Hessian, found u.Hw and w.Hu apart by {defect:.1e}: some part of the loss "
            "has a wrong second derivative (a custom autograd function, or weight_norm on the CPU)"
        )
    return f"symmetric to {defect:.0e}; not compared with finite differences"
