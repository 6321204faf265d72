"""Curvature batches in pieces: the same Hessian where the loss is a mean over samples, refused elsewhere."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe.curvature.finite_differences import FiniteDifferenceOperator
from sgd_probe.curvature.hessian import (
    CurvatureError,
    HessianOperator,
    LossFunction,
    gradient_noise_trace,
    measure_gradient,
)
from sgd_probe.curvature.linear_algebra import norm, random_unit
from sgd_probe.curvature.microbatches import check_pieces, cut
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import isolated
from tests.curvature import obstacles as ob
from tests.helpers.dense import dense_hessian, freeze


def build(make: Callable[[], nn.Module] = lambda: ob.mlp(nn.Tanh())) -> nn.Module:
    torch.manual_seed(0)
    return make().train()


def nested(samples: int, seed: int = 3) -> dict[str, Any]:
    """Inputs, a weight of every sample, labels, names and a temperature, in one nested batch."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(samples, 6, generator=generator, dtype=torch.float64),
        "targets": (torch.randint(3, (samples,), generator=generator), [str(i) for i in range(samples)]),
        "extra": {"weights": np.linspace(0.5, 1.5, samples), "temperature": torch.tensor(1.7)},
        "flag": True,
    }


def weighted(module: nn.Module, batch: Any, index: int) -> Tensor:
    labels, names = batch["targets"]
    assert len(names) == len(labels) and batch["flag"]
    logits = module(batch["x"]) / batch["extra"]["temperature"]
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * torch.from_numpy(batch["extra"]["weights"])).mean()


class TestCut:
    def test_pieces_hold_all_samples_in_order(self) -> None:
        (batch,) = freeze([nested(11)])
        pieces = cut(batch, 4)
        assert [piece.samples for piece in pieces] == [4, 4, 3]
        assert torch.equal(torch.cat([piece.content["x"] for piece in pieces]), batch.content["x"])
        names = [name for piece in pieces for name in piece.content["targets"][1]]
        assert names == [str(i) for i in range(11)]
        assert np.concatenate([p.content["extra"]["weights"] for p in pieces]).tolist() == pytest.approx(
            np.linspace(0.5, 1.5, 11)
        )
        assert all(float(piece.content["extra"]["temperature"]) == pytest.approx(1.7) for piece in pieces)
        assert all(piece.content["flag"] is True and piece.index == batch.index for piece in pieces)
        assert len(batch.content["x"]) == 11, "the batch itself is left as it is"

    def test_every_piece_draws_numbers_of_its_own_the_same_every_time(self) -> None:
        batches = freeze([nested(64), nested(64)])
        seeds = [piece.seed for batch in batches for piece in cut(batch, 2)]
        assert seeds == [piece.seed for batch in batches for piece in cut(batch, 2)]
        assert len({*seeds, *(batch.seed for batch in batches)}) == 64 + 2

    @pytest.mark.parametrize("size", [None, 11, 12])
    def test_what_is_small_enough_stays_whole(self, size: int | None) -> None:
        (batch,) = freeze([nested(11)])
        assert cut(batch, size) == (batch,)

    def test_structures_stay_what_they_are(self) -> None:
        class Pair(NamedTuple):
            x: Tensor
            y: Tensor

        @dataclasses.dataclass(frozen=True)
        class Record:
            pair: Pair
            mask: Tensor

        ordered = collections.OrderedDict(a=torch.arange(5))
        shared = collections.UserDict(a=torch.arange(5))
        record = Record(Pair(torch.arange(5), torch.ones(5, 2)), torch.arange(5))
        (batch,) = freeze([(record, ordered, shared, [torch.arange(5)], None)])
        first, last = cut(batch, 3)
        for piece, expected in ((first, [0, 1, 2]), (last, [3, 4])):
            found, mapping, user, listed, nothing = piece.content
            assert isinstance(found, Record) and isinstance(found.pair, Pair)
            assert isinstance(mapping, collections.OrderedDict) and isinstance(user, collections.UserDict)
            held = (found.pair.x, found.mask, mapping["a"], user["a"], listed[0])
            assert all(tensor.tolist() == expected for tensor in held)
            assert found.pair.y.shape == (len(expected), 2) and nothing is None
        assert len(batch.content[1]["a"]) == len(batch.content[2]["a"]) == 5

    def test_a_tensor_of_another_length_is_refused_by_name(self) -> None:
        (batch,) = freeze([{"x": torch.zeros(6, 2), "graph": {"edges": torch.zeros(9, 2)}}])
        with pytest.raises(
            CurvatureError, match=r"6 samples .* found batch\['graph'\]\['edges'\] of shape \(9, 2\)\. Leave"
        ):
            cut(batch, 2)

    def test_what_has_no_known_structure_is_refused(self) -> None:
        class Opaque:
            x = torch.zeros(6)

        (batch,) = freeze([(torch.zeros(6), Opaque())])
        with pytest.raises(CurvatureError, match=r"found batch\[1\] to be a Opaque.*microbatch=None"):
            cut(batch, 2)


