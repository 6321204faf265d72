"""What the probe costs in wall seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Charge:
    """Seconds of one piece of work; filled in when it ends."""

    seconds = 0.0


class Ledger:
    """Splits wall time since its creation into the probe's and the training's.

    Args:
        device: where the training computes; what is still under way there when the probe begins is the
            training's.

    Attributes:
        spent: seconds of the probe.
        longest: of one piece of its work: the longest time for which the training has stood still.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._started = time.perf_counter()
        self._charging = False
        self.spent = self.longest = 0.0

    @property
    def training(self) -> float:
        """Wall seconds so far without the probe's."""
        return time.perf_counter() - self._started - self.spent

    @contextmanager
    def charge(self) -> Iterator[Charge]:
        """Charge the body to the probe; a part of what is charged already costs nothing more."""
        charge, outermost = Charge(), not self._charging
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        self._charging = True
        try:
            yield charge
        finally:
            if self._device is not None:
                torch.cuda.synchronize(self._device)
            charge.seconds = time.perf_counter() - started
            if outermost:
                self._charging = False
                self.spent += charge.seconds
                self.longest = max(self.longest, charge.seconds)


def duration(seconds: float) -> str:
    """Seconds for people: two digits and a fitting unit."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1g} s"
