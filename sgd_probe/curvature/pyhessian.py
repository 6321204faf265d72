"""PyHessian's interface on our operator, for people who know it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.density import spectral_density, trace_samples
from sgd_probe.curvature.hessian import HessianOperator
from sgd_probe.curvature.lanczos import lanczos, most_products
from sgd_probe.curvature.selftest import self_test
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import isolated


class hessian:  # lower-case, so that code written for PyHessian needs another import and no other change
    """Eigenvalues, trace and spectral density of a loss, called as in PyHessian 0.1.

    What the methods take and return is PyHessian's; what they do differs:

    * Nothing of the user's changes: no ``eval()``, nothing added into ``.grad``, no gradient hook fires,
      and random generators, buffers and the criterion's state are put back. Random vectors come from a
      generator of the object's own, which starts from ``torch.initial_seed()``.
    * BatchNorm and dropout act in the mode that the model is in (dropout with one fixed mask per batch). For
      PyHessian's figures call ``model.eval()`` first.
    * Each call takes the weights as they are then; PyHessian keeps those that a single batch first met.
    * A dataloader is read once, and its batches are kept: with shuffling or augmentation, too, all
      products are products of one and the same matrix.
    * The constructor asks on the first batch whether the loss is differentiated twice correctly.
    * ``eigenvalues`` finds all of them together by Lanczos instead of one after another by power iteration:
      fewer products, orthonormal vectors, and a tolerance that bounds the error instead of a change.
    * A negative mean does not stop ``trace`` at once, and ``density`` needs no ``torch.eig``.

    Args:
        model: its trainable parameters span the space.
        criterion: called as ``criterion(model(inputs), targets)``; its mean over samples is assumed where
            batches differ in length, as in PyHessian.
        data: one batch ``(inputs, targets)``.
        dataloader: batches like that, instead.
        cuda: has no effect: batches go where the model is.

    Raises:
        ValueError: not exactly one of ``data`` and ``dataloader``, no batch, or nothing to train.
        CurvatureError: the loss cannot be probed, or what would be computed is not its Hessian.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        data: tuple[Tensor, Tensor] | None = None,
        dataloader: Iterable[tuple[Tensor, Tensor]] | None = None,
        cuda: bool = False,
    ) -> None:
        self._model = model
        self._criterion = criterion
        self._space = ParameterSpace.of(model)
        self._like = torch.empty(0, dtype=self._space.dtype, device=self._space.device)
        self._generator = torch.Generator().manual_seed(torch.initial_seed())
        if data is not None and dataloader is None:
            self._batches = [CurvatureBatch.freeze(data, 0, seed=0)]
        elif dataloader is not None and data is None:
            # To iterate draws from these generators: a loader's own, its sampler's, the global ones.
            owners = (dataloader, getattr(dataloader, "sampler", None))
            with isolated(model, *(getattr(owner, "generator", None) for owner in owners)):
                self._batches = [CurvatureBatch.freeze(b, i, seed=i) for i, b in enumerate(dataloader)]
        else:
            raise ValueError("expected either `data` or `dataloader`, found both or neither")
        with self._operator(self._batches[:1]) as operator:
            verdict = self_test(operator, self._generator)
        if verdict.startswith("unverified"):
            warnings.warn(f"Hessian {verdict}", stacklevel=2)

    def eigenvalues(
        self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1
    ) -> tuple[list[float], list[list[Tensor]]]:
        """Eigenpairs of largest |eigenvalue|, in descending order of it.

        Args:
            maxIter: products after which it gives up, for each pair.
            tol: bound on ``||Hv - lambda v|| / |lambda_1|``.
            top_n: number of pairs; fewer are returned where there are fewer weights.

        Returns:
            Eigenvalues (loss per weight^2), and unit eigenvectors as one tensor per trainable parameter, in
            the order of ``model.parameters()``. A warning says when the tolerance was not reached.

        Raises:
            ValueError: an argument below one.
        """
        if maxIter < 1 or top_n < 1:
            raise ValueError(f"expected maxIter and top_n of at least 1, found {maxIter} and {top_n}")
        with self._operator(self._batches) as operator:
            found = lanczos(
                operator,
                top_n,
                self._like,
                tolerance=tol,
                max_products=maxIter * top_n,
                max_vectors=most_products(top_n),
                generator=self._generator,
            )
        if not found.converged:
            largest = float(found.residuals.max())
            warnings.warn(f"eigenvalues: {found.message}, residuals up to {largest:.1e}", stacklevel=2)
        return found.eigenvalues.tolist(), [self._space.split(vector) for vector in found.vectors]

    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """Samples of the trace by Hutchinson's estimator; people take their mean.

        Args:
            maxIter: largest number of samples, one product each.
            tol: relative change of their mean at which it stops. As in PyHessian this is no bound on the
                error, and a chance agreement of two samples meets it: for a mean with a standard error
                see :func:`sgd_probe.curvature.density.trace`.

        Returns:
            The samples (loss per weight^2).
        """
        samples: list[float] = []
        mean = 0.0
        with self._operator(self._batches) as operator:
            for sample in itertools.islice(trace_samples(operator, self._like, self._generator), maxIter):
                samples.append(sample)
                previous, mean = mean, sum(samples) / len(samples)
                if abs(mean - previous) < tol * (abs(previous) + 1e-6):
                    break
        return samples

    def density(self, iter: int = 100, n_v: int = 1) -> tuple[list[list[float]], list[list[float]]]:
        """Spectral density by stochastic Lanczos quadrature.

        Args:
            iter: nodes per run; fewer where there are fewer weights. As many vectors are held.
            n_v: number of runs.

        Returns:
            Eigenvalues (loss per weight^2) and their weights, a list per run; the weights of a run add up
            to one. They go into PyHessian's ``get_esd_plot`` as they are.

        Raises:
            ValueError: fewer than two nodes, or no run.
        """
        with self._operator(self._batches) as operator:
            found = spectral_density(operator, self._like, probes=n_v, steps=iter, generator=self._generator)
        return found.nodes.tolist(), found.weights.tolist()

    @contextmanager
    def _operator(self, batches: list[CurvatureBatch]) -> Iterator[HessianOperator]:
        """The Hessian at the weights of now; graphs of more than one batch are not held at once."""
        with (
            isolated(self._model, self._criterion),
            HessianOperator(self._model, self._loss, batches, self._space, len(batches) == 1) as operator,
        ):
            yield operator

    def _loss(self, model: nn.Module, batch: Any, index: int) -> Tensor:
        inputs, targets = (part.to(self._space.device) for part in batch)
        return self._criterion(model(inputs), targets)
