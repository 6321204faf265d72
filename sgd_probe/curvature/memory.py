"""When an allocation has failed: every device says it in words of its own."""

from __future__ import annotations

import torch

#: Of the messages of RuntimeErrors: torch's allocator on the CPU, C++ itself, the libraries under torch on
#: accelerators.
_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "bad allocation",
    "_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was short.

    Only accelerators raise :class:`torch.OutOfMemoryError`; the CPU's allocator raises a plain
    :class:`RuntimeError`, python and numpy raise :class:`MemoryError`.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)
