"""What is read off live loaders, without touching them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from sgd_probe.dynamics.statistics import Draw
from sgd_probe.engine.config import SamplingChoice
from sgd_probe.engine.sampling import Sampling, read_sampling

DATA = TensorDataset(torch.arange(100.0))


class Stream(IterableDataset[Tensor]):
    """Never to be iterated by a reader."""

    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("the loader was iterated")


class Custom(Sampler[int]):
    """Draws in a way that nobody can know; has no length."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("the sampler was iterated")


class CustomBatches(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        raise AssertionError("the batch sampler was iterated")

    def __len__(self) -> int:
        return 7


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, **{"batch_size": 8, **options})


CASES: dict[str, tuple[Callable[[], Any], Sampling]] = {
    "shuffled": (
        lambda: loader(shuffle=True),
        Sampling("without_replacement", samples=100, batch_size=8, batches=13),
    ),
    "shuffled_drop_last": (
        lambda: loader(shuffle=True, drop_last=True),
        Sampling("without_replacement", samples=100, batch_size=8, batches=12, drop_last=True),
    ),
    "with_replacement": (
        lambda: loader(sampler=RandomSampler(DATA, replacement=True, num_samples=640)),
        Sampling("with_replacement", samples=100, batch_size=8, batches=80),
    ),
    "weighted": (
        lambda: loader(sampler=WeightedRandomSampler([1.0] * 100, 64)),
        Sampling("with_replacement", samples=100, batch_size=8, batches=8),
    ),
    "weighted_without_replacement": (
        lambda: loader(sampler=WeightedRandomSampler([1.0] * 100, 64, replacement=False)),
        Sampling("unknown", samples=100, batch_size=8, batches=8),
    ),
    "subset": (
        lambda: loader(sampler=SubsetRandomSampler(range(40))),
        Sampling("without_replacement", samples=40, batch_size=8, batches=5),
    ),
    "distributed": (
        lambda: loader(sampler=DistributedSampler(DATA, num_replicas=4, rank=1)),
        Sampling("without_replacement", samples=100, batch_size=32, batches=4),
    ),
    "distributed_drop_last": (
        lambda: loader(
            sampler=DistributedSampler(DATA, num_replicas=3, rank=1, drop_last=True), drop_last=True
        ),
        Sampling("without_replacement", samples=99, batch_size=24, batches=4, drop_last=True),
    ),
    "distributed_in_order": (
        lambda: loader(sampler=DistributedSampler(DATA, num_replicas=4, rank=1, shuffle=False)),
        Sampling("ordered", samples=100, batch_size=32, batches=4),
    ),
    "sequential": (lambda: loader(), Sampling("ordered", samples=100, batch_size=8, batches=13)),
    "batch_sampler": (
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA, replacement=True), 4, True)),
        Sampling("with_replacement", samples=100, batch_size=4, batches=25, drop_last=True),
    ),
    "sequential_batch_sampler": (
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 4, False)),
        Sampling("ordered", samples=100, batch_size=4, batches=25),
    ),
    "custom_batch_sampler": (
        lambda: DataLoader(DATA, batch_sampler=CustomBatches()),
        Sampling("unknown", samples=100, batches=7),
    ),
    "custom_sampler": (
        lambda: loader(sampler=Custom()),
        Sampling("unknown", samples=100, batch_size=8),
    ),
    "no_batching": (
        lambda: loader(batch_size=None, shuffle=True),
        Sampling("unknown", samples=100, batches=100),
    ),
    "iterable": (lambda: DataLoader(Stream(), batch_size=8), Sampling("unknown")),
    "list": (lambda: [torch.zeros(8)], Sampling("unknown")),
    "nothing": (lambda: None, Sampling("unknown")),
}


@pytest.mark.parametrize("name", CASES)
def test_reading(name: str) -> None:
    make, expected = CASES[name]
    assert read_sampling(make()) == expected


def test_reading_moves_no_generator() -> None:
    generator = torch.Generator().manual_seed(3)
    loaders = [make() for make, _ in CASES.values()]
    loaders += [
        loader(shuffle=True, generator=generator),
        loader(sampler=RandomSampler(DATA, replacement=True, generator=generator)),
        loader(sampler=WeightedRandomSampler([1.0] * 100, 64, generator=generator)),
    ]
    before = (
        generator.get_state(),
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(legacy=False),
    )
    for each in loaders:
        read_sampling(each).describe()
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert random.getstate() == before[2]
    np.testing.assert_equal(np.random.get_state(legacy=False), before[3])


@pytest.mark.parametrize("choice", ["with_replacement", "without_replacement"])
@pytest.mark.parametrize("make", [lambda: loader(), lambda: None])
def test_the_user_s_word_wins(make: Callable[[], Any], choice: SamplingChoice) -> None:
    found = read_sampling(make(), choice)
    assert found.scheme == choice
    assert found.samples == read_sampling(make()).samples


SHUFFLED = Sampling("without_replacement", samples=100, batch_size=8, batches=13)


def test_what_is_not_known_gets_no_verdict() -> None:
    assert Sampling("with_replacement").withheld == ""
    assert SHUFFLED.withheld == ""
    assert "is not known" in dataclasses.replace(SHUFFLED, every_step=False).withheld
    assert "fewer samples" in dataclasses.replace(SHUFFLED, accumulation=2).withheld
    even = dataclasses.replace(SHUFFLED, accumulation=3, batches=12, drop_last=True)
    assert even.withheld == ""
    assert "without replacement" in Sampling("without_replacement").withheld
    assert "fixed order" in Sampling("ordered").withheld
    assert 'sampling="with_replacement"' in Sampling("unknown").withheld


def test_one_line_for_people() -> None:
    found = read_sampling(loader(shuffle=True))
    assert found.describe() == (
        "sampling without replacement, 100 samples in batches of 8, 13 batches an epoch"
    )
    assert Sampling("unknown").describe() == "sampling scheme unknown"


def test_the_draws_of_an_epoch() -> None:
    draws = [SHUFFLED.draw(index) for index in range(13)]
    assert [draw.first for draw in draws] == [True] + [False] * 12
    assert [draw.share for draw in draws] == [1.0] * 12 + [0.5]
    assert {draw.batches for draw in draws} == {100 / 8}
    even = dataclasses.replace(SHUFFLED, accumulation=3, batches=12, drop_last=True)
    steps = [even.draw(index) for index in (2, 5, 8, 11)]
    assert [(draw.first, draw.share) for draw in steps] == [(True, 1.0)] + [(False, 1.0)] * 3
    assert steps[0].batches == 100 / 24
    for other in (Sampling("with_replacement"), Sampling("without_replacement"), Sampling("unknown")):
        assert other.draw(0) == Draw()
