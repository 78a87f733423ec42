"""Load: many concurrent streams without an error; beyond the bound clean 429s; memory flat."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.http_client import StreamRun, stream
from tests.support.stack import MODEL, Stack, running_stack

pytestmark = [pytest.mark.model]

STREAMS = 128
STALL_SECONDS = 60.0
"""The product's own bound between two tokens of a stream (its inter-token deadline)."""


def payload(number: int, tokens: int = 48) -> dict[str, object]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Tell me fact number {number} about rivers."}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0.7,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(stack: Stack, number: int, tokens: int = 48) -> StreamRun:
    return await stream("127.0.0.1", stack.port, "/v1/chat/completions", payload(number, tokens), timeout=300)


GROWTH_MIB = 96.0
"""What allocators may breathe: a step's logits are up to 25 MiB, kept in several sizes. 0.02 MiB a request
come on top for the records in Valkey; a leak of one prompt's KV or logits a request is ten times that."""


def memory(stack: Stack) -> dict[str, float]:
    """Private MiB of each process of the stack (KV pools are shared memory and do not count)."""
    children = [child for child in stack.status()["children"] if child["pid"]]
    return {c["name"]: psutil.Process(c["pid"]).memory_full_info().uss / 2**20 for c in children}


def longest_gap(run: StreamRun) -> float:
    return max((b - a for a, b in zip([run.started, *run.arrivals], run.arrivals, strict=False)), default=0.0)


async def hold(stack: Stack, seconds: float) -> list[StreamRun]:
    """Keeps STREAMS streams going for `seconds`; each ends one and starts the next."""
    ends = time.perf_counter() + seconds
    runs: list[StreamRun] = []

    async def client(number: int) -> None:
        while time.perf_counter() < ends:
            runs.append(await ask(stack, number * 1000 + len(runs)))

    await asyncio.gather(*(client(number) for number in range(STREAMS)))
    return runs


async def check_load(stack: Stack, seconds: float) -> None:
    await hold(stack, min(15.0, seconds / 2))  # buffers, pools and caches reach their size
    before = memory(stack)
    runs = await hold(stack, seconds)
    after = memory(stack)
    assert Counter(str(run.error()) for run in runs) == {"None": len(runs)}
    assert all(run.done for run in runs)
    assert all(run.parsed()[-1]["usage"]["completion_tokens"] == 48 for run in runs)  # type: ignore[index,call-overload]
    assert max(map(longest_gap, runs)) < STALL_SECONDS
    growth = {name: after[name] - before[name] for name in before}
    assert all(megabytes < GROWTH_MIB + 0.02 * len(runs) for megabytes in growth.values()), growth
    await stack.wait_clean()


@pytest.mark.timeout(240)
async def test_128_streams_without_an_error(stack_default: Stack) -> None:
    await stack_default.wait_ready()
    await check_load(stack_default, 20)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_128_streams_for_two_minutes(stack_default: Stack) -> None:
    await stack_default.wait_ready()
    await check_load(stack_default, 120)


@pytest.fixture
def small_queue(small_model_path: Path) -> Iterator[Stack]:
    with running_stack("1C", env={"DEEPFLOW_JOBS_MAX_CHOICES": "8"}) as stack:
        yield stack


@pytest.mark.timeout(180)
async def test_beyond_the_bound_clean_429s(small_queue: Stack) -> None:
    runs = await asyncio.gather(*(ask(small_queue, number) for number in range(32)))
    counts = Counter(run.status for run in runs)
    assert counts[200] >= 8
    assert set(counts) == {200, 429}
    for run in runs:
        if run.status == 200:
            assert run.done
            assert run.error() is None
        else:
            assert int(run.headers["retry-after"]) >= 1
            error = run.error()
            assert error is not None
            assert error["error"]["code"] == "queue_full"  # type: ignore[index,call-overload]
    assert (await ask(small_queue, 99)).status == 200, "after the burst there is room again"
    await small_queue.wait_clean()
