"""The modes of a trained network beside its dense Hessian in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.hessian import HessianOperator
from sgd_probe.curvature.lanczos import LanczosResult, lanczos
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import isolated
from tests.helpers.dense import dense_hessian, freeze, largest_angle

COUNT = 10


def cross_entropy(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


@pytest.fixture(scope="module", params=["mlp", "cnn"])
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, list[CurvatureBatch], Tensor, Tensor]:
    """A network of digits, two curvature batches, and all eigenvalues and eigenvectors (rows)."""
    torch.manual_seed(0)
    if request.param == "mlp":
        module = nn.Sequential(nn.Linear(64, 14), nn.ReLU(), nn.Linear(14, 14), nn.GELU(), nn.Linear(14, 10))
    else:
        module = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 12, 3), nn.Softplus(), nn.Flatten(), nn.Linear(48, 10)),
        )
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    targets = torch.tensor(digits.target)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(200):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(module(images[chosen]), targets[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    batches = freeze([(images[:96], targets[:96]), (images[96:160], targets[96:160])])
    names = ParameterSpace.of(module).names
    values, vectors = torch.linalg.eigh(dense_hessian(module, cross_entropy, batches, names))
    assert len(values) < 3_000
    order = values.abs().argsort(descending=True)
    return module, batches, values[order], vectors.T[order]


def modes(
    module: nn.Module, batches: list[CurvatureBatch], dtype: torch.dtype, tolerance: float, seed: int
) -> LanczosResult:
    module = copy.deepcopy(module).to(dtype)
    cast = [CurvatureBatch.freeze(b.thaw(dtype), b.index, b.seed) for b in batches]
    with (
        isolated(module),
        HessianOperator(module, cross_entropy, cast, ParameterSpace.of(module)) as operator,
    ):
        return lanczos(
            operator,
            COUNT,
            torch.empty(0, dtype=dtype),
            tolerance=tolerance,
            max_products=400,
            generator=torch.Generator().manual_seed(seed),
        )


def test_float64_at_a_tight_tolerance(
    trained: tuple[nn.Module, list[CurvatureBatch], Tensor, Tensor],
) -> None:
    module, batches, values, vectors = trained
    found = modes(module, batches, torch.float64, 1e-8, seed=0)
    assert found.converged
    torch.testing.assert_close(found.eigenvalues, values[:COUNT], rtol=0, atol=1e-8 * float(values[0].abs()))
    assert largest_angle(found.vectors, vectors[:COUNT]) <= 1e-5


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
@pytest.mark.parametrize("seed", range(3))
def test_float32_within_the_bounds_of_residual_and_gap(
    trained: tuple[nn.Module, list[CurvatureBatch], Tensor, Tensor], tolerance: float, seed: int
) -> None:
    module, batches, values, vectors = trained
    found = modes(module, batches, torch.float32, tolerance, seed)
    assert found.converged
    scale = float(values[0].abs())
    matrix = vectors.T @ torch.diag(values) @ vectors
    rows = found.vectors.double()
    residuals = rows @ matrix - found.eigenvalues[:, None] * rows
    true, rounding = residuals.norm(dim=1) / scale, 2e-5
    assert float(found.residuals.max()) <= tolerance
    assert bool((true <= 1.5 * found.residuals + rounding).all()), (true, found.residuals)
    assert bool((found.residuals <= 1.5 * true + rounding).all()), (true, found.residuals)
    # Some eigenvalue lies within the residual of a Ritz value; the largest are found, to the tolerance.
    nearest = (found.eigenvalues[:, None] - values).abs().amin(dim=1) / scale
    assert bool((nearest <= found.residuals + rounding).all())
    assert float((found.eigenvalues.abs() - values[:COUNT].abs()).abs().max()) <= tolerance * scale
    # Davis and Kahan: the angle is at most the residual over the gap to the rest of the spectrum.
    rest = values[COUNT:]
    gap = float((found.eigenvalues[:, None] - rest).abs().min())
    bound = float(torch.linalg.matrix_norm(residuals, 2)) / gap
    assert largest_angle(rows, vectors[:COUNT]) <= 1.1 * bound + rounding * scale / gap
