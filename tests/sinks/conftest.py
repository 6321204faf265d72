"""Tiny results, and a tiny Lightning module of either package."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

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
from sgd_probe.sinks.base import RunInfo, Vectors

PACKAGES = ("pytorch_lightning", "lightning.pytorch")

MakeWindow = Callable[..., WindowResult]


def make_mode(name: str, verdict: Verdict) -> ModeResult:
    return ModeResult(
        name=name,
        kind=ModeKind.TOP,
        eigenvalue=4.0,
        residual=0.001,
        converged=True,
        held_out_eigenvalue=3.5,
        held_out_standard_error=0.25,
        effective_curvature=3.75,
        end_eigenvalue=3.25,
        relaxation_times=21.0,
        noise_variance=Interval(0.5, 0.25, 1.0),
        noise_kurtosis=3.0,
        noise_share=0.1,
        measured_curvature=Interval.unknown(),
        diffusion=Interval(1.5e-7, 1e-7, 2e-7),
        diffusion_per_time=Interval(1.5e-6, 1e-6, 2e-6),
        diffusion_lag=8,
        predicted_diffusion=math.nan,
        langevin_diffusion=1.25e-7,
        free_diffusion=1e-6,
        log_bayes_factor=-2.5,
        t_level=9.0,
        t_trend=8.0,
        drift_z=0.5,
        verdict=verdict,
        detail="",
        reason="the gradient pulls back",
        displacements=(LagPoint(1, 20, Interval(1e-7, 9e-8, 1.1e-7), 1e-7, 1e-7),),
    )


def make_window(
    index: int = 0,
    closed_at_step: int = 10,
    verdicts: tuple[Verdict, ...] = (Verdict.CONFINED, Verdict.DIFFUSIVE),
) -> WindowResult:
    """A window whose values differ by index only where a test looks (``lambda_max``)."""
    return WindowResult(
        index=index,
        opened_at_step=0,
        closed_at_step=closed_at_step,
        steps=closed_at_step,
        skipped_steps=0,
        planned_steps=closed_at_step,
        complete=True,
        learning_rate=0.1,
        effective_learning_rate=0.1,
        confinement_clock=1.0,
        diffusion_clock=0.1,
        optimizer="SGD(lr=0.1)",
        sampling="with replacement",
        curvature=CurvatureResult(
            lambda_max=4.0 + index,
            samples_found=8,
            samples_certified=8,
            batches_found=1,
            batches_certified=1,
            parameters=6,
            products=5,
            orthogonality=1e-7,
            converged=True,
            message="converged",
            self_test="passed",
        ),
        cost=CostResult(
            open_seconds=1.0,
            observe_seconds=0.5,
            close_seconds=0.25,
            total_seconds=1.75,
            training_seconds=17.5,
        ),
        modes=tuple(make_mode(f"top_{i:02d}", verdict) for i, verdict in enumerate(verdicts, start=1)),
        warnings=("a warning",),
    )


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the probe itself warned of."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "sgd_probe" and record.levelno == logging.WARNING
    ]


@pytest.fixture(scope="session")
def window() -> MakeWindow:
    return make_window


@pytest.fixture
def vectors() -> Vectors:
    return {
        "top_01": np.arange(6, dtype=np.float32),
        "top_02": np.full(6, 1 / 3, dtype=np.float32),
    }


@pytest.fixture(scope="session")
def run_info() -> RunInfo:
    return RunInfo(
        name="sgd_probe",
        config={"top": 2, "window": "auto", "params": None},
        plan=("first window at step 0",),
        versions={"torch": "2"},
        parameters={"layer.weight": 4, "layer.bias": 2},
    )


@pytest.fixture(scope="module", params=PACKAGES)
def pl(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


def make_module(pl: Any) -> Any:
    """A linear model that logs ``loss`` at each step and ``val_loss`` at each validation."""

    class Tiny(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.layer(batch).square().mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val_loss", self.layer(batch).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    return Tiny()


def make_loader(batches: int) -> torch.utils.data.DataLoader[torch.Tensor]:
    """Batches of one sample each."""
    data = torch.arange(2.0 * batches).reshape(batches, 2) / batches
    return torch.utils.data.DataLoader(data, batch_size=1)  # type: ignore[arg-type]


def make_trainer(pl: Any, **kwargs: Any) -> Any:
    quiet = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "logger": False,
    }
    return pl.Trainer(**{**quiet, **kwargs})
