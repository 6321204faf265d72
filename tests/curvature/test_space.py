"""The flat layout of chosen parameters."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from sgd_probe.curvature.space import ParameterFilter, ParameterSpace


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 2)
        self.tied = self.head
        self.temperature = nn.Parameter(torch.tensor(2.0))


ALL = (
    "temperature",
    "encoder.0.weight",
    "encoder.0.bias",
    "encoder.1.weight",
    "encoder.1.bias",
    "head.weight",
    "head.bias",
)


def test_takes_every_trainable_parameter_once() -> None:
    module = Network()
    space = ParameterSpace.of(module)
    assert space.names == ALL
    assert space.size == sum(parameter.numel() for parameter in module.parameters())
    assert space.dtype == torch.float32 and space.device.type == "cpu"
    assert all(a is b for a, b in zip(space.parameters, module.parameters(), strict=True))


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("head.*", {"head.weight", "head.bias"}),
        ("*.bias", {"encoder.0.bias", "encoder.1.bias", "head.bias"}),
        (["head.weight", "*.0.*"], {"head.weight", "encoder.0.weight", "encoder.0.bias"}),
        (("temp*",), {"temperature"}),
        (re.compile(r"\.[01]\."), set(ALL[1:5])),
        (re.compile("^head"), {"head.weight", "head.bias"}),
        (lambda name, parameter: parameter.ndim == 2, {"encoder.0.weight", "head.weight"}),
        (None, set(ALL)),
    ],
)
def test_filters(chosen: ParameterFilter, expected: set[str]) -> None:
    assert set(ParameterSpace.of(Network(), chosen).names) == expected


def test_frozen_parameters_and_those_of_no_optimizer_are_left_out() -> None:
    module = Network()
    module.encoder.requires_grad_(False)
    assert ParameterSpace.of(module).names == ("temperature", "head.weight", "head.bias")
    among = (parameter for parameter in module.head.parameters())
    assert ParameterSpace.of(module, among=among).names == ("head.weight", "head.bias")


@pytest.mark.parametrize("chosen", ["nothing.*", [], re.compile("nothing"), lambda name, parameter: False])
def test_an_empty_choice_is_refused(chosen: ParameterFilter) -> None:
    with pytest.raises(ValueError, match=r"expected parameters to probe.*params"):
        ParameterSpace.of(Network(), chosen)


def test_nothing_trainable_is_refused() -> None:
    with pytest.raises(ValueError, match="requires_grad"):
        ParameterSpace.of(Network().requires_grad_(False))


def test_mixed_precision_is_refused_and_a_part_of_one_precision_is_not() -> None:
    module = Network()
    module.head.double()
    with pytest.raises(ValueError, match=r"one dtype.*float32 on cpu.*float64 on cpu"):
        ParameterSpace.of(module)
    assert ParameterSpace.of(module, "head.*").dtype == torch.float64


def test_parameters_without_a_shape_and_complex_ones_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found weight without a shape: run a batch through lazy"):
        ParameterSpace.of(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"real parameters, found weight complex.*view_as_complex"):
        ParameterSpace.of(nn.Linear(2, 2, dtype=torch.complex64))


def test_flatten_and_split_are_inverse() -> None:
    space = ParameterSpace.of(Network())
    tensors = [torch.randn(parameter.shape) for parameter in space.parameters]
    flat = space.flatten(tensors)
    assert flat.shape == (space.size,)
    for piece, tensor in zip(space.split(flat), tensors, strict=True):
        assert torch.equal(piece, tensor)
        assert piece.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    transposed = space.flatten([t.T.contiguous().T if t.ndim == 2 else t for t in tensors])
    assert torch.equal(transposed, flat)


def test_none_flattens_to_zeros() -> None:
    space = ParameterSpace.of(Network(), "head.*")
    flat = space.flatten([None, torch.ones(2, requires_grad=True)])
    assert flat.tolist() == [0.0] * 6 + [1.0] * 2
    assert not flat.requires_grad


def test_shares_of_the_layers() -> None:
    space = ParameterSpace.of(Network())
    shares = space.layer_shares(torch.randn(space.size))
    assert set(shares) == set(ALL)
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    vector = space.flatten(
        [torch.full_like(p, 1.0 if n == "head.bias" else 0.0) for n, p in module_items(space)]
    )
    assert space.layer_shares(vector, most=1) == {"head.bias": 1.0}
    assert set(space.layer_shares(torch.zeros(space.size)).values()) == {0.0}


def module_items(space: ParameterSpace) -> list[tuple[str, nn.Parameter]]:
    return list(zip(space.names, space.parameters, strict=True))
