"""Read a run folder: what the fit began with and what every window found. JSON only."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgd_probe.result import WindowResult

RUN_FILE = "run.json"
WINDOWS_FILE = "windows.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """A run as its folder tells it.

    Attributes:
        folder: the folder's name.
        name: prefix of the run's metrics.
        config: every knob of the probe and its value.
        plan: the preflight message's lines.
        versions: packages and their versions.
        parameters: names and sizes of the probed parameters.
        windows: the windows that could be read, in the order of the file.
        unreadable: numbers (from 1) of the lines of the windows' file that are no JSON objects.
    """

    folder: str
    name: str
    config: Mapping[str, Any]
    plan: tuple[str, ...]
    versions: Mapping[str, str]
    parameters: Mapping[str, int]
    windows: tuple[WindowResult, ...]
    unreadable: tuple[int, ...] = ()


def read_run_folder(folder: Path, last: int | None = None) -> RunFolder:
    """Read ``run.json`` and ``windows.jsonl``; the latter may be absent or broken off.

    A line that is no JSON object is what a killed process leaves behind: it is counted, not fatal.

    Args:
        folder: of the run.
        last: lines of the windows' file to read, from its end; all by default.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no ``run.json``.
        ValueError: a file is of another schema or not what the probe writes.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected a run folder, found {'a file' if folder.exists() else 'nothing'} at {folder}: "
            f"pass the folder that holds {RUN_FILE}"
        )
    info = _read_info(folder / RUN_FILE)
    windows, unreadable = _read_windows(folder / WINDOWS_FILE, last)
    return RunFolder(folder=folder.resolve().name, **info, windows=windows, unreadable=unreadable)


def _read_info(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"expected {RUN_FILE} in {path.parent}, found none: pass the folder that the probe wrote, "
            "or start the fit first"
        )
    data = _parse(path.read_bytes())
    if data is None:
        raise ValueError(
            f"expected a JSON object in {path}, found something else: the file is damaged or not the probe's"
        )
    expected = {"name": str, "config": dict, "plan": list, "versions": dict}
    for key, kind in expected.items():
        if not isinstance(data.get(key), kind):
            raise ValueError(
                f"expected {key!r} of {path} to be a {kind.__name__}, found {type(data.get(key)).__name__}: "
                "the file is damaged or not the probe's"
            )
    return {
        "name": data["name"],
        "config": data["config"],
        "plan": tuple(map(str, data["plan"])),
        "versions": data["versions"],
        "parameters": data.get("parameters") or {},
    }


def _read_windows(path: Path, last: int | None) -> tuple[tuple[WindowResult, ...], tuple[int, ...]]:
    windows: list[WindowResult] = []
    unreadable: list[int] = []
    lines: deque[tuple[int, bytes]] = deque(maxlen=last)
    if path.is_file():
        with path.open("rb") as file:
            lines.extend(enumerate(file, start=1))
    for line_number, line in lines:
        if not line.strip():
            continue
        data = _parse(line)
        if data is None:
            unreadable.append(line_number)
            continue
        try:
            windows.append(WindowResult.from_dict(data))
        except ValueError as error:
            raise ValueError(f"{path}, line {line_number}: {error}") from error
    return tuple(windows), tuple(unreadable)


def _parse(text: bytes) -> dict[str, Any] | None:
    """The JSON object in ``text``, or None where there is none (broken JSON, broken UTF-8)."""
    try:
        data = json.loads(text)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None
