"""Runs per table and calls per request after churn: our placement against a FIFO free list and best fit.

    python -m tests.bench.kv_fragmentation [--quick] [--json PATH]

Bookkeeping only, no model and no bytes but where compaction is timed: a prefill pool full of cached
prefixes and a decode pool at an occupancy, both real `RTC`s over real pools, serve requests until the
order of an empty pool is long gone. A call is one contiguous copy (`kvtransfer.runs.align`).

- `calls`: copies of a request's blocks that the decode side lacks; `calls, all`: as if it had none.
- Baselines evict least recently used blocks, tails first. `fifo` hands free blocks out in the order they
  came back (the classic block allocator); `best fit` is FlowKV's segment allocator alone.
- `hit`: prompts share a prefix with one of 32 groups that are replaced over time. `turns`: conversations
  that grow, more of them than the prefill pool holds, so every eviction of the wrong block costs hits.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from flowserve.rtc import RTC
from flowserve.rtc.allocator import SegmentAllocator
from kvtransfer.layout import KVLayout
from kvtransfer.pool import HostPool
from kvtransfer.runs import align, runs_of
from tests.bench.common import Report, mean, median, parser

BLOCKS = 4096
MEAN_BLOCKS = 54  # of a prompt: the mean FlowKV's simulation uses
MEAN_OUTPUT = 8
GROUPS = 32
IN_FLIGHT = 4  # transfers that still hold their blocks on the prefill side
LAYOUT = KVLayout("bench@1", "bfloat16", block_tokens=16, layers=1, kv_heads=1, head_dim=16)
COMPACT_LAYOUT = KVLayout("bench@1", "bfloat16", block_tokens=16, layers=8, kv_heads=2, head_dim=64)
"""Pages of 64 KiB: where compaction's copies are timed."""
AIMS = {
    ("unique", 0.8, 0.0): 1.2,
    ("unique", 0.92, 0.0): 2.0,
    ("hit", 0.8, 0.5): 2.5,
    ("hit", 0.8, 0.8): 2.5,
}
LOST_HITS = 0.02
"""Prefix hits that fewer runs may cost against eviction by age, in parts of all blocks (ours)."""

Identities = list[bytes]


class Cache(Protocol):
    """One side of the simulation."""

    seconds: float

    def used(self) -> int: ...

    def admit(self, identities: Identities) -> tuple[list[int], int] | None: ...

    def grow(self, table: list[int], identity: bytes) -> bool: ...

    def leave(self, table: list[int]) -> None: ...


class Ours:
    """The engine's cache, called as the engine calls it."""

    def __init__(self, caching: bool, layout: KVLayout = LAYOUT) -> None:
        self.store = HostPool.create(layout, BLOCKS)
        self.rtc = RTC(self.store)
        self.caching = caching
        self.seconds = 0.0
        self.copy_seconds = 0.0

    def stage(self, table: list[int], call_seconds: float) -> tuple[list[int], list[int]]:
        start = time.perf_counter()
        announced, staged = self.rtc.stage(table, call_seconds)
        self.copy_seconds += time.perf_counter() - start
        return announced, staged

    def used(self) -> int:
        return self.rtc.held_blocks

    def admit(self, identities: Identities) -> tuple[list[int], int] | None:
        start = time.perf_counter()
        match = self.rtc.match_identities(identities[:-1] if self.caching else [])
        table = self.rtc.alloc_blocks(len(identities) - len(match), match)
        if table is not None and self.caching:
            for block, identity in zip(table[len(match) :], identities[len(match) :], strict=True):
                self.rtc.commit(block, identity)
        self.seconds += time.perf_counter() - start
        return None if table is None else (table, len(match))

    def grow(self, table: list[int], identity: bytes) -> bool:
        start = time.perf_counter()
        block = self.rtc.append_block(table)
        if block is not None:
            table.append(block)
            if self.caching:
                self.rtc.commit(block, identity)
        self.seconds += time.perf_counter() - start
        return block is not None

    def leave(self, table: list[int]) -> None:
        start = time.perf_counter()
        self.rtc.free(table)
        self.seconds += time.perf_counter() - start


class _Fifo:
    def __init__(self) -> None:
        self.queue = deque(range(BLOCKS))

    @property
    def free(self) -> int:
        return len(self.queue)

    def take(self, count: int, after: int) -> list[int]:
        return [self.queue.popleft() for _ in range(count)]

    def give(self, block: int) -> None:
        self.queue.append(block)


