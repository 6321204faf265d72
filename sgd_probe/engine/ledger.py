"""What the probe costs: wall seconds, and the memory that it may take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Charge:
    """Seconds of one piece of work; filled in when it ends."""

    seconds = 0.0


class Ledger:
    """Splits wall time since its creation into the probe's and the training's."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.spent = 0.0

    @property
    def training(self) -> float:
        """Wall seconds so far without the probe's."""
        return time.perf_counter() - self._started - self.spent

    @contextmanager
    def charge(self) -> Iterator[Charge]:
        """Charge the body to the probe."""
        charge = Charge()
        started = time.perf_counter()
        try:
            yield charge
        finally:
            charge.seconds = time.perf_counter() - started
            self.spent += charge.seconds


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device; None where nobody can tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        return int(found[0]) * 1024 if found else None
    return None


def duration(seconds: float) -> str:
    """Seconds for people: two digits and a fitting unit."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1g} s"
