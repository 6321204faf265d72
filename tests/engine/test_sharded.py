"""FSDP2 over two gloo processes: products, modes and failures of a module that nobody holds whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.hessian import CurvatureError, HessianOperator, gradient_noise_trace
from sgd_probe.curvature.linear_algebra import random_unit
from sgd_probe.curvature.modes import ModeBasis, find_modes
from sgd_probe.curvature.selftest import self_test
from sgd_probe.curvature.sharded import ShardedDifferenceOperator, at_rest
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.engine import ProbeConfig, ProbeEngine, Sampling
from sgd_probe.engine.distributed import Processes
from sgd_probe.engine.window import radial_shares
from sgd_probe.isolation import isolated
from tests.helpers.processes import run_processes

pytestmark = pytest.mark.slow

BATCHES, RANKS = 3, 2


class Scale(nn.Module):
    """One weight: one of the processes has none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 1.3))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 3), Scale())


def kinked_network() -> nn.Sequential:
    """Enough units that some change sign within any step that float32 can resolve."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)]
    return nn.Sequential(*layers)


def loss(module: nn.Module, batch: Any, index: int) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(module(inputs), targets)


def batches(certifying: bool, rank: int) -> list[CurvatureBatch]:
    """Those of one process, each with dropout of its own."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(2 * RANKS * BATCHES):
        content = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)
        found.append(CurvatureBatch.freeze(content, number, seed=number))
    return found[certifying::2][rank::RANKS]


def modes_of(finding: HessianOperator, certifying: HessianOperator, seed: int) -> ModeBasis:
    return find_modes(
        finding,
        certifying,
        top=3,
        flat=1,
        interior=1,
        tolerance=1e-2,
        flat_curvature=lambda values: 0.05 * float(values.abs().max()),
        flat_dimension=4,
        generator=torch.Generator().manual_seed(seed),
    )


