from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from sgd_probe.report.run_folder import read_run_folder
from sgd_probe.result import WindowResult
from sgd_probe.sinks import (
    FolderSink,
    RunInfo,
    SinkGroup,
    Vectors,
    folder,
    fresh_folder,
    load_vectors,
    read_run,
)
from tests.sinks.conftest import MakeWindow, warnings_of


def same(found: list[WindowResult], expected: list[WindowResult]) -> bool:
    """Equality with NaN equal to NaN."""
    return [window.to_dict() for window in found] == [window.to_dict() for window in expected]


def reject_constant(name: str) -> None:
    raise AssertionError(f"{name} is not strict JSON")


def test_round_trip(tmp_path: Path, run_info: RunInfo, window: MakeWindow, vectors: Vectors) -> None:
    windows = [window(index=0), window(index=1, closed_at_step=20)]
    sink = FolderSink(tmp_path / "deep" / "run")
    sink.start(run_info)
    for result in windows:
        sink.write(result, vectors)
    info, found, note = read_run(sink.path)
    assert info["config"] == {"top": 2, "window": "auto", "params": None}
    assert list(info["parameters"]) == ["layer.weight", "layer.bias"]
    assert same(found, windows)
    assert note == ""
    loaded = load_vectors(sink.path / "basis_0001.npz")
    assert list(loaded) == ["top_01", "top_02"]
    for name, vector in vectors.items():
        assert loaded[name].dtype == np.float32
        np.testing.assert_array_equal(loaded[name], vector)


def test_the_last_windows_alone(tmp_path: Path, run_info: RunInfo, window: MakeWindow) -> None:
    """What the page of a running training reads: its memory does not grow with the run."""
    sink = FolderSink(tmp_path)
    sink.start(run_info)
    for index in range(5):
        sink.write(window(index=index), {})
    with (tmp_path / folder.WINDOWS_FILE).open("a") as file:
        file.write("{torn\n")
    run = read_run_folder(tmp_path, last=3)
    assert [result.index for result in run.windows] == [3, 4]
    assert run.unreadable == (6,)
    assert len(read_run_folder(tmp_path).windows) == 5


def test_every_line_is_strict_json(
    tmp_path: Path, run_info: RunInfo, window: MakeWindow, vectors: Vectors
) -> None:
    sink = FolderSink(tmp_path)
    sink.start(run_info)
    sink.write(window(), vectors)
    for name in ("run.json", "windows.jsonl"):
        json.loads((tmp_path / name).read_text(), parse_constant=reject_constant)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_window_is_readable_before_the_run_ends(
    tmp_path: Path, run_info: RunInfo, window: MakeWindow
) -> None:
    sink = FolderSink(tmp_path)
    sink.start(run_info)
    sink.write(window(), {})
    assert same(read_run(tmp_path)[1], [window()])
    assert not list(tmp_path.glob("*.npz"))


def test_large_directions_are_skipped_and_said_once(
    tmp_path: Path, run_info: RunInfo, window: MakeWindow, vectors: Vectors, caplog: pytest.LogCaptureFixture
) -> None:
    sink = FolderSink(tmp_path, max_vector_bytes=47)
    sink.start(run_info)
    with caplog.at_level(logging.WARNING, "sgd_probe"):
        sink.write(window(index=0), vectors)
        sink.write(window(index=1), vectors)
    assert warnings_of(caplog) == [
        "sgd_probe: the directions of a window take 48 bytes, more than max_vector_bytes=47; "
        "they are not stored. Everything else is."
    ]
    assert not list(tmp_path.glob("*.npz"))
    assert len(read_run(tmp_path)[1]) == 2


def test_directions_of_exactly_the_limit_are_stored(
    tmp_path: Path, run_info: RunInfo, window: MakeWindow, vectors: Vectors
) -> None:
    sink = FolderSink(tmp_path, max_vector_bytes=48)
    sink.start(run_info)
    sink.write(window(), vectors)
    assert (tmp_path / "basis_0000.npz").exists()


