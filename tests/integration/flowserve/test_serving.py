"""Real TE processes with the real model: right tokens over every path, and nothing left after every end.

Needs the small model. Three processes, loaded once for the module.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
import pytest_asyncio
from deepflow.v1 import common_pb2 as cpb
from deepflow.v1 import worker_pb2 as pb

from flowserve.engine.processors import TokenChoices
from tests.support.te import TaskExecutor, executor
from tests.support.worker_client import TaskRun, WorkerClient, generate_disaggregated, greedy

pytestmark = [pytest.mark.model]

REVISION = "smollm2@test"
KV_BYTES = 160 << 20
# Ids of ordinary words, so that greedy answers are text and end late; lengths around block and chunk edges.
SHORT = [504, 3575, 282, 4649, 314, 260, 2240, 338]
MEDIUM = [(97 * i * i + 31 * i) % 40_000 + 500 for i in range(75)]
LONG = [(89 * i * i + 7 * i) % 40_000 + 500 for i in range(700)]
TOKENS = 12


@dataclass
class Executors:
    prefill: TaskExecutor  # also the reference: one process that does everything
    decode: TaskExecutor  # maps the sender's pool
    remote: TaskExecutor  # reads over gRPC, as from another host


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="dft-"))  # short: a socket's path is bounded
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def executors(small_model_path: Path, folder: Path) -> AsyncIterator[Executors]:
    async with AsyncExitStack() as stack:
        started: list[TaskExecutor] = []
        for te_id, options in (
            ("te-p", ("--kv-transport", "auto")),
            ("te-d", ("--kv-transport", "shm")),
            ("te-r", ("--kv-transport", "grpc")),
        ):
            started.append(
                await stack.enter_async_context(executor(te_id, folder, shm_dir=folder, options=options))
            )
        loads = (te.load(small_model_path, REVISION, kv_cache_bytes=KV_BYTES) for te in started)
        await asyncio.gather(*loads)
        yield Executors(*started)


async def alone(te: TaskExecutor, prompt: list[int], tokens: int = TOKENS) -> TaskRun:
    async with te.connect() as client:
        run = await client.generate(prompt, revision=REVISION, max_tokens=tokens)
    assert run.error is None, run.error
    return run


async def metric(te: TaskExecutor, pattern: str) -> float:
    """Sum of the samples whose line matches."""
    text = (await asyncio.to_thread(httpx.get, te.metrics_url)).text
    lines = [line for line in text.splitlines() if re.match(pattern, line)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def test_loading_the_same_revision_again_answers_at_once(
    executors: Executors, small_model_path: Path
) -> None:
    started = time.monotonic()
    again = await executors.prefill.load(small_model_path, REVISION)
    assert time.monotonic() - started < 1.0
    assert again.model_revision == REVISION and again.kv_blocks > 0 and again.block_tokens == 16
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await executors.prefill.load(small_model_path, "another@1")
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("prompt", [SHORT, MEDIUM, LONG], ids=["short", "medium", "long"])
@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_prefill_then_decode_equals_one_executor_token_by_token(
    executors: Executors, prompt: list[int], transport: str
) -> None:
    target = executors.decode if transport == "shm" else executors.remote
    counter = rf'deepflow_kv_transfers_total{{outcome="ok",transport="{transport}"}}'
    before = await metric(target, counter)
    async with executors.prefill.connect() as prefill, target.connect() as decode:
        run = await generate_disaggregated(prefill, decode, prompt, revision=REVISION, max_tokens=TOKENS)
    assert run.error is None, run.error
    reference = await alone(executors.prefill, prompt)
    assert run.tokens == reference.tokens and len(run.tokens) == TOKENS
    assert run.finish == reference.finish == cpb.FINISH_REASON_LENGTH
    assert await metric(target, counter) == before + 1
    for te in (executors.prefill, target):
        await te.settled()


async def test_a_logit_processors_state_travels_with_the_handover(executors: Executors) -> None:
    choices = [[9, 30_000, 77, 12_345, 8], [10, 11]]
    state = TokenChoices(choices, end_token=2).state()
    task = {"revision": REVISION, "max_tokens": TOKENS, "task_id": "choice"}
    async with executors.prefill.connect() as prefill, executors.decode.connect() as decode:
        alone = await prefill.generate(SHORT, revision=REVISION, max_tokens=TOKENS, processor_state=state)
        first = await prefill.generate(SHORT, kind=cpb.TASK_KIND_PREFILL, processor_state=state, **task)
        assert first.handover is not None and first.handover.processor_state not in (b"", state)
        rest = await decode.generate(
            SHORT,
            kind=cpb.TASK_KIND_DECODE,
            output=first.tokens,
            kv_source=first.handover.source,
            processor_state=first.handover.processor_state,
            **task,
        )
    assert first.tokens + rest.tokens == alone.tokens
    assert alone.tokens in ([*choices[0], 2], [*choices[1], 2])


async def test_many_handovers_at_once_stay_apart(executors: Executors) -> None:
    prompts = [MEDIUM[i : i + 40] for i in range(6)]
    references = [await alone(executors.prefill, prompt, 6) for prompt in prompts]
    async with executors.prefill.connect() as prefill, executors.decode.connect() as decode:
        runs = await asyncio.gather(
            *(
                generate_disaggregated(prefill, decode, prompt, revision=REVISION, max_tokens=6)
                for prompt in prompts
            )
        )
    assert [run.tokens for run in runs] == [reference.tokens for reference in references]
    for te in (executors.prefill, executors.decode):
        await te.settled()


async def test_a_plain_connection_carries_what_grpc_carries(executors: Executors) -> None:
    te = executors.prefill
    expected = await alone(te, MEDIUM)
    async with te.connect("gw-plain", plain=True) as client:
        run = await client.generate(MEDIUM, revision=REVISION, max_tokens=TOKENS)
        refused = await client.generate(SHORT, revision="another@1", max_tokens=TOKENS)
    assert (run.tokens, run.finish) == (expected.tokens, expected.finish)
    assert refused.error is not None
    assert refused.error.code == cpb.ERROR_CODE_MODEL_NOT_LOADED


@pytest.mark.parametrize("plain", [False, True], ids=["grpc", "plain"])
async def test_a_dropped_stream_leaves_no_task_and_no_block(executors: Executors, plain: bool) -> None:
    te = executors.prefill
    async with te.connect("gw-lost", plain=plain) as client:
        firsts = []
        for number in range(3):
            _, _, first = await client.submit(
                MEDIUM[number:], revision=REVISION, max_tokens=4000, sampling=greedy(ignore_eos=True)
            )
            firsts.append(first)
        await asyncio.wait_for(asyncio.gather(*(first.wait() for first in firsts)), 60)
        assert (await te.status()).tasks == 3
        dropped = time.monotonic()
    await te.settled(5.0)
    assert time.monotonic() - dropped < 3.0  # a step, the abort, and what a busy machine adds


async def test_a_handover_nobody_fetches_goes_with_its_gateways_stream(executors: Executors) -> None:
    te = executors.prefill
    async with te.connect() as client:
        run = await client.generate(
            SHORT, revision=REVISION, max_tokens=TOKENS, kind=cpb.TASK_KIND_PREFILL, task_id="unfetched"
        )
        assert run.finish == cpb.FINISH_REASON_HANDOVER and run.handover is not None
        assert run.handover.length == len(SHORT) and run.handover.lease_ms == 30_000
        assert run.handover.source.address == te.address
        assert (await te.status()).load.transfers_out == 1
    await te.settled(5.0)


async def test_a_pull_from_an_unknown_transfer_is_a_retryable_error(executors: Executors) -> None:
    source = cpb.KVSource(
        transfer_id="never.1",
        te_id="te-p",
        incarnation=executors.prefill.incarnation,
        address=executors.prefill.address,
    )
    async with executors.decode.connect() as client:
        run = await client.generate(
            SHORT, revision=REVISION, max_tokens=4, kind=cpb.TASK_KIND_DECODE, output=[1], kv_source=source
        )
    assert run.error is not None
    assert run.error.code == cpb.ERROR_CODE_KV_TRANSFER_FAILED and run.error.retryable
    await executors.decode.settled()


async def test_deadlines_and_aborts_end_tasks_with_the_right_word(executors: Executors) -> None:
    te = executors.decode
    async with te.connect() as client:
        late = await client.generate(LONG, revision=REVISION, max_tokens=4000, timeout_ms=300)
        assert late.error is not None and late.error.code == cpb.ERROR_CODE_DEADLINE_EXCEEDED
        assert not late.error.retryable
        run, done, first = await client.submit(
            SHORT, revision=REVISION, max_tokens=4000, sampling=greedy(ignore_eos=True), task_id="abort-me"
        )
        await asyncio.wait_for(first.wait(), 30)
        await client.abort("abort-me")
        await asyncio.wait_for(done.wait(), 5)
        assert run.finish == cpb.FINISH_REASON_ABORTED and run.tokens
    await te.settled()


async def test_bad_submits_cost_themselves_only(executors: Executors) -> None:
    te = executors.decode
    async with te.connect() as client:

        async def error_of(prompt: list[int], **kwargs: object) -> cpb.TaskError:
            values: dict[str, object] = {"revision": REVISION, "max_tokens": 4, **kwargs}
            run = await client.generate(prompt, **values)  # type: ignore[arg-type]  # passed through
            assert run.error is not None
            return run.error

        for bad in (
            await error_of([]),
            await error_of([10**9]),
            await error_of([1] * 20_000),  # beyond the context
            await error_of([1] * (1 << 21)),  # 8 MiB: beyond gRPC's default bound of a message
            await error_of(SHORT, kind=9),
            await error_of(SHORT, kind=cpb.TASK_KIND_DECODE),
            await error_of(SHORT, sampling=cpb.SamplingParams(temperature=-1, top_p=1)),
        ):
            assert bad.code == cpb.ERROR_CODE_INVALID_ARGUMENT and not bad.retryable, bad
        other = await error_of(SHORT, revision="another@1")
        assert other.code == cpb.ERROR_CODE_MODEL_NOT_LOADED and other.retryable
        assert (await client.generate(SHORT, revision=REVISION, max_tokens=2)).error is None
    await te.settled()


async def test_a_new_gateway_learns_the_cached_blocks(executors: Executors) -> None:
    te = executors.decode
    await alone(te, MEDIUM, 2)
    async with te.stub() as stub, asyncio.timeout(10):
        call = stub.Tasks(metadata=te.metadata)
        await call.write(pb.TasksRequest(hello=pb.Hello(gateway_id="raw", incarnation="1")))
        while not (response := await call.read()).step.HasField("kv_events"):
            pass
        call.cancel()
    events = response.step.kv_events
    assert events.cleared and len(events.stored) >= len(MEDIUM) // 16
    assert len({*events.stored}) == len(events.stored) and all(len(b) == 16 for b in events.stored)
    assert (await te.status()).load.kv_blocks_cached == len(events.stored)


async def start_pull_from(
    victim: TaskExecutor, decode: WorkerClient, stack: AsyncExitStack, task_id: str
) -> tuple[TaskRun, asyncio.Event]:
    """A long prefill at `victim` and, at the same time, the decode that pulls it chunk after chunk."""
    prefill = await stack.enter_async_context(victim.connect())
    prompt = [(83 * i * i + 11 * i) % 40_000 + 500 for i in range(2000)]
    await prefill.submit(
        prompt, revision=REVISION, max_tokens=50, kind=cpb.TASK_KIND_PREFILL, task_id=task_id
    )
    source = cpb.KVSource(
        transfer_id=f"{task_id}.1",
        te_id=victim.te_id,
        incarnation=victim.incarnation,
        address=victim.address,
    )
    run, done, _ = await decode.submit(
        prompt, revision=REVISION, max_tokens=50, kind=cpb.TASK_KIND_DECODE, output=[42], kv_source=source
    )
    return run, done


async def test_a_sender_killed_mid_transfer_is_a_retryable_error_and_leaves_nothing(
    executors: Executors, small_model_path: Path, folder: Path
) -> None:
    """The reference executor is the victim; it comes back as another incarnation."""
    victim, target = executors.prefill, executors.remote
    async with AsyncExitStack() as stack:
        decode = await stack.enter_async_context(target.connect())
        moved = await metric(target, r'deepflow_kv_bytes_total{transport="grpc"}')
        run, done = await start_pull_from(victim, decode, stack, "killed")
        async with asyncio.timeout(60):
            while await metric(target, r'deepflow_kv_bytes_total{transport="grpc"}') <= moved:
                await asyncio.sleep(0.02)
        assert not done.is_set()
        killed = time.monotonic()
        await victim.kill()
        await asyncio.wait_for(done.wait(), 20)
        assert run.error is not None
        assert run.error.code == cpb.ERROR_CODE_KV_TRANSFER_FAILED and run.error.retryable, run.error
        assert time.monotonic() - killed < 12
    await target.settled()
    old = victim.incarnation
    await victim.start()
    assert victim.incarnation != old
    await victim.load(small_model_path, REVISION, kv_cache_bytes=KV_BYTES)
    async with victim.connect() as first, target.connect() as second:
        again = await generate_disaggregated(first, second, SHORT, revision=REVISION, max_tokens=4)
    assert again.error is None and len(again.tokens) == 4


async def test_a_drain_lets_tasks_and_offers_finish_and_then_exits(
    executors: Executors, folder: Path
) -> None:
    """Ends the executors: the last test of this file."""
    te, target = executors.prefill, executors.decode
    async with te.connect() as prefill, target.connect() as decode:
        offered = await prefill.generate(
            SHORT, revision=REVISION, max_tokens=8, kind=cpb.TASK_KIND_PREFILL, task_id="offered"
        )
        run, done, first = await prefill.submit(
            MEDIUM, revision=REVISION, max_tokens=40, sampling=greedy(ignore_eos=True)
        )
        await asyncio.wait_for(first.wait(), 30)
        drain = asyncio.create_task(te.drain(30, exit=True))
        while not (await te.status()).load.draining:
            await asyncio.sleep(0.02)
        late = await prefill.generate(SHORT, revision=REVISION, max_tokens=1)
        assert late.error is not None and late.error.code == cpb.ERROR_CODE_DRAINING
        await asyncio.wait_for(done.wait(), 30)
        assert run.finish == cpb.FINISH_REASON_LENGTH and len(run.tokens) == 40
        assert not drain.done()  # the offer is still there
        assert offered.handover is not None
        rest = await decode.generate(
            SHORT,
            revision=REVISION,
            max_tokens=8,
            kind=cpb.TASK_KIND_DECODE,
            output=offered.tokens,
            kv_source=offered.handover.source,
            task_id="offered",
            attempt=1,
        )
        assert rest.error is None and len(rest.tokens) == 7
        answer = await drain
    assert answer.drained and (answer.tasks_left, answer.transfers_left) == (0, 0)
    assert await te.wait() == 0

    assert await target.stop() == 0
    await executors.remote.stop()
    assert not list(folder.glob("*.json"))
    assert len({path.name.partition(".")[0] for path in folder.glob("*.sock")}) == 1  # of the killed one
