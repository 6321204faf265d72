"""Reads back the ``.wandb`` file that an offline run leaves, to assert what was really logged.

The file is LevelDB's log format, of which wandb no longer ships a reader: a header of 7 bytes, then
blocks of 32 KiB that hold chunks, each with a header of its own (CRC, length, type); a record that
crosses a block is cut into FIRST, MIDDLE ... LAST. Each record is one protobuf message.
"""

from __future__ import annotations

import importlib
import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAGIC = b":W&B" + struct.pack("<H", 0xBEE1)
FILE_HEADER_BYTES = 7
BLOCK_BYTES = 32 * 1024
CHUNK_HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class WandbFile:
    """What a finished run logged.

    Attributes:
        history: the rows in order, W&B's own ``_step`` and ``_runtime`` included.
        config: the final configuration.
        step_metrics: step metric by the name of each metric that was defined by that exact name.
        globs: step metric by glob.
        tags: of the run.
        alerts: title and text of each.
        artifacts: names of those that were logged.
    """

    history: list[dict[str, Any]]
    config: dict[str, Any]
    step_metrics: dict[str, str]
    globs: dict[str, str]
    tags: list[str] = field(default_factory=list)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)


def read_wandb_file(path: Path, timeout: float = 30.0) -> WandbFile:
    """Read a run's file once its exit record is in it.

    Raises:
        TimeoutError: no exit record appeared in time.
        ValueError: the file is not of this format, or a checksum is wrong.
    """
    deadline = time.monotonic() + timeout
    while True:
        records = _messages(path)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return _digest(records)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has no exit record after {timeout} s")
        time.sleep(0.05)


def _messages(path: Path) -> list[Any]:
    # By name: the generated module declares its classes where no type checker sees them.
    protocol: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    messages = []
    for data in _records(path.read_bytes()):
        message = protocol.Record()
        message.ParseFromString(data)
        messages.append(message)
    return messages


def _digest(records: list[Any]) -> WandbFile:
    file = WandbFile(history=[], config={}, step_metrics={}, globs={})
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            file.history.append(_items(record.history.item))
        elif kind == "run":
            file.config.update(_items(record.run.config.update))
            file.tags[:] = record.run.tags
        elif kind == "config":
            file.config.update(_items(record.config.update))
        elif kind == "alert":
            file.alerts.append((record.alert.title, record.alert.text))
        elif kind == "artifact":
            file.artifacts.append(record.artifact.name)
        elif kind == "metric" and record.metric.name:
            file.step_metrics[record.metric.name] = record.metric.step_metric
        elif kind == "metric":
            file.globs[record.metric.glob_name] = record.metric.step_metric
    return file


def _items(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    """The whole records; a last one that is still being written is left out."""
    if not data.startswith(MAGIC):
        raise ValueError(f"expected a .wandb file, found one that begins with {data[:7]!r}")
    parts = b""
    for kind, payload in _chunks(data):
        parts = payload if kind in (FULL, FIRST) else parts + payload
        if kind in (FULL, LAST):
            yield parts


def _chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = FILE_HEADER_BYTES
    while True:
        left_in_block = BLOCK_BYTES - offset % BLOCK_BYTES
        if left_in_block < CHUNK_HEADER.size:
            offset += left_in_block  # too short for a header: zeros
        if offset + CHUNK_HEADER.size > len(data):
            return
        checksum, length, kind = CHUNK_HEADER.unpack_from(data, offset)
        start = offset + CHUNK_HEADER.size
        payload = data[start : start + length]
        if len(payload) < length:
            return
        if zlib.crc32(payload, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"wrong checksum at byte {offset}")
        yield kind, payload
        offset = start + length