class _BestFit:
    def __init__(self) -> None:
        self.segments = SegmentAllocator(BLOCKS)

    @property
    def free(self) -> int:
        return self.segments.free

    def take(self, count: int, after: int) -> list[int]:
        if after >= 0 and self.segments.is_free(after):
            self.segments.take_at(after, 1)
            return [after]
        return [b for run in self.segments.take(count) or [] for b in range(run.start, run.start + run.count)]

    def give(self, block: int) -> None:
        self.segments.give(block, 1)


class Baseline:
    """A prefix cache that evicts the least recently used block, over a free list."""

    def __init__(self, free: _Fifo | _BestFit, caching: bool) -> None:
        self.store = HostPool.create(LAYOUT, BLOCKS)  # generations move here too: the times compare
        self.free = free
        self.caching = caching
        self.refs = [0] * BLOCKS
        self.block_of: dict[bytes, int] = {}
        self.identity_of: dict[int, bytes] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.seconds = 0.0

    def used(self) -> int:
        return BLOCKS - self.free.free - len(self.idle)

    def admit(self, identities: Identities) -> tuple[list[int], int] | None:
        start = time.perf_counter()
        table: list[int] = []
        for identity in identities[:-1] if self.caching else []:
            block = self.block_of.get(identity)
            if block is None:
                break
            table.append(block)
        matched = len(table)
        room = self.free.free + len(self.idle) - sum(1 for block in table if block in self.idle)
        if len(identities) - matched > room:
            return None
        for block in table:
            self.idle.pop(block, None)
            self.refs[block] += 1
        table += self._take(len(identities) - matched, -1)
        for block, identity in zip(table[matched:], identities[matched:], strict=True):
            self._commit(block, identity)
        self.seconds += time.perf_counter() - start
        return table, matched

    def grow(self, table: list[int], identity: bytes) -> bool:
        start = time.perf_counter()
        if self.free.free + len(self.idle) < 1:
            return False
        table += self._take(1, table[-1] + 1)
        self._commit(table[-1], identity)
        self.seconds += time.perf_counter() - start
        return True

    def leave(self, table: list[int]) -> None:
        start = time.perf_counter()
        for block in reversed(table):
            self.refs[block] -= 1
            if self.refs[block] == 0 and block in self.identity_of:
                self.idle[block] = None
            elif self.refs[block] == 0:
                self._release(block)
        self.seconds += time.perf_counter() - start

    def _commit(self, block: int, identity: bytes) -> None:
        if self.caching and identity not in self.block_of and block not in self.identity_of:
            self.block_of[identity] = block
            self.identity_of[block] = identity

    def _take(self, count: int, after: int) -> list[int]:
        while self.free.free < count:
            block, _ = self.idle.popitem(last=False)
            del self.block_of[self.identity_of.pop(block)]
            self._release(block)
        blocks = self.free.take(count, after)
        for block in blocks:
            self.refs[block] = 1
            self.store.bump(block)
        return blocks

    def _release(self, block: int) -> None:
        self.store.bump(block)
        self.free.give(block)


def make(policy: str, caching: bool, layout: KVLayout) -> Cache:
    if policy == "ours":
        return Ours(caching, layout)
    return Baseline(_Fifo() if policy == "fifo" else _BestFit(), caching)


@dataclass
class Load:
    """What comes in. `kind`: "unique", "hit" or "turns"."""

    kind: str
    occupancy: float
    hit: float = 0.0
    caching: bool = True


@dataclass
class Result:
    calls: list[int] = field(default_factory=list)
    calls_all: list[int] = field(default_factory=list)
    source_runs: list[int] = field(default_factory=list)
    target_runs: list[int] = field(default_factory=list)
    occupancy: list[float] = field(default_factory=list)
    hits: int = 0
    blocks: int = 0
    micros: float = 0.0  # of both sides' bookkeeping, a request
    copy_seconds: float = 0.0  # of compaction, a request


