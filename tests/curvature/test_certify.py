"""Certificates from held-out batches, on quadratic losses whose batches differ at random."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.certify import Certificate, certify, revisit
from sgd_probe.curvature.hessian import CurvatureError, HessianOperator
from sgd_probe.curvature.space import ParameterSpace
from tests.helpers.dense import Symmetric, freeze

SIZE = 8


class Quadratic(nn.Module):
    """The Hessian of a batch is the mean of its matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(SIZE, dtype=torch.float64))


def half_quadratic(module: nn.Module, batch: Tensor, index: int) -> Tensor:
    assert isinstance(module, Quadratic)
    return 0.5 * module.weights @ batch.mean(0) @ module.weights


class Drawn:
    """Products of a vector with the matrices of given batches, without a loss."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches
        self.space = ParameterSpace.of(Quadratic())

    def matvec_per_batch(self, vector: Tensor) -> Iterator[tuple[float, Tensor]]:
        samples = sum(len(batch) for batch in self.batches)
        for batch in self.batches:
            yield len(batch) / samples, batch.mean(0) @ vector


def certificate_of(batches: list[Tensor]) -> Certificate:
    (certificate,) = certify(cast(HessianOperator, Drawn(batches)), direction()[None]).certificates
    return certificate


def operator_over(batches: list[Tensor]) -> HessianOperator:
    module = Quadratic()
    return HessianOperator(module, half_quadratic, freeze(batches), ParameterSpace.of(module))


def mean_hessian() -> Tensor:
    return Symmetric.of([5.0, 3, 2, 1, 0.5, 0.1, 0, -1]).matrix


def draw(sizes: list[int], generator: torch.Generator, noise: float = 2.0) -> list[Tensor]:
    """Batches of matrices, each the mean Hessian plus symmetric noise."""
    batches = []
    for size in sizes:
        disturbance = noise * torch.randn(size, SIZE, SIZE, generator=generator, dtype=torch.float64)
        batches.append(mean_hessian() + (disturbance + disturbance.transpose(1, 2)) / 2)
    return batches


def direction() -> Tensor:
    vector = torch.arange(1.0, SIZE + 1, dtype=torch.float64)
    return F.normalize(vector, dim=0)


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [8, 8, 3], [16, 1]], ids=str)
def test_estimates_are_unbiased_and_their_error_is_calibrated(sizes: list[int]) -> None:
    generator, repeats, v = torch.Generator().manual_seed(0), 2000, direction()
    found = [certificate_of(draw(sizes, generator)) for _ in range(repeats)]

    values = torch.tensor([c.eigenvalue for c in found], dtype=torch.float64)
    squares = torch.tensor([c.squared_norm for c in found], dtype=torch.float64)
    stated = torch.tensor([c.standard_error for c in found], dtype=torch.float64).square()
    image = mean_hessian() @ v
    four_sigma = 4 / repeats**0.5
    assert abs(float(values.mean() - v @ image)) < four_sigma * float(values.std())
    assert abs(float(squares.mean() - image @ image)) < four_sigma * float(squares.std())
    # With few batches each stated variance is scattered; its mean is right.
    tolerance = four_sigma * float(stated.std() / stated.mean()) + 0.15
    assert float(stated.mean() / values.var()) == pytest.approx(1, abs=tolerance)
    if len(set(sizes)) == 1:
        variances = torch.tensor([c.batch_variance for c in found], dtype=torch.float64)
        assert float(variances.mean()) == pytest.approx(2.0**2 / sizes[0], rel=0.15)


def test_unequal_batches_do_not_inflate_the_error() -> None:
    # A short last batch is noisier by its size, which its weight allows for.
    generator = torch.Generator().manual_seed(1)
    found = [certificate_of(draw([8, 8, 8, 1], generator)) for _ in range(4000)]
    values = torch.tensor([c.eigenvalue for c in found])
    stated = torch.tensor([c.standard_error for c in found]).square().mean()
    assert float(stated / values.var()) == pytest.approx(1, abs=0.12)


def test_one_batch_says_nothing_of_its_error() -> None:
    (batch,) = draw([4], torch.Generator().manual_seed(0))
    (certificate,) = certify(operator_over([batch]), direction()[None]).certificates
    assert math.isnan(certificate.standard_error) and math.isnan(certificate.batch_variance)
    assert certificate.eigenvalue == pytest.approx(float(direction() @ batch.mean(0) @ direction()))


def test_without_noise_everything_is_exact() -> None:
    batches = draw([4, 2, 1], torch.Generator().manual_seed(0), noise=0.0)
    vectors = torch.linalg.eigh(mean_hessian())[1].T.contiguous()
    operator = operator_over(batches)

    certificates = certify(operator, vectors).certificates

    assert operator.products == SIZE
    for certificate, value in zip(certificates, torch.linalg.eigvalsh(mean_hessian()).tolist(), strict=True):
        assert certificate.eigenvalue == pytest.approx(value, abs=1e-12)
        assert certificate.standard_error == pytest.approx(0, abs=1e-12)
        assert certificate.squared_norm == pytest.approx(value**2, abs=1e-12)


def test_effective_curvature_is_at_least_the_curvature() -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(100):
        vectors = torch.linalg.qr(
            torch.randn(SIZE, 3, generator=generator, dtype=torch.float64)
        ).Q.T.contiguous()
        for certificate in certify(operator_over(draw([2, 3], generator, noise=9.0)), vectors).certificates:
            assert certificate.effective_curvature >= abs(certificate.eigenvalue)


def test_a_mixed_direction_feels_its_stiff_share() -> None:
    values, vectors = torch.linalg.eigh(mean_hessian())
    mixed = (0.99 * vectors[:, 1] + 0.1 * vectors[:, -1]) / math.hypot(0.99, 0.1)
    (certificate,) = certify(
        operator_over(draw([2, 2], torch.Generator(), noise=0.0)), mixed[None]
    ).certificates
    assert certificate.eigenvalue < 0.1 < 4 < certificate.effective_curvature < values.max() + 1e-9


def test_a_dead_direction_has_no_effective_curvature() -> None:
    operator = operator_over([torch.zeros(2, SIZE, SIZE, dtype=torch.float64)] * 2)
    (certificate,) = certify(operator, direction()[None]).certificates
    assert certificate.eigenvalue == 0
    assert certificate.effective_curvature == 0


class Sampled(nn.Module):
    """Least squares on given rows: Hessian and gradients of every batch are known in closed form."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, rows: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (rows @ self.weights - targets).square().mean()