def test_a_changed_working_directory_does_not_move_the_run(
    tmp_path: Path, run_info: RunInfo, window: MakeWindow, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    sink = FolderSink("run")
    sink.start(run_info)
    monkeypatch.chdir(tmp_path / "elsewhere")
    sink.write(window(), {})
    assert len(read_run(tmp_path / "run")[1]) == 1


def test_a_torn_line_costs_that_line_only(tmp_path: Path, run_info: RunInfo, window: MakeWindow) -> None:
    sink = FolderSink(tmp_path)
    sink.start(run_info)
    sink.write(window(index=0), {})
    sink.write(window(index=1), {})
    lines = tmp_path / "windows.jsonl"
    lines.write_bytes(lines.read_bytes()[:-100])
    assert same(read_run(tmp_path)[1], [window(index=0)])

    resumed = FolderSink(tmp_path)
    resumed.start(run_info)
    resumed.write(window(index=2), {})
    _, found, note = read_run(tmp_path)
    assert same(found, [window(index=0), window(index=2)])
    assert note == "unreadable lines of windows.jsonl: 2"


def test_a_lost_newline_costs_nothing(tmp_path: Path, run_info: RunInfo, window: MakeWindow) -> None:
    sink = FolderSink(tmp_path)
    sink.start(run_info)
    sink.write(window(index=0), {})
    lines = tmp_path / "windows.jsonl"
    lines.write_bytes(lines.read_bytes()[:-1])
    sink.write(window(index=1), {})
    _, found, note = read_run(tmp_path)
    assert same(found, [window(index=0), window(index=1)])
    assert note == ""


def test_another_schema_is_refused(tmp_path: Path, run_info: RunInfo) -> None:
    FolderSink(tmp_path).start(run_info)
    (tmp_path / "windows.jsonl").write_text('{"schema": 99}\n')
    with pytest.raises(ValueError, match="expected a window result of schema 1, found 99"):
        read_run(tmp_path)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A disk with no more room, as the kernel plays it: writes stop half way, then fail."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


needs_rlimit = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")


@needs_rlimit
def test_a_full_disk_while_the_line_is_written(tmp_path: Path, run_info: RunInfo, window: MakeWindow) -> None:
    sink = FolderSink(tmp_path)
    sink.start(run_info)
    sink.write(window(index=0), {})
    room = (tmp_path / "windows.jsonl").stat().st_size + 100
    with files_no_larger_than(room), pytest.raises(OSError):
        sink.write(window(index=1), {})
    _, found, note = read_run(tmp_path)
    assert same(found, [window(index=0)])
    assert note == "", "no torn line either"


@needs_rlimit
def test_a_full_disk_while_the_directions_are_written(
    tmp_path: Path, run_info: RunInfo, window: MakeWindow, vectors: Vectors
) -> None:
    sink = FolderSink(tmp_path)
    sink.start(run_info)
    sink.write(window(index=0), vectors)
    large = {"top_01": np.zeros(100_000, np.float32)}
    with files_no_larger_than(50_000), pytest.raises(OSError):
        sink.write(window(index=1), large)
    assert same(read_run(tmp_path)[1], [window(index=0), window(index=1)])
    assert [path.name for path in tmp_path.glob("basis*")] == ["basis_0000.npz"]
    assert list(load_vectors(tmp_path / "basis_0000.npz")) == list(vectors)


def test_no_space_left_drops_the_sink_with_one_warning(
    tmp_path: Path,
    run_info: RunInfo,
    window: MakeWindow,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    group = SinkGroup([FolderSink(tmp_path)])
    group.start(run_info)
    group.write(window(index=0), {})
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "sgd_probe"):
        # Network and copy-on-write file systems tell of a full disk only here.
        patch.setattr(os, "fsync", no_space)
        group.write(window(index=1), {})
    group.write(window(index=2), {})
    group.finish()
    assert warnings_of(caplog) == [
        "sgd_probe: FolderSink failed in write (OSError: [Errno 28] No space left on device). "
        "Training and the other outputs go on without it, and results stay in memory (`results`); the next "
        "fit tries it again."
    ]
    assert read_run(tmp_path)[1][0].index == 0
    assert all(found.index != 2 for found in read_run(tmp_path)[1])


def test_a_full_disk_keeps_an_earlier_description(
    tmp_path: Path, run_info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    FolderSink(tmp_path).start(run_info)
    before = (tmp_path / "run.json").read_bytes()
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError):
        FolderSink(tmp_path).start(RunInfo(name="other", config={}, plan=(), versions={}))
    assert (tmp_path / "run.json").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_the_end_of_the_fit_writes_the_report(
    tmp_path: Path, run_info: RunInfo, window: MakeWindow, caplog: pytest.LogCaptureFixture
) -> None:
    sink = FolderSink(tmp_path)
    sink.start(run_info)
    sink.write(window(), {})
    sink.finish()
    assert "top_01" in (tmp_path / "report.html").read_text()
    assert warnings_of(caplog) == []


def test_the_page_is_written_while_the_training_runs_as_far_as_its_time_allows(
    tmp_path: Path, run_info: RunInfo, window: MakeWindow, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "report.html"
    sink = FolderSink(tmp_path)
    sink.start(run_info)
    sink.write(window(0), {})
    assert not page.exists()  # a moment after the start, one percent of it has no room for a page
    monkeypatch.setattr(folder, "REPORT_SHARE", 1e9)
    sink.write(window(1), {})
    assert "still training at step" in page.read_text(encoding="utf-8")
    monkeypatch.setattr(folder, "REPORT_SHARE", 0.0)
    page.unlink()
    sink.write(window(2), {})
    assert not page.exists()
    sink.finish()
    text = page.read_text(encoding="utf-8")
    assert "3 windows" in text and "still training" not in text


def test_a_page_that_fails_while_the_training_runs_is_not_tried_again_before_its_end(
    tmp_path: Path,
    run_info: RunInfo,
    window: MakeWindow,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(folder, "REPORT_SHARE", 1e9)
    (tmp_path / "report.html").mkdir()  # no page can be written over a folder
    sink = FolderSink(tmp_path)
    sink.start(run_info)
    with caplog.at_level(logging.WARNING, "sgd_probe"):
        sink.write(window(0), {})
        sink.write(window(1), {})
    assert [record.message[:36] for record in caplog.records] == [
        "sgd_probe: no report could be written"[:36]
    ]
    assert len(read_run(tmp_path)[1]) == 2


def test_a_report_that_fails_only_warns(
    tmp_path: Path, run_info: RunInfo, window: MakeWindow, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "report.html").mkdir()
    group = SinkGroup([FolderSink(tmp_path)], strict=True)
    group.start(run_info)
    group.write(window(), {})
    group.finish()
    (warning,) = warnings_of(caplog)
    assert warning.startswith("sgd_probe: no report could be written (")
    assert warning.endswith(f"The data in {tmp_path} are complete.")


def test_fresh_folder_takes_the_base_first(tmp_path: Path) -> None:
    base = tmp_path / "runs" / "probe"
    assert [fresh_folder(base) for _ in range(3)] == [
        base,
        base.with_name("probe_1"),
        base.with_name("probe_2"),
    ]


@pytest.mark.parametrize("name", ["run.json", "windows.jsonl", "report.html"])
def test_fresh_folder_leaves_what_is_there(tmp_path: Path, name: str) -> None:
    base = tmp_path / "probe"
    base.mkdir()
    (base / name).write_text("mine")
    assert fresh_folder(base) == tmp_path / "probe_1"
    assert [(path.name, path.read_text()) for path in base.iterdir()] == [(name, "mine")]


def test_fresh_folder_beside_a_file_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "probe").write_text("mine")
    assert fresh_folder(tmp_path / "probe") == tmp_path / "probe_1"


def test_fresh_folder_uses_an_empty_folder_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fresh_folder(".") == tmp_path
    assert fresh_folder(".") == tmp_path.with_name(f"{tmp_path.name}_1")


def test_a_run_without_windows_can_be_read(tmp_path: Path, run_info: RunInfo) -> None:
    sink = FolderSink(fresh_folder(tmp_path / "probe"))
    sink.start(run_info)
    assert read_run(sink.path)[1:] == ([], "")
