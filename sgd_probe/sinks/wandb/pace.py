"""How often something may be sent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

Clock = Callable[[], float]


class Pace:
    """Due at once, then again when a while has passed since the last time.

    Args:
        seconds: between two times at the least.
        share: of all time that what is done may take; 1 sets no bound.
        clock: seconds.
    """

    def __init__(self, seconds: float, share: float = 1.0, clock: Clock = time.monotonic) -> None:
        self._seconds, self._share, self._clock = seconds, share, clock
        self._due = -math.inf

    @property
    def due(self) -> bool:
        """It may be done now."""
        return self._clock() >= self._due

    def do(self, work: Callable[[], object]) -> None:
        """Do it now, and see how long it takes."""
        begun = self._clock()
        work()
        now = self._clock()
        self._due = now + max(self._seconds, (now - begun) / self._share)
