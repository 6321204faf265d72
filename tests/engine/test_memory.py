"""What is given up where memory is short, in which order, and what there is to begin with."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sgd_probe.curvature.lanczos import smallest_basis
from sgd_probe.curvature.memory import is_out_of_memory
from sgd_probe.engine.config import ProbeConfig
from sgd_probe.engine.memory import Means, Room, Sizes, _control_group, describe, fitted, free_memory, leaner
from sgd_probe.engine.planning import most_vectors

#: A hundred times as large as a vector is the graph of a batch of 64; batches weigh something too.
SIZES = Sizes(vector=1_000, graph=100_000, graph_samples=64, samples=64, batch=20_000)
ASKED = Means(config=ProbeConfig(top=10, flat=4, interior=2), batches=8, vectors=70, keep_graphs=True)
PLENTY = Room(graphs=1e12, basis=None, vectors=1e9)


def given_up(means: Means) -> str:
    return "; ".join(describe(ASKED, means, SIZES))


def test_the_order_is_time_before_certainty_before_directions() -> None:
    order, means = [ASKED], leaner(ASKED, SIZES, cuttable=True, on_accelerator=True)
    while means is not None:
        order.append(means)
        means = leaner(means, SIZES, cuttable=True, on_accelerator=True)
    for one, other in itertools.pairwise(order):
        assert (other.bytes(SIZES), other.vector_bytes(SIZES)) < (
            one.bytes(SIZES),
            one.vector_bytes(SIZES),
        )
    kinds = ("keep_graphs", "piece", "vectors", "on_cpu", "batches", "directions")
    first = {
        kind: next(i for i, m in enumerate(order) if _part(m, kind) != _part(ASKED, kind)) for kind in kinds
    }
    assert sorted(first, key=first.__getitem__) == [
        "keep_graphs",
        "piece",
        "vectors",
        "on_cpu",
        "batches",
        "directions",
    ]
    assert (order[-1].config.top, order[-1].config.flat, order[-1].config.interior) == (1, 0, 0)
    assert order[-1].vectors >= smallest_basis(1) and order[-1].batches == 2
    assert "1 stiff direction in place of 10 stiff and 2 interior and 4 near-flat" in given_up(order[-1])


def _part(means: Means, kind: str) -> object:
    return means.piece(SIZES) if kind == "piece" else getattr(means, kind)


def test_where_one_sample_sees_another_batches_stay_whole() -> None:
    means = leaner(ASKED, SIZES, cuttable=False, on_accelerator=False)
    while means is not None:
        assert means.config.microbatch is None and not means.on_cpu
        means = leaner(means, SIZES, cuttable=False, on_accelerator=False)


def test_what_saves_nothing_is_passed_over() -> None:
    # All the memory goes into vectors: rebuilding graphs would only take time.
    heavy = Sizes(vector=10**9, graph=10**9 + 10, graph_samples=64, samples=64, batch=10)
    rebuilt = Means(config=ASKED.config, batches=8, vectors=70, keep_graphs=False)
    found = leaner(rebuilt, heavy, cuttable=True, on_accelerator=False)
    assert found is not None and found.vectors == 35 and found.config.microbatch is None


def test_nothing_is_given_up_where_there_is_room() -> None:
    found = fitted(ASKED, SIZES, PLENTY)
    assert found == ASKED and given_up(found) == ""


@pytest.mark.parametrize(
    ("room", "words"),
    [
        (Room(graphs=500_000, basis=None, vectors=1e9), "graphs are rebuilt for every product"),
        (
            Room(graphs=30_000, basis=None, vectors=1e9),
            "graphs are rebuilt for every product, which takes longer; batches are taken in pieces of 16",
        ),
        (Room(graphs=30_000, basis=None, vectors=1e9, cuttable=False), "graphs are rebuilt"),
        (Room(graphs=1e12, basis=20, vectors=1e9), "the search restarts with 20 vectors"),
        (Room(graphs=1e12, basis=None, vectors=46), "the search restarts with"),
        (Room(graphs=1e12, basis=None, vectors=20, cpu_vectors=1e6), "the directions are held on the CPU"),
        (Room(graphs=1e12, basis=None, vectors=30), "5 stiff and 2 near-flat directions in place of"),
        (Room(graphs=1e12, basis=7, vectors=1e9), "1 stiff direction in place of"),
    ],
)
def test_a_plan_fits_and_says_how(room: Room, words: str) -> None:
    found = fitted(ASKED, SIZES, room)
    assert found is not None and words in given_up(found)
    assert found.config.microbatch is None or found.graph_bytes(SIZES) <= room.graphs
    held = most_vectors(found.config, found.vectors)
    assert found.vectors <= room.basis if room.basis else held <= max(room.vectors, room.cpu_vectors)
    assert found.vectors >= smallest_basis(found.config.top) + found.config.interior


def test_it_gives_up_where_not_even_one_direction_fits() -> None:
    assert fitted(ASKED, SIZES, Room(graphs=1e12, basis=6, vectors=1e9)) is None
    assert fitted(ASKED, SIZES, Room(graphs=1e12, basis=None, vectors=15)) is None


def test_every_device_s_word_for_it() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50, dtype=torch.uint8)
    assert not isinstance(refused.value, torch.OutOfMemoryError)
    with pytest.raises(MemoryError) as by_numpy:
        np.empty(2**50, np.uint8)
    known = [refused.value, by_numpy.value, torch.OutOfMemoryError("x"), RuntimeError("std::bad_alloc")]
    assert all(map(is_out_of_memory, known))
    assert not any(map(is_out_of_memory, [RuntimeError("shapes differ"), ValueError("out of memory")]))


def test_free_memory() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**60
    assert free_memory(torch.device("meta")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of a process are read from Linux's own books")
def test_the_limits_of_the_process_count() -> None:
    code = """
import json, resource, torch
from sgd_probe.engine.memory import free_memory
line = next(row for row in open("/proc/self/status") if row.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (int(line.split()[1]) * 1024 + 50 * 2**20,) * 2)
print(json.dumps(free_memory(torch.device("cpu"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 20 * 2**20 < json.loads(done.stdout) <= 50 * 2**20


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_the_control_group_count(tmp_path: Path, version: int) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    base = root if version == 2 else root / "memory"
    group = base / "job" / "step"
    group.mkdir(parents=True)
    own.write_text("0::/job/step\n" if version == 2 else "3:cpuset:/\n4:memory:/job/step\n")
    limit, usage = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    assert _control_group(root, own) is None
    (group / limit).write_text("max\n" if version == 2 else "9223372036854771712\n")
    (group / usage).write_text("600\n")
    (group.parent / limit).write_text("1000\n")
    (group.parent / usage).write_text("700\n")
    (group.parent / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    # The tighter limit is that of the group above; what the kernel has cached there is as good as free.
    assert _control_group(root, own) == 450
