"""A saved W&B workspace whose panels show what the probe logs."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from sgd_probe.result import Verdict
from sgd_probe.sinks.wandb.figures import FIGURES, figure_key
from sgd_probe.sinks.wandb.modes import DIFFUSION_PLOT, MODES, NOISE_PLOT
from sgd_probe.sinks.wandb.run import STEP_METRIC

_MISSING = "wandb_workspace needs the package wandb-workspaces: pip install 'sgd-probe[workspace]'"


def wandb_workspace(
    entity: str,
    project: str,
    *,
    top: int = 10,
    flat: int = 4,
    interior: int = 0,
    name: str = "sgd_probe",
    axis: str = STEP_METRIC,
) -> str:
    """Save a workspace with panels for the probe's metrics and figures in a W&B project.

    Call it once for a project, outside of training: it asks the server and waits. It changes no workspace
    that is there already.

    Args:
        entity: the user or team that owns the project.
        project: its name.
        top: as given to the probe,
        flat: likewise,
        interior: likewise; panels of modes that a run does not have stay empty.
        name: the probe's, the prefix of its metrics.
        axis: the metric on which the rows lie (``train/global_step`` with a Hugging Face ``Trainer``).

    Returns:
        The address of the saved workspace.

    Raises:
        ImportError: wandb-workspaces is not installed.
        ValueError: an argument is out of range; the message names it.
        Exception: what the client raises when the server is down or refuses.
    """
    workspace = build_workspace(
        entity, project, top=top, flat=flat, interior=interior, name=name, axis=axis
    ).save()
    return str(workspace.url)


def build_workspace(
    entity: str, project: str, *, top: int, flat: int, interior: int, name: str, axis: str
) -> Any:
    """The same, not saved: a ``wandb_workspaces.workspaces.Workspace``. No network."""
    for argument, text in (("entity", entity), ("project", project), ("name", name), ("axis", axis)):
        if not isinstance(text, str) or not text:
            raise ValueError(f"expected `{argument}` to be a non-empty string, found {text!r}")
    for argument, count in (("top", top), ("flat", flat), ("interior", interior)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"expected `{argument}` to be an integer of at least 0, found {count!r}")
    try:
        wr: Any = import_module("wandb_workspaces.reports.v2")
        ws: Any = import_module("wandb_workspaces.workspaces")
    except ImportError as error:
        raise ImportError(_MISSING) from error

    kinds = {"top": top, "interior": interior, "flat": flat}
    modes = {kind: [f"{kind}_{i:02d}" for i in range(1, n + 1)] for kind, n in kinds.items() if n}

    def line(title: str, keys: list[str], unit: str, log_y: bool = False) -> Any:
        return wr.LinePlot(
            title=title,
            x=axis,
            y=[f"{name}/{key}" for key in keys],
            title_x="optimizer step",
            title_y=unit,
            log_y=log_y or None,
        )

    def per_kind(quantity: str, title: str, unit: str, log_y: bool = False) -> Iterator[Any]:
        for kind, names in modes.items():
            yield line(f"{title}, {kind}", [f"{mode}/{quantity}" for mode in names], unit, log_y)

    def section(title: str, panels: list[Any], is_open: bool = True) -> Any:
        return ws.Section(name=title, panels=panels, is_open=is_open)

    verdicts = [f"n_{verdict.value}" for verdict in Verdict]
    figures = [
        wr.MediaBrowser(title=figure, media_keys=[figure_key(figure, name)], num_columns=1)
        for figure in FIGURES
    ]
    table = wr.WeavePanelSummaryTable(table_name=f"{name}/{MODES}")
    plots = [
        wr.CustomChart(
            query={"summaryTable": {"tableKey": f"{name}/{plot}_table"}},
            chart_name="wandb/scatter/v0",
            chart_fields={"x": "log10 curvature", "y": quantity},
            chart_strings={"title": f"{quantity} against log10 curvature"},
        )
        for plot, quantity in ((DIFFUSION_PLOT, "log10 D"), (NOISE_PLOT, "log10 noise variance"))
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"{name}: modes of the loss",
        settings=ws.WorkspaceSettings(x_axis=axis),
        auto_generate_panels=True,
        sections=[
            section(
                "Verdicts",
                [
                    line("Modes with each verdict", verdicts, "modes"),
                    line("Largest curvature", ["lambda_max"], "loss / weight²"),
                    line("Flags expected to be wrong", ["window/expected_false_flags"], "flags"),
                ],
            ),
            section("Figures", figures),
            section(
                "Diffusion",
                [
                    *per_kind("diffusion", "D", "weight² / step", log_y=True),
                    *per_kind("predicted_diffusion", "D by theory", "weight² / step", log_y=True),
                    *per_kind("log_bayes_factor", "Evidence of confinement", "log Bayes factor"),
                    *per_kind("drift_z", "Drift", "of free diffusion"),
                ],
            ),
            section(
                "Curvature and noise",
                [
                    *per_kind("eigenvalue", "Eigenvalue, held out", "loss / weight²"),
                    *per_kind("effective_curvature", "Effective curvature", "loss / weight²", log_y=True),
                    *per_kind("noise_variance", "Noise variance", "(loss / weight)²", log_y=True),
                    *per_kind("relaxation_times", "Relaxation times in the window", ""),
                    *per_kind("residual", "Residual", "of lambda_1", log_y=True),
                ],
                is_open=False,
            ),
            section(
                "Windows and cost",
                [
                    line(
                        "Overlap of the stiff subspace",
                        ["window/held_out_overlap", "window/end_overlap"],
                        "",
                    ),
                    line("Steps of a window", ["window/steps"], "steps"),
                    line(
                        "Warnings, and verdicts undermined",
                        ["window/warnings", "window/undermined"],
                        "",
                    ),
                    line("Hessian-vector products", ["window/products"], ""),
                    line("Share of the training's time", ["cost/fraction"], ""),
                    line(
                        "Seconds",
                        ["cost/window_seconds", "cost/total_seconds"],
                        "s",
                    ),
                    line(
                        "Pauses, and what was foretold",
                        ["cost/pause_seconds", "cost/longest_pause_seconds", "cost/foretold_pause_seconds"],
                        "s",
                    ),
                    line(
                        "Memory of an opening, and what was foretold",
                        ["cost/peak_bytes", "cost/foretold_bytes"],
                        "bytes",
                    ),
                ],
                is_open=False,
            ),
            section("When the fit has ended", [table, *plots]),
        ],
    )
