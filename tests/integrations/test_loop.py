"""A plain loop with the probe is the loop without it; and what the probe measures there is right."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import LoopProbe, ModeKind, WindowResult
from tests.helpers.probing import is_probing
from tests.helpers.wandb_file import read_wandb_file
from tests.integrations.harness import generators, plain

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def network() -> nn.Sequential:
    """Dropout, which draws random numbers, and BatchNorm, which keeps statistics."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 4))


def shuffled(generator: torch.Generator | None = None, batch_size: int = 8) -> DataLoader[Any]:
    """160 blobs in a loader that shuffles with a generator of its own."""
    source = torch.Generator().manual_seed(7)
    labels = torch.randint(4, (160,), generator=source)
    inputs = torch.randn((4, 6), generator=source)[labels] + 0.7 * torch.randn((160, 6), generator=source)
    own = generator or torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size, shuffle=True, generator=own)


def classify(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    inputs.mul_(0.9)  # a loss may do as it likes with its batch
    return F.cross_entropy(model(inputs), labels)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3)


def quick(**options: Any) -> dict[str, Any]:
    return {
        "top": 3,
        "flat": 2,
        "window": 50,
        "every_n_steps": 60,
        "curvature_batches": 2,
        "strict": True,
        **options,
    }


def train(
    make_optimizer: MakeOptimizer,
    options: dict[str, Any] | None,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] = classify,
    epochs: int = 8,
    accumulation: int = 1,
    evaluates: bool = False,
) -> tuple[list[Any], LoopProbe | None]:
    """Train, with the probe where there are options for it, and take down all that could differ."""
    torch.manual_seed(11)
    model, loader = network(), shuffled()
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.9)
    trace: list[Any] = []

    def epoch(batches: Any) -> None:
        for index, batch in enumerate(batches):
            model.train()
            loss = loss_fn(model, batch) / accumulation
            loss.backward()  # type: ignore[no-untyped-call]
            trace.append((plain(loss.detach()), plain(batch), generators()))
            trace.append(plain([parameter.grad for parameter in model.parameters()]))
            if (index + 1) % accumulation == 0:
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            trace.append(plain(list(model.state_dict().values())))
            if evaluates:
                model.eval()  # until the next batch is there

    probe = None
    if options is None:
        for _ in range(epochs):
            epoch(loader)
    else:
        planned = epochs * len(loader) // accumulation
        given = {"planned_steps": planned, "accumulation": accumulation, **options}
        with LoopProbe(model, optimizer, loss_fn, **given) as probe:
            for _ in range(epochs):
                epoch(probe.watch(loader))
    trace.append(plain([optimizer.state_dict(), sorted(vars(optimizer)), schedule.state_dict()]))
    trace.append([len(hooks) for name, hooks in vars(optimizer).items() if name.endswith("_hooks")])
    trace.append([plain(loader.generator), generators(), [m.training for m in model.modules()]])
    trace.append([sorted(vars(module)) for module in model.modules()])
    return trace, probe


def assert_same(mine: list[Any], its: list[Any]) -> None:
    assert len(mine) == len(its)
    for index, (one, other) in enumerate(zip(mine, its, strict=True)):
        assert one == other, f"entry {index} of {len(mine)} differs"


def assert_measured(results: list[WindowResult], kinds: tuple[str, ...] = ("top", "flat")) -> None:
    assert results
    for result in results:
        assert {mode.kind.value for mode in result.modes} == set(kinds)
        assert all(0 <= mode.residual < 1 for mode in result.modes)
        assert all(math.isfinite(mode.held_out_eigenvalue) for mode in result.modes)


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
@pytest.mark.parametrize("case", [{}, {"evaluates": True}, {"accumulation": 2, "epochs": 14}])
def test_a_loop_with_the_probe_is_bit_identical(make_optimizer: MakeOptimizer, case: dict[str, Any]) -> None:
    without, _ = train(make_optimizer, None, **case)
    found, probe = train(make_optimizer, quick(), **case)
    assert probe is not None
    assert_same(without, found)
    assert_measured(probe.results)
    assert len(probe.results) == 2
    assert probe.results[0].complete
    assert "without replacement" in probe.results[0].sampling


