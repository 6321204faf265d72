"""The loss along a line: exact on a quadratic loss, and without a trace in the module."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.hessian import CurvatureError, HessianOperator
from sgd_probe.curvature.slices import SIDE_POINTS, Slice, loss_slices
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import isolated
from tests.helpers.quadratic import Quadratic, loss

CURVATURES = (8.0, 1.0, 0.01)


def sliced(
    module: nn.Module, axis: int, reach: float, batches: int = 4, scales: float | None = None
) -> tuple[Slice, list[torch.Tensor]]:
    """The slice along a coordinate, and the batches that it was taken on."""
    assert isinstance(module, Quadratic)
    generator = torch.Generator().manual_seed(3)
    drawn = [module.draw(generator) for _ in range(batches)]
    frozen = [CurvatureBatch.freeze(batch, index, index) for index, batch in enumerate(drawn)]
    space = ParameterSpace.of(module)
    if scales is not None:
        space = space.scaled([scales])
    axes = torch.eye(len(CURVATURES), dtype=torch.float64)
    with isolated(module, []), HessianOperator(module, loss, frozen, space) as operator:
        first, found = loss_slices(operator, axes[[0, axis]], reach)
    assert first.loss == found.loss
    return found, drawn


@pytest.mark.parametrize("axis", range(len(CURVATURES)))
@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_parabola_with_the_gradient_of_the_batches(axis: int, scale: float | None) -> None:
    module = Quadratic(CURVATURES, start=[0.3, -0.2, 0.1])
    found, drawn = sliced(module, axis, 2.0, scales=scale)
    assert len(found.offsets) == 2 * SIDE_POINTS + 1
    assert found.offsets == pytest.approx([-2, -4 / 3, -2 / 3, 0, 2 / 3, 4 / 3, 2])
    noises = torch.stack([batch.mean(0)[axis] * math.sqrt(8) for batch in drawn])
    here = float(module.weight[axis].detach())
    for offset, rise, error in zip(found.offsets, found.rises, found.errors, strict=True):
        moved = offset * (1.0 if scale is None else scale)
        curved = CURVATURES[axis] * (moved * here + moved**2 / 2)
        assert rise == pytest.approx(curved + moved * float(noises.mean()), abs=1e-12)
        assert error == pytest.approx(abs(moved) * float(noises.std()) / 2, abs=1e-12)
    losses = [float(module.loss(batch).detach()) for batch in drawn]
    assert found.loss == pytest.approx(sum(losses) / len(losses))


def test_one_batch_has_no_error() -> None:
    found, _ = sliced(Quadratic(CURVATURES), 0, 1.0, batches=1)
    assert all(math.isnan(error) for offset, error in zip(found.offsets, found.errors, strict=True) if offset)


def test_no_weight_is_written_to_and_nothing_is_left_behind() -> None:
    module = Quadratic(CURVATURES, start=[0.3, -0.2, 0.1])
    version, before = module.weight._version, copy.deepcopy(module.state_dict())
    sliced(module, 0, 1.0)
    assert module.weight._version == version and module.weight.grad is None
    assert torch.equal(module.weight, before["weight"])


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(CurvatureError, match="finite loss"):
        sliced(Quadratic(CURVATURES), 0, 1e200)


@pytest.mark.parametrize("reach", [0.0, -1.0, math.inf, math.nan])
def test_a_line_without_length_is_refused(reach: float) -> None:
    with pytest.raises(ValueError, match="positive, finite reach"):
        sliced(Quadratic(CURVATURES), 0, reach)
