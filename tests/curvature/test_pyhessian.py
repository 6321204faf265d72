"""PyHessian's interface beside PyHessian itself, and the side effects that it does without."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from sgd_probe.curvature.hessian import CurvatureError, WrongHessianError
from sgd_probe.curvature.pyhessian import hessian
from sgd_probe.curvature.space import ParameterSpace
from tests.helpers.dense import Symmetric, dense_hessian, freeze

SIZES = (12, 7, 5)  # unequal on purpose


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def noisy() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)
    ).train()


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 5, generator=generator).to(dtype), torch.randint(0, 3, (n,), generator=generator))
        for n in SIZES
    ]


def given(whole: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"dataloader": batches(dtype)} if whole else {"data": batches(dtype)[0]}


def dense(model: nn.Module, contents: list[tuple[Tensor, Tensor]]) -> Symmetric:
    def loss(module: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    return Symmetric(dense_hessian(model, loss, freeze(contents, seed=0), ParameterSpace.of(model).names))


def flat(vector: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in vector])


@pytest.mark.parametrize("whole", [False, True], ids=["data", "dataloader"])
def test_eigenpairs_are_those_of_the_dense_hessian(whole: bool) -> None:
    model = build(torch.float64)
    values, vectors = dense(model, batches(torch.float64)[: None if whole else 1]).eigenpairs()

    found, rows = hessian(model, nn.CrossEntropyLoss(), **given(whole, torch.float64)).eigenvalues(
        tol=1e-8, top_n=4
    )

    assert found == pytest.approx(values[:4].tolist(), rel=1e-8)
    for row, vector in zip(rows, vectors, strict=False):
        assert [part.shape for part in row] == [parameter.shape for parameter in model.parameters()]
        assert abs(float(flat(row) @ vector)) == pytest.approx(1, abs=1e-8)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # backward() with create_graph, of PyHessian's
@pytest.mark.parametrize("whole", [False, True], ids=["data", "dataloader"])
def test_eigenvalues_and_trace_agree_with_pyhessian(whole: bool) -> None:
    reference = pytest.importorskip("pyhessian").hessian
    torch.manual_seed(0)
    peer = reference(build(), nn.CrossEntropyLoss(), **given(whole), cuda=False)
    values, vectors = peer.eigenvalues(maxIter=2_000, tol=1e-7, top_n=3)
    samples = peer.trace(maxIter=400, tol=-math.inf)  # with 0 a negative mean would stop it

    ours = hessian(build(), nn.CrossEntropyLoss(), **given(whole), cuda=False)
    found, rows = ours.eigenvalues(maxIter=100, tol=1e-4, top_n=3)
    traces = ours.trace(maxIter=400, tol=0)

    assert type(found) is type(values) is list and type(rows) is type(vectors) is list
    assert found == pytest.approx(values, rel=5e-3)
    for row, vector in zip(rows, vectors, strict=True):
        assert [part.shape for part in row] == [part.shape for part in vector]
        assert abs(float(flat(row) @ flat(vector))) > 0.99
    assert len(traces) == len(samples) == 400
    error = float(np.hypot(np.std(traces), np.std(samples))) / 20
    assert abs(np.mean(traces) - np.mean(samples)) < 4 * error


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_density_has_the_format_of_pyhessian(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = pytest.importorskip("pyhessian").hessian

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        """What torch once had: real and imaginary parts in columns, eigenvectors in columns."""
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    monkeypatch.setattr(torch, "eig", eig, raising=False)
    torch.manual_seed(0)
    theirs = reference(build(), nn.CrossEntropyLoss(), **given(False), cuda=False).density(iter=12, n_v=3)
    ours = hessian(build(), nn.CrossEntropyLoss(), **given(False)).density(iter=12, n_v=3)

    assert type(ours) is type(theirs) is tuple
    for mine, other in zip(ours, theirs, strict=True):
        assert type(mine) is type(other) is list and type(mine[0]) is type(other[0]) is list
        assert np.array(mine).shape == np.array(other).shape == (3, 12)
    np.testing.assert_allclose(np.sum(ours[1], axis=1), 1, rtol=1e-6)
    # With one and the same extreme eigenvalue in it, whatever the probe.
    np.testing.assert_allclose(np.max(ours[0], axis=1), np.max(theirs[0], axis=1), rtol=1e-3)


def test_density_has_the_moments_of_the_dense_hessian() -> None:
    model = build(torch.float64)
    matrix = dense(model, batches(torch.float64)[:1]).matrix
    found = hessian(model, nn.CrossEntropyLoss(), **given(False, torch.float64)).density(iter=60, n_v=30)
    nodes, weights = (torch.tensor(part, dtype=torch.float64) for part in found)
    assert nodes.shape == (30, len(matrix))
    for power in (1, 2):
        moments = len(matrix) * (weights * nodes**power).sum(1)
        true = float(torch.linalg.matrix_power(matrix, power).trace())
        assert abs(float(moments.mean()) - true) < 4 * float(moments.std()) / 30**0.5
    assert float(nodes.min()) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[0]), rel=1e-6)


def test_trace_stops_as_pyhessian_does_and_not_because_it_is_negative() -> None:
    model = build(torch.float64)

    def upside_down(output: Tensor, target: Tensor) -> Tensor:
        return -F.cross_entropy(output, target)

    ours = hessian(model, upside_down, **given(True, torch.float64))
    samples = ours.trace(maxIter=60, tol=1e-9)
    assert len(samples) == 60 and np.mean(samples) < 0
    means = np.cumsum(settled := ours.trace(maxIter=500, tol=1e-2)) / np.arange(1, len(settled) + 1)
    changes = abs(np.diff(means)) / (abs(means[:-1]) + 1e-6)
    assert len(settled) < 500 and changes[-1] < 1e-2 and bool((changes[:-1] >= 1e-2).all())


@pytest.mark.parametrize("whole", [False, True], ids=["data", "loader"])
def test_nothing_of_the_users_changes(whole: bool) -> None:
    model = noisy()
    model[0].weight.register_hook(lambda gradient: pytest.fail("a gradient hook fired"))  # type: ignore
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    grads = {id(parameter): parameter.grad for parameter in model.parameters()}
    dataset = TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(8))
    loader = DataLoader(dataset, batch_size=8, sampler=sampler, generator=torch.Generator().manual_seed(9))
    before = copy.deepcopy(model.state_dict())
    states = [g.get_state() for g in (loader.generator, sampler.generator)]
    numbers = random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()
    drawn = torch.get_rng_state()

    source: dict[str, Any] = {"dataloader": loader} if whole else {"data": batches()[0]}
    ours = hessian(model, nn.CrossEntropyLoss(), **source)
    ours.eigenvalues(top_n=2)
    ours.trace(maxIter=5)
    ours.density(iter=5)

    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad is grads[id(parameter)]
        assert torch.equal(parameter.grad, torch.full_like(parameter, 2.0))
    assert (random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()) == numbers
    assert torch.equal(torch.get_rng_state(), drawn)
    for generator, state in zip((loader.generator, sampler.generator), states, strict=True):
        assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_and_dropout_act_in_the_models_own_mode(training: bool) -> None:
    model = noisy().double().train(training)
    values, _ = dense(model, batches(torch.float64)[:1]).eigenpairs()
    found, _ = hessian(model, F.cross_entropy, **given(False, torch.float64)).eigenvalues(tol=1e-8, top_n=2)
    assert found == pytest.approx(values[:2].tolist(), rel=1e-7)


def test_a_call_takes_the_weights_as_they_are_then() -> None:
    model = build(torch.float64)
    ours = hessian(model, nn.CrossEntropyLoss(), **given(False, torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    values, _ = dense(model, batches(torch.float64)[:1]).eigenpairs()
    assert ours.eigenvalues(tol=1e-8)[0] == pytest.approx(values[:1].tolist(), rel=1e-8)


def test_a_loader_is_read_once_and_its_batches_are_ours() -> None:
    contents = batches(torch.float64)
    ours = hessian(build(torch.float64), nn.CrossEntropyLoss(), dataloader=iter(contents))
    values, _ = dense(build(torch.float64), contents).eigenpairs()
    for inputs, _ in contents:
        inputs.zero_()
    assert ours.eigenvalues(tol=1e-8)[0] == pytest.approx(values[:1].tolist(), rel=1e-8)


def test_random_vectors_follow_the_users_seed_and_differ_from_call_to_call() -> None:
    def traces(seed: int) -> list[list[float]]:
        model = build()
        torch.manual_seed(seed)
        ours = hessian(model, nn.CrossEntropyLoss(), **given(False))
        return [ours.trace(maxIter=4, tol=0) for _ in range(2)]

    assert traces(1) == traces(1) != traces(2)
    assert traces(1)[0] != traces(1)[1]
    assert traces(2**64 - 1)


def test_what_did_not_converge_says_so() -> None:
    ours = hessian(build(), nn.CrossEntropyLoss(), **given(True))
    with pytest.warns(UserWarning, match="limit of 3 products, residuals up to"):
        found, _ = ours.eigenvalues(maxIter=1, tol=1e-8, top_n=3)
    assert len(found) == 3


def test_there_are_no_more_pairs_than_weights() -> None:
    data = (torch.randn(8, 2).double(), torch.randn(8, 1).double())
    found, rows = hessian(nn.Linear(2, 1).double(), F.mse_loss, data=data).eigenvalues(top_n=10)
    assert len(found) == len(rows) == 3


class Rounded(nn.Module):
    """Its weights are held fixed in a part of the loss: double backward misses that part."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.line(x)
        return y * y.detach()


def test_a_wrong_hessian_is_refused() -> None:
    with pytest.raises(WrongHessianError):
        hessian(Rounded(), nn.CrossEntropyLoss(), **given(False))


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("single precision only")
        y: Tensor = self.line(x)
        return y


def test_an_unverified_hessian_says_so() -> None:
    with pytest.warns(UserWarning, match="Hessian unverified"):
        hessian(Single(), nn.CrossEntropyLoss(), **given(False))


def test_arguments_are_checked() -> None:
    model, criterion = build(), nn.CrossEntropyLoss()
    sources: list[dict[str, Any]] = [{}, given(True) | given(False)]
    for source in sources:
        with pytest.raises(ValueError, match="either `data` or `dataloader`"):
            hessian(model, criterion, **source)
    with pytest.raises(ValueError, match="at least one curvature batch"):
        hessian(model, criterion, dataloader=[])
    with pytest.raises(CurvatureError, match="scalar"):
        hessian(model, nn.CrossEntropyLoss(reduction="none"), **given(False))
    ours = hessian(model, criterion, **given(False))
    for arguments in ({"maxIter": 0}, {"top_n": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            ours.eigenvalues(**arguments)
