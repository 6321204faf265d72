"""What the examples share: options, a quiet trainer, and the claims that all of them make."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from sgd_probe import ModeKind, ModeResult, WindowResult

#: Options of a Lightning trainer that works on the processor and prints and stores nothing of its own.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


def options(script: str, about: str | None) -> argparse.Namespace:
    """Read the options that all scripts have; hush what is not the probe's.

    Args:
        script: the default of ``--output`` is named after it.
        about: what ``--help`` prints first.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shorter run")
    parser.add_argument("--seed", default=0, type=int, help="of weights and batches (%(default)s)")
    folder = Path(f"{Path(script).stem}_run")
    parser.add_argument("--output", default=folder, type=Path, help="folder of the results (%(default)s)")
    torch.set_num_threads(1)  # threads only get in each other's way on tensors this small
    # Lightning's hints (more workers, a free processor) would drown the table.
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning|torch")
    return parser.parse_args()


def assert_same_bits(without: nn.Module, probed: nn.Module) -> None:
    """Compare all weights and buffers of two trainings."""
    mine, its = without.state_dict(), probed.state_dict()
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in mine)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes, one speaks
        print("\nThe weights are those of a training without the probe, bit for bit.")


def stiff_modes(window: WindowResult) -> list[ModeResult]:
    """The stiff modes of a window, whose Hessian is one and whose directions are eigenvectors of it."""
    assert window.curvature.self_test.startswith("passed")
    stiff = [mode for mode in window.modes if mode.kind is ModeKind.TOP]
    assert all(mode.converged and mode.residual < 0.02 for mode in stiff)
    return stiff


def stiffness_by_motion(confined: Sequence[ModeResult]) -> float:
    """Median curvature by motion over that by the Hessian.

    The slope of the used gradients on the displacements knows nothing of the Hessian, and finds its
    eigenvalues.
    """
    return median(mode.measured_curvature.value / mode.held_out_eigenvalue for mode in confined)
