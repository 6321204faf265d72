"""Finite differences beside dense float64 Hessians, and where they are of no use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sgd_probe.curvature.finite_differences import FiniteDifferenceOperator
from sgd_probe.curvature.hessian import CurvatureError, HessianOperator, LossFunction, WrongHessianError
from sgd_probe.curvature.linear_algebra import norm, random_unit
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import isolated
from tests.curvature import obstacles as ob
from tests.helpers.dense import dense_hessian, freeze

SIZES = (16, 5)  # unequal on purpose


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().train()


def columns(operator: FiniteDifferenceOperator) -> Tensor:
    return torch.stack([operator.matvec(row) for row in torch.eye(operator.size, dtype=operator.space.dtype)])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "smooth": lambda: ob.mlp(nn.Tanh()),
    "relu": lambda: ob.mlp(nn.ReLU()),
    "dropout": lambda: nn.Sequential(ob.mlp(nn.Tanh()), nn.Dropout(0.3)),
    "batch norm": lambda: ob.made(ob.image(nn.BatchNorm2d(4), nn.Softplus())),
    "tied": ob.Tied,
    "checkpointing": lambda: ob.Checkpointed(reentrant=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_hessian_in_float64(name: str) -> None:
    module = build(MODELS[name])
    batches, space = freeze([ob.content(size) for size in SIZES]), ParameterSpace.of(module)
    expected = dense_hessian(module, ob.cross_entropy, batches, space.names)
    with (
        isolated(module),
        FiniteDifferenceOperator(module, ob.cross_entropy, batches, space, dtype=torch.float64) as operator,
    ):
        found = columns(operator)
        assert operator.products == operator.size == space.size
        assert operator.samples == sum(SIZES)
        assert operator.disagreement < 1e-4
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_finds_what_double_backward_gets_wrong() -> None:
    module = build(lambda: ob.applied(ob.Detached))
    twin = build(lambda: ob.applied(ob.TwiceDifferentiable))
    batches, space = freeze([ob.content()]), ParameterSpace.of(module)
    expected = dense_hessian(twin, ob.cross_entropy, batches, space.names)
    with isolated(module):
        operator = FiniteDifferenceOperator(module, ob.cross_entropy, batches, space, dtype=torch.float64)
        assert float((columns(operator) - expected).norm() / expected.norm()) < 1e-6


def test_float32_is_good_to_a_thousandth_where_the_loss_is_smooth() -> None:
    module = build(lambda: ob.mlp(nn.Tanh()))
    batches, space = freeze([ob.content()]), ParameterSpace.of(module)
    vector = random_unit(space.size, torch.empty(0), torch.Generator().manual_seed(1))
    with isolated(module):
        exact = HessianOperator(module, ob.cross_entropy, batches, space).matvec(vector)
        operator = FiniteDifferenceOperator(module, ob.cross_entropy, batches, space)
        found = operator.matvec(vector)
    assert found.dtype is torch.float32
    assert norm(found - exact) < 2e-3 * norm(exact)
    assert 0 < operator.disagreement < 1e-2


class Deep(nn.Sequential):
    """Enough units that some change sign within any step that float32 can resolve."""

    def __init__(self) -> None:
        layers = [nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)]
        super().__init__(*layers)


def test_float32_on_relu_networks_says_unreliable() -> None:
    module = build(Deep)
    batches, space = freeze([ob.content(64)]), ParameterSpace.of(module)
    vector = random_unit(space.size, torch.empty(0), torch.Generator().manual_seed(1))
    with isolated(module):
        operator = FiniteDifferenceOperator(module, ob.cross_entropy, batches, space)
        with pytest.raises(CurvatureError, match=r"unreliable: .* to 1e-02, found them .* apart.*float64"):
            operator.matvec(vector)
        double = FiniteDifferenceOperator(module, ob.cross_entropy, batches, space, dtype=torch.float64)
        exact = HessianOperator(module, ob.cross_entropy, batches, space, dtype=torch.float64)
        expected = exact.matvec(vector.double())
        assert norm(double.matvec(vector.double()) - expected) < 1e-6 * norm(expected)


def test_smaller_steps_are_tried_where_two_do_not_agree() -> None:
    module = build(Deep)
    batches, space = freeze([ob.content(64)]), ParameterSpace.of(module)
    vector = random_unit(space.size, torch.empty(0), torch.Generator().manual_seed(1)).double()
    with isolated(module):
        exact = HessianOperator(module, ob.cross_entropy, batches, space, dtype=torch.float64).matvec(vector)
        operator = FiniteDifferenceOperator(
            module, ob.cross_entropy, batches, space, dtype=torch.float64, relative_step=1e-5
        )
        found = operator.matvec(vector)
    assert norm(found - exact) < 1e-4 * norm(exact)


def test_weights_that_are_all_zero_have_a_step() -> None:
    module = build(lambda: nn.Linear(6, 3)).double()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    x, y = ob.content()
    batches, space = freeze([(x.double(), y)]), ParameterSpace.of(module)
    expected = dense_hessian(module, ob.cross_entropy, batches, space.names)
    with isolated(module):
        found = columns(FiniteDifferenceOperator(module, ob.cross_entropy, batches, space))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_that_of_the_loss() -> None:
    module = build(lambda: ob.mlp(nn.Tanh()))
    batches, space = freeze([ob.content(size) for size in SIZES]), ParameterSpace.of(module)
    with isolated(module):
        double = HessianOperator(module, ob.cross_entropy, batches, space, dtype=torch.float64)
        differences = FiniteDifferenceOperator(module, ob.cross_entropy, batches, space, dtype=torch.float64)
        vector = random_unit(space.size, torch.empty(0), torch.Generator().manual_seed(1)).double()
        pairs = zip(double.gradients(), differences.gradients(), batches, strict=True)
        for (weight, expected), (other, found), batch in pairs:
            assert weight == other
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
            slope, rounding = differences.slope(batch, vector)
            assert slope == pytest.approx(float(expected @ vector), rel=1e-6)
            assert 0 < rounding < 1e-6


def test_a_loss_that_reaches_weights_around_the_module_is_refused() -> None:
    module = build(lambda: ob.mlp(nn.Tanh()))
    weights = list(module.parameters())

    def around(module: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return ob.cross_entropy(module, batch, index) + weights[0].square().sum()

    losses: list[LossFunction] = [around]
    for loss in losses:
        operator = FiniteDifferenceOperator(module, loss, freeze([ob.content()]), ParameterSpace.of(module))
        with isolated(module), pytest.raises(WrongHessianError, match="another way to it"):
            operator.matvec(torch.ones(operator.size))
