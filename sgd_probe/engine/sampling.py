"""What a live loader does: how minibatches are drawn decides whether flat modes can diffuse."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from sgd_probe.engine.config import SamplingChoice


@dataclass(frozen=True)
class Sampling:
    """How the training loader draws.

    Attributes:
        scheme: "with_replacement", "without_replacement", "ordered" or "unknown".
        samples: size of the data set, or None.
        batch_size: or None.
        batches: minibatches in an epoch, or None.
        drop_last: a partial last batch is dropped.
    """

    scheme: str
    samples: int | None = None
    batch_size: int | None = None
    batches: int | None = None
    drop_last: bool = False

    @property
    def withheld(self) -> str:
        """Why the rule for sampling with replacement does not apply; "" where it does."""
        return _WITHHELD[self.scheme]

    def describe(self) -> str:
        """One line for people."""
        line = _NAMES[self.scheme]
        if self.samples is not None and self.batch_size is not None:
            line += f", {self.samples} samples in batches of {self.batch_size}"
        if self.batches is not None:
            line += f", {self.batches} batches an epoch"
        return line


def read_sampling(loader: Any, choice: SamplingChoice = "auto", batches: int | None = None) -> Sampling:
    """Read a loader without touching it: no iteration, no generator.

    Args:
        loader: the live training loader; anything but a torch ``DataLoader`` is "unknown".
        choice: the user's word, which wins.
        batches: what the loop takes from an epoch, where it knows better than the loader.
    """
    found = _read(loader)
    if batches is not None:
        found = dataclasses.replace(found, batches=batches)
    if choice == "auto":
        return found
    return Sampling(choice, found.samples, found.batch_size, found.batches, found.drop_last)


def _read(loader: Any) -> Sampling:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return Sampling("unknown")
    batch_sampler, samples = loader.batch_sampler, _length(loader.dataset)
    if not isinstance(batch_sampler, BatchSampler):
        return Sampling("unknown", samples=samples, batches=_length(loader))
    sampler = batch_sampler.sampler
    if isinstance(sampler, RandomSampler | WeightedRandomSampler):
        scheme = "with_replacement" if sampler.replacement else "without_replacement"
    elif isinstance(sampler, SubsetRandomSampler):
        scheme, samples = "without_replacement", len(sampler)
    elif isinstance(sampler, SequentialSampler):
        scheme = "ordered"
    else:
        scheme = "unknown"
    return Sampling(
        scheme,
        samples=samples,
        batch_size=batch_sampler.batch_size,
        batches=_length(loader),
        drop_last=batch_sampler.drop_last,
    )


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


_NAMES = {
    "with_replacement": "sampling with replacement",
    "without_replacement": "sampling without replacement",
    "ordered": "data in a fixed order",
    "unknown": "sampling scheme unknown",
}
_WITHHELD = {
    "with_replacement": "",
    "without_replacement": (
        "the loader samples without replacement, which holds flat modes back over an epoch; the rule for "
        "it is not built yet"
    ),
    "ordered": "the loader reads the data in a fixed order, so the noise of successive steps is correlated",
    "unknown": (
        "how the loader draws its batches is unknown; if they are independent, say "
        'ProbeConfig(sampling="with_replacement")'
    ),
}
