"""Training steps that draw their batches, or make their optimizer's steps, themselves: what is probed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sgd_probe import WindowResult
from tests.integrations.harness import fit
from tests.integrations.trainings import (
    MakeModule,
    discriminator_first,
    drawing,
    gan,
    in_turns,
    quick_probe,
    vectors,
)

LossFn = Callable[[Any, Any], Tensor]


def generators(module: Any, batch: Any) -> Tensor:
    loss: Tensor = module.says(module.fake(batch[0]), True)
    return loss


def discriminators_second(module: Any, batch: Any) -> Tensor:
    """After the generator has drawn its noise."""
    module.fake(batch[0])
    return discriminators(module, batch)


def discriminators(module: Any, batch: Any) -> Tensor:
    loss: Tensor = module.says(module.fake(batch[0]).detach(), False) + module.says(batch[0], True)
    return loss


def classifiers(module: Any, batch: Any) -> Tensor:
    batch[0].mul_(0.9)
    return F.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("make", "loss_fn", "optimizer"),
    [
        (gan(in_turns, schedule=True), generators, 0),
        (gan(in_turns, schedule=True), discriminators_second, 1),
        (gan(discriminator_first), generators, 0),
        (gan(discriminator_first), discriminators, 1),
        (drawing(), classifiers, 0),
    ],
)
def test_the_probed_loss_is_the_one_that_was_written_down(
    make: MakeModule, loss_fn: LossFn, optimizer: int, tmp_path: Path
) -> None:
    """A probe that finds the loss by itself sees the curvature that one sees which is given it."""
    found = quick_probe(strict=True, optimizer=optimizer)
    given = quick_probe(strict=True, optimizer=optimizer, loss_fn=loss_fn, name="sgd_probe_given")
    fit("pytorch_lightning", make, vectors, [found, given], tmp_path, steps=180)
    assert len(found.results) == len(given.results) >= 1
    for mine, its in zip(found.results, given.results, strict=True):
        assert _eigenvalues(mine) == pytest.approx(_eigenvalues(its), rel=1e-4)
        assert max(_eigenvalues(mine)) > 1e-3
        assert mine.curvature.parameters == its.curvature.parameters
        assert (mine.opened_at_step, mine.steps) == (its.opened_at_step, its.steps)


def _eigenvalues(result: WindowResult) -> list[float]:
    return [mode.held_out_eigenvalue for mode in result.modes if mode.kind == "top"]


def test_steps_are_numbered_as_the_trainer_numbers_its_rows(tmp_path: Path) -> None:
    """Two optimizers: ``global_step`` counts both, the rows of a logger one a batch."""
    probe = quick_probe(strict=True)
    _, trainer = fit("pytorch_lightning", gan(in_turns, schedule=True), vectors, [probe], tmp_path, steps=300)
    assert trainer.global_step == 300
    rows = trainer.logger.rows
    assert max(step for step, _ in rows) == 149
    closed = [step for step, row in rows if "sgd_probe/lambda_max" in row]
    assert closed == [result.closed_at_step - 1 for result in probe.results]
    assert [result.closed_at_step - result.opened_at_step for result in probe.results] == [60, 60]
    assert all(result.steps == 60 for result in probe.results)


def test_a_loss_function_is_a_way_around_every_refusal(tmp_path: Path) -> None:
    def twice(self: Any, batch: Any, batch_idx: int) -> None:
        generator, _ = self.optimizers()
        for _ in range(2):
            generator.zero_grad()
            generators(self, batch).backward()  # type: ignore[no-untyped-call]
            generator.step()

    probe = quick_probe(strict=True, loss_fn=generators)
    fit("pytorch_lightning", gan(twice), vectors, [probe], tmp_path, steps=200)
    assert probe.results


def test_a_loader_that_runs_out_ends_the_epoch_as_ever(tmp_path: Path) -> None:
    seen: list[int] = []

    class Counting(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            for index in range(16 * 5):
                seen.append(index)
                yield torch.randn(6), index % 4

    def data() -> Any:
        return torch.utils.data.DataLoader(Counting(), batch_size=16)

    probe = quick_probe(strict=True)
    _, trainer = fit("pytorch_lightning", drawing(), data, [probe], tmp_path, steps=150)
    assert trainer.global_step == 150
    assert len(seen) == 150 * 16
    assert "training_step" not in vars(trainer.lightning_module)
    assert probe.results
