"""A real client, online: what reaches a server, and what a server that is down or slow costs the training."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sgd_probe import SGDProbe, WindowResult, find_flags, wandb_workspace
from sgd_probe.report.figures import Figure, all_figures
from sgd_probe.sinks import RunInfo, SinkGroup, Vectors, scalars
from sgd_probe.sinks.wandb import WandbRun, wandb_sinks
from sgd_probe.sinks.wandb.alerts import WandbAlerts
from sgd_probe.sinks.wandb.directions import ARTIFACT_TYPE, WandbDirections
from sgd_probe.sinks.wandb.figures import FIGURES, WandbFigures, figure_key
from sgd_probe.sinks.wandb.modes import DIFFUSION_PLOT, NOISE_PLOT, WandbModes
from sgd_probe.sinks.wandb.scalars import WandbSink
from sgd_probe.sinks.wandb.workspace import build_workspace
from tests.helpers.results import make_mode, make_window
from tests.helpers.wandb_server import API_KEY, ENTITY, WandbServer, wandb_server
from tests.sinks.conftest import make_loader, make_module, make_trainer, warnings_of

wandb: Any = pytest.importorskip("wandb")

STEP = "trainer/global_step"
RESULTS = [make_window(0), make_window(1)]
#: Far above what it takes on a busy machine, and below what a server that does not answer would make of it.
PROMPT = 10.0
SLOW = 60.0
PATIENCE = 1.0


@pytest.fixture(autouse=True, scope="module")
def no_telemetry() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        yield


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with wandb_server() as running:
        yield running


def directions(result: WindowResult) -> Vectors:
    """Another vector for every mode of every window."""
    return {mode.name: np.full(6, 10 * result.index + i, np.float32) for i, mode in enumerate(result.modes)}


def as_logger(run: Any) -> WandbRun:
    return WandbRun(SimpleNamespace(experiment=run))


@dataclass(frozen=True)
class Arrived:
    """A finished run as the server knows it."""

    server: WandbServer
    run_id: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in row.items() if not key.startswith("_")}
            for row in self.server.history
        ]

    def row_with(self, key: str) -> dict[str, Any]:
        return next(row for row in reversed(self.rows) if key in row)

    def media(self, key: str) -> Any:
        return json.loads(self.server.files[self.row_with(key)[key]["path"]])

    def artifact(self, kind: str) -> dict[str, bytes]:
        (found,) = (artifact for artifact in self.server.artifacts if artifact["type"] == kind)
        prefix = f"{found['id']}/"
        return {n.removeprefix(prefix): d for n, d in self.server.files.items() if n.startswith(prefix)}


@pytest.fixture(scope="module")
def arrived(run_info: RunInfo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arrived]:
    """Two windows beside a row of the user's, in a run with a tag and a configuration of the user's."""
    with wandb_server() as server:
        run = wandb.init(
            project="p", dir=tmp_path_factory.mktemp("wandb"), tags=["mine"], settings=server.settings()
        )
        run.config.update({"lr": 0.1})
        sinks = SinkGroup(wandb_sinks(as_logger(run), directions=True), strict=True)
        sinks.start(run_info)
        for result in RESULTS:
            run.log({"loss": 1.0, STEP: result.closed_at_step - 1})
            sinks.write(result, directions(result))
        sinks.finish()
        run.finish()
        yield Arrived(server, run.id)


def test_the_client_asked_nothing_that_the_server_did_not_know(arrived: Arrived) -> None:
    assert arrived.server.unknown == []


def test_one_row_of_scalars_for_each_window(arrived: Arrived) -> None:
    rows = [row for row in arrived.rows if "sgd_probe/lambda_max" in row]
    expected = [{**scalars(result), STEP: result.closed_at_step - 1} for result in RESULTS]
    assert rows == [pytest.approx(row) for row in expected]
    assert sum("loss" in row for row in arrived.rows) == len(RESULTS)


def test_configuration_and_tags_join_the_users(arrived: Arrived, run_info: RunInfo) -> None:
    assert arrived.server.config["sgd_probe"] == run_info.config
    assert arrived.server.config["lr"] == 0.1
    assert sorted(arrived.server.tags) == ["mine", "sgd_probe"]


def test_figures_arrive_with_the_first_window_and_with_the_last(arrived: Arrived) -> None:
    expected = {figure_key(figure.name): figure.plot for figure in all_figures(RESULTS)}
    sets = [row for row in arrived.rows if expected.keys() <= row.keys()]
    assert [row[STEP] for row in sets] == [result.closed_at_step - 1 for result in RESULTS]
    for key, plot in expected.items():
        assert arrived.media(key) == json.loads(plot.to_json())
        assert sets[-1][key]["_type"] == "plotly-file"


def test_the_list_of_figures_is_whole() -> None:
    assert {figure.name for figure in all_figures(RESULTS)} == set(FIGURES)


def test_one_alert_for_the_onsets(arrived: Arrived) -> None:
    (alert,) = arrived.server.alerts
    assert alert["title"] == "sgd_probe: 2 directions diffuse"
    for flag in find_flags(RESULTS[:1]):
        assert str(flag) in alert["text"]
    assert "0.4 are expected to be wrong" in alert["text"]


def test_the_table_of_modes(arrived: Arrived) -> None:
    files = arrived.artifact("run_table")
    table = json.loads(files["sgd_probe/modes.table.json"])
    assert arrived.media("sgd_probe/modes")["data"] == table["data"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["window"], row["mode"]) for row in rows] == [
        (result.index, mode.name) for result in RESULTS for mode in result.modes
    ]
    flagged = next(row for row in rows if (row["window"], row["mode"]) == (1, "flat_01"))
    mode = next(mode for mode in RESULTS[1].modes if mode.name == "flat_01")
    assert flagged["flagged since step"] == RESULTS[0].opened_at_step
    assert flagged["D"] == pytest.approx(mode.diffusion.value)
    assert flagged["reason"] == mode.reason
    unknown = next(row for row in rows if row["mode"] == "flat_04")
    assert unknown["D"] is unknown["log10 D"] is None


def test_plots_of_that_table(arrived: Arrived) -> None:
    plots = arrived.server.config["_wandb"]["visualize"]
    assert set(plots) == {"sgd_probe/plots/diffusion", "sgd_probe/plots/noise"}
    columns = arrived.media("sgd_probe/modes")["columns"]
    for key, plot in plots.items():
        assert set(plot["panel_config"]["fieldSettings"].values()) <= set(columns)
        assert f"{key}_table" in arrived.row_with("sgd_probe/modes")


def test_the_flagged_directions(arrived: Arrived, run_info: RunInfo) -> None:
    files = arrived.artifact(ARTIFACT_TYPE)
    assert json.loads(files["parameters.json"]) == dict(run_info.parameters)
    flags = find_flags(RESULTS)
    assert [(f["window"], f["mode"]) for f in json.loads(files["flags.json"])] == [
        (flag.window, flag.mode) for flag in flags
    ]
    for result in RESULTS:
        loaded = np.load(io.BytesIO(files[f"window_{result.index:04d}.npz"]), allow_pickle=False)
        assert set(loaded.files) == {flag.mode for flag in flags if flag.window == result.index}
        for name in loaded.files:
            np.testing.assert_array_equal(loaded[name], directions(result)[name])


def test_fewer_than_300_keys_for_20_directions(arrived: Arrived) -> None:
    """As stated in docs/wandb.md."""
    per_mode = 11
    ours = {key for row in arrived.rows for key in row if key.startswith("sgd_probe/")}
    names = {mode.name for mode in RESULTS[0].modes}
    shared = {key for key in ours if key.split("/")[1] not in names}
    assert max(sum(key.startswith(f"sgd_probe/{name}/") for key in ours) for name in names) == per_mode
    assert len(shared) + per_mode * 20 < 300


# A server that is down or slow.


def write_all(sinks: SinkGroup, run: Any, windows: range = range(6)) -> list[float]:
    """Seconds that each window's writing took."""
    taken = []
    for index in windows:
        result = make_window(index)
        begun = time.monotonic()
        sinks.write(result, directions(result))
        taken.append(time.monotonic() - begun)
        run.log({"loss": 1.0})
    return taken