def least_squares(batches: int, size: int, spectrum: Tensor, seed: int) -> tuple[HessianOperator, Tensor]:
    """An operator over batches of rows of covariance diag(spectrum), at the minimum, with unit residuals."""
    generator = torch.Generator().manual_seed(seed)
    module = Sampled(torch.zeros(len(spectrum), dtype=torch.float64))
    frozen = []
    for index in range(batches):
        rows = torch.randn(size, len(spectrum), generator=generator, dtype=torch.float64) * spectrum.sqrt()
        targets = torch.randn(size, generator=generator, dtype=torch.float64)
        frozen.append(CurvatureBatch.freeze((rows, targets), index, seed=0))
    space = ParameterSpace.of(module)
    return HessianOperator(module, lambda m, batch, index: m(*batch), frozen, space), spectrum.diag()


def test_the_noise_weighted_curvature_needs_no_assumption() -> None:
    """With C = H the mixture's curvature is sum c^2 lambda^2 / sum c^2 lambda, from the gradients alone."""
    spectrum = torch.tensor([4.0, 1.0, 0.25, 0.05], dtype=torch.float64)
    vector = torch.tensor([0.1, 0.3, 0.5, 0.8], dtype=torch.float64)
    vector /= vector.norm()
    truth = float((vector.square() * spectrum.square()).sum() / (vector.square() * spectrum).sum())
    found, claimed = [], []
    for seed in range(40):
        operator, _ = least_squares(64, 64, spectrum, seed)
        (certificate,) = certify(operator, vector[None]).certificates
        found.append(certificate.noise_weighted_curvature)
        claimed.append(certificate.noise_weighted_error)
    values = torch.tensor(found, dtype=torch.float64)
    assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / 40**0.5 + 0.02 * truth
    assert float(torch.tensor(claimed).mean()) == pytest.approx(float(values.std()), rel=0.4)
    few, _ = least_squares(7, 64, spectrum, 0)
    assert math.isnan(certify(few, vector[None]).certificates[0].noise_weighted_curvature)