class Requests:
    """Prompts as lists of block identities."""

    def __init__(self, load: Load, seed: int) -> None:
        self.load = load
        self.draw = random.Random(seed)
        self.number = 0
        count = 60 if load.kind == "turns" else GROUPS
        self.weights = [(i + 1) ** -0.7 for i in range(count)]
        self.groups = [self._fresh() for _ in range(count)] if load.kind != "unique" else []

    def length(self, average: float, most: int) -> int:
        """Log-normal, sigma 0.6."""
        return min(most, max(1, round(self.draw.lognormvariate(math.log(average) - 0.18, 0.6))))

    def identities(self, count: int) -> Identities:
        self.number += count
        return [n.to_bytes(16, "little") for n in range(self.number - count, self.number)]

    def next(self) -> Identities:
        if self.load.kind == "unique":
            return self.identities(self.length(MEAN_BLOCKS, 600))
        index = self.draw.choices(range(len(self.groups)), self.weights)[0]
        if self.draw.random() < 0.02 or len(self.groups[index]) > 250:
            self.groups[index] = self._fresh()
        if self.load.kind == "turns":  # question and answer are part of the next turn's prompt
            self.groups[index] = self.groups[index] + self.identities(self.length(12, 100))
            return self.groups[index]
        return self.groups[index] + self.identities(self.length(MEAN_BLOCKS * (1 - self.load.hit), 400))

    def _fresh(self) -> Identities:
        return self.identities(
            self.length(MEAN_BLOCKS * self.load.hit if self.load.kind == "hit" else 20, 400)
        )


def simulate(
    policy: str, load: Load, seed: int, requests: int, warm: int, call_seconds: float = 0.0
) -> Result:
    """Serves `warm + requests` requests and reports the last `requests` of them.

    `call_seconds`: what a call costs; above 0 the prefill side compacts (in a pool of `COMPACT_LAYOUT`).
    """
    source = make(policy, load.caching, COMPACT_LAYOUT if call_seconds else LAYOUT)
    target = make(policy, load.caching, LAYOUT)
    prompts = Requests(load, seed)
    draw = random.Random(seed + 1000)
    sending: deque[tuple[list[int], list[int]]] = deque()
    decoding: list[tuple[list[int], int]] = []
    result = Result()

    def turn() -> None:
        """Every running decode moves on by a block, or not yet; those at their end leave."""
        for entry in list(decoding):
            table, final = entry
            if draw.random() < 0.25 and (
                len(table) >= final or not target.grow(table, prompts.identities(1)[0])
            ):
                target.leave(table)
                decoding.remove(entry)

    for number in range(warm + requests):
        if number == warm:
            source.seconds = target.seconds = 0.0
            if isinstance(source, Ours):
                source.copy_seconds = 0.0
        identities = prompts.next()
        output = prompts.length(MEAN_OUTPUT, 100)
        sent = source.admit(identities)
        while target.used() + len(identities) > load.occupancy * BLOCKS and decoding:
            turn()
        placed = target.admit(identities)
        if sent is None or placed is None:
            raise RuntimeError("a pool is full below its occupancy")
        (table, hits), (into, known) = sent, placed
        decoding.append((into, len(into) + output))
        announced, staged = table, list[int]()
        if call_seconds and isinstance(source, Ours):
            announced, staged = source.stage(table, call_seconds)
        sending.append((table, staged))
        if len(sending) > IN_FLIGHT:
            for blocks in sending.popleft():
                source.leave(blocks)
        if number >= warm:
            result.calls.append(len(align(announced[known:], into[known:])))
            result.calls_all.append(len(align(announced, into)))
            result.source_runs.append(len(runs_of(announced)))
            result.target_runs.append(len(runs_of(into)))
            result.occupancy.append(target.used() / BLOCKS)
            result.hits += hits
            result.blocks += len(identities)
    if isinstance(source, Ours):
        result.copy_seconds = source.copy_seconds / requests
    result.micros = (source.seconds + target.seconds) / requests * 1e6
    return result


LOADS = (
    Load("unique", 0.8, caching=False),
    Load("unique", 0.92, caching=False),
    Load("unique", 0.8),
    Load("unique", 0.92),
    Load("hit", 0.8, 0.5),
    Load("hit", 0.8, 0.8),
    Load("turns", 0.8),
)


def sizes(quick: bool) -> tuple[tuple[int, ...], int, int]:
    """Seeds, requests that count, requests before them."""
    return ((1,), 400, 200) if quick else ((1, 2, 3), 700, 400)