def impatient(run: Any) -> list[Any]:
    """As wandb_sinks makes them, but for the time that the fit's end waits."""
    target = as_logger(run)
    return [
        WandbSink(target),
        WandbFigures(target),
        WandbAlerts(target),
        WandbModes(target, patience=PATIENCE),
    ]


@pytest.mark.parametrize("down", ["from the start", "from the third window on"])
def test_a_server_that_dies_holds_nothing_up_and_loses_nothing(
    server: WandbServer, run_info: RunInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture, down: str
) -> None:
    run = wandb.init(project="p", dir=tmp_path, settings=server.settings())
    sinks = SinkGroup(impatient(run))
    if down == "from the start":
        server.stop()
    with caplog.at_level(logging.WARNING, "sgd_probe"):
        sinks.start(run_info)
        taken = write_all(sinks, run, range(2))
        server.stop()
        taken += write_all(sinks, run, range(2, 6))
        begun = time.monotonic()
        sinks.finish()
        ended = time.monotonic() - begun
    assert max(taken) < PROMPT
    assert ended < PATIENCE + PROMPT
    (warning,) = warnings_of(caplog)
    assert warning.startswith("sgd_probe: WandbModes failed in finish (")
    server.start()
    run.finish()
    assert sum("sgd_probe/lambda_max" in row for row in server.history) == 6
    assert sum("loss" in row for row in server.history) == 6
    assert len(server.alerts) == 1


