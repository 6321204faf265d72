"""How a window is taken in the memory that there is.

What only costs time is given up first: graphs are rebuilt for every product, batches are cut into pieces, the
search restarts on a shorter basis, the directions are held on the CPU. Only then certainty goes, with some of
the batches, and last what is seen, with some of the directions. Steps that would save next to nothing are
passed over.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sgd_probe.curvature.lanczos import most_products, smallest_basis
from sgd_probe.engine.config import ProbeConfig
from sgd_probe.engine.planning import most_vectors

#: A step that saves less than this share of what is needed is passed over.
_WORTH_IT = 0.02
#: Fewest batches of a curvature set: one alone has no standard error.
_FEWEST_BATCHES = 2
#: A piece over the one before.
_PIECE_RATIO = 4
#: Vectors of weights that a product needs on the device, also where the others are held on the CPU.
_DEVICE_VECTORS = 6


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What was measured on one batch, in bytes.

    Attributes:
        vector: of as many numbers as there are probed weights.
        graph: one graph, with the gradient that it leads to.
        graph_samples: samples behind that graph.
        samples: of a batch.
        batch: a batch itself.
        beside: vectors that a product takes beside all that a window holds.
    """

    vector: int
    graph: int
    graph_samples: int
    samples: int
    batch: int
    beside: int = 0

    def graph_of(self, samples: int) -> float:
        """A graph of so many samples: all but the gradient grows with them."""
        return self.vector + max(self.graph - self.vector, 0) * samples / self.graph_samples


@dataclass(frozen=True, kw_only=True)
class Means:
    """How a window is taken.

    Attributes:
        config: the knobs; of directions and samples in a piece, what is left of those asked for.
        batches: in each curvature set.
        vectors: that the eigensolver may hold.
        keep_graphs: between products.
        on_cpu: directions are held there, products are taken where the weights are.
    """

    config: ProbeConfig
    batches: int
    vectors: int
    keep_graphs: bool
    on_cpu: bool = False

    @property
    def directions(self) -> int:
        """Of all kinds."""
        return self.config.top + self.config.interior + self.config.flat

    def piece(self, sizes: Sizes) -> int:
        """Samples of a graph."""
        return min(self.config.microbatch or sizes.samples, sizes.samples)

    def graph_bytes(self, sizes: Sizes) -> float:
        """Of all graphs that are held at once; those of both sets are, where they are kept."""
        piece = self.piece(sizes)
        kept = 2 * self.batches * math.ceil(sizes.samples / piece) if self.keep_graphs else 1
        return kept * sizes.graph_of(piece)

    def vector_bytes(self, sizes: Sizes) -> int:
        """Of all vectors of weights that are held at once, wherever they are."""
        return (most_vectors(self.config, self.vectors) + sizes.beside) * sizes.vector

    def bytes(self, sizes: Sizes) -> float:
        """What a window needs at its peak where the weights are."""
        vectors = _DEVICE_VECTORS * sizes.vector if self.on_cpu else self.vector_bytes(sizes)
        return self.graph_bytes(sizes) + vectors + 2 * self.batches * sizes.batch


@dataclass(frozen=True, kw_only=True)
class Room:
    """What may be taken.

    Attributes:
        graphs: bytes of graphs.
        basis: vectors of the eigensolver, where the user has bounded them; else None.
        vectors: vectors of weights in all, where the weights are.
        cpu_vectors: likewise on the CPU; 0 where the weights are there themselves.
        cuttable: batches may be cut into pieces.
    """

    graphs: float
    basis: int | None
    vectors: float
    cpu_vectors: float = 0.0
    cuttable: bool = True


def fitted(asked: Means, sizes: Sizes, room: Room) -> Means | None:
    """The means that are asked for, or what fits: the first of the order that does.

    The number of batches is not looked at: it is chosen with the pace of the windows.

    Returns:
        None where nothing fits.
    """
    means = asked
    if means.keep_graphs and means.graph_bytes(sizes) > room.graphs:
        means = dataclasses.replace(means, keep_graphs=False)
    automatic = asked.config.max_graph_bytes == "auto"
    while automatic and room.cuttable and means.graph_bytes(sizes) > room.graphs:
        smaller = _in_smaller_pieces(means, sizes)
        if smaller is None:
            break  # one graph has been built already: it may well fit
        means = smaller
    for fewer in (means, *_with_fewer_directions(means)):
        found = _with_room(fewer, room.basis, room.vectors)
        if found is None and room.cpu_vectors > 0:
            found = _with_room(dataclasses.replace(fewer, on_cpu=True), room.basis, room.cpu_vectors)
        if found is not None:
            return found
    return None


def leaner(means: Means, sizes: Sizes, *, cuttable: bool, on_accelerator: bool) -> Means | None:
    """The next means in order after an allocation has failed; None where there are none.

    Args:
        means: that did not fit.
        sizes: as measured.
        cuttable: batches may be cut into pieces.
        on_accelerator: the weights are not on the CPU, so that the directions may be there.
    """
    for candidate in _order(means, sizes, cuttable, on_accelerator):
        # Where the directions are on the CPU, nobody has told which of the two was short.
        saves = [candidate.bytes(sizes) <= (1 - _WORTH_IT) * means.bytes(sizes)]
        if means.on_cpu:
            saves.append(candidate.vector_bytes(sizes) <= (1 - _WORTH_IT) * means.vector_bytes(sizes))
        if any(saves):
            return candidate
    return None