def main(rank: int, folder: Path) -> Any:
    """All that one of the processes finds, in one start."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo")
    processes = Processes(torch.device("cpu"))
    mesh = init_device_mesh("cpu", (RANKS,))

    def sharded(module: nn.Sequential) -> nn.Sequential:
        for child in module:
            if next(child.parameters(), None) is not None:
                fully_shard(child, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    def space_of(module: nn.Module) -> ParameterSpace:
        return replace(ParameterSpace.of(module), reduce=processes.sums)

    def parts(vector: Tensor, space: ParameterSpace) -> list[Any]:
        return [vector[where].tolist() for where in space.slices]

    def caught(work: Callable[[], object]) -> str:
        try:
            work()
        except (CurvatureError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    module = sharded(network())
    torch.manual_seed(rank)
    # As after a validation: without a backward pass, gathered weights stay behind.
    module(torch.randn(4, 6))
    at_rest(module)
    loss(module, batches(False, rank)[0].thaw(), 0).backward()  # type: ignore[no-untyped-call]
    space = space_of(module)

    def state() -> list[Tensor]:
        kept = [torch.get_rng_state()]
        for parameter in module.parameters():
            assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
            kept += [parameter.to_local().clone(), parameter.grad.to_local().clone()]
        return kept

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("expected nothing to be gathered")

    reduced: list[int] = []
    all_reduce = dist.all_reduce

    def count(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        reduced.append(tensor.numel())
        return all_reduce(tensor, *arguments, **named)

    before, broken = state(), False

    def fragile(module: nn.Module, batch: Any, index: int) -> Tensor:
        value = loss(module, batch, index)
        if broken and rank == 1:
            raise KeyError("odd batch")
        return value

    found: dict[str, Any] = {"shapes": [tuple(weights.shape) for weights in space.parts]}
    with (
        isolated(module),
        mock.patch.object(DTensor, "full_tensor", refuse),
        mock.patch.object(DTensor, "redistribute", refuse),
        mock.patch.object(dist, "all_gather", refuse),
        mock.patch.object(dist, "all_gather_object", refuse),
        mock.patch.object(dist, "all_reduce", count),
    ):
        operator = ShardedDifferenceOperator(module, fragile, batches(False, rank), space, ranks=processes)
        held_out = ShardedDifferenceOperator(module, fragile, batches(True, rank), space, ranks=processes)
        like = torch.empty(0)
        vector = random_unit(space.size, like, torch.Generator().manual_seed(rank), processes.sums)
        found["vector"], found["product"] = parts(vector, space), parts(operator.matvec(vector), space)
        (_, gradient), *_ = operator.gradients()
        found["gradient"] = parts(gradient, space)
        broken = True
        found["failure"] = caught(lambda: operator.matvec(vector))
        broken = False
        found["after"] = parts(operator.matvec(vector), space)
        found["samples"], found["trace"] = operator.samples, gradient_noise_trace(operator)
        found["self_test"] = self_test(operator, torch.Generator().manual_seed(7 + rank))
        basis = modes_of(operator, held_out, seed=rank)
    found["modes"] = [
        {
            "name": mode.name,
            "eigenvalue": mode.eigenvalue,
            "residual": mode.residual,
            "certificate": mode.certificate.eigenvalue,
            "effective": mode.certificate.effective_curvature,
            "shares": dict(mode.layer_shares),
            "vector": parts(row, space),
        }
        for mode, row in zip(basis.modes, basis.vectors, strict=True)
    ]
    found["basis"] = [basis.orthogonality, basis.split_half_overlap, basis.held_out_overlap]
    found["radial"] = radial_shares(basis.vectors, space)
    found["untouched"] = all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    found["largest"] = max(reduced)

    relu = sharded(kinked_network())
    relu_space = space_of(relu)
    with isolated(relu):
        kinked = ShardedDifferenceOperator(relu, loss, batches(False, rank), relu_space, ranks=processes)
        direction = torch.randn(relu_space.size, generator=torch.Generator().manual_seed(rank))
        found["relu"] = caught(lambda: kinked.matvec(direction))

    def engine_on(module: nn.Module, **options: Any) -> Callable[[], object]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        config, sampling = ProbeConfig(**options), Sampling("with_replacement")
        return lambda: ProbeEngine(
            module, loss, optimizer, config, sampling=sampling, planned_steps=1e3, processes=processes
        )

    some, columns, hooked = network(), nn.Sequential(nn.Linear(6, 4)), sharded(network())
    fully_shard(some[0], mesh=mesh)
    fully_shard(columns, mesh=mesh, shard_placement_fn=lambda weights: Shard(weights.ndim - 1))
    weight: Any = next(hooked.parameters())
    weight.register_post_accumulate_grad_hook(lambda weights: None)
    found["refused"] = [
        caught(engine_on(some)),
        caught(engine_on(columns)),
        caught(engine_on(hooked)),
        caught(engine_on(module, microbatch=4)),
        caught(engine_on(module)),
    ]
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_processes("tests.engine.test_sharded", tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def exact() -> list[HessianOperator]:
    """Double backward in one process, in float64, on the same weights and batches."""
    module = network()
    sets = [[b for rank in range(RANKS) for b in batches(certifying, rank)] for certifying in (False, True)]
    space = ParameterSpace.of(module)
    return [HessianOperator(module, loss, chosen, space, dtype=torch.float64) for chosen in sets]


def whole(parts: list[list[list[float]]]) -> Tensor:
    """The vector whose parts the processes hold: every parameter's rows in their order."""
    return torch.tensor(
        [number for piece in zip(*parts, strict=True) for part in piece for number in part],
        dtype=torch.float64,
    )


def of(found: list[Any], key: str) -> Tensor:
    return whole([one[key] for one in found])


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_each_process_works_on_its_rows_and_puts_them_back(found: list[Any]) -> None:
    assert found[0]["shapes"] == [[4, 6], [4], [2, 7], [2], [1]]
    assert found[1]["shapes"] == [[3, 6], [3], [1, 7], [1], [0]]
    for one in found:
        assert one["untouched"]
        # Only coefficients and matrices of a few vectors are reduced: less than a process holds of one.
        assert one["largest"] < 29


