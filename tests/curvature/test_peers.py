"""Our eigenvalues beside those of PyHessian's own power iteration."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe.curvature.hessian import HessianOperator
from sgd_probe.curvature.lanczos import lanczos
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import isolated
from tests.helpers.dense import freeze

pyhessian = pytest.importorskip("pyhessian")


def loss(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_eigenvalues_and_vectors_of_power_iteration() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    # Trained a little, on inputs of unequal scales: power iteration separates what is far apart.
    inputs = torch.randn(64, 8) * torch.logspace(0.5, -0.5, 8)
    targets = inputs[:, :4].argmax(dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    twin = copy.deepcopy(model)  # it switches to eval mode and adds into .grad
    solver = pyhessian.hessian(twin, nn.CrossEntropyLoss(), data=(inputs, targets), cuda=False)
    values, vectors = solver.eigenvalues(maxIter=2000, tol=1e-7, top_n=4)
    theirs = torch.stack([torch.cat([part.flatten() for part in vector]) for vector in vectors])

    space = ParameterSpace.of(model)
    with isolated(model), HessianOperator(model, loss, freeze([(inputs, targets)]), space) as operator:
        ours = lanczos(operator, 4, torch.empty(0), tolerance=1e-5)

    torch.testing.assert_close(ours.eigenvalues.float(), torch.tensor(values), rtol=1e-3, atol=0.0)
    cosines = (ours.vectors * theirs).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(4), rtol=0.0, atol=1e-2)
