"""Resident memory of this process, from Linux's own books."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

STATUS = Path("/proc/self/status")


def measurable() -> bool:
    """Linux with glibc: memory can be read, its peak reset, and what is free handed back."""
    return Path("/proc/self/clear_refs").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")


def resident_megabytes() -> float:
    """Now, with all that is free handed back; the peak is counted from here on."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_megabytes() -> float:
    """The most since :func:`resident_megabytes`."""
    return _status("VmHWM")


def open_files() -> set[str]:
    """What the process's descriptors lead to."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.add(str(descriptor.readlink()))
        except OSError:
            continue  # the one that listed them
    return found


def _status(key: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024