def test_products_and_gradients_are_those_of_one_process(
    found: list[Any], exact: list[HessianOperator]
) -> None:
    finding, _ = exact
    with isolated(finding.module):
        product, gradients = finding.matvec(of(found, "vector")), [g for _, g in finding.gradients()]
    assert relative(of(found, "product"), product) < 2e-3
    # A batch is what all processes hold at one place.
    assert relative(of(found, "gradient"), (gradients[0] + gradients[BATCHES]) / 2) < 1e-5
    united = [(gradients[i] + gradients[i + BATCHES]) / 2 for i in range(BATCHES)]
    trace = float(torch.stack(united).var(0).sum())
    for one in found:
        assert one["samples"] == finding.samples
        assert one["trace"] == pytest.approx(trace, rel=1e-4)


def test_modes_are_those_of_double_backward(found: list[Any], exact: list[HessianOperator]) -> None:
    with isolated(exact[0].module):
        expected = modes_of(exact[0], exact[1], seed=5)
        vectors = torch.stack([whole([one["modes"][i]["vector"] for one in found]) for i in range(5)])
        images = torch.stack([exact[1].matvec(vector) for vector in vectors])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(5).double(), rtol=0, atol=1e-5)
    for index, mode in enumerate(found[0]["modes"]):
        vector = vectors[index]
        assert mode["certificate"] == pytest.approx(float(vector @ images[index]), rel=5e-3, abs=1e-3)
        squares = [float(vector[where].square().sum()) for where in exact[0].space.slices]
        shares = dict(zip(exact[0].space.names, squares, strict=True))
        assert mode["shares"] == pytest.approx(shares, abs=1e-5)
        assert found[0]["radial"][index] == pytest.approx(
            radial_shares(vectors.float(), ParameterSpace.of(network()))[index], abs=1e-5
        )
    for mode, other in zip(found[0]["modes"][:3], expected.modes[:3], strict=True):
        assert mode["eigenvalue"] == pytest.approx(other.eigenvalue, rel=1e-2)
        assert mode["residual"] <= 1e-2
    cosines = torch.linalg.svdvals(vectors[:3] @ expected.vectors[:3].T)
    assert float(cosines.min()) > 0.999
    assert found[0]["basis"][1:] == pytest.approx(
        [expected.split_half_overlap, expected.held_out_overlap], abs=0.02
    )


def test_all_processes_say_the_same(found: list[Any]) -> None:
    first, second = ({key: one[key] for key in ("basis", "radial", "trace", "self_test")} for one in found)
    assert first == second
    numbers = [[{k: v for k, v in m.items() if k != "vector"} for m in one["modes"]] for one in found]
    assert numbers[0] == numbers[1]
    assert "finite differences, symmetric" in found[0]["self_test"]
    assert "the gradient is the slope of the loss" in found[0]["self_test"]


def test_a_failure_of_one_ends_the_product_on_both_and_the_next_is_right(found: list[Any]) -> None:
    assert found[0]["failure"].startswith("WrongHessianError: another process")
    assert found[1]["failure"].startswith("WrongHessianError: KeyError")
    torch.testing.assert_close(of(found, "after"), of(found, "product"), rtol=0, atol=0)


def test_kinks_are_unreliable_there_as_well(found: list[Any]) -> None:
    for one in found:
        assert "unreliable" in one["relu"]


def test_what_is_divided_in_another_way_is_refused_by_name(found: list[Any]) -> None:
    for one in found:
        some, columns, hooked, pieces, fine = one["refused"]
        assert "3.weight whole on every process and 0.weight not" in some and "`params`" in some
        assert "divided by rows over all processes, found 0.weight" in columns
        assert "register_post_accumulate_grad_hook" in hooked
        assert "expected no `microbatch`" in pieces and "found 4" in pieces
        assert fine == "nothing"