def call_cost() -> float:
    """Seconds of one unary gRPC call with an empty message on loopback: the median of 300."""

    def echo(request: bytes, context: grpc.ServicerContext) -> bytes:
        return request

    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Calls", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/bench.Calls/Echo")
            times = []
            for _ in range(300):
                start = time.perf_counter()
                call(b"")
                times.append(time.perf_counter() - start)
            return median(times)
    finally:
        server.stop(0)


def compaction(report: Report, quick: bool) -> None:
    """Adds rows and aims of compaction where a call costs what a gRPC call costs here."""
    seeds, requests, warm = sizes(quick)
    seconds = call_cost()
    for load in LOADS[4:]:
        plain = [simulate("ours", load, seed, requests, warm) for seed in seeds]
        compacted = [simulate("ours", load, seed, requests, warm, seconds) for seed in seeds]
        calls = median([mean(r.calls) for r in compacted])
        copies = median([r.copy_seconds for r in compacted]) * 1e3
        before, after = (median([mean(r.calls_all) for r in side]) for side in (plain, compacted))
        name = load.kind + (f" {load.hit:.0%}" if load.hit else "")
        report.add(
            load=name,
            policy="ours, compacted",
            calls=calls,
            **{"calls, all": after},
            call_ms=seconds * 1e3,
            copies_ms=copies,
            calls_ms_before=before * seconds * 1e3,
            calls_and_copies_ms=after * seconds * 1e3 + copies,
        )
        if load.kind == "hit":
            report.check(f"calls per request with compaction, {name}", calls, "calls", "<= 2.0", calls <= 2.0)


def bookkeeping(report: Report) -> None:
    """Adds the cost of cutting and giving back runs in a shattered pool: it must not grow with the pool."""
    for size in (4096, 65536, 1048576):
        segments = SegmentAllocator(size)
        segments.take(size)
        draw = random.Random(1)
        at = 0
        while at < size - 200:  # every second run free, of 1 to 99 blocks
            length = draw.randrange(1, 100)
            segments.give(at, length)
            at += length + draw.randrange(1, 100)
        held = [run for _ in range(20) for run in segments.take(54) or []]
        start = time.perf_counter()
        for _ in range(5000):
            index = draw.randrange(len(held))
            segments.give(held[index].start, held[index].count)
            held[index : index + 1] = segments.take(held[index].count) or []
        report.add(
            load=f"give and take a run, {size} blocks",
            policy="ours",
            us_per_operation=(time.perf_counter() - start) / 5000 * 1e6,
        )


def calls_per_request(report: Report, quick: bool) -> None:
    """Adds rows and aims; about 15 s with `quick`."""
    seeds, requests, warm = sizes(quick)
    for load in LOADS:
        medians: dict[str, tuple[float, float]] = {}
        for policy in ("fifo", "best fit", "ours"):
            results = [simulate(policy, load, seed, requests, warm) for seed in seeds]
            calls = median([mean(r.calls) for r in results])
            hits = median([r.hits / r.blocks for r in results])
            medians[policy] = (calls, hits)
            name = load.kind + (f" {load.hit:.0%}" if load.hit else "")
            name += "" if load.caching else ", no cache"
            report.add(
                load=name,
                decode_pool=f"{median([mean(r.occupancy) for r in results]):.0%}",
                policy=policy,
                calls=calls,
                **{"calls, all": median([mean(r.calls_all) for r in results])},
                single_call=median([mean([float(c <= 1) for c in r.calls]) for r in results]),
                source_runs=median([mean(r.source_runs) for r in results]),
                target_runs=median([mean(r.target_runs) for r in results]),
                prefix_hits=hits,
                us_per_request=median([r.micros for r in results]),
            )  # fmt: skip
        aim = AIMS.get((load.kind, load.occupancy, load.hit))
        ours, lru = medians["ours"], medians["best fit"]
        if aim is not None:
            report.check(
                f"calls per request, {name}, {load.occupancy:.0%}",
                ours[0],
                "calls",
                f"<= {aim}",
                ours[0] <= aim,
            )
        if load.kind != "unique":
            report.check(
                f"prefix hits lost to fewer runs, {name}",
                lru[1] - ours[1],
                "of all blocks",
                f"<= {LOST_HITS}",
                None if quick else lru[1] - ours[1] <= LOST_HITS,
            )


def main() -> int:
    options = parser(__doc__ or "").parse_args()
    report = Report("Calls per request after churn")
    calls_per_request(report, options.quick)
    compaction(report, options.quick)
    bookkeeping(report)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