@pytest.mark.parametrize("fault", [{"delay": SLOW}, {"status": 403}])
def test_a_server_that_is_slow_or_refuses_holds_nothing_up(
    server: WandbServer,
    run_info: RunInfo,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fault: dict[str, Any],
) -> None:
    run = wandb.init(project="p", dir=tmp_path, settings=server.settings())
    sinks = SinkGroup(impatient(run))
    vars(server).update(fault)
    with caplog.at_level(logging.WARNING, "sgd_probe"):
        sinks.start(run_info)
        taken = write_all(sinks, run)
        begun = time.monotonic()
        sinks.finish()
        ended = time.monotonic() - begun
    assert max(taken) < PROMPT
    assert ended < PATIENCE + PROMPT
    assert len(warnings_of(caplog)) == 1
    server.delay = 0
    run.finish()
    if "delay" in fault:
        assert sum("sgd_probe/lambda_max" in row for row in server.history) == 6


def trained(pl: Any, callbacks: list[Any], logger: Any) -> dict[str, torch.Tensor]:
    """The weights, and the next random numbers, after a fit."""
    random.seed(0)
    np.random.seed(0)
    module = make_module(pl)
    make_trainer(pl, logger=logger, callbacks=callbacks, max_steps=150, max_epochs=-1).fit(
        module, make_loader(40)
    )
    drawn = torch.tensor([random.random(), np.random.random()], dtype=torch.float64)
    return {**module.state_dict(), "torch": torch.get_rng_state(), "python and numpy": drawn}


def quick_probe(folder: Path) -> SGDProbe:
    return SGDProbe(top=2, flat=1, window=50, every_n_steps=60, curvature_batches=2, run_dir=folder / "probe")


@pytest.mark.parametrize("down", [False, True])
def test_a_fit_is_the_same_to_the_bit_whether_the_server_lives_or_not(
    server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    down: bool,
) -> None:
    """The stranger's case, too: a callback in a trainer that logs to W&B, and no further code."""
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setattr(WandbModes.__init__, "__defaults__", (PATIENCE,))
    expected = trained(pl, [], logger=False)
    run = wandb.init(project="p", dir=tmp_path, settings=server.settings())
    if down:
        server.stop()
    probe = quick_probe(tmp_path)
    with caplog.at_level(logging.WARNING, "sgd_probe"):
        found = trained(pl, [probe], WandbLogger(experiment=run))
    warnings = [w for w in warnings_of(caplog) if "Wandb" in w]
    assert len(warnings) == down
    if down:
        server.start()
    run.finish()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert len(probe.results) == 2
    rows = [row for row in server.history if "sgd_probe/lambda_max" in row]
    assert [row[STEP] for row in rows] == [result.closed_at_step - 1 for result in probe.results]
    assert {figure_key(name) for name in FIGURES} <= {key for row in server.history for key in row}
    assert sum("loss" in row for row in server.history) == 150


# Rates, on a clock of the test's.


