"""How fast KV gets from one executor's pool into another's, beside what the medium can do.

    python -m tests.bench.kv_transfer [--quick] [--json PATH] [--peers PYTHON]

Two processes, 128 MiB (1,024 tokens of Llama-3.1-8B in fp16) a request, pools mapped in, random block
order for the scattered rows, every contender once a round in turn, medians. `pull` is the whole of
`Receiver.pull`, control calls included. Ceilings of the same run: one memcpy of the same bytes, and a
plain copy over a socket into mapped memory. Every row's bytes are compared once.

The classic path is FlowKV's baseline: a call for each block, layer and K or V, 4,096 of 32 KiB.
`--peers` names an interpreter with `nixl` and `mooncake-transfer-engine-non-cuda` installed
(tests/bench/kv_peers.py runs in it); the same bytes and block sizes go through them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvtransfer import native
from kvtransfer.auth import call_metadata
from kvtransfer.channel import open_channel
from kvtransfer.layout import KVLayout
from kvtransfer.pool import HostPool, copy_bytes
from kvtransfer.receiver import Receiver
from kvtransfer.transports import stream_wire as wire
from kvtransfer.transports.choice import Mode
from kvtransfer.transports.shm import ShmTransport
from tests.bench.common import ROOT, Report, median, parser, run
from tests.bench.kv_sender import CLASSIC_METHOD, PIECE, RAW_PIECE_BYTES, SenderProcess
from tests.support.kv import TOKEN, block_bytes

PAYLOAD = 128 << 20
LLAMA = KVLayout("llama-3.1-8b", "float16", block_tokens=16, layers=32, kv_heads=8, head_dim=128)
"""Blocks of 2 MiB; 32 KiB for each layer and each of K and V."""
SMALL = KVLayout("one-layer", "float16", block_tokens=16, layers=1, kv_heads=8, head_dim=128)
"""Blocks of 64 KiB."""
MODES: tuple[Mode, ...] = ("shm", "unix", "tcp", "grpc")
AIMS = {"shm": 0.85, "small": 0.75, "tcp": 0.85, "grpc": 1.5, "classic": 0.944}
"""Shares of the ceilings, GB/s, and FlowKV's reduction of transfer time."""


@dataclass
class Contender:
    """One way to bring a request's bytes over: `run(round)` is timed, `check` compares them."""

    name: str
    calls: int
    work: Callable[[int], Awaitable[float]]
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """GB/s of the median."""
        return PAYLOAD / median(self.seconds) / 1e9

    @property
    def cpu_per_gib(self) -> float:
        """Seconds of both processes, of the median."""
        return median(self.cpu) * 2**30 / PAYLOAD


