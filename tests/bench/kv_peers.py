"""NIXL (UCX over host memory) and Mooncake (TCP) moving what `tests.bench.kv_transfer` moves.

Started by it with `--peers PYTHON`, in an environment of their own (numpy beside them is enough), and as
a module: a script's folder is searched first, and `operator.py` beside it is not Python's. Two
processes; one reads 128 MiB out of the other's registered memory, as one piece or as 2,048 scattered
pieces of 64 KiB, in turn; a request's descriptors are prepared within its time, since every request has
others. Prints a JSON object a row. Bytes are compared after the first request of each kind.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

PAYLOAD = 128 << 20
SHAPES = {"2 MiB": 1, "64 KiB": PAYLOAD >> 16}
"""Pieces of a request, by the block size of the table it belongs to."""
MOONCAKE_BATCH = 512
"""Entries of one batch: 4,096 overflow its TCP queue."""


def memory(seed: int) -> tuple[mmap.mmap, Any, int]:
    """256 MiB, mapped in; filled with random bytes unless `seed` is 0. (mapping, array, address)"""
    mapping = mmap.mmap(-1, 2 * PAYLOAD)
    array = np.frombuffer(mapping, np.uint8)
    array[:] = np.random.default_rng(seed).integers(0, 256, len(array), np.uint8) if seed else 0
    return mapping, array, array.ctypes.data


def pieces(count: int, rng: random.Random) -> list[tuple[int, int, int]]:
    """(source offset, target offset, bytes)"""
    if count == 1:
        return [(0, PAYLOAD // 2, PAYLOAD)]
    size = PAYLOAD // count
    source, target = rng.sample(range(2 * count), count), rng.sample(range(2 * count), count)
    return [(s * size, d * size, size) for s, d in zip(source, target, strict=True)]


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def nixl_agent(name: str) -> Any:
    from nixl._api import nixl_agent as make
    from nixl._api import nixl_agent_config

    return make(name, nixl_agent_config(backends=["UCX"]))


def nixl_sender(pipe: Connection) -> None:
    _mapping, array, address = memory(7)
    agent = nixl_agent("sender")
    agent.register_memory([(address, len(array), 0, "")], "DRAM")
    pipe.send((agent.get_agent_metadata(), address))
    _serve_bytes(pipe, array)


def nixl_reader(pipe: Connection, address: int) -> Callable[[list[tuple[int, int, int]]], None]:
    metadata, remote = pipe.recv()
    agent = nixl_agent("receiver")
    agent.register_memory([(address, 2 * PAYLOAD, 0, "")], "DRAM")
    peer = agent.add_remote_agent(metadata)
    if isinstance(peer, bytes):
        peer = peer.decode()

    def read(some: list[tuple[int, int, int]]) -> None:
        rows = np.array(some, np.uint64)
        device = np.zeros(len(rows), np.uint64)
        local = np.stack((rows[:, 1] + np.uint64(address), rows[:, 2], device), axis=1)
        there = np.stack((rows[:, 0] + np.uint64(remote), rows[:, 2], device), axis=1)
        handle = agent.initialize_xfer(
            "READ", agent.get_xfer_descs(local, "DRAM"), agent.get_xfer_descs(there, "DRAM"), peer
        )
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise SystemExit(f"nixl: {state}")

    return read


def mooncake_engine() -> Any:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise SystemExit("mooncake does not start")
    return engine


def mooncake_sender(pipe: Connection) -> None:
    _mapping, array, address = memory(7)
    engine = mooncake_engine()
    engine.register_memory(address, len(array))
    pipe.send((f"127.0.0.1:{engine.get_rpc_port()}", address))
    _serve_bytes(pipe, array)


def mooncake_reader(pipe: Connection, address: int) -> Callable[[list[tuple[int, int, int]]], None]:
    peer, remote = pipe.recv()
    engine = mooncake_engine()
    engine.register_memory(address, 2 * PAYLOAD)

    def read(some: list[tuple[int, int, int]]) -> None:
        for at in range(0, len(some), MOONCAKE_BATCH):
            batch = some[at : at + MOONCAKE_BATCH]
            failed = engine.batch_transfer_sync_read(
                peer,
                [address + target for _, target, _ in batch],
                [remote + source for source, _, _ in batch],
                [size for _, _, size in batch],
            )
            if failed:
                raise SystemExit(f"mooncake: {failed}")

    return read


def _serve_bytes(pipe: Connection, array: Any) -> None:
    """Answers (offset, size) with bytes until the other end goes."""
    try:
        while True:
            offset, size = pipe.recv()
            pipe.send_bytes(array[offset : offset + size].tobytes())
    except EOFError:
        pass


ENGINES: dict[str, tuple[str, dict[str, str], Callable[..., None], Callable[..., Any]]] = {
    "nixl, UCX default (shared memory)": ("shm", {}, nixl_sender, nixl_reader),
    "nixl, UCX tcp": ("tcp", {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}, nixl_sender, nixl_reader),
    "mooncake, tcp": ("tcp", {}, mooncake_sender, mooncake_reader),
}


def measure(way: str, rounds: int) -> None:
    """One engine, in a process of its own: libraries read their environment once."""
    kind, _, sender_main, make_reader = ENGINES[way]
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    sender = context.Process(target=sender_main, args=(theirs,), daemon=True)
    sender.start()
    theirs.close()
    _mapping, array, address = memory(0)
    read = make_reader(pipe, address)
    rng = random.Random(1)
    seconds: dict[str, list[float]] = {size: [] for size in SHAPES}
    cpu: dict[str, list[float]] = {size: [] for size in SHAPES}
    for number in range(rounds + 1):
        for size, count in SHAPES.items():
            some = pieces(count, rng)
            before = cpu_seconds(os.getpid()) + cpu_seconds(sender.pid or 0)
            started = time.perf_counter()
            read(some)
            took = time.perf_counter() - started
            spent = cpu_seconds(os.getpid()) + cpu_seconds(sender.pid or 0) - before
            if number:
                seconds[size].append(took)
                cpu[size].append(spent)
                continue
            for source, target, length in some[:64]:
                pipe.send((source, length))
                if pipe.recv_bytes() != array[target : target + length].tobytes():
                    raise SystemExit(f"{way}: bytes differ")
    for size, count in SHAPES.items():
        median = statistics.median(seconds[size])
        row = {
            "way": f"{way}, {'one piece' if count == 1 else 'scattered'}",
            "kind": kind,
            "size": size,
            "calls": count,
            "ms": median * 1e3,
            "rate": PAYLOAD / median / 1e9,
            "cpu": statistics.fmean(cpu[size]) * 2**30 / PAYLOAD,
        }
        print(json.dumps(row), flush=True)
    sender.kill()
    os._exit(0)  # both libraries' threads may hold up an ordinary end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--way", choices=list(ENGINES))
    args = parser.parse_args()
    if args.way:
        measure(args.way, args.rounds)
        return
    for way, (_, environment, _, _) in ENGINES.items():
        command = [sys.executable, "-m", "tests.bench.kv_peers", "--way", way, "--rounds", str(args.rounds)]
        process = os.spawnve(os.P_WAIT, sys.executable, command, {**os.environ, **environment})
        if process:
            print(f"{way}: could not be measured (exit code {process})", file=sys.stderr)


if __name__ == "__main__":
    main()
