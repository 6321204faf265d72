"""What the search for modes takes above the model, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgd_probe.curvature.hessian import HessianOperator, measure_gradient
from sgd_probe.curvature.krylov import BLOCK_ROWS
from sgd_probe.curvature.lanczos import lanczos
from sgd_probe.curvature.microbatches import check_pieces
from sgd_probe.curvature.modes import find_modes
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.engine.config import ProbeConfig
from sgd_probe.engine.planning import most_vectors
from sgd_probe.isolation import isolated
from tests.helpers.dense import freeze
from tests.helpers.memory import measurable, peak_megabytes, resident_megabytes

pytestmark = pytest.mark.skipif(not measurable(), reason="resident memory is read from Linux's own books")

ROOT = Path(__file__).resolve().parent.parent.parent
#: Pages of code, the interpreter's own objects, small tensors.
SLACK_MEGABYTES = 6.0


def elsewhere(work: str, **arguments: Any) -> dict[str, float]:
    """The answer of a function of this module in a new interpreter.

    Vectors go back to the system when they are freed there, whatever their length; left to itself,
    glibc keeps freed blocks of less than 32 MB for later, and a peak is then a matter of luck.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.curvature.test_memory", work, json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def loss(module: nn.Module, batch: Any, index: int) -> torch.Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def search(
    width: int, count: int, max_vectors: int | None, max_products: int, retain: bool
) -> dict[str, float]:
    """Lanczos on a wide network and few samples: weights are large, the graph beside them small."""
    torch.manual_seed(0)
    layers = (nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))
    module = nn.Sequential(*layers)
    batches = freeze([(torch.randn(16, width), torch.randint(4, (16,)))])
    space = ParameterSpace.of(module)
    with isolated(module):
        cost = measure_gradient(module, loss, batches[0], space)
        before = resident_megabytes()
        with HessianOperator(module, loss, batches, space, retain) as operator:
            found = lanczos(
                operator,
                count,
                torch.empty(0),
                tolerance=1e-6,
                max_vectors=max_vectors,
                max_products=max_products,
            )
        peak = peak_megabytes() - before
    return {
        "peak": peak,
        "vector": 4 * space.size / 2**20,
        "graph": cost.graph_bytes / 2**20,
        "basis": len(found.krylov),
        "restarts": found.restarts,
        "products": found.products,
    }


@pytest.mark.parametrize(
    ("count", "max_vectors", "max_products", "basis", "retain"),
    [
        (3, 10, 24, 10, True),
        pytest.param(3, 10, 24, 10, False, marks=pytest.mark.slow),
        pytest.param(3, None, 14, 14, True, marks=pytest.mark.slow),
        pytest.param(3, None, 14, 14, False, marks=pytest.mark.slow),
        pytest.param(6, 12, 24, 12, True, marks=pytest.mark.slow),
        pytest.param(6, 12, 24, 12, False, marks=pytest.mark.slow),
    ],
)
def test_lanczos_holds_its_basis_and_three_vectors(
    count: int, max_vectors: int | None, max_products: int, basis: int, retain: bool
) -> None:
    found = elsewhere(
        "search",
        width=1024,
        count=count,
        max_vectors=max_vectors,
        max_products=max_products,
        retain=retain,
    )
    assert found["vector"] > 8.0, "2.1 million weights"
    assert found["graph"] < 1.0 + found["vector"], "activations, and the gradient"
    assert found["products"] == max_products and found["basis"] <= basis
    assert (found["restarts"] > 0) == (max_vectors is not None)
    # A block of the basis may have seven rows to spare.
    vectors = count + -(-(basis - count) // BLOCK_ROWS) * BLOCK_ROWS + 3
    assert found["peak"] <= vectors * found["vector"] + found["graph"] + SLACK_MEGABYTES
    assert found["peak"] >= basis * found["vector"], "less than the basis itself cannot be"


def window(max_vectors: int, batches: int, width: int = 64) -> dict[str, float]:
    """What opening a window takes: the search, flat directions, their certificates."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))
    frozen = freeze([(torch.randn(8, width), torch.randint(4, (8,))) for _ in range(2 * batches)])
    space = ParameterSpace.of(module)
    with isolated(module):
        cost = measure_gradient(module, loss, frozen[0], space)
        before = resident_megabytes()
        with (
            HessianOperator(module, loss, frozen[::2], space, False) as finding,
            HessianOperator(module, loss, frozen[1::2], space, False) as certifying,
        ):
            found = find_modes(
                finding,
                certifying,
                top=10,
                flat=4,
                tolerance=1e-2,
                flat_curvature=lambda eigenvalues: 0.01 * float(eigenvalues[0].abs()),
                flat_dimension=6,
                max_vectors=max_vectors,
                generator=torch.Generator().manual_seed(0),
            )
        peak = peak_megabytes() - before
    vector = 4 * space.size / 2**20
    return {"vectors": (peak - cost.graph_bytes / 2**20) / vector, "modes": len(found.modes)}


@pytest.mark.slow
@pytest.mark.parametrize(("max_vectors", "batches"), [(16, 8), (34, 2)])
def test_a_window_takes_what_the_plan_says(max_vectors: int, batches: int) -> None:
    found = elsewhere("window", max_vectors=max_vectors, batches=batches, width=1448)
    planned = most_vectors(ProbeConfig(top=10, flat=4), max_vectors)
    assert found["modes"] == 14
    assert 0.6 * planned <= found["vectors"] <= planned + 1


def products(samples: int, microbatch: int | None) -> dict[str, float]:
    """Products on a deep network and many samples: the graph is large, the weights beside it small."""
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(128, 128), nn.Tanh())]
    module = nn.Sequential(*layers, nn.Linear(128, 4))
    batches = freeze([(torch.randn(samples, 128), torch.randint(4, (samples,))) for _ in range(2)])
    space = ParameterSpace.of(module)
    vector = torch.ones(space.size)
    with isolated(module):
        HessianOperator(
            module, loss, freeze([(torch.randn(2, 128), torch.zeros(2, dtype=torch.long))]), space
        )
        before = resident_megabytes()
        with HessianOperator(module, loss, batches, space, False, microbatch=microbatch) as operator:
            for _ in range(2):
                operator.matvec(vector)
        peak = peak_megabytes() - before
        batch = resident_megabytes()
        if microbatch is not None:
            check_pieces(module, loss, batches[0], space, microbatch)
        check = peak_megabytes() - batch
        cost = measure_gradient(module, loss, batches[0], space, microbatch)
    return {"peak": peak, "check": check, "graph": cost.graph_bytes / 2**20, "graphs": cost.graphs}


def test_pieces_bound_the_memory_of_a_product() -> None:
    whole = elsewhere("products", samples=2048, microbatch=None)
    pieces = elsewhere("products", samples=2048, microbatch=128)
    assert (whole["graphs"], pieces["graphs"]) == (1, 16)
    assert whole["peak"] > 2048 * 8 * 128 * 4 / 2**20, "the activations are the least of it"
    assert pieces["peak"] < whole["peak"] / 6
    assert pieces["graph"] < whole["graph"] / 10
    # The comparison with the whole batch takes what a training step takes: no graph of the gradient.
    assert pieces["check"] < 0.6 * whole["peak"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = {"search": search, "products": products, "window": window}[sys.argv[1]]
    # Once on a small scale, for what is loaded or set up at the first use.
    if work is search:
        search(16, 2, None, 6, True)
    elif work is products:
        products(16, 4)
    else:
        window(16, 2)
    print(json.dumps(work(**json.loads(sys.argv[2]))))  # type: ignore[operator]