class Ends:
    """A sender process and a receiver's pool for one layout, and every way between them."""

    def __init__(self, folder: Path, layout: KVLayout) -> None:
        self.layout = layout
        self.blocks = PAYLOAD // layout.block_bytes
        self.folder = folder
        self.sender = SenderProcess(folder, layout, 2 * self.blocks)
        self.pool = HostPool.create(layout, 2 * self.blocks)
        self.receivers = {
            mode: Receiver(self.pool, f"te-{mode}", "d1", token=TOKEN, shm_dir=folder, transports=mode)
            for mode in MODES
        }
        self._rng = random.Random(layout.layers)
        self._numbers = iter(range(1 << 30))
        self._plain: dict[str, socket.socket] = {}
        self._channel = open_channel(self.sender.classic)
        self._piece = self._channel.unary_unary(CLASSIC_METHOD)

    async def close(self) -> None:
        for receiver in self.receivers.values():
            await receiver.close()
        for connection in self._plain.values():
            connection.close()
        await self._channel.close()
        self.sender.close()
        self.pool.close()

    def lists(self, scattered: bool) -> tuple[list[int], list[int]]:
        if not scattered:
            return list(range(self.blocks)), list(range(self.blocks // 2, self.blocks // 2 + self.blocks))
        everything = range(2 * self.blocks)
        return self._rng.sample(everything, self.blocks), self._rng.sample(everything, self.blocks)

    async def pull(self, mode: Mode, scattered: bool, verify: bool) -> float:
        src, dst = self.lists(scattered)
        transfer_id = f"{mode}-{next(self._numbers)}"
        self.sender("offer", transfer_id, src)
        started = time.perf_counter()
        await self.receivers[mode].pull(
            self.sender.address, "te-p", "p1", transfer_id, dst, self.blocks * self.layout.block_tokens
        )
        seconds = time.perf_counter() - started
        if verify:
            self.compare(src, dst)
        return seconds

    def compare(self, src: Sequence[int], dst: Sequence[int]) -> None:
        if block_bytes(self.pool, dst) != self.sender("digest", list(src)):
            raise SystemExit("bytes differ: nothing here counts")

    # -- ceilings ---------------------------------------------------------------------------------

    def mapped(self) -> HostPool:
        """The sender's pool as the receiver over shared memory sees it."""
        (peer,) = self.receivers["shm"].peers._peers.values()
        assert isinstance(peer.transport, ShmTransport)
        return peer.transport._source

    async def memcpy(self) -> float:
        source = self.mapped().pages
        started = time.perf_counter()
        copy_bytes(self.pool.pages[:PAYLOAD], source[:PAYLOAD])
        return time.perf_counter() - started

    async def plain(self, kind: str) -> float:
        """The same bytes over a socket that nothing is asked of."""
        connection = self._plain.get(kind)
        if connection is None:
            family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
            connection = self._plain[kind] = socket.socket(family)
            wire.tune(connection)
            connection.connect(self.sender.raw[kind])
        return await asyncio.to_thread(self._plain_copy, connection)

    def _plain_copy(self, connection: socket.socket) -> float:
        started = time.perf_counter()
        connection.sendall(PIECE.pack(0, PAYLOAD))
        _fill(connection, self.pool.pages[:PAYLOAD])
        return time.perf_counter() - started

    # -- the classic path -------------------------------------------------------------------------

    def pieces(self) -> list[tuple[int, int]]:
        """(source, target) offsets of K and V of each block, layer by layer; blocks scattered."""
        src, dst = self.lists(True)
        size = self.piece_bytes
        groups = self.layout.layers * 2
        whole = self.layout.block_bytes
        return [
            (s * whole + group * size, d * whole + group * size)
            for group in range(groups)
            for s, d in zip(src, dst, strict=True)
        ]

    @property
    def piece_bytes(self) -> int:
        return self.layout.kv_heads * self.layout.head_bytes

    async def classic_shm(self) -> float:
        source, size, pieces = self.mapped().pages, self.piece_bytes, self.pieces()
        target = self.pool.pages
        started = time.perf_counter()
        for a, b in pieces:
            copy_bytes(target[b : b + size], source[a : a + size])
        return time.perf_counter() - started

    async def classic_socket(self, kind: str) -> float:
        await self.plain(kind)  # connects
        return await asyncio.to_thread(self._classic_socket, self._plain[kind])

    def _classic_socket(self, connection: socket.socket) -> float:
        size, pieces, target = self.piece_bytes, self.pieces(), self.pool.pages
        started = time.perf_counter()
        for a, b in pieces:
            connection.sendall(PIECE.pack(a, size))
            _fill(connection, target[b : b + size])
        return time.perf_counter() - started

    async def classic_grpc(self, at_once: int) -> float:
        size, pieces, target = self.piece_bytes, iter(self.pieces()), self.pool.pages
        metadata = call_metadata(TOKEN)

        async def caller() -> None:
            for a, b in pieces:
                copy_bytes(target[b : b + size], await self._piece(PIECE.pack(a, size), metadata=metadata))

        started = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(at_once)))
        return time.perf_counter() - started


def _fill(connection: socket.socket, target: memoryview) -> None:
    at = 0
    while at < len(target):
        at += connection.recv_into(target[at : at + RAW_PIECE_BYTES])


def cpu_seconds(pid: int) -> float:
    """What the process's threads ran so far, to the nanosecond: cpu_times count in hundredths of a second,
    a fifth of a transfer."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread ended
            total += int(path.read_text().split()[0])
    return total / 1e9


async def rounds(contenders: Sequence[Contender], count: int, pids: Sequence[int]) -> None:
    """Each contender once a round, in turn; CPU time of both processes beside it."""
    for number in range(count):
        for contender in contenders:
            before = sum(map(cpu_seconds, pids))
            contender.seconds.append(await contender.work(number))
            contender.cpu.append(sum(map(cpu_seconds, pids)) - before)


def rows(report: Report, contenders: Sequence[Contender], what: str, ceiling: dict[str, Contender]) -> None:
    for contender in contenders:
        base = ceiling.get(contender.name.split()[0])
        report.add(
            what=what,
            way=contender.name,
            calls=contender.calls,
            ms=median(contender.seconds) * 1e3,
            **{
                "GB/s": contender.rate,
                "share of ceiling": contender.rate / base.rate if base else None,
                "CPU s/GiB": contender.cpu_per_gib,
                "share in CPU time": base.cpu_per_gib / contender.cpu_per_gib if base else None,
            },
        )


def contenders(ends: Ends) -> tuple[list[Contender], list[Contender]]:
    """The ceilings (memory, unix socket, TCP), and every transport with one run and with scattered blocks."""
    ceilings = [
        Contender("memcpy, one call", 1, lambda _: ends.memcpy()),
        Contender("plain unix socket", 1, lambda _: ends.plain("unix")),
        Contender("plain TCP socket", 1, lambda _: ends.plain("tcp")),
    ]
    ways = [
        Contender(
            f"{mode} pull, {'scattered' if scattered else 'one run'}",
            ends.blocks if scattered else 1,
            lambda _, mode=mode, scattered=scattered: ends.pull(mode, scattered, verify=False),
        )
        for scattered in (False, True)
        for mode in MODES
    ]
    return ceilings, ways


async def speed(report: Report, folder: Path, quick: bool) -> dict[str, float]:
    """Every transport at both block sizes, and the classic path. Returns rates for the peers' table."""
    rates: dict[str, float] = {}
    for layout, size in ((LLAMA, "2 MiB"), (SMALL, "64 KiB")):
        (folder / size).mkdir()
        ends = Ends(folder / size, layout)
        try:
            for mode in MODES:
                for scattered in (False, True):  # connects, warms up, compares the bytes
                    await ends.pull(mode, scattered, verify=True)
            ceilings, ways = contenders(ends)
            pids = (os.getpid(), ends.sender.process.pid or 0)
            await rounds([*ceilings, *ways], 5 if quick else 11, pids)
            of = dict(zip(("shm", "unix", "tcp"), ceilings, strict=True))
            rows(report, [*ceilings, *ways], f"{size} blocks", of)
            found = {way.name: way for way in ways}
            for way in ways:
                rates[f"{size} {way.name}"] = way.rate
            aim(report, found, of, size)
            if layout is LLAMA:
                await against_classic(report, ends, pids, quick)
        finally:
            await ends.close()
    return rates


