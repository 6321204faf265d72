"""Four solvers, each called as its documentation shows, and how many products each of them takes."""

from __future__ import annotations

import copy
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from _problems import Problem, exact_product
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.hessian import HessianOperator
from sgd_probe.curvature.lanczos import lanczos
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import isolated

#: Module to look for, and what to install for it.
PACKAGES = {
    "curvlinops": ("curvlinops", "curvlinops-for-pytorch"),
    "hessian-eigenthings": ("hessian_eigenthings", "hessian-eigenthings==1.0.0a5"),
    "pyhessian": ("pyhessian", "PyHessian"),
}
OURS = "sgd_probe"
PEERS = tuple(PACKAGES)
TOLERANCE = 1e-3
MOST_STEPS = 70
SEED = 0


@dataclass
class Clock:
    """Counts and times the products of a solver."""

    seconds: list[float] = field(default_factory=list)

    def __call__(self, product: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = product(*arguments, **named)
            self.seconds.append(time.perf_counter() - started)
            return result

        return timed


def is_installed(peer: str) -> bool:
    """Whether a peer is there, without importing it."""
    return find_spec(PACKAGES[peer][0]) is not None


def solve(solver: str, problem: Problem, count: int, setting: float, clock: Clock) -> tuple[Tensor, Tensor]:
    """Eigenvalues of largest magnitude and their vectors as rows.

    Args:
        solver: one of those above.
        problem: with a model of the solver's own.
        count: number of pairs.
        setting: tolerance of ``eigsh``, steps of hessian-eigenthings; others take none.
        clock: sees every product.
    """
    return _SOLVERS[solver](problem, count, setting, clock)


def training_loss(module: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    """The loss as sgd_probe takes it."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def _sgd_probe(problem: Problem, count: int, setting: float, clock: Clock) -> tuple[Tensor, Tensor]:
    model = problem.model
    batch = CurvatureBatch.freeze((problem.inputs, problem.targets), 0, SEED)
    generator = torch.Generator().manual_seed(SEED)
    with (
        isolated(model),
        HessianOperator(model, training_loss, [batch], ParameterSpace.of(model)) as operator,
    ):
        operator.matvec = clock(operator.matvec)  # type: ignore[method-assign]
        found = lanczos(operator, count, torch.empty(0), tolerance=TOLERANCE, generator=generator)
    return found.eigenvalues, found.vectors


def _curvlinops(problem: Problem, count: int, setting: float, clock: Clock) -> tuple[Tensor, Tensor]:
    from curvlinops import HessianLinearOperator

    problem.without_running_statistics()
    parameters = list(problem.model.parameters())
    hessian = HessianLinearOperator(
        problem.model,
        nn.CrossEntropyLoss(),
        parameters,
        [(problem.inputs, problem.targets)],
        check_deterministic=False,
    ).to_scipy(dtype=np.float32)
    counted = LinearOperator(hessian.shape, matvec=clock(hessian.matvec), dtype=np.float32)
    return _eigsh(counted, count, setting)


def _eigsh(operator: LinearOperator, count: int, tolerance: float) -> tuple[Tensor, Tensor]:
    start = np.random.default_rng(SEED).standard_normal(operator.shape[0]).astype(np.float32)
    values, vectors = eigsh(operator, k=count, which="LM", tol=tolerance, v0=start)
    return torch.from_numpy(values), torch.from_numpy(vectors.T.copy())


def _hessian_eigenthings(problem: Problem, count: int, setting: float, clock: Clock) -> tuple[Tensor, Tensor]:
    from hessian_eigenthings import HessianOperator as Operator
    from hessian_eigenthings import lanczos as their_lanczos
    from hessian_eigenthings import supervised_loss

    loss = supervised_loss(nn.functional.cross_entropy)
    operator = Operator(problem.model, [(problem.inputs, problem.targets)], loss)
    operator.matvec = clock(operator.matvec)
    found = their_lanczos(operator, k=count, max_iter=int(setting), reorthogonalize=True, seed=SEED)
    return found.eigenvalues, found.eigenvectors


def _pyhessian(problem: Problem, count: int, setting: float, clock: Clock) -> tuple[Tensor, Tensor]:
    from pyhessian import hessian

    warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
    theirs = sys.modules["pyhessian.hessian"]
    theirs.hessian_vector_product = clock(theirs.hessian_vector_product)  # type: ignore[attr-defined]
    problem.without_running_statistics()  # it calls eval()
    data = (problem.inputs, problem.targets)
    values, vectors = hessian(problem.model, nn.CrossEntropyLoss(), data=data, cuda=False).eigenvalues(
        top_n=count
    )
    return torch.tensor(values), torch.stack([torch.cat([part.reshape(-1) for part in v]) for v in vectors])


_SOLVERS: dict[str, Callable[[Problem, int, float, Clock], tuple[Tensor, Tensor]]] = {
    "sgd_probe": _sgd_probe,
    "curvlinops": _curvlinops,
    "hessian-eigenthings": _hessian_eigenthings,
    "pyhessian": _pyhessian,
}


def settings_in_hindsight(problem: Problem, count: int, peers: list[str]) -> dict[str, float]:
    """The cheapest setting with which each peer finds the right set to the tolerance.

    Both start from the same vector whatever their setting, so products are remembered, and a whole
    search costs as many as its longest run.
    """
    memory: dict[int, Tensor] = {}
    product = exact_product(copy.deepcopy(problem), torch.float32)

    def remembered(vector: Tensor) -> Tensor:
        key = hash(vector.numpy().tobytes())
        if key not in memory:
            memory[key] = product(vector)
        return memory[key].clone()

    size = sum(parameter.numel() for parameter in problem.model.parameters())
    settings: dict[str, float] = {}
    if "hessian-eigenthings" in peers:
        settings["hessian-eigenthings"] = _fewest_steps(remembered, size, count)
        memory.clear()
    if "curvlinops" in peers:
        settings["curvlinops"] = _loosest_tolerance(remembered, product, size, count)
    return settings


def _fewest_steps(product: Callable[[Tensor], Tensor], size: int, count: int) -> int:
    from hessian_eigenthings import lanczos as their_lanczos
    from hessian_eigenthings.operators.base import LambdaOperator

    operator = LambdaOperator(product, size)
    true = their_lanczos(operator, k=count, max_iter=MOST_STEPS, reorthogonalize=True, seed=SEED).eigenvalues
    scale = true.abs().max()
    low, high = count, MOST_STEPS
    while high - low > 1:
        middle = (low + high) // 2
        found = their_lanczos(operator, k=count, max_iter=middle, reorthogonalize=True, seed=SEED)
        accurate = bool((found.residuals <= TOLERANCE * scale).all())
        right = bool(((found.eigenvalues - true).abs() <= TOLERANCE * scale).all())
        low, high = (low, middle) if accurate and right else (middle, high)
    return high


def _loosest_tolerance(
    product: Callable[[Tensor], Tensor], check: Callable[[Tensor], Tensor], size: int, count: int
) -> float:
    """ARPACK compares with each |eigenvalue|, not with the largest: the tolerance is looser than ours."""
    clock = Clock()
    matvec = clock(lambda v: product(torch.from_numpy(v.reshape(-1).copy())).numpy())
    operator = LinearOperator((size, size), matvec=matvec, dtype=np.float32)
    tried = 0
    for exponent in range(0, 13):
        tolerance = 10.0 ** (-exponent / 3)
        clock.seconds.clear()
        _, vectors = _eigsh(operator, count, tolerance)
        if len(clock.seconds) == tried:  # it stopped at the same restart
            continue
        tried = len(clock.seconds)
        if float(residuals(check, vectors)[1].max()) <= TOLERANCE:
            return tolerance
    return math.nan


def residuals(product: Callable[[Tensor], Tensor], vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients by descending magnitude, and the norms ||Hv - (v.Hv) v|| / |lambda_1|.

    With the Rayleigh quotient rather than the reported value: the least residual that a vector allows.
    """
    quotients, norms = [], []
    for vector in vectors:
        unit = vector.double() / vector.double().norm()
        image = product(unit).double()
        quotient = unit @ image
        quotients.append(quotient)
        norms.append((image - quotient * unit).norm())
    values, errors = torch.stack(quotients), torch.stack(norms)
    order = values.abs().argsort(descending=True)
    return values[order], errors[order] / values.abs().max()
