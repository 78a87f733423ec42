"""The first token of a prompt whose prefix lies in each tier of the cache, beside computing it.

    python -m tests.bench.kv_tiers [--quick] [--json PATH] [--prompt TOKENS] [--rounds N]

Two executors with the small model, on one host, in shared memory's reach: one computes each prompt, the other
gets it from the first one's cache, loses it to host memory, then to the disk, and is asked for it each time.
Every round is a prompt of its own, so rounds interleave all tiers; the median of the rounds is told. What
each answer found in cache, and where from, is checked by the executors' own counts: a tier that was not used
fails the run. `ceiling` is the same bytes copied in memory once.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import numpy as np
from deepflow.v1 import worker_pb2 as pb

from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from kvtransfer.pool import copy_bytes
from tests.bench import common
from tests.support.te import TaskExecutor, executor
from tests.support.worker_client import WorkerClient

REVISION = "tiers@bench"
PROMPT_TOKENS, ROUNDS = 1008, 7
QUICK_TOKENS, QUICK_ROUNDS = 336, 2
BLOCK_TOKENS = 16
BLOCK_BYTES = 30 * 2 * 3 * BLOCK_TOKENS * 64 * 2  # SmolLM2-135M in bfloat16
TIERS = ("host", "disk", "peer")
AIM = 0.5
"""A prefix that is brought back should give its first token in half the time of computing it (ours)."""


def prompt(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(500, 40_000), k=tokens)


async def first_token(
    client: WorkerClient, tokens: list[int], source: pb.PrefixSource | None = None
) -> tuple[float, int]:
    """Milliseconds to the first token, and prompt tokens found in cache."""
    started = time.perf_counter()
    run = await client.generate(tokens, revision=REVISION, max_tokens=1, prefix_source=source)
    if run.error is not None:
        raise RuntimeError(run.error.message)
    return (run.arrivals[0][0] - started) * 1e3, run.cached_tokens


async def count(te: TaskExecutor, tier: str) -> float:
    text = (await asyncio.to_thread(httpx.get, te.metrics_url)).text
    found = re.search(rf'^deepflow_rtc_populated_blocks_total{{tier="{tier}"}} (\S+)$', text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


async def written(te: TaskExecutor) -> None:
    """Waits until the disk's writer has nothing to do."""
    while True:
        text = (await asyncio.to_thread(httpx.get, te.metrics_url)).text
        found = re.search(r"^deepflow_rtc_disk_pending_bytes (\S+)$", text, re.MULTILINE)
        if found and float(found.group(1)) == 0:
            return
        await asyncio.sleep(0.05)


async def measure(args: argparse.Namespace, report: common.Report, folder: Path) -> None:
    tokens = args.prompt or (QUICK_TOKENS if args.quick else PROMPT_TOKENS)
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    blocks = tokens // BLOCK_TOKENS
    pool = (blocks + 8) * BLOCK_BYTES  # room for one prompt
    options = (
        *("--host-cache-bytes", str((blocks + 4) * BLOCK_BYTES)),
        *("--disk-cache", str(folder / "disk"), "--disk-cache-bytes", str(64 * blocks * BLOCK_BYTES)),
    )
    model = fetch(DEFAULT_MODEL_URI).path
    times: dict[str, list[float]] = {name: [] for name in ("computed", "device", *TIERS)}
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(executor("te-source", folder, shm_dir=folder))
        target = await stack.enter_async_context(
            executor("te-target", folder, shm_dir=folder, options=options)
        )
        # A quarter of its pool may be lent: all of a prompt.
        await source.load(model, REVISION, dtype="bfloat16", kv_cache_bytes=5 * pool)
        await target.load(model, REVISION, dtype="bfloat16", kv_cache_bytes=pool)
        there = await stack.enter_async_context(source.connect())
        here = await stack.enter_async_context(target.connect())
        for client in (there, here):
            await first_token(client, prompt(1, tokens))  # costs are known then

        async def through(tier: str, asked: list[int], hint: pb.PrefixSource | None = None) -> None:
            before = await count(target, tier)
            took, cached = await first_token(here, asked, hint)
            came = await count(target, tier) - before
            if not came or cached < (blocks - 1) * BLOCK_TOKENS:
                raise RuntimeError(f"{tier}: {came:.0f} blocks came, {cached} tokens were cached")
            times[tier].append(took)

        for number in range(rounds):
            asked = prompt(100 + number, tokens)
            times["computed"].append((await first_token(there, asked))[0])
            hint = pb.PrefixSource(
                te_id=source.te_id,
                incarnation=source.incarnation,
                address=source.address,
                tokens=tokens - 1,
            )
            await through("peer", asked, hint)
            times["device"].append((await first_token(here, asked))[0])
            await first_token(here, prompt(1000 + number, tokens))
            await through("host", asked)
            for other in (2000, 3000):
                await first_token(here, prompt(other + number, tokens))
            await written(target)
            await through("disk", asked)
            print(".", end="", flush=True)
    size = blocks * BLOCK_BYTES
    computed = common.median(times["computed"])
    for name, values in times.items():
        took = common.median(values)
        report.add(prefix=name, first_token_ms=took, of_computed=took / computed, rounds=len(values))
    report.add(prefix="ceiling", first_token_ms=memcpy_ms(size), of_computed=None, rounds=5)
    for tier in TIERS:
        ratio = common.median(times[tier]) / computed
        holds = None if args.quick else ratio <= AIM
        report.check(f"first token, prefix from {tier}", ratio, "of computed", f"<= {AIM}", holds)


def memcpy_ms(size: int) -> float:
    """Milliseconds of one copy of so many bytes between warm buffers."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        copy_bytes(memoryview(target), memoryview(source))
        taken.append((time.perf_counter() - started) * 1e3)
    return common.median(taken)


async def main() -> int:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    report = common.Report("kv_tiers")
    with tempfile.TemporaryDirectory(prefix="dft-") as folder:
        await measure(args, report, Path(folder))
    return report.finish(args.json)


if __name__ == "__main__":
    common.run(main())
