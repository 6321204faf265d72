"""Where in the network the flagged directions live."""

from __future__ import annotations

from sgd_probe.report.figures.drawing import Trace, heatmap
from sgd_probe.report.figures.style import INK, Figure, canvas, ending, text, with_empty_note
from sgd_probe.report.wording import VERDICT_STYLES, share
from sgd_probe.result import ModeResult, Verdict, WindowResult

#: Verdicts that say of a direction that the weights get away along it.
FLAGGED = (Verdict.DIFFUSIVE, Verdict.DRIFTING, Verdict.UNSTABLE)
_MAX_LAYERS = 14


def layers(result: WindowResult) -> Figure:
    """Share of each parameter in the squared length of every flagged direction."""
    flagged = [mode for mode in result.modes if mode.verdict in FLAGGED]
    totals: dict[str, float] = {}
    for mode in flagged:
        for name, part in mode.layer_shares.items():
            totals[name] = totals.get(name, 0.0) + part
    names = sorted(totals, key=totals.__getitem__, reverse=True)[:_MAX_LAYERS]
    rows = [[mode.layer_shares.get(name, 0.0) for mode in flagged] for name in names]
    others = [max(1.0 - sum(column), 0.0) for column in zip(*rows, strict=True)]
    if any(other > 0.005 for other in others):
        names, rows = [*names, "all others"], [*rows, others]
    plot = canvas("", "", entries=1, height=150 + 26 * max(len(names), 4))
    if flagged:
        plot.add_trace(_map(flagged, names, rows))
    plot.update_layout(showlegend=False, margin={"b": 64})
    plot.update_xaxes(
        tickvals=list(range(len(flagged))),
        ticktext=[f"{text(mode.name)}<br>{VERDICT_STYLES[mode.verdict].label}" for mode in flagged],
        range=[-0.5, max(len(flagged), 1) - 0.5],
        showgrid=False,
    )
    plot.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[ending(name) for name in names],
        range=[max(len(names), 1) - 0.5, -0.5],
        showgrid=False,
    )
    return Figure(
        "layers",
        "Where the flagged directions live",
        "Each column is a direction along which the weights get away, each row a parameter; a cell is the "
        "share of the direction's squared length that lies in that parameter, and a column adds up to 100%. "
        "Large parameters get large shares of any direction.",
        with_empty_note(plot, flagged, "no direction is flagged in this window"),
        _in_words(flagged),
    )


def _map(flagged: list[ModeResult], names: list[str], rows: list[list[float]]) -> Trace:
    return heatmap(
        x=list(range(len(flagged))),
        y=list(range(len(names))),
        z=rows,
        text=[[f"{100 * part:.0f}%" if part >= 0.005 else "" for part in row] for row in rows],
        texttemplate="%{text}",
        hovertext=[
            [
                f"<b>{text(mode.name)}</b><br>{ending(name)}: {share(part)}"
                for mode, part in zip(flagged, row, strict=True)
            ]
            for name, row in zip(names, rows, strict=True)
        ],
        hoverinfo="text",
        zmin=0,
        zmax=1,
        colorscale=[(0, "#f7f9fb"), (1, "#6aaed6")],
        textfont={"color": INK},
        showscale=False,
        xgap=2,
        ygap=2,
    )


def _in_words(flagged: list[ModeResult]) -> str:
    said = []
    for mode in flagged:
        largest = max(mode.layer_shares.items(), key=lambda item: item[1], default=None)
        if largest is not None:
            said.append(f"{mode.name}: most in {largest[0]}, {share(largest[1])}.")
    return " ".join(said) or "No direction is flagged in this window."
