"""What a live loader does: how minibatches are drawn decides whether flat modes can diffuse."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from sgd_probe.dynamics.statistics import Draw
from sgd_probe.engine.config import SamplingChoice
from sgd_probe.theory.sampling import MinibatchSampling


@dataclass(frozen=True)
class Sampling:
    """How the training loader draws.

    Attributes:
        scheme: "with_replacement", "without_replacement", "ordered" or "unknown".
        samples: size of the data set, or None.
        batch_size: or None.
        batches: minibatches in an epoch, or None.
        drop_last: a partial last batch is dropped.
        accumulation: batches gathered into an optimizer step.
        every_step: the loop makes a step of every so many batches, no more and no fewer.
    """

    scheme: str
    samples: int | None = None
    batch_size: int | None = None
    batches: int | None = None
    drop_last: bool = False
    accumulation: int = 1
    every_step: bool = True

    @property
    def withheld(self) -> str:
        """Why no verdict can be given; "" where one can."""
        if self.scheme != "without_replacement":
            return _WITHHELD[self.scheme]
        if self.samples is None or not self.batch_size or self.batches is None or not self.every_step:
            return "the loader samples without replacement, and which samples make a step is not known"
        if self.accumulation > 1 and (self.batches % self.accumulation or self._last_batch < 1):
            return (
                "the loader samples without replacement, and the last step of an epoch gathers fewer samples "
                "than the others: let accumulate_grad_batches divide the batches, with drop_last=True"
            )
        return ""

    @property
    def _last_batch(self) -> float:
        """Samples of an epoch's last batch over those of a full one."""
        assert self.samples is not None and self.batch_size and self.batches is not None
        left = self.samples - (self.batches - 1) * self.batch_size
        return 1.0 if self.drop_last else min(left / self.batch_size, 1.0)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of an epoch as a real number; infinity where it has no end."""
        return math.inf if self.batches is None else self.batches / self.accumulation

    @property
    def epoch_correlation(self) -> float:
        """Correlation of the noise of two steps of an epoch; NaN where nobody knows."""
        if self.withheld:
            return math.nan
        if self.scheme == "with_replacement":
            return 0.0
        steps = self.draw(0).batches
        return -1 / (steps - 1) if steps > 1 else math.nan

    def draw(self, index: int) -> Draw:
        """How the minibatch of a step was drawn.

        Args:
            index: of its last batch in the epoch.
        """
        if self.scheme != "without_replacement" or self.withheld:
            return Draw()
        assert self.samples is not None and self.batch_size and self.batches is not None
        return Draw(
            batches=self.samples / (self.batch_size * self.accumulation),
            share=self._last_batch if index == self.batches - 1 else 1.0,
            first=index < self.accumulation,
        )

    def theory(self) -> MinibatchSampling:
        """The same for the closed forms; independent draws where nothing else is known."""
        if self.scheme != "without_replacement" or self.withheld or not self.batch_size:
            return MinibatchSampling()
        return MinibatchSampling(
            self.samples,
            self.batch_size,
            replacement=False,
            drop_last=self.drop_last,
            accumulation=self.accumulation,
        )

    def describe(self) -> str:
        """One line for people."""
        line = _NAMES[self.scheme]
        if self.samples is not None and self.batch_size is not None:
            line += f", {self.samples} samples in batches of {self.batch_size}"
        if self.batches is not None:
            line += f", {self.batches} batches an epoch"
        if self.accumulation > 1:
            line += f", {self.accumulation} of them a step"
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
    return dataclasses.replace(found, scheme=choice)


def _read(loader: Any) -> Sampling:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return Sampling("unknown")
    batch_sampler, samples = loader.batch_sampler, _length(loader.dataset)
    if not isinstance(batch_sampler, BatchSampler):
        return Sampling("unknown", samples=samples, batches=_length(loader))
    sampler = batch_sampler.sampler
    if isinstance(sampler, RandomSampler):
        scheme = "with_replacement" if sampler.replacement else "without_replacement"
        if not sampler.replacement and samples is not None and sampler.num_samples > samples:
            scheme = "unknown"  # an epoch goes through the data more than once
    elif isinstance(sampler, WeightedRandomSampler):
        scheme = "with_replacement" if sampler.replacement else "unknown"
    elif isinstance(sampler, SubsetRandomSampler):
        scheme, samples = "without_replacement", len(sampler)
    elif isinstance(sampler, SequentialSampler):
        scheme = "ordered"
    elif isinstance(sampler, DistributedSampler) and type(sampler).__iter__ is DistributedSampler.__iter__:
        # A step gathers a batch of every process; together they go through the data once an epoch.
        return Sampling(
            "without_replacement" if sampler.shuffle else "ordered",
            samples=sampler.total_size if sampler.drop_last else samples,
            batch_size=(batch_sampler.batch_size or 0) * sampler.num_replicas,
            batches=_length(loader),
            drop_last=batch_sampler.drop_last,
        )
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
    "ordered": "the loader reads the data in a fixed order, so the noise of successive steps is correlated",
    "unknown": (
        "how the loader draws its batches is unknown; if they are independent, say "
        'ProbeConfig(sampling="with_replacement")'
    ),
}
