"""Starts of a fleet in the twin: the steps from a decision to serving, and weights going round many nodes.

What one machine cannot try: a model that fills eight devices on each of 64 nodes. Times follow from stated
bandwidths (`Hardware`; each says where it comes from); steps are those of a real start (DeepServe, section
6). The tree is laid out by `controlplane.scheduling.forks`, which the operator uses. Nothing is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.scheduling.forks import FANOUT, fork_sources

GB = 1e9


@dataclass(frozen=True, slots=True)
class Hardware:
    """Of one node, bytes a second unless said otherwise. Numbers of DeepServe's table are solved for."""

    ranks: int = 8  # devices, each with a network port
    storage: float = 3.1 * GB  # a share of an object store over 25 Gbit/s (ours)
    storage_total: float = 50 * GB  # what the store gives to all nodes together (ours)
    ssd: float = 6.1 * GB  # the table: 145 GB of Qwen-72B in 24 s
    host_to_devices: float = 50 * GB  # the table: the same in 3.2 s, of which 0.3 s are tensors' init
    port: float = 23 * GB  # of each rank, RoCE: the table, 18 GB in 0.91 s, of which 0.12 s are not bytes
    init_seconds: float = 0.3  # tensors and devices, on any path from the host (section 6.3)
    connect_seconds: float = 0.12  # until a fork's first byte: the table's rows differ by it (ours, fitted)
    pre_load_seconds: float = 31.7  # imports, devices, links, not warmed: the table's Qwen-72B row
    post_load_seconds: float = 0.3  # pool, dummy request (ours: ten times what the small model takes here)
    scaler_pre_seconds: float = 0.1  # a claim of a warm pod (ours)
    scaler_post_seconds: float = 0.05  # until gateways route there: our bound


@dataclass(frozen=True, slots=True)
class Waterfall:
    """Seconds of each step, for one node."""

    path: str
    scaler_pre: float
    te_pre_load: float
    te_load: float
    te_post_load: float
    scaler_post: float

    @property
    def total(self) -> float:
        return self.scaler_pre + self.te_pre_load + self.te_load + self.te_post_load + self.scaler_post


def load_seconds(path: str, weight_bytes: float, hardware: Hardware, nodes: int = 1) -> float:
    """TE-Load of each of `nodes` that start at once by one path: "storage", "ssd", "memory", "fork" (one to
    one). Raises ValueError for another."""
    if path == "fork":
        return hardware.connect_seconds + weight_bytes / hardware.ranks / hardware.port
    rates = {
        "storage": min(hardware.storage, hardware.storage_total / nodes),
        "ssd": hardware.ssd,
        "memory": hardware.host_to_devices,
    }
    if path not in rates:
        raise ValueError(f"path {path!r} is none of {', '.join(rates)}, fork")
    # Bytes reach devices as they come: the slower of both legs is what is waited for.
    return hardware.init_seconds + weight_bytes / min(rates[path], hardware.host_to_devices)


def waterfall(path: str, weight_bytes: float, hardware: Hardware, nodes: int = 1) -> Waterfall:
    """`path` is "cold" (no warm process, storage), "warm" (SSD), "hot" (host memory) or "fork"."""
    source = {"cold": "storage", "warm": "ssd", "hot": "memory", "fork": "fork"}
    if path not in source:
        raise ValueError(f"path {path!r} is none of {', '.join(source)}")
    return Waterfall(
        path,
        hardware.scaler_pre_seconds,
        hardware.pre_load_seconds if path == "cold" else 0.0,
        load_seconds(source[path], weight_bytes, hardware, nodes),
        hardware.post_load_seconds,
        hardware.scaler_post_seconds,
    )


def parents_of(targets: int, fanout: int = FANOUT) -> list[int]:
    """Of each target in the order they join, its parent: 0 is the source, n the n-th target. `fanout` of at
    least `targets` is a star."""
    return [fork_sources([0], range(1, target), fanout)[0] for target in range(1, targets + 1)]


def spread(
    parents: Sequence[int], chunks: int, chunk_seconds: float, *, pipelined: bool = True
) -> list[float]:
    """When each target has all `chunks`, in seconds from the first byte; `chunk_seconds` is one of them on a
    port that nobody shares. `parents` as `parents_of` gives them. Raises ValueError for one that joins later.

    A port sends one chunk at a time, to its node's children in turn. `pipelined`: a chunk is fed on when it
    has arrived; otherwise when the whole image has.
    """
    count = len(parents) + 1
    children: list[list[int]] = [[] for _ in range(count)]
    for target, parent in enumerate(parents, start=1):
        if not 0 <= parent < target:
            raise ValueError(f"target {target} cannot hang on {parent}: parents join first")
        children[parent].append(target)
    arrived = [[0.0] * chunks for _ in range(count)]
    for node in range(count):  # parents come before their children
        mine = arrived[node]
        free = 0.0 if pipelined else mine[-1]
        for chunk in range(chunks):
            for child in children[node]:
                free = max(free, mine[chunk]) + chunk_seconds
                arrived[child][chunk] = free
    return [arrived[target][-1] for target in range(1, count)]


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to bring weights to many nodes."""

    name: str
    fanout: int  # 0: all hang on the source
    pipelined: bool = True


LAYOUTS = (
    Layout("one to one, all from the source", 0),
    Layout("tree of 4, fed on when whole", 4, pipelined=False),
    Layout("tree of 2, fed on when whole", 2, pipelined=False),
    Layout("tree of 4", 4),
    Layout("tree of 2 (ours)", FANOUT),
    Layout("chain", 1),
)


def fork_seconds(
    layout: Layout, targets: int, weight_bytes: float, hardware: Hardware, chunk_bytes: float
) -> list[float]:
    """TE-Load of each of `targets` nodes that are forked from one source at once; only ports are shared."""
    share = weight_bytes / hardware.ranks  # each rank's port carries its part, all ranks at once
    chunks = max(1, round(share / chunk_bytes))
    parents = parents_of(targets, layout.fanout or targets)
    seconds = spread(parents, chunks, share / chunks / hardware.port, pipelined=layout.pipelined)
    return [hardware.connect_seconds + value for value in seconds]