class TestOperator:
    @pytest.mark.parametrize("retain", [True, False])
    @pytest.mark.parametrize("size", [1, 4, 5])
    def test_equals_the_dense_hessian(self, size: int, retain: bool) -> None:
        module = build().double()
        batches, space = freeze([nested(11), nested(6, seed=4), nested(3, seed=5)]), ParameterSpace.of(module)
        expected = dense_hessian(module, weighted, batches, space.names)
        with (
            isolated(module),
            HessianOperator(module, weighted, batches, space, retain, microbatch=size) as operator,
        ):
            found = torch.stack([operator.matvec(row) for row in torch.eye(space.size, dtype=torch.float64)])
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
            pieces = sum(-(-samples // size) for samples in (11, 6, 3))
            assert len(operator._graphs) == (pieces if retain else 0)
            assert operator.products == space.size

    @pytest.mark.parametrize("kind", [HessianOperator, FiniteDifferenceOperator])
    def test_batches_stay_batches(self, kind: type[HessianOperator]) -> None:
        """Noise is that between training batches: pieces must not show."""
        module = build().double()
        batches, space = freeze([nested(11), nested(6, seed=4), nested(6, seed=5)]), ParameterSpace.of(module)
        vector = random_unit(
            space.size, torch.empty(0, dtype=torch.float64), torch.Generator().manual_seed(1)
        )
        with isolated(module):
            whole = HessianOperator(module, weighted, batches, space)
            pieces = kind(module, weighted, batches, space, microbatch=4)
            tight = 1e-10 if kind is HessianOperator else 1e-5
            for found, expected, rtol in (
                (pieces.gradients(), whole.gradients(), 1e-10),
                (pieces.matvec_per_batch(vector), whole.matvec_per_batch(vector), tight),
            ):
                pairs = list(zip(found, expected, strict=True))
                assert [found[0] for found, _ in pairs] == [11 / 23, 6 / 23, 6 / 23]
                for (_, a), (_, b) in pairs:
                    assert norm(a - b) < rtol * norm(b)
            assert gradient_noise_trace(pieces) == pytest.approx(gradient_noise_trace(whole), rel=1e-9)
            product = whole.matvec(vector)
            assert norm(pieces.matvec(vector) - product) < tight * norm(product)

    def test_dropout_draws_anew_in_every_piece_and_the_same_every_time(self) -> None:
        module = build(lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)))
        batch = (torch.ones(8, 6), torch.zeros(8, 3))
        drawn: list[Tensor] = []

        def loss(module: nn.Module, batch: Any, index: int) -> Tensor:
            output = cast(Tensor, module(batch[0]))
            drawn.append((output == 0).detach())
            return F.mse_loss(output, batch[1])

        space = ParameterSpace.of(module)
        with isolated(module), HessianOperator(module, loss, freeze([batch]), space, microbatch=4) as first:
            next(first.gradients())
            with HessianOperator(module, loss, freeze([batch]), space, microbatch=4) as second:
                next(second.gradients())
        assert not torch.equal(drawn[0], drawn[1])
        assert torch.equal(torch.cat(drawn[:2]), torch.cat(drawn[2:]))

    def test_a_graph_is_no_larger_than_that_of_a_piece(self) -> None:
        module = build(lambda: nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3)))
        (batch,), space = freeze([ob.content(256)]), ParameterSpace.of(module)
        with isolated(module):
            whole = measure_gradient(module, ob.cross_entropy, batch, space)
            pieces = measure_gradient(module, ob.cross_entropy, batch, space, microbatch=30)
        assert (whole.graphs, pieces.graphs) == (1, 9)
        assert whole.graph_bytes > 256 * 64 * 4, "an activation is the least of it"
        assert pieces.graph_bytes < whole.graph_bytes * 30 / 256 * 1.5


def total(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")


def contrastive(module: nn.Module, batch: Any, index: int) -> Tensor:
    embedded = F.normalize(module(batch[0]), dim=1)
    return F.cross_entropy(embedded @ embedded.T / 0.5, torch.arange(len(embedded)))


def class_weighted(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], weight=torch.tensor([1.0, 5.0, 0.1]))