def test_a_batch_does_not_meet_its_own_hessian() -> None:
    """With few samples for many weights, the pull of a batch on itself would double the curvature."""
    spectrum = torch.cat([torch.tensor([1.0]), torch.full((39,), 0.1)]).double()
    vector = torch.eye(40, dtype=torch.float64)[7]
    found = []
    for seed in range(120):
        operator, _ = least_squares(12, 4, spectrum, seed)
        (certificate,) = certify(operator, vector[None]).certificates
        found.append(certificate.noise_weighted_curvature)
    values = torch.tensor(found, dtype=torch.float64)
    error = float(values.std()) / len(found) ** 0.5
    assert error < 0.015
    assert abs(float(values.mean()) - 0.1) < 4 * error  # its own share would be trace / samples = 0.1


def test_the_split_half_overlap_says_whether_the_samples_settle_the_subspace() -> None:
    spectrum = torch.cat([torch.tensor([50.0, 30.0]), torch.full((60,), 0.5)]).double()
    top = torch.eye(62, dtype=torch.float64)[:2]
    many, few = least_squares(8, 256, spectrum, 1)[0], least_squares(2, 2, spectrum, 1)[0]
    settled = certify(many, top, top=2).split_half_overlap
    unsettled = certify(few, top, top=2).split_half_overlap
    assert 0.95 < settled <= 1 + 1e-9
    assert 0 <= unsettled < 0.9 * settled
    assert math.isnan(certify(least_squares(1, 8, spectrum, 1)[0], top, top=2).split_half_overlap)


def test_what_is_seen_again_is_what_was_certified() -> None:
    batches = draw([3, 4], torch.Generator().manual_seed(4))
    operator = operator_over(batches)
    vectors = torch.eye(SIZE, dtype=torch.float64)[:3]
    certified, again = certify(operator, vectors, top=2), revisit(operator, vectors, top=2)
    assert again.eigenvalues == pytest.approx([c.eigenvalue for c in certified.certificates])
    assert again.overlap == pytest.approx(certified.held_out_overlap)
    # Mean squared cosine between the first two axes and their images.
    hessian = torch.cat(batches).mean(0)
    images = torch.linalg.qr(hessian[:, :2])[0]
    assert again.overlap == pytest.approx(float(images[:2].square().sum()) / 2)
    assert math.isnan(revisit(operator, vectors).overlap)


def test_images_are_means_over_two_halves_of_the_batches() -> None:
    batches = draw([3, 4, 2], torch.Generator().manual_seed(4))
    vectors = torch.eye(SIZE, dtype=torch.float64)[:3]
    found = certify(operator_over(batches), vectors, top=1).images
    assert found is not None and found.shape == (2, 2, SIZE)
    even, odd = torch.cat([batches[0], batches[2]]).mean(0), batches[1].mean(0)
    torch.testing.assert_close(found[0], even[:, 1:3].T)
    torch.testing.assert_close(found[1], odd[:, 1:3].T)
    room = torch.full_like(found, torch.nan)
    assert certify(operator_over(batches), vectors, top=1, images=room).images is room
    torch.testing.assert_close(room, found, rtol=0, atol=0)
    assert certify(operator_over(batches[:1]), vectors, top=1).images is None
    assert certify(operator_over(batches), vectors, top=3).images is None


def test_products_that_are_not_finite_are_no_certificate() -> None:
    batch = torch.full((2, SIZE, SIZE), 1e308, dtype=torch.float64)
    module = Quadratic()
    module.weights.data.mul_(0)  # a finite loss
    operator = HessianOperator(module, half_quadratic, freeze([batch]), ParameterSpace.of(module))
    with pytest.raises(CurvatureError, match="finite"):
        certify(operator, torch.ones(1, SIZE, dtype=torch.float64))
