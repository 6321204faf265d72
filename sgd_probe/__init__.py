"""Measure how SGD moves along the eigen-directions of your own loss.

The public names load on first use, so that ``import sgd_probe`` brings neither torch nor a trainer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgd_probe.engine.config import ProbeConfig
    from sgd_probe.flags import Flag, find_flags
    from sgd_probe.integrations.lightning import SGDProbe
    from sgd_probe.integrations.loop import LoopProbe
    from sgd_probe.result import (
        CostResult,
        CurvatureResult,
        Interval,
        LagPoint,
        ModeKind,
        ModeResult,
        Verdict,
        WindowResult,
    )
    from sgd_probe.sinks.wandb.workspace import wandb_workspace

__version__ = "0.1.0"

__all__ = [
    "CostResult",
    "CurvatureResult",
    "Flag",
    "Interval",
    "LagPoint",
    "LoopProbe",
    "ModeKind",
    "ModeResult",
    "ProbeConfig",
    "SGDProbe",
    "Verdict",
    "WindowResult",
    "__version__",
    "find_flags",
    "wandb_workspace",
]

_HOMES = {
    "Flag": "sgd_probe.flags",
    "LoopProbe": "sgd_probe.integrations.loop",
    "ProbeConfig": "sgd_probe.engine.config",
    "SGDProbe": "sgd_probe.integrations.lightning",
    "find_flags": "sgd_probe.flags",
    "wandb_workspace": "sgd_probe.sinks.wandb.workspace",
}
_HOMES |= {name: "sgd_probe.result" for name in __all__ if name not in {*_HOMES, "__version__"}}

# Type checkers take the imports above; shown a module-level __getattr__ they would accept any name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(_HOMES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