def test_the_comparison_sees_one_random_number() -> None:
    def careless(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 30:
            torch.rand(())
        return classify(model, batch)

    calls: list[int] = []
    without, _ = train(sgd, None)
    found, _ = train(sgd, None, loss_fn=careless)
    with pytest.raises(AssertionError, match="differs"):
        assert_same(without, found)


def counting() -> Callable[[nn.Module, Any], Tensor]:
    """A loss that is another one at every call, by a variable around it."""
    calls = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return classify(model, batch) * (1 + 1e-3 * calls)

    return loss_fn


def test_what_a_loss_keeps_around_it_is_put_back() -> None:
    without, _ = train(sgd, None, loss_fn=counting())
    found, probe = train(sgd, quick(), loss_fn=counting())
    assert probe is not None and probe.results
    assert_same(without, found)


def still(inputs: Tensor, labels: Tensor, **options: Any) -> tuple[nn.Module, LoopProbe]:
    """A network that hardly moves, trained on one batch over and over."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    with LoopProbe(model, optimizer, loss_fn, planned_steps=60, **quick(**options)) as probe:
        for index in range(60):
            batch = inputs, labels
            probe.batch(batch, index)
            noisy = loss_fn(model, batch) * (1 + 0.1 * torch.randn(()))
            noisy.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return model, probe


def test_the_eigenvalues_are_those_of_the_dense_hessian() -> None:
    torch.manual_seed(1)
    inputs, labels = torch.randn(40, 3, dtype=torch.float64), torch.randint(2, (40,))
    model, probe = still(inputs, labels, flat=0)
    names = [name for name, _ in model.named_parameters()]
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(flat: Tensor) -> Tensor:
        pieces = torch.split(flat, [p.numel() for p in model.parameters()])
        shaped = [piece.view_as(p) for piece, p in zip(pieces, model.parameters(), strict=True)]
        logits = torch.func.functional_call(model, dict(zip(names, shaped, strict=True)), (inputs,))
        return F.cross_entropy(cast(Tensor, logits), labels)

    dense = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, start))  # type: ignore[no-untyped-call]
    expected = sorted(dense.tolist(), key=abs, reverse=True)[:3]
    (result,) = probe.results
    assert [mode.eigenvalue for mode in result.modes] == pytest.approx(expected, rel=1e-4)
    assert [mode.held_out_eigenvalue for mode in result.modes] == pytest.approx(expected, rel=1e-4)
    assert "passed" in result.curvature.self_test


def test_the_probed_loss_is_that_of_the_training_mode() -> None:
    """Between two batches the loop may be evaluating."""
    seen: list[bool] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(model.training)
        return classify(model, batch)

    _, probe = train(sgd, quick(), loss_fn=loss_fn, evaluates=True)
    assert probe is not None and probe.results
    assert all(seen)


def test_nothing_is_said_or_logged_by_an_evaluation_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    def loud(model: nn.Module, batch: Any) -> Tensor:
        print("a loss")
        return classify(model, batch)

    train(sgd, quick(), loss_fn=loud, epochs=5)
    printed = capsys.readouterr()
    assert printed.out.count("a loss") == 5 * 20
    assert "near-flat directions" in printed.err  # the plan


def failing(after: int) -> Callable[[nn.Module, Any], Tensor]:
    """A loss that fails for the probe once the loop has had so many of its own."""
    own = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal own
        if not is_probing():
            own += 1
        elif own >= after:
            raise RuntimeError("no loss today")
        return classify(model, batch)

    return loss_fn


#: The first batch, the opening after four, the closing fifty steps later.
STAGES = (0, 1, 30)


@pytest.mark.parametrize("after", STAGES)
def test_a_failure_is_warned_of_once_and_the_loop_goes_on(
    after: int, caplog: pytest.LogCaptureFixture
) -> None:
    without, _ = train(sgd, None, loss_fn=failing(after))
    found, probe = train(sgd, quick(strict=False), loss_fn=failing(after))
    assert_same(without, found)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert "switched off" in warning and "no loss today" in warning
    assert probe is not None and not probe.results


@pytest.mark.parametrize("after", STAGES)
def test_a_strict_probe_raises(after: int) -> None:
    with pytest.raises(RuntimeError, match="no loss today"):
        train(sgd, quick(), loss_fn=failing(after))


def test_results_go_to_the_folder_the_function_and_the_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen: list[WindowResult] = []
    quiet = wandb.Settings(x_disable_stats=True, x_disable_meta=True, console="off")
    run = wandb.init(project="p", dir=tmp_path, mode="offline", settings=quiet)

    def logging_loss(model: nn.Module, batch: Any) -> Tensor:
        loss = classify(model, batch)
        run.log({"loss": loss.item()})
        return loss

    _, probe = train(
        sgd, quick(run_dir=tmp_path / "run", on_result=seen.append), loss_fn=logging_loss, epochs=4
    )
    run.finish()
    assert probe is not None
    assert seen == probe.results and len(seen) == 1
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000
    (path,) = tmp_path.rglob("run-*.wandb")
    history = read_wandb_file(path).history
    assert sum("loss" in row for row in history) == 4 * 20
    (ours,) = (row for row in history if "sgd_probe/lambda_max" in row)
    assert ours["sgd_probe/lambda_max"] == pytest.approx(seen[0].curvature.lambda_max)
    assert ours["trainer/global_step"] == seen[0].closed_at_step - 1


def test_a_function_that_fails_leaves_the_results(caplog: pytest.LogCaptureFixture) -> None:
    def on_result(result: WindowResult) -> None:
        raise KeyError("mine")

    _, probe = train(sgd, quick(on_result=on_result, strict=False))
    assert probe is not None and len(probe.results) == 2
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert "CallbackSink failed" in warning


def test_a_window_that_the_end_cuts_short_is_closed() -> None:
    _, probe = train(sgd, quick(window=100, every_n_steps=100, planned_steps=200), epochs=4)
    assert probe is not None
    (result,) = probe.results
    assert 40 <= result.steps < 100 and not result.complete
    assert_measured(probe.results)


def test_a_watched_loader_is_the_loader() -> None:
    model, loader = network(), shuffled()
    batches = [object(), object()]
    probe = LoopProbe(model, sgd(model), classify, planned_steps=10)
    assert all(a is b for a, b in zip(probe.watch(batches), batches, strict=True))
    assert len(probe.watch(loader)) == 20
    assert probe.watch(loader).dataset is loader.dataset

    def stream() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="has no len"):
        len(probe.watch(stream()))


def test_two_probes_watch_two_optimizers() -> None:
    model, loader = network(), shuffled()
    head = torch.optim.SGD(model[4].parameters(), lr=0.05)
    body = torch.optim.AdamW(model[0].parameters(), lr=1e-3)
    with (
        LoopProbe(model, head, classify, planned_steps=80, name="head", **quick()) as first,
        LoopProbe(model, body, classify, planned_steps=80, name="body", **quick()) as second,
    ):
        for _ in range(4):
            for batch in second.watch(first.watch(loader)):
                classify(model, batch).backward()  # type: ignore[no-untyped-call]
                for optimizer in (head, body):
                    optimizer.step()
                    optimizer.zero_grad()
    for probe, parameters in ((first, 52), (second, 84)):
        assert_measured(probe.results)
        assert probe.results[0].curvature.parameters == parameters
        assert "without replacement" in probe.results[0].sampling


def test_accelerates_wrappers_are_looked_into() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = network(), None, shuffled()
    model, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
    with LoopProbe(model, optimizer, classify, planned_steps=80, **quick()) as probe:
        for _ in range(4):
            for batch in probe.watch(loader):
                accelerator.backward(classify(model, batch))
                optimizer.step()
                optimizer.zero_grad()
    assert_measured(probe.results)
    assert "AdamW" in probe.results[0].optimizer
    assert "without replacement, 160 samples in batches of 8" in probe.results[0].sampling


def test_a_loop_that_is_half_seen_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer, other = sgd(model), sgd(model)
    with LoopProbe(model, optimizer, classify, planned_steps=3):
        optimizer.step()
    assert "saw 1 optimizer steps and no batch" in caplog.text
    caplog.clear()
    with LoopProbe(model, optimizer, classify, planned_steps=60, **quick()) as probe:
        for batch in probe.watch(shuffled()):
            classify(model, batch)
            other.step()
    assert "saw 20 batches and no step of the SGD" in caplog.text


def test_an_error_of_the_loop_is_its_own() -> None:
    model = network()
    optimizer = sgd(model)
    with (
        pytest.raises(ZeroDivisionError),
        LoopProbe(model, optimizer, classify, planned_steps=60, **quick()) as probe,
    ):
        for _ in probe.watch(shuffled()):
            raise ZeroDivisionError
    assert not optimizer._optimizer_step_post_hooks
    assert not probe.results


def test_a_probe_can_be_used_again() -> None:
    model, loader = network(), shuffled()
    optimizer = sgd(model)
    probe = LoopProbe(model, optimizer, classify, planned_steps=60, **quick())
    for _ in range(2):
        with probe:
            for _ in range(3):
                for batch in probe.watch(loader):
                    classify(model, batch).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
        assert len(probe.results) == 1


@pytest.mark.parametrize(
    ("model", "optimizer", "why"),
    [
        (network(), torch.optim.LBFGS, "LBFGS"),
        (network().to(torch.bfloat16), torch.optim.SGD, "bfloat16"),
    ],
)
def test_what_cannot_be_probed_is_left_alone(
    model: nn.Module, optimizer: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with LoopProbe(model, optimizer(model.parameters()), classify, planned_steps=10) as probe:
        list(probe.watch(shuffled()))
    assert f"off for this training: {why}" in caplog.text or f"in {why}" in caplog.text
    assert not probe.results
    with (
        pytest.raises(ValueError, match=why),
        LoopProbe(model, optimizer(model.parameters()), classify, planned_steps=10, strict=True),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"planned_steps": 0}, "`planned_steps`"),
        ({"accumulation": 0}, "`accumulation`"),
        ({"first_step": -1}, "`first_step`"),
        ({"top": 0}, "`top`"),
        ({"name": ""}, "`name`"),
        ({"loss_fn": 3}, "`loss_fn`"),
        ({"on_result": 3}, "`on_result`"),
        ({"model": len}, "`model`"),
        ({"optimizer": len}, "`optimizer`"),
    ],
)
def test_a_wrong_argument_is_named(options: dict[str, Any], message: str) -> None:
    model = network()
    given = {"model": model, "optimizer": sgd(model), "loss_fn": classify, "planned_steps": 10, **options}
    with pytest.raises((TypeError, ValueError), match=f"expected {message}"):
        LoopProbe(**given)


def test_modes_of_a_result_are_in_order() -> None:
    _, probe = train(adamw, quick(), epochs=4)
    assert probe is not None
    stiff = [mode.eigenvalue for mode in probe.results[0].modes if mode.kind is ModeKind.TOP]
    assert stiff == sorted(stiff, key=abs, reverse=True) and len(stiff) == 3
