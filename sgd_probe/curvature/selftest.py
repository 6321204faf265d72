"""Is this operator a Hessian? Asked before the first Lanczos of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sgd_probe.curvature.finite_differences import FiniteDifferenceOperator
from sgd_probe.curvature.hessian import HessianOperator, WrongHessianError
from sgd_probe.curvature.linear_algebra import dot, norm, random_unit
from sgd_probe.curvature.sharded import ShardedDifferenceOperator
from sgd_probe.curvature.space import ParameterSpace

#: Largest tolerated ``|u.Hw - w.Hu|`` relative to ``|w.Hu|``, in units of sqrt(eps).
SYMMETRY_TOLERANCE = 30.0
#: Largest tolerated difference between derivatives and finite differences in float64, relative. Finite
#: differences are ten thousand times better; what is smaller than this drowns in a window's residual.
DIFFERENCE_TOLERANCE = 1e-2
#: A parameter's part of a product is compared relative to its own length, or to this share of the whole.
_LEAST_SHARE = 0.1
#: A gradient is compared with a slope relative to itself, or to what moving the weights by this share of
#: their length makes of it: at a minimum (a copy of a model beside the model) it vanishes.
_LEAST_MOVE = 1e-5
#: Largest tolerated difference between two evaluations of one loss, relative, in units of eps.
_REPEAT_TOLERANCE = 100.0

_WRONG = (
    "some part of the loss has a wrong second derivative: a custom autograd function whose backward is "
    "once_differentiable, leaves torch (numpy) or detaches; a gradient penalty through batch, layer or "
    "instance normalisation; spectral_norm in training mode, which holds fixed what follows the weights; "
    "on the CPU, either weight_norm of torch.nn.utils (right with dim=None; "
    "otherwise compute g * v / v.norm(dim=1, keepdim=True) in the forward pass). Use torch functions there, "
    "give a loss_fn, or choose other layers with `params`"
)
_NO_GRADIENT = (
    "the weights do not follow the slope of the loss, so there is no Hessian for them to move in. A part of "
    "it is held fixed or replaced in the backward pass: a target that is detached or computed under no_grad "
    "from the same weights, layers that the training step freezes itself, a straight-through estimator, "
    "checkpointing with use_reentrant=True (use False). Give a loss_fn whose target comes from a copy of the "
    "weights, or choose with `params` layers that the target does not depend on"
)


def self_test(operator: HessianOperator, generator: torch.Generator) -> str:
    """Ask whether the operator is symmetric, and whether an independent way leads to the same products.

    The independent way is a finite difference of the gradient, on copies of weights, buffers and one
    curvature batch in float64. There, the double backward has to agree with it, and the gradient with
    a difference of the loss. Random numbers are the same at every evaluation. Besides, the loss has to
    be the same on aliases of the weights and on the weights themselves.

    Where processes hold a part of every weight each there is no copy in float64: then the gradient has to
    agree with a difference of the loss along it, in the precision of the weights.

    Of an operator that takes finite differences itself, by the user's word, double backward is no judge: the
    loss may have none, or a wrong one. What has to agree is the gradient with a difference of the loss;
    the products in float64 are the differences of that gradient, where they settle.

    It costs two losses of one piece, two products of the operator and one more of its first batch, and in
    float64, on that batch, one gradient with a product, four gradients (eight where kinks are in the way)
    and two evaluations of the loss; the memory of one graph and of about ten vectors of weights, in float64.
    Call it inside :func:`sgd_probe.isolation.isolated`.

    Args:
        operator: of the live loss.
        generator: source of random vectors.

    Returns:
        One line for people: "passed: ..." or, where the loss cannot be evaluated in float64 or its
        differences do not settle, "unverified: ..." with the reason.

    Raises:
        WrongHessianError: the operator is not the Hessian of the loss.
    """
    symmetry = check_symmetry(operator, generator)
    if isinstance(operator, ShardedDifferenceOperator):
        return f"passed: {symmetry}; {_compare_in_place(operator)}"
    _check_aliases(operator)
    try:
        found = _compare(operator, generator)
    except Exception as error:  # whatever a model does in a precision that it was not written for
        reason = (str(error).strip() or "no message").splitlines()[0].rstrip(".")
        return f"unverified: {symmetry}, but not compared in float64 ({type(error).__name__}: {reason})"
    _check_gradient(found.gradient)
    if found.product > DIFFERENCE_TOLERANCE:
        raise WrongHessianError(
            f"expected Hessian-vector products that finite differences confirm, found them apart by "
            f"{found.product:.0e} in {found.where} (float64): {_WRONG}"
        )
    if isinstance(operator, FiniteDifferenceOperator):
        line = f"passed: {symmetry}; in float64 the gradient is the slope of the loss"
    else:
        line = f"passed: {symmetry}; in float64 finite differences agree to {found.product:.0e}"
    if operator.space.dtype is torch.float64:
        return line
    line += f", and the {str(operator.space.dtype).removeprefix('torch.')} product to {found.rounding:.0e}"
    if found.rounding > DIFFERENCE_TOLERANCE:
        line += " (it draws other random numbers there, or its rounding is that coarse)"
    return line


def _check_aliases(operator: HessianOperator) -> None:
    """Refuse a loss that is another one on aliases of the weights, unless no two evaluations agree."""
    first = operator.losses_on_aliases_and_weights()
    if first is None or _repeats(operator, *first):
        return
    second = operator.losses_on_aliases_and_weights()
    if second is not None and _repeats(operator, first[0], second[0]):
        raise WrongHessianError(
            f"expected the same loss on the weights and on aliases of them, found {first[1]:.6g} and "
            f"{first[0]:.6g}: the training step asks which object a parameter is (a set or a dictionary of "
            "parameters, `is`, `id`). Let it go by names or attributes of parameters, or give a loss_fn"
        )


def _repeats(operator: HessianOperator, one: float, other: float) -> bool:
    return abs(one - other) <= _REPEAT_TOLERANCE * torch.finfo(operator.space.dtype).eps * abs(one)


def _check_gradient(gap: float) -> None:
    if gap > DIFFERENCE_TOLERANCE:
        raise WrongHessianError(
            "expected the gradient of the loss, found one that a difference of the loss contradicts by "
            f"{gap:.0e}: {_NO_GRADIENT}"
        )


def _compare_in_place(operator: ShardedDifferenceOperator) -> str:
    """Compare the gradient of a batch with a difference of the loss along it, where that is longest."""
    _, gradient = next(operator.gradients())
    length = norm(gradient, operator.space.reduce)
    if length == 0:
        return "the gradient of the first batch vanishes"
    slope, rounding = operator.slope(operator.batches[0], gradient.div_(length))
    _check_gradient(max(abs(slope - length) - rounding, 0.0) / length)
    return f"the gradient is the slope of the loss, to {abs(slope / length - 1):.0e} along itself"


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
    reduce = space.reduce
    u = random_unit(operator.size, like, generator, reduce)
    image = operator.matvec(u)
    length = norm(image, reduce)
    if length == 0:
        return "the Hessian vanishes on random vectors: a loss that is linear in the weights"
    defect = abs(dot(u, operator.matvec(image / length), reduce) / length - 1.0)
    if defect > SYMMETRY_TOLERANCE * torch.finfo(space.dtype).eps ** 0.5:
        raise WrongHessianError(
            f"expected a symmetric Hessian, found u.Hw and w.Hu apart by {defect:.0e}: "
            f"{_NO_GRADIENT if isinstance(operator, FiniteDifferenceOperator) else _WRONG}"
        )
    which = "finite differences, " if isinstance(operator, FiniteDifferenceOperator) else ""
    return f"{which}symmetric to {defect:.0e}"


@dataclass(frozen=True)
class _Comparison:
    """Relative differences along a random vector on one batch.

    Attributes:
        gradient: gradient against a difference of the loss, over a typical component of the gradient.
        product: double backward against a finite difference of the gradient, both in float64; the largest
            over the parameters.
        where: the parameter of that largest difference.
        rounding: the operator's own product against the one in float64; more than rounding where random
            numbers are drawn in the precision of the weights.
    """

    gradient: float
    product: float
    where: str
    rounding: float


def _compare(operator: HessianOperator, generator: torch.Generator) -> _Comparison:
    module, loss, space, batch = operator.module, operator.loss, operator.space, operator.batches[0]
    like = torch.empty(0, dtype=space.dtype, device=space.device)
    vector = random_unit(operator.size, like, generator)
    _, own = next(operator.matvec_per_batch(vector))
    direction = vector.double()
    direction[_held_still(operator)] = 0
    differences = FiniteDifferenceOperator(module, loss, [batch], space, dtype=torch.float64)
    expected = differences.matvec(direction)
    if isinstance(operator, FiniteDifferenceOperator):
        _, gradient = next(differences.gradients())
        product = expected
    else:
        with HessianOperator(module, loss, [batch], space, dtype=torch.float64) as exact:
            _, gradient = next(exact.gradients())
            product = exact.matvec(direction)
    slope, rounding = differences.slope(batch, direction)
    apart = abs(slope - dot(gradient, direction)) - rounding
    moved = differences.step(direction, _LEAST_MOVE) * norm(expected)
    gaps = _gaps(space, product, expected, differences.rounding)
    where = max(gaps, key=gaps.__getitem__)
    return _Comparison(
        gradient=_ratio(max(apart, 0.0), max(norm(gradient) / math.sqrt(operator.size), moved)),
        product=gaps[where],
        where=where,
        rounding=_ratio(norm(own.double() - product), norm(product)),
    )


def _held_still(operator: HessianOperator) -> Tensor:
    """Where embeddings keep the row of their ``padding_idx``: a mask over all weights.

    Autograd gives such a row no gradient, whatever the loss says of it. The other weights have a Hessian all
    the same, which differences along the row know nothing of. (A row that is tied to another layer gets a
    part of its gradient, and stays in.)
    """
    module, space = operator.module, operator.space
    held = torch.zeros(space.size, dtype=torch.bool, device=space.device)
    where = {id(parameter): part for parameter, part in zip(space.parameters, space.slices, strict=True)}
    for table in module.modules():
        if isinstance(table, nn.Embedding | nn.EmbeddingBag) and table.padding_idx is not None:
            part = where.get(id(table.weight))
            if part is not None:
                held[part].view(table.weight.shape)[table.padding_idx] = True
    if held.any():
        _, gradient = next(operator.gradients())
        held &= gradient == 0
    return held


def _gaps(space: ParameterSpace, found: Tensor, expected: Tensor, rounding: float) -> dict[str, float]:
    """Difference of two products at each parameter, relative as :data:`_LEAST_SHARE` says.

    What may be rounding is within the tolerance: of a loss that is nearly linear, a difference is little
    else.
    """
    least = max(_LEAST_SHARE * norm(expected), rounding / DIFFERENCE_TOLERANCE)
    return {
        name: _ratio(norm(found[where] - expected[where]), max(norm(expected[where]), least))
        for name, where in zip(space.names, space.slices, strict=True)
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)