def own_numbers(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0] + torch.randn_like(batch[0])), batch[1])


def bfloat16(module: nn.Module, batch: Any, index: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return ob.cross_entropy(module, batch, index)


def bfloat16_weighted(module: nn.Module, batch: Any, index: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return class_weighted(module, batch, index)


def ask(module: nn.Module, loss: LossFunction, size: int = 6, samples: int = 16) -> float | None:
    (batch,) = freeze([ob.content(samples)])
    with isolated(module):
        return check_pieces(module, loss, batch, ParameterSpace.of(module), size)


class Attention(nn.Module):
    """Dropout inside modules that are no dropout layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.4, batch_first=True)
        self.recurrent = nn.LSTM(6, 6, num_layers=2, dropout=0.4, batch_first=True)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.recurrent(self.layer(x.unsqueeze(1).expand(-1, 3, -1)))
        return cast(Tensor, self.last(found[:, -1]))


class TestCheck:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: ob.mlp(nn.Tanh()),
            lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)),
            lambda: nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)),
            Attention,
        ],
    )
    def test_a_mean_over_samples_is_accepted_with_rounding(self, make: Callable[[], nn.Module]) -> None:
        gap = ask(build(make), ob.cross_entropy)
        assert gap is not None and gap < 3e-6

    def test_dropout_is_put_back(self) -> None:
        module = cast(Attention, build(Attention))
        ask(module, ob.cross_entropy)
        assert all(child.training for child in module.modules())
        assert module.layer.self_attn.dropout == module.recurrent.dropout == 0.4

    def test_float64_is_held_to_its_own_rounding(self) -> None:
        def barely(module: nn.Module, batch: Any, index: int) -> Tensor:
            return ob.cross_entropy(module, batch, index) + 1e-6 * total(module, batch, index)

        x, y = ob.content()
        (batch,), module = freeze([(x.double(), y)]), build().double()
        with isolated(module):
            gap = check_pieces(module, ob.cross_entropy, batch, ParameterSpace.of(module), 6)
            assert gap is not None and gap < 1e-13
            with pytest.raises(CurvatureError, match="apart by 1e-05"):
                check_pieces(module, barely, batch, ParameterSpace.of(module), 6)

    def test_autocast_is_held_to_its_own_rounding(self) -> None:
        module = build(lambda: ob.mlp(nn.Tanh()))
        gap = ask(module, bfloat16)
        assert gap is not None and 1e-6 < gap < 1e-2
        with pytest.raises(CurvatureError, match="means over its pieces"):
            ask(module, bfloat16_weighted)

    @pytest.mark.parametrize("loss", [total, contrastive, class_weighted, own_numbers])
    def test_what_is_no_mean_over_samples_is_refused(self, loss: LossFunction) -> None:
        for samples in (16, 18):  # with a shorter last piece, and without
            with pytest.raises(CurvatureError, match=r"means over its pieces of 6 samples.*microbatch=None"):
                ask(build(), loss, samples=samples)

    def test_a_gradient_that_cancels_is_no_reason_to_refuse(self) -> None:
        """At a minimum the mean gradient is nothing beside those of the pieces."""
        x, y = torch.randn(16, 6), torch.randn(16, 3)
        module = nn.Linear(6, 3)
        fitted = torch.linalg.lstsq(torch.cat([x, torch.ones(16, 1)], dim=1).double(), y.double()).solution
        with torch.no_grad():
            module.weight.copy_(fitted[:6].T)
            module.bias.copy_(fitted[6])
        (batch,) = freeze([(x, y)])

        def loss(module: nn.Module, batch: Any, index: int) -> Tensor:
            return F.mse_loss(module(batch[0]), batch[1])

        with isolated(module):
            gap = check_pieces(module, loss, batch, ParameterSpace.of(module), 6)
        assert gap is not None and gap < 3e-6

    def test_batch_norm_is_refused_by_name_before_anything_is_tried(self) -> None:
        def never(module: nn.Module, batch: Any, index: int) -> Tensor:
            raise AssertionError("the loss was evaluated")

        def make() -> nn.Module:
            return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

        with pytest.raises(CurvatureError, match=r"found statistics over the batch in `1` \(BatchNorm1d\)"):
            ask(build(make), never)
        frozen = build(make)
        frozen[1].eval()  # type: ignore[index]
        assert ask(frozen, ob.cross_entropy) is not None

    def test_one_piece_teaches_nothing(self) -> None:
        assert ask(build(), total, size=16) is None
