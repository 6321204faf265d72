"""What happens when a window raises flags: they are kept, told, and handed to the user's own function."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from sgd_probe.flags import Flag, onset_message, raise_flags
from sgd_probe.result import WindowResult

log = logging.getLogger("sgd_probe")

OnFlag = Callable[[Flag], object]


class Flagging:
    """The flags of one training.

    Args:
        on_flag: called with each flag that is an onset; when it fails it is not called again.
        strict: raise its failure.
        max_bytes: flagged directions that would take more are not kept.

    Attributes:
        flags: of all windows so far, in their order.
        basis: the flagged directions of the last window by mode name: float32 on the CPU, shape
            (parameters,).
    """

    def __init__(self, on_flag: OnFlag | None, *, strict: bool, max_bytes: int) -> None:
        self.flags: list[Flag] = []
        self.basis: dict[str, Tensor] = {}
        self._raised: tuple[Flag, ...] = ()
        self._on_flag = on_flag
        self._strict = strict
        self._max_bytes = max_bytes

    def take(self, result: WindowResult, vectors: Tensor | None) -> None:
        """Keep the flags of a window that has closed.

        Args:
            result: the window's.
            vectors: its directions, rows in the order of its modes; None where no process has them whole.
        """
        self._raised = raise_flags(result, self.flags)
        self.flags += self._raised
        self.basis = self._kept(result, vectors, self._raised)

    def tell(self, announce: Callable[[str], None]) -> None:
        """Say which of them are onsets, and hand those over.

        Args:
            announce: shows a message to the user.
        """
        text = onset_message(self._raised)
        if text:
            announce(text)
        for flag in self._raised:
            if flag.is_onset:
                self._hand_over(flag)

    def _kept(
        self, result: WindowResult, vectors: Tensor | None, raised: tuple[Flag, ...]
    ) -> dict[str, Tensor]:
        if vectors is None or 4 * vectors.shape[1] * len(raised) > self._max_bytes:
            return {}
        rows = {mode.name: row for mode, row in zip(result.modes, vectors, strict=True)}
        # Clones: a row of the basis would keep all of it.
        return {flag.mode: rows[flag.mode].detach().float().cpu().clone() for flag in raised}

    def _hand_over(self, flag: Flag) -> None:
        if self._on_flag is None:
            return
        try:
            self._on_flag(flag)
        except Exception as error:
            if self._strict:
                raise
            self._on_flag = None
            log.warning(
                "sgd_probe: on_flag failed on %s of window %d (%s: %s) and is not called again. Training and "
                "the probe go on; strict=True raises instead.",
                flag.mode,
                flag.window,
                type(error).__name__,
                error,
            )
