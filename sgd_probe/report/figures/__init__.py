"""One pure function per figure: window results in, a Plotly figure with its reading guide out.

Curvature is in units of the loss per squared weight, displacement in weights; D is per optimizer
step. What was not measured (NaN) is left out of a figure, never drawn as zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from sgd_probe.report.figures.drawing import Drawing
from sgd_probe.report.figures.dynamics import diffusion, displacement
from sgd_probe.report.figures.layers import layers
from sgd_probe.report.figures.noise import autocorrelation, noise
from sgd_probe.report.figures.spectrum import density, spectra, spectrum
from sgd_probe.report.figures.style import Figure
from sgd_probe.report.figures.timeline import edge_of_stability, lambda_max, verdict_timeline
from sgd_probe.report.figures.valley import loss_slices
from sgd_probe.result import WindowResult

__all__ = [
    "Drawing",
    "Figure",
    "all_figures",
    "autocorrelation",
    "density",
    "diffusion",
    "displacement",
    "edge_of_stability",
    "lambda_max",
    "layers",
    "loss_slices",
    "noise",
    "spectra",
    "spectrum",
    "verdict_timeline",
]


def all_figures(results: Sequence[WindowResult]) -> tuple[Figure, ...]:
    """Every figure of a run: the first eight from the last window, the others over all windows.

    Raises:
        ValueError: no window.
    """
    if not results:
        raise ValueError("expected at least one window result, found none: wait until a window has closed")
    last = results[-1]
    return (
        spectrum(last),
        displacement(last),
        diffusion(last),
        noise(last),
        loss_slices(last),
        layers(last),
        density(last),
        autocorrelation(last),
        verdict_timeline(results),
        lambda_max(results),
        edge_of_stability(results),
        spectra(results),
    )
