"""The whole search on a small network that has learnt a little, beside its dense Hessian."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.hessian import CurvatureError, HessianOperator
from sgd_probe.curvature.modes import ModeBasis, find_modes
from sgd_probe.curvature.selftest import check_symmetry
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import isolated
from tests.helpers.dense import assert_orthonormal, dense_hessian, freeze, largest_angle

TOP, FLAT = 6, 3


def cross_entropy(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


@pytest.fixture(scope="module")
def digits() -> list[tuple[Tensor, Tensor]]:
    images, labels = load_digits(return_X_y=True)
    x = F.avg_pool2d(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, 2).flatten(1)
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [(x[part], y[part]) for part in torch.split(order, 64)]


@pytest.fixture(scope="module")
def module(digits: list[tuple[Tensor, Tensor]]) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    for _ in range(10):
        for batch in digits:
            optimizer.zero_grad()
            cross_entropy(network, batch, 0).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return network


@pytest.fixture(scope="module")
def sets(digits: list[tuple[Tensor, Tensor]]) -> tuple[list[CurvatureBatch], list[CurvatureBatch]]:
    return freeze(digits[0:8:2]), freeze(digits[1:8:2])


@pytest.fixture(scope="module")
def dense(module: nn.Module, sets: tuple[list[CurvatureBatch], ...]) -> tuple[Tensor, ...]:
    names = ParameterSpace.of(module).names
    return tuple(dense_hessian(module, cross_entropy, batches, names) for batches in sets)


def effective_curvature(vectors: Tensor, hessian: Tensor) -> Tensor:
    image = vectors @ hessian
    found: Tensor = image.square().sum(1) / (image * vectors).sum(1).abs()
    return found


def search(
    module: nn.Module, sets: tuple[list[CurvatureBatch], ...], seen: list[int] | None = None, **options: Any
) -> ModeBasis:
    space = ParameterSpace.of(module)
    arguments: dict[str, Any] = {"top": TOP, "flat": FLAT, "tolerance": 1e-3, "flat_dimension": 10}
    arguments |= {"flat_curvature": lambda values: 0.01 * float(values.abs().max())} | options
    with (
        isolated(module),
        HessianOperator(module, cross_entropy, sets[0], space) as finding,
        HessianOperator(module, cross_entropy, sets[1], space) as certifying,
    ):
        basis = find_modes(
            finding,
            certifying,
            generator=torch.Generator().manual_seed(1),
            on_product=None if seen is None else seen.append,
            **arguments,
        )
        assert basis.products == finding.products + certifying.products
    return basis


def test_top_modes_are_the_dense_eigenpairs(
    module: nn.Module, sets: tuple[list[CurvatureBatch], ...], dense: tuple[Tensor, ...]
) -> None:
    basis = search(module, sets)
    values, vectors = torch.linalg.eigh(dense[0])
    order = values.abs().argsort(descending=True)[: TOP + 1]
    values, vectors = values[order], vectors.T[order]

    assert basis.converged and basis.message.startswith("converged")
    tops = [mode for mode in basis.modes if mode.kind == "top"]
    found = torch.tensor([mode.eigenvalue for mode in tops], dtype=torch.float64)
    torch.testing.assert_close(found, values[:TOP], rtol=0, atol=1e-3 * float(values[0]))
    gap = float((values[TOP - 1] - values[TOP]).abs() / values[0])
    assert largest_angle(basis.vectors[:TOP], vectors[:TOP]) < 1e-3 * TOP**0.5 / gap
    assert basis.lambda_max == tops[0].eigenvalue
    assert [mode.name for mode in basis.modes] == [f"top_{i:02d}" for i in range(1, 7)] + [
        f"flat_{i:02d}" for i in range(1, 4)
    ]


def test_everything_that_is_said_of_a_mode_is_true(
    module: nn.Module, sets: tuple[list[CurvatureBatch], ...], dense: tuple[Tensor, ...]
) -> None:
    basis = search(module, sets)
    rows = basis.vectors.double()
    scale = abs(basis.lambda_max)
    assert_orthonormal(rows, 1e-5)
    assert basis.orthogonality < 1e-5
    assert basis.vectors.is_contiguous()
    for mode, v in zip(basis.modes, rows, strict=True):
        image, held_out = dense[0] @ v, dense[1] @ v
        assert mode.eigenvalue == pytest.approx(float(v @ image), abs=1e-5 * scale)
        residual = float((image - mode.eigenvalue * v).norm()) / scale
        assert mode.residual == pytest.approx(residual, rel=0.5, abs=2e-5)
        assert mode.converged == (mode.residual <= 1e-3)
        assert mode.certificate.eigenvalue == pytest.approx(float(v @ held_out), abs=1e-5 * scale)
        assert mode.certificate.standard_error > 0
        assert sum(mode.layer_shares.values()) == pytest.approx(1)
    assert max(abs(mode.certificate.eigenvalue) for mode in basis.modes if mode.flat) < 0.05 * scale


@pytest.mark.parametrize("tolerance", [1e-4, 1e-2])
def test_interior_modes_between_the_top_and_the_flat(
    module: nn.Module,
    sets: tuple[list[CurvatureBatch], ...],
    dense: tuple[Tensor, ...],
    tolerance: float,
) -> None:
    """Eigenvectors of the dense Hessian where they are called so, and what is said of them elsewhere."""
    basis = search(module, sets, interior=7, top=4, tolerance=tolerance)
    rows, scale = basis.vectors.double(), abs(basis.lambda_max)
    kinds = [mode.kind for mode in basis.modes]
    between = range(4, len(kinds) - FLAT)
    assert kinds == ["top"] * 4 + ["interior"] * len(between) + ["flat"] * FLAT
    assert [basis.modes[i].name for i in between] == [f"interior_{i:02d}" for i in range(1, len(between) + 1)]
    sizes = [abs(mode.eigenvalue) for mode in basis.modes[:-FLAT]]
    assert sizes == sorted(sizes, reverse=True)
    assert_orthonormal(rows, 1e-5)
    values = torch.linalg.eigvalsh(dense[0])
    for mode, v in zip(basis.modes, rows, strict=True):
        if mode.kind != "interior":
            assert mode.mixed == mode.flat
            continue
        image = dense[0] @ v
        residual = float((image - mode.eigenvalue * v).norm())
        assert mode.eigenvalue == pytest.approx(float(v @ image), abs=1e-5 * scale)
        assert mode.residual * scale / 1.5 < residual < mode.residual * scale * 1.5
        own = residual / abs(mode.eigenvalue)
        assert mode.converged == (mode.residual <= tolerance and own <= 0.1)
        assert mode.mixed == (not mode.converged) == (mode.quadrature is not None)
        if mode.converged:
            assert float((values - mode.eigenvalue).abs().min()) <= residual
            assert float(effective_curvature(v[None], dense[0])) == pytest.approx(
                abs(mode.eigenvalue), rel=0.011
            )
        assert mode.certificate.eigenvalue == pytest.approx(float(v @ dense[1] @ v), abs=1e-5 * scale)
        assert mode.certificate.standard_error > 0
    assert {basis.modes[i].mixed for i in between} == {True, False}


def test_interior_modes_change_nothing_about_the_top_ones(
    module: nn.Module, sets: tuple[list[CurvatureBatch], ...]
) -> None:
    seen: list[int] = []
    without, some = search(module, sets), search(module, sets, seen, interior=4)
    # To rounding: rows for the further modes are laid out beside the top ones, and sums are cut elsewhere.
    torch.testing.assert_close(some.vectors[:TOP], without.vectors[:TOP], rtol=0, atol=1e-4)
    for one, other in zip(without.modes[:TOP], some.modes[:TOP], strict=True):
        assert (one.name, one.kind, one.converged) == (other.name, other.kind, other.converged)
        assert other.certificate.eigenvalue == pytest.approx(one.certificate.eigenvalue, rel=1e-3)
    assert some.split_half_overlap == pytest.approx(without.split_half_overlap, abs=1e-3)
    assert some.products - without.products == 2 + 4
    assert seen[-1] == some.products - (TOP + 4 + FLAT)


def test_interior_modes_under_a_memory_bound(
    module: nn.Module, sets: tuple[list[CurvatureBatch], ...]
) -> None:
    """Vectors that the flat directions leave no room for are forgotten, but not those that were taken."""
    basis = search(module, sets, interior=4, max_vectors=TOP + 10)
    assert [mode.kind for mode in basis.modes] == ["top"] * TOP + ["interior"] * 4 + ["flat"] * FLAT
    assert_orthonormal(basis.vectors, 1e-5)


def test_more_interior_modes_than_the_search_leaves(
    module: nn.Module, sets: tuple[list[CurvatureBatch], ...]
) -> None:
    basis = search(module, sets, interior=500)
    found = sum(mode.kind == "interior" for mode in basis.modes)
    assert 5 < found < 60
    assert len(basis.vectors) == TOP + found + FLAT
    assert_orthonormal(basis.vectors, 1e-5)


def test_noise_weighted_curvature_of_interior_modes(
    module: nn.Module, digits: list[tuple[Tensor, Tensor]]
) -> None:
    sets = freeze(digits[0:16:2]), freeze(digits[1:16:2])
    basis = search(module, sets, interior=3)
    for mode in basis.modes:
        assert math.isnan(mode.certificate.noise_weighted_curvature) == (mode.kind == "top")


def test_flat_modes_are_flatter_than_anything_random(
    module: nn.Module, sets: tuple[list[CurvatureBatch], ...], dense: tuple[Tensor, ...]
) -> None:
    basis = search(module, sets)
    random = torch.randn(500, basis.vectors.shape[1], dtype=torch.float64)
    top = basis.vectors[:TOP].double()
    random -= random @ top.T @ top
    random /= random.norm(dim=1, keepdim=True)
    flat, others = (effective_curvature(v, dense[0]) for v in (basis.vectors[TOP:].double(), random))
    assert 2 * float(flat.max()) < float(others.min())


def test_progress_and_reproducibility(module: nn.Module, sets: tuple[list[CurvatureBatch], ...]) -> None:
    seen: list[int] = []
    first, second = search(module, sets, seen), search(module, sets)
    assert torch.equal(first.vectors, second.vectors)
    assert seen == sorted(set(seen)) and seen[-1] == first.products - TOP - FLAT


def test_without_flat_directions(module: nn.Module, sets: tuple[list[CurvatureBatch], ...]) -> None:
    basis = search(module, sets, flat=0, top=2)
    assert [mode.name for mode in basis.modes] == ["top_01", "top_02"]
    assert len(basis.vectors) == 2


def test_a_start_from_an_earlier_basis(module: nn.Module, sets: tuple[list[CurvatureBatch], ...]) -> None:
    first = search(module, sets)
    again = search(module, sets, start=first.vectors[:TOP].sum(0))
    assert largest_angle(first.vectors[:TOP], again.vectors[:TOP]) < 0.05


def test_more_modes_than_weights(sets: tuple[list[CurvatureBatch], ...]) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, :12].view(-1, 3, 4).sum(2) * self.scales).tanh()

    def loss(module: nn.Module, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1] % 3)

    tiny = Scale()
    space = ParameterSpace.of(tiny)
    with isolated(tiny):
        operators = [HessianOperator(tiny, loss, batches, space) for batches in sets]
        basis = find_modes(
            *operators,
            top=2,
            flat=4,
            tolerance=1e-3,
            flat_curvature=lambda values: 0.01,
            flat_dimension=10,
            generator=torch.Generator(),
        )
    assert basis.vectors.shape == (3, 3)
    assert_orthonormal(basis.vectors, 1e-5)


class Crooked(torch.autograd.Function):
    """sin, with a derivative whose own derivative is wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return CrookedDerivative.apply(gradients[0], x)  # type: ignore[no-any-return, no-untyped-call]


class CrookedDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, x)
        return gradient * x.cos()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gradient, x = ctx.saved_tensors
        return gradients[0] * x.cos(), gradients[0].roll(1, -1) * gradient * x.sin()


def test_symmetry_is_checked(module: nn.Module, sets: tuple[list[CurvatureBatch], ...]) -> None:
    def crooked(module: nn.Module, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(Crooked.apply(module(batch[0])), batch[1])  # type: ignore[no-untyped-call]

    space, generator = ParameterSpace.of(module), torch.Generator().manual_seed(0)
    with isolated(module):
        assert "symmetric to" in check_symmetry(
            HessianOperator(module, cross_entropy, sets[0], space), generator
        )
        with pytest.raises(CurvatureError, match=r"symmetric Hessian.*custom autograd"):
            check_symmetry(HessianOperator(module, crooked, sets[0], space), generator)
        linear = HessianOperator(
            module, lambda m, b, i: sum((p.sum() for p in m.parameters()), torch.zeros(())), sets[0], space
        )
        assert "linear in the weights" in check_symmetry(linear, generator)
