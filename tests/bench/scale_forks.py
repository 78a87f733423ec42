"""Part of tests.bench.scale: weights from a running executor, and what feeding costs it."""

from __future__ import annotations

import asyncio
import mmap
import time

from controlplane.local.executors import Executor
from controlplane.local.starts import PHASES, REVISION, TOKEN, Node, steps
from kvtransfer.images import BLOCK_BYTES, GRANT_BLOCKS, ImageStore
from kvtransfer.receiver import Receiver
from kvtransfer.weights import WeightFetcher, WeightPeer
from tests.bench import common

KV_BYTES = 256 << 20
RESERVE = 272 << 20  # the small model's weights in bfloat16, a little more
TOKENS = 200  # of a stream, about three seconds


async def forks(made: Node, report: common.Report, rounds: int) -> tuple[dict[str, float], Executor]:
    """Medians by the way the weights come, and the executor that they came from."""
    source = made.add(forked=True)
    await made.first_token(source, KV_BYTES)
    ways = {
        "hot": (),
        "fork, shm": ("shm", RESERVE),
        "fork, tcp": ("tcp", RESERVE),
        "fork, not set aside": ("shm", 0),
    }
    taken: dict[str, list[tuple[float, dict[str, float]]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, elsewhere in ways.items():
            executor = made.add(forked=True, options=made.elsewhere(*elsewhere) if elsewhere else ())
            await made.waits(executor)
            started = time.perf_counter()
            end = await made.first_token(executor, KV_BYTES, source if elsewhere else None)
            taken[way].append((end - started, steps(executor)))
            await made.remove(executor)
            print(".", end="", flush=True)
    print()
    medians = {}
    for way, runs in taken.items():
        medians[way] = common.median([seconds for seconds, _ in runs])
        row = {name: common.median([found.get(name, 0.0) for _, found in runs]) for name in PHASES}
        row["te_pre_load"] = 0.0
        rest = medians[way] - sum(row.values())
        report.add(weights=way, first_token_s=medians[way], **row, rest=rest, rounds=rounds)
    return medians, source


async def feeding(made: Node, report: common.Report, source: Executor, rounds: int) -> float:
    """How much slower the source's tokens are while it feeds, medians of interleaved rounds."""
    receiver = Receiver(None, "bench", "1", token=TOKEN, transports="tcp", shm_dir=made.paths.sockets)
    fetcher = WeightFetcher(receiver)
    assert source.status is not None
    peer = WeightPeer(source.address, source.te_id, source.status.record.incarnation)
    described = await fetcher.describe([peer], REVISION)
    memory = memoryview(mmap.mmap(-1, described.image.size))
    store = ImageStore(described.image.name, described.image.size, memory)
    alone: list[float] = []
    fed: list[float] = []
    rates: list[float] = []
    try:
        for _ in range(rounds):
            alone.append(_mean_gap(await made.generate(source, TOKENS)))
            copied = 0

            async def feed() -> None:
                nonlocal copied
                while True:

                    def advance(blocks: int) -> None:
                        nonlocal copied
                        copied += 1

                    await fetcher.fetch([peer], REVISION, described.image, store, advance)

            task = asyncio.create_task(feed())
            started = time.perf_counter()
            fed.append(_mean_gap(await made.generate(source, TOKENS)))
            rates.append(copied * GRANT_BLOCKS * BLOCK_BYTES / (time.perf_counter() - started))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    finally:
        await receiver.close()
    slower = common.median([one / two for one, two in zip(fed, alone, strict=True)])
    report.add(
        feeding="a stream of the source",
        alone_ms=common.median(alone) * 1e3,
        feeding_ms=common.median(fed) * 1e3,
        ratio=slower,
        fed_mib_s=common.median(rates) / 2**20,
        rounds=rounds,
    )
    return slower


def _mean_gap(came: list[float]) -> float:
    return (came[-1] - came[0]) / (len(came) - 1)
