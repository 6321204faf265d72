"""Hessians in the coordinates of a diagonal preconditioner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.finite_differences import FiniteDifferenceOperator
from sgd_probe.curvature.hessian import HessianOperator
from sgd_probe.curvature.lanczos import lanczos
from sgd_probe.curvature.selftest import self_test
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import isolated
from tests.helpers.dense import dense_hessian, freeze, largest_angle


def cross_entropy(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batches() -> list[CurvatureBatch]:
    generator = torch.Generator().manual_seed(1)
    sizes = (8, 5)
    return freeze(
        [
            (
                torch.randn(n, 6, generator=generator, dtype=torch.float64),
                torch.randint(0, 3, (n,), generator=generator),
            )
            for n in sizes
        ]
    )


def scales(space: ParameterSpace) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [10 ** torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in space.parameters]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def test_the_hessian_and_its_modes_are_those_of_the_scaled_matrix() -> None:
    module = network()
    space = ParameterSpace.of(module)
    scale = flat(scales(space))
    expected = scale[:, None] * dense_hessian(module, cross_entropy, batches(), space.names) * scale
    space = space.scaled(scales(space))
    with isolated(module), HessianOperator(module, cross_entropy, batches(), space) as operator:
        identity = torch.eye(space.size, dtype=torch.float64)
        found = torch.stack([operator.matvec(row) for row in identity])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
        top = lanczos(operator, 3, identity[:0, 0], tolerance=1e-8)
    values, vectors = torch.linalg.eigh(expected)
    order = values.abs().argsort(descending=True)[:3]
    torch.testing.assert_close(top.eigenvalues, values[order], rtol=1e-8, atol=0)
    assert largest_angle(top.vectors, vectors.T[order]) < 1e-6


def test_gradients_are_scaled_and_finite_differences_agree() -> None:
    module = network()
    plain = ParameterSpace.of(module)
    space = plain.scaled(scales(plain))
    vector = torch.randn(space.size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with isolated(module), HessianOperator(module, cross_entropy, batches(), plain) as operator:
        gradients = [gradient for _, gradient in operator.gradients()]
    with isolated(module), HessianOperator(module, cross_entropy, batches(), space) as operator:
        for (_, found), gradient in zip(operator.gradients(), gradients, strict=True):
            torch.testing.assert_close(found, flat(scales(plain)) * gradient)
        product = operator.matvec(vector)
        assert self_test(operator, torch.Generator().manual_seed(0)).startswith("passed")
    differences = FiniteDifferenceOperator(module, cross_entropy, batches(), space)
    with isolated(module):
        torch.testing.assert_close(
            differences.matvec(vector), product, rtol=0, atol=1e-5 * float(product.norm())
        )


def test_a_preconditioned_step_is_a_plain_one_in_the_scaled_space() -> None:
    module = network()
    plain = ParameterSpace.of(module)
    space = plain.scaled(scales(plain))
    gradient = torch.autograd.grad(cross_entropy(module, batches()[0].thaw(), 0), space.parameters)
    expected = [scale**2 * g for scale, g in zip(scales(plain), gradient, strict=True)]
    for step, change in zip(space.split(space.flatten(gradient)), expected, strict=True):
        torch.testing.assert_close(step, change)


def test_one_number_scales_a_whole_parameter_and_casts_with_it() -> None:
    space = ParameterSpace.of(nn.Linear(3, 2)).scaled([2.0, torch.tensor(0.5)]).cast(torch.float64)
    assert space.scaling is not None and space.scaling.tolist() == [2.0] * 6 + [0.5] * 2
    assert space.scaling.dtype == torch.float64


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([1.0], "one scale for each of 2 parameters, found 1"),
        ([1.0, 0.0], "positive, finite scales for bias"),
        ([1.0, float("nan")], "positive, finite scales for bias"),
        ([torch.ones(3, 2), 1.0], r"shape \(2, 3\) for weight, found \(3, 2\)"),
    ],
)
def test_scales_that_are_none_are_refused(wrong: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterSpace.of(nn.Linear(3, 2)).scaled(wrong)
