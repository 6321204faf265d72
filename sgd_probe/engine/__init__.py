"""The probe without a trainer or a logger."""

from sgd_probe.curvature.hessian import CurvatureError, LossFunction
from sgd_probe.curvature.sharded import sharded_units
from sgd_probe.curvature.space import ParameterFilter
from sgd_probe.engine.config import ProbeConfig
from sgd_probe.engine.distributed import Processes
from sgd_probe.engine.ledger import duration
from sgd_probe.engine.probe import ProbeEngine
from sgd_probe.engine.sampling import Sampling, read_sampling

__all__ = [
    "CurvatureError",
    "LossFunction",
    "ParameterFilter",
    "ProbeConfig",
    "ProbeEngine",
    "Processes",
    "Sampling",
    "duration",
    "read_sampling",
    "sharded_units",
]