def describe(asked: Means, used: Means, sizes: Sizes) -> tuple[str, ...]:
    """What of the means that were asked for had to be given up, in words; empty where nothing."""
    found = []
    if asked.keep_graphs and not used.keep_graphs:
        found.append("graphs are rebuilt for every product, which takes longer")
    if used.piece(sizes) < asked.piece(sizes):
        found.append(f"batches are taken in pieces of {used.piece(sizes)} samples")
    if used.vectors < min(asked.vectors, most_products(used.config.top)):
        found.append(f"the search restarts with {used.vectors} vectors")
    if used.on_cpu and not asked.on_cpu:
        found.append("the directions are held on the CPU, which takes longer")
    if used.batches < asked.batches:
        found.append(f"{used.batches} batches in each curvature set in place of {asked.batches}")
    if used.directions < asked.directions:
        word = "direction" if used.directions == 1 else "directions"
        found.append(f"{_directions(used.config)} {word} in place of {_directions(asked.config)}")
    return tuple(found)


def _directions(config: ProbeConfig) -> str:
    kinds = ((config.top, "stiff"), (config.interior, "interior"), (config.flat, "near-flat"))
    return " and ".join(f"{count} {kind}" for count, kind in kinds if count or kind == "stiff")


def _order(means: Means, sizes: Sizes, cuttable: bool, on_accelerator: bool) -> Iterator[Means]:
    if means.keep_graphs:
        yield dataclasses.replace(means, keep_graphs=False)
    smaller = _in_smaller_pieces(means, sizes) if cuttable and not means.keep_graphs else None
    if smaller is not None:
        yield smaller
    least = smallest_basis(means.config.top) + means.config.interior
    if means.vectors > least:
        # What is held while the directions are certified does not shrink with the basis.
        yield dataclasses.replace(means, vectors=max(means.vectors // 2, least))
    if on_accelerator and not means.on_cpu:
        yield dataclasses.replace(means, on_cpu=True)
    if means.batches > _FEWEST_BATCHES:
        yield dataclasses.replace(means, batches=max(means.batches // 2, _FEWEST_BATCHES))
    yield from _with_fewer_directions(means)


def _in_smaller_pieces(means: Means, sizes: Sizes) -> Means | None:
    piece = means.piece(sizes)
    if piece <= 1:
        return None
    smaller = max(piece // _PIECE_RATIO, 1)
    if sizes.graph_of(smaller) > (1 - _WORTH_IT) * sizes.graph_of(piece):
        return None  # the gradient is all that is left of it
    return dataclasses.replace(means, config=dataclasses.replace(means.config, microbatch=smaller))


def _with_fewer_directions(means: Means) -> Iterator[Means]:
    config = means.config
    if config.interior:
        config = dataclasses.replace(config, interior=0)
        yield _searching(means, config)
    while config.top > 1 or config.flat > 0:
        config = dataclasses.replace(config, top=max(config.top // 2, 1), flat=config.flat // 2)
        yield _searching(means, config)


def _searching(means: Means, config: ProbeConfig) -> Means:
    least = smallest_basis(config.top) + config.interior
    return dataclasses.replace(means, config=config, vectors=max(min(means.vectors, 3 * least), least))


def _with_room(means: Means, basis: int | None, vectors: float) -> Means | None:
    """The longest basis that fits."""
    config = means.config
    least = smallest_basis(config.top) + config.interior
    longest = min(means.vectors, most_products(config.top))
    if basis is not None:
        return dataclasses.replace(means, vectors=min(basis, longest)) if basis >= least else None
    for held in range(max(longest, least), least - 1, -1):
        if most_vectors(config, held) <= vectors:
            return dataclasses.replace(means, vectors=held)
    return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device; None where nobody can tell.

    On the CPU that is the least of what the machine has left, what the limits of the process leave it and
    what those of its control group do: a container that takes more is killed, with the training in it.
    """
    if device.type == "cuda":
        # What torch's allocator holds and does not use is as good as free.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + idle)
    if device.type != "cpu":
        return None
    known = [left for left in (_machine(), _process(), _control_group()) if left is not None]
    return max(min(known), 0) if known else None


def resident_bytes(device: torch.device) -> tuple[int, int] | None:
    """What this process holds on a device now, and the most that it ever did; None where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if device.type == "cpu":
        found = _table(Path("/proc/self/status"))
        if "VmRSS" in found and "VmHWM" in found:
            return found["VmRSS"], found["VmHWM"]
    return None


def _machine() -> int | None:
    return _table(Path("/proc/meminfo")).get("MemAvailable")


def _process() -> int | None:
    """By its own limits on its address space and its data."""
    if sys.platform == "win32":
        return None
    import resource

    found = _table(Path("/proc/self/status"))
    limits = ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))
    left = [
        limit - found[held]
        for which, held in limits
        if (limit := resource.getrlimit(which)[0]) != resource.RLIM_INFINITY and held in found
    ]
    return min(left) if left else None


def _control_group(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """By the limits of all groups that it is in, of either version of Linux's control groups."""
    left = []
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        new = controllers == ""
        base = root if new else root / "memory"
        limit, usage = (
            ("memory.max", "memory.current") if new else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        # Within a container the path may be one of the host's: its own group then lies at the root.
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            limited, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if limited.isdigit() and used.isdigit():
                cache = _table(folder / "memory.stat", unit=1).get("inactive_file", 0)
                left.append(int(limited) - int(used) + cache)
            if folder == base:
                break
    return min(left) if left else None


def _table(path: Path, unit: int = 1024) -> dict[str, int]:
    """Lines of a name, a number and perhaps a unit."""
    found = {}
    for line in _text(path).splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0]] = int(words[1]) * unit
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
