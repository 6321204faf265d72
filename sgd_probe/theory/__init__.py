"""What SGD does near a critical point, by exact recursion and closed form, beside the Langevin equation.

The interface is :class:`SGDMode`, with :class:`LangevinMode` as its counterpart; ``closed_forms`` has the
formulas, ``ensemble`` all modes at once and ``master_equation`` densities in one dimension. No tensors:
numpy and scipy.
"""

from sgd_probe.theory.dynamics import SGDDynamics
from sgd_probe.theory.ensemble import QuadraticEnsemble
from sgd_probe.theory.mode import LangevinMode, Moments, SGDMode, Stability
from sgd_probe.theory.sampling import MinibatchSampling

__all__ = [
    "LangevinMode",
    "MinibatchSampling",
    "Moments",
    "QuadraticEnsemble",
    "SGDDynamics",
    "SGDMode",
    "Stability",
]