@dataclass
class Stub:
    """Stands in for a run where only the pace matters."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    alerts: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def alert(self, **said: Any) -> None:
        self.alerts.append(said)

    def define_metric(self, name: str, step_metric: str) -> None:
        """Nothing to do."""


def test_figures_keep_to_their_share_of_the_time(run_info: RunInfo) -> None:
    """A set takes one second on this clock, so that the next may come after 500 more."""
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    stub = Stub()
    sink = WandbFigures(as_logger(stub), clock)
    sink.start(run_info)
    shown = []
    for index in range(60):
        now[0] = 20.0 * index
        sink.write(make_window(index), {})
        shown.append(len(stub.rows))
    assert [index for index in range(60) if shown[index] > [0, *shown][index]] == [0, 26, 52]
    sink.finish()
    sink.finish()
    assert [row[STEP] for row in stub.rows] == [make_window(i).closed_at_step - 1 for i in (0, 26, 52, 59)]


def test_figures_reach_the_client_as_they_are_without_plotly(
    run_info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Figure, "plot", property(lambda figure: pytest.fail("Plotly was asked")))
    assert logged_once(run_info) == {
        f.name: json.loads(f.drawing.to_json()) for f in all_figures(RESULTS[:1])
    }


def test_a_client_that_insists_on_plotly_gets_its_figures(
    run_info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plotly.graph_objects import Figure as PlotlyFigure

    class Strict(wandb.Plotly):  # type: ignore[misc]
        def __init__(self, figure: Any) -> None:
            if not isinstance(figure, PlotlyFigure):
                raise ValueError("Logged plots must be plotly figures")
            super().__init__(figure)

    monkeypatch.setattr(wandb, "Plotly", Strict)
    assert logged_once(run_info) == {
        f.name: json.loads(f.drawing.to_json()) for f in all_figures(RESULTS[:1])
    }


def logged_once(run_info: RunInfo) -> dict[str, Any]:
    """The figures of a window, by name, as the client would send them."""
    sink = WandbFigures(as_logger(stub := Stub()))
    sink.start(run_info)
    sink.write(RESULTS[0], {})
    (row,) = stub.rows
    names = {figure_key(name): name for name in FIGURES}
    return {names[key]: json.loads(Path(row[key]._path).read_text()) for key in names}


def test_alerts_that_come_too_soon_are_told_together(run_info: RunInfo) -> None:
    now = [0.0]
    stub = Stub()
    sink = WandbAlerts(as_logger(stub), lambda: now[0])
    sink.start(run_info)
    quiet = dataclasses.replace(make_window(), modes=make_window().modes[:1])
    for index, result in enumerate([make_window(), quiet, make_window(), quiet, make_window(), quiet]):
        sink.write(dataclasses.replace(result, index=index), {})
    assert len(stub.alerts) == 1
    now[0] = 301.0
    sink.write(dataclasses.replace(quiet, index=6), {})
    first, second = stub.alerts
    assert first["title"] == "sgd_probe: 2 directions diffuse"
    assert second["title"] == "sgd_probe: 4 directions diffuse"
    assert "window 2," in second["text"] and "window 4," in second["text"]
    sink.write(dataclasses.replace(make_window(), index=7), {})
    sink.finish()
    assert len(stub.alerts) == 3


def test_the_directions_sink_without_a_flag_logs_nothing(run_info: RunInfo) -> None:
    sink = WandbDirections(as_logger(Stub()))
    sink.start(run_info)
    sink.write(dataclasses.replace(make_window(), modes=make_window().modes[:1]), {})
    sink.finish()


# The workspace.


def panels(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for section in spec["section"]["panelBankConfig"]["sections"]:
        yield from section["panels"]


def shown_keys(spec: dict[str, Any]) -> set[str]:
    """Every key that a panel asks for."""
    keys: set[str] = set()
    for panel in panels(spec):
        config = panel["config"]
        keys |= set(config.get("metrics", [])) | set(config.get("mediaKeys", []))
        text = json.dumps(config)
        keys |= {key for key in ("sgd_probe/modes",) if f'"{key}"' in text}
        keys |= {
            f"sgd_probe/plots/{plot}_table"
            for plot in ("diffusion", "noise")
            if f"plots/{plot}_table" in text
        }
    return keys


def whole_window() -> WindowResult:
    """One in which nothing is unknown."""
    window = make_window()
    curvature = dataclasses.replace(window.curvature, held_out_overlap=0.9, end_overlap=0.8)
    modes = (*window.modes[:-1], make_mode("flat_04"))
    return dataclasses.replace(window, modes=modes, curvature=curvature)


def test_the_workspaces_panels_show_what_is_logged_and_nothing_else() -> None:
    pytest.importorskip("wandb_workspaces")
    workspace = build_workspace("someone", "p", top=10, flat=4, interior=0, name="sgd_probe", axis=STEP)
    spec = json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    logged = {*scalars(whole_window()), *map(figure_key, FIGURES), "sgd_probe/modes"}
    logged |= {f"sgd_probe/{plot}_table" for plot in (DIFFUSION_PLOT, NOISE_PLOT)}
    assert shown_keys(spec) <= logged
    bounds = {key for key in logged if key.endswith(("diffusion_low", "diffusion_high"))}
    assert logged - shown_keys(spec) == bounds | {"sgd_probe/window/index"}
    lines = [panel for panel in panels(spec) if panel["viewType"] == "Run History Line Plot"]
    assert {panel["config"]["xAxis"] for panel in lines} == {STEP}


def test_the_workspace_is_saved(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    address = wandb_workspace(ENTITY, "p", top=3, flat=1)
    assert address.startswith(f"{server.url}/{ENTITY}/p?nw=")
    (view,) = server.views
    assert (view["entityName"], view["projectName"]) == (ENTITY, "p")
    assert "sgd_probe/flat_01/diffusion" in view["spec"] and "flat_02" not in view["spec"]
    assert server.unknown == []


@pytest.mark.parametrize(
    ("options", "named"), [({"entity": ""}, "`entity`"), ({"top": -1}, "`top`"), ({"name": ""}, "`name`")]
)
def test_a_wrong_argument_of_the_workspace_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"expected {named}"):
        wandb_workspace(**{"entity": "e", "project": "p", **options})