def aim(report: Report, ways: dict[str, Contender], ceilings: dict[str, Contender], size: str) -> None:
    if size == "2 MiB":
        for name, key in (("shm", "shm"), ("tcp", "tcp")):
            share = ways[f"{name} pull, one run"].rate / ceilings[name].rate
            report.check(
                f"{name}, whole run, of its ceiling", share, "", f">= {AIMS[key]}", share >= AIMS[key]
            )
        rate = ways["grpc pull, one run"].rate
        report.check("gRPC", rate, "GB/s", f">= {AIMS['grpc']}", rate >= AIMS["grpc"])
    else:
        share = ways["shm pull, scattered"].rate / ceilings["shm"].rate
        report.check(
            "shm, 64 KiB blocks, of memcpy", share, "", f">= {AIMS['small']}", share >= AIMS["small"]
        )


async def against_classic(report: Report, ends: Ends, pids: Sequence[int], quick: bool) -> None:
    pieces = len(ends.pieces())
    classic = {
        "shm": Contender("shm classic", pieces, lambda _: ends.classic_shm()),
        "unix": Contender("unix classic", pieces, lambda _: ends.classic_socket("unix")),
        "tcp": Contender("tcp classic", pieces, lambda _: ends.classic_socket("tcp")),
        "grpc": Contender("grpc classic", pieces, lambda _: ends.classic_grpc(1)),
        "grpc16": Contender("grpc classic, 16 calls at once", pieces, lambda _: ends.classic_grpc(16)),
    }
    ours = {
        mode: Contender(f"{mode} pull, one run", 1, lambda _, mode=mode: ends.pull(mode, False, verify=False))
        for mode in MODES
    }
    await rounds([*classic.values(), *ours.values()], 3 if quick else 5, pids)
    for name, contender in classic.items():
        base, new = median(contender.seconds), median(ours[name[:4].removesuffix("16")].seconds)
        report.add(
            what="against the classic path",
            way=contender.name,
            calls=pieces,
            ms=base * 1e3,
            **{
                "GB/s": contender.rate,
                "ours ms": new * 1e3,
                "times faster": base / new,
                "less time": 1 - new / base,
            },
        )
        if name == "grpc":
            saved = 1 - new / base
            aim_ = AIMS["classic"]
            report.check("less time than classic over gRPC", saved, "", f">= {aim_}", saved >= aim_)


def peers(report: Report, interpreter: str, quick: bool, ours: dict[str, float]) -> None:
    """The same bytes through NIXL and Mooncake, in their own environment."""
    command = [interpreter, "-m", "tests.bench.kv_peers", "--rounds", "3" if quick else "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    best: dict[str, float] = {}
    for line in done.stdout.splitlines():
        if not line.startswith("{"):
            continue
        row: dict[str, Any] = json.loads(line)
        report.add(what=f"{row['size']} blocks", way=row["way"], calls=row["calls"], ms=row["ms"],
                   **{"GB/s": row["rate"], "CPU s/GiB": row["cpu"]})  # fmt: skip
        key = f"{row['size']} {row['kind']}"
        best[key] = max(best.get(key, 0.0), row["rate"])
    for size, shape in (("2 MiB", "one run"), ("64 KiB", "scattered")):
        for kind in ("shm", "tcp"):
            theirs = best.get(f"{size} {kind}")
            if theirs is None:
                report.check(f"{kind} ahead of peers, {size}", None, "", "> 1", None)
                continue
            ratio = ours[f"{size} {kind} pull, {shape}"] / theirs
            report.check(f"{kind} ahead of the faster peer, {size} {shape}", ratio, "times", "> 1", ratio > 1)


async def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--peers", metavar="PYTHON", help="interpreter with nixl and mooncake installed")
    args = options.parse_args()
    report = Report("KV transfer")
    print(f"compiled copy: {native.available()}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory(prefix="kv-bench-") as folder:
        ours = await speed(report, Path(folder), args.quick)
    if args.peers:
        peers(report, args.peers, args.quick, ours)
    return report.finish(args.json)


if __name__ == "__main__":
    run(main())
