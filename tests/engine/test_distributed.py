"""Two real processes over gloo: products of all data, the same bits on both, no failure that hangs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.hessian import CurvatureError, HessianOperator, WrongHessianError
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.engine import ProbeConfig, ProbeEngine, Sampling
from sgd_probe.engine.distributed import Processes
from tests.helpers.processes import run_processes
from tests.helpers.quadratic import Quadratic
from tests.helpers.quadratic import loss as quadratic_loss

pytestmark = pytest.mark.slow

CURVATURES, SCALES = (9.0, 7.0, 5.0, 3.0, 2.0, 1.0), (0.5, 1.0, 2.0, 3.0, 0.1, 1.0)
MINIBATCHES = 100


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loss(module: nn.Module, batch: Any, index: int) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(module(inputs), targets)


def data() -> list[tuple[Tensor, Tensor]]:
    """Four batches of eight."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(4)
    ]


def frozen(batches: list[Any]) -> list[CurvatureBatch]:
    return [CurvatureBatch.freeze(batch, 0, seed=0) for batch in batches]


def main(rank: int, folder: Path, case: str) -> Any:
    """What one of the processes does."""
    dist.init_process_group("gloo")
    processes = Processes(torch.device("cpu"))
    found = CASES[case](processes)
    dist.barrier()
    dist.destroy_process_group()
    return found


def _products(processes: Processes) -> Any:
    module = network()
    space = ParameterSpace.of(module)
    mine = frozen(data()[processes.rank :: 2])
    vector = torch.ones(space.size, dtype=torch.float64)
    operator = HessianOperator(module, loss, mine, space, ranks=processes)
    return {
        "samples": operator.samples,
        "product": operator.matvec(vector).tolist(),
        "each": [(weight, product.tolist()) for weight, product in operator.matvec_per_batch(vector)],
        "gradients": [gradient.tolist() for _, gradient in operator.gradients()],
    }


def _caught(work: Callable[[], object]) -> str:
    try:
        work()
    except (CurvatureError, MemoryError, WrongHessianError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _failures(processes: Processes) -> Any:
    first = processes.rank == 0

    def fails(error: Exception) -> Tensor:
        if first:
            raise error
        return torch.ones(3)

    def infinite() -> Tensor:
        return torch.tensor([1.0, float("inf") if first else 1.0, 1.0])

    return {
        "memory": _caught(lambda: processes.mean(lambda: fails(torch.OutOfMemoryError("no room")))),
        "user": _caught(lambda: processes.mean(lambda: fails(KeyError("batch")))),
        "infinite": _caught(lambda: processes.mean(infinite)),
        "alone": _caught(lambda: processes.together(lambda: fails(CurvatureError("not today")))),
        "fine": processes.mean(lambda: torch.full((3,), 1.0 + processes.rank)).tolist(),
        "numbers": [processes.least(processes.rank), *processes.total([1.0, processes.rank])],
    }


def _noise(processes: Processes) -> Any:
    """A window's noise at fixed weights, where one process's minibatch has SCALES squared."""
    module = Quadratic(CURVATURES, noise=SCALES)
    engine = ProbeEngine(
        module,
        quadratic_loss,
        torch.optim.SGD(module.parameters(), lr=0.1),
        ProbeConfig(top=len(CURVATURES), flat=0, curvature_batches=MINIBATCHES, every_n_steps=1000),
        sampling=Sampling("with_replacement"),
        planned_steps=1e6,
        accumulation=3,
        processes=processes,
    )
    generator = torch.Generator().manual_seed(10 + processes.rank)
    engine.preflight(module.draw(generator), 0, 0)
    for step in range(0, 1000):
        assert not engine.confer(step)
        if engine.opening_due(step):
            break
        engine.offer(module.draw(generator), step, step)
    assert engine.open_window(step) is not None
    window = engine._window
    assert window is not None and window.resampled is not None
    return {
        "variance": [[i.value, i.low, i.high] for i in window.resampled.variance],
        "order": window.basis.vectors.abs().argmax(1).tolist(),
        "trace": window.noise_trace,
        "start": window.start_gradient,
    }


CASES: dict[str, Callable[[Processes], Any]] = {"products": _products, "failures": _failures, "noise": _noise}


def test_products_are_those_of_all_batches_and_the_same_on_all(tmp_path: Path) -> None:
    found = run_processes("tests.engine.test_distributed", tmp_path, case="products")
    assert found[0] == found[1]
    module = network()
    space, batches = ParameterSpace.of(module), data()
    vector = torch.ones(space.size, dtype=torch.float64)
    whole = HessianOperator(module, loss, frozen(batches), space)
    assert found[0]["samples"] == whole.samples == 32
    torch.testing.assert_close(torch.tensor(found[0]["product"], dtype=torch.float64), whole.matvec(vector))
    # Its batches are those of the training: what both processes hold at one place.
    pairs = [
        tuple(torch.cat(parts) for parts in zip(batches[2 * i], batches[2 * i + 1], strict=True))
        for i in (0, 1)
    ]
    united = HessianOperator(module, loss, frozen(pairs), space)
    for (weight, product), (mine, seen) in zip(
        united.matvec_per_batch(vector), found[0]["each"], strict=True
    ):
        assert weight == mine == 0.5
        torch.testing.assert_close(torch.tensor(seen, dtype=torch.float64), product)
    for (_, gradient), seen in zip(united.gradients(), found[0]["gradients"], strict=True):
        torch.testing.assert_close(torch.tensor(seen, dtype=torch.float64), gradient)


def test_a_failure_of_one_is_a_failure_of_all(tmp_path: Path) -> None:
    first, second = run_processes("tests.engine.test_distributed", tmp_path, case="failures")
    assert first["memory"] == "MemoryError: OutOfMemoryError: no room"
    assert second["memory"] == "MemoryError: another process of the training failed; see its log"
    assert first["user"].startswith("WrongHessianError: KeyError")
    assert second["user"].startswith("WrongHessianError: ")
    assert first["infinite"].startswith("CurvatureError: ") and second["infinite"].startswith(
        "CurvatureError: "
    )
    assert first["alone"] == "CurvatureError: not today"
    assert second["alone"] == "CurvatureError: another process of the training failed; see its log"
    assert first["fine"] == second["fine"] == [1.5, 1.5, 1.5]
    assert first["numbers"] == second["numbers"] == [0.0, 2.0, 1.0]


def test_noise_at_fixed_weights_counts_the_minibatches_of_all_processes(tmp_path: Path) -> None:
    first, second = run_processes("tests.engine.test_distributed", tmp_path, case="noise")
    assert first == second
    # A step is the mean of 2 processes x 3 accumulated minibatches.
    truth = [SCALES[index] ** 2 / 6 for index in first["order"]]
    values, lows, highs = zip(*first["variance"], strict=True)
    ratios = [value / true for value, true in zip(values, truth, strict=True)]
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.1)  # 6 x 199 degrees of freedom: 4%
    assert sum(low <= true <= high for low, true, high in zip(lows, truth, highs, strict=True)) >= 5
    # 199 degrees of freedom give 0.82 to 1.22 (chi-square), half of them 0.76 to 1.32.
    assert all(high / low < 1.6 for low, high in zip(lows, highs, strict=True))
    assert first["trace"] == pytest.approx(sum(truth), rel=0.15)
    # The weights are at the minimum: the mean gradient is as far from zero as its error says.
    assert max(map(abs, first["start"])) < 3.5
