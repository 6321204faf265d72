"""Values of ours as tensors and plain types, as ``torch.load(weights_only=True)`` reads, and back again."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.certify import Certificate
from sgd_probe.curvature.density import SeenDensity
from sgd_probe.curvature.flat import Quadrature
from sgd_probe.curvature.modes import Mode, ModeBasis
from sgd_probe.dynamics.force import JointStatistics
from sgd_probe.dynamics.noise import Resampled
from sgd_probe.dynamics.statistics import Draw, Epoch, Part, WindowStatistics
from sgd_probe.engine.optimizers import OptimizerState
from sgd_probe.engine.planning import Foretold, WindowPlan
from sgd_probe.engine.step import Step
from sgd_probe.result import Interval, LossSlice

_CLASSES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Certificate,
        CurvatureBatch,
        Draw,
        Epoch,
        Foretold,
        Interval,
        JointStatistics,
        LossSlice,
        Mode,
        ModeBasis,
        OptimizerState,
        Part,
        Quadrature,
        Resampled,
        SeenDensity,
        Step,
        WindowPlan,
        WindowStatistics,
    )
}


def pack(value: Any) -> Any:
    """Reduce a value to tensors, lists, dicts and plain numbers and text.

    Raises:
        TypeError: a part of it (of a batch of the user's, say) is of a kind that cannot be read back safely.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.copy())}
    if isinstance(value, np.generic):
        return value.item()
    if _CLASSES.get(kind.__name__) is kind:
        names = getattr(value, "_fields", None) or [f.name for f in dataclasses.fields(value)]
        return {"class": kind.__name__, "fields": {name: pack(getattr(value, name)) for name in names}}
    if kind is tuple:
        return {"tuple": [pack(item) for item in value]}
    if kind is list:
        return {"list": [pack(item) for item in value]}
    if kind is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: pack(item) for key, item in value.items()}}
    raise TypeError(f"expected tensors and plain types, found a {kind.__name__}")


def unpack(value: Any) -> Any:
    """Read :func:`pack` back.

    Raises:
        KeyError: it names a class that is not ours.
        TypeError: its fields are not those of the class; another version wrote it.
    """
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return value["array"].numpy().copy()
    if "tuple" in value:
        return tuple(unpack(item) for item in value["tuple"])
    if "list" in value:
        return [unpack(item) for item in value["list"]]
    if "dict" in value:
        return {key: unpack(item) for key, item in value["dict"].items()}
    fields = {name: unpack(item) for name, item in value["fields"].items()}
    return _CLASSES[value["class"]](**fields)
