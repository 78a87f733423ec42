"""Right tokens: 1P1D = 1C = Hugging Face transformers, token by token, on 30 prompts of 5 to 3,000 tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from deepflow.v1 import common_pb2

from tests.support import prompts
from tests.support.reference import Reference
from tests.support.stack import MODEL, Stack
from tests.support.te import executor
from tests.support.worker_client import TaskRun, WorkerClient, generate_disaggregated, greedy

NEW_TOKENS = 64
CHUNK_TOKENS = 512  # EngineConfig.max_batch_tokens: longer prompts are cut
TIE_NATS = 1e-4
"""Two float32 codes may order logits that lie closer than this differently; anything wider is a bug."""

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def reference(small_model_path: Path) -> Reference:
    return Reference(small_model_path)


async def tokenized(stack: Stack) -> list[list[int]]:
    async with stack.http() as http:
        answer = await http.post("/v1/tokenize", json={"model": MODEL, "prompt": prompts.text()})
        return prompts.suite(answer.json()["tokens"])


async def colocated(
    client: WorkerClient, suite: Sequence[Sequence[int]], revision: str, salt: bytes
) -> list[TaskRun]:
    """All prompts at once on one executor: batched, chunked, one after the other in the same steps."""
    return await asyncio.gather(
        *(
            client.generate(
                prompt,
                revision=revision,
                max_tokens=NEW_TOKENS,
                sampling=greedy(ignore_eos=True),
                timeout=600,
                cache_salt=salt,
            )
            for prompt in suite
        )
    )


async def test_float32_1p1d_equals_1c_equals_transformers(stack_float32: Stack, reference: Reference) -> None:
    stack = stack_float32
    suite = await tokenized(stack)
    async with (
        stack.client(stack.executor("prefill")) as prefill,
        stack.client(stack.executor("decode")) as decode,
    ):
        together = await colocated(decode, suite, stack.revision, b"1C")
        assert all(run.finish == common_pb2.FINISH_REASON_LENGTH for run in together)
        assert all(run.cached_tokens == 0 for run in together), "the first pass must compute everything"
        apart = await asyncio.gather(
            *(
                generate_disaggregated(
                    prefill,
                    decode,
                    prompt,
                    revision=stack.revision,
                    max_tokens=NEW_TOKENS,
                    sampling=greedy(ignore_eos=True),
                    cache_salt=b"1P1D",
                    timeout=600,
                )
                for prompt in suite
            )
        )
        assert all(run.handover is not None for run in apart), "every request must be disaggregated"
        some = suite[::4]
        alone = [
            (await colocated(decode, [prompt], stack.revision, b"alone"))[0] for prompt in some
        ]  # nothing cached, nothing else in the batch
        cached = [(await colocated(decode, [prompt], stack.revision, b"1C"))[0] for prompt in some]
    assert [run.tokens for run in apart] == [run.tokens for run in together]
    assert [run.tokens for run in alone] == [run.tokens for run in together[::4]]
    assert [run.tokens for run in cached] == [run.tokens for run in together[::4]]
    assert all(run.cached_tokens >= (len(p) - 1) // 16 * 16 for run, p in zip(cached, some, strict=True))
    for prompt, run in zip(suite, together, strict=True):
        agreement = reference.agreement(prompt, run.tokens)
        assert agreement.worst_gap < TIE_NATS, f"prompt of {len(prompt)} tokens: {agreement}"
    await stack.wait_clean()


async def test_chunked_prefill_equals_whole_prompts(
    stack_float32: Stack, small_model_path: Path, tmp_path: Path
) -> None:
    """The longest prompts in one step each, on an executor of its own, against the stack's chunks."""
    stack = stack_float32
    suite = [prompt for prompt in await tokenized(stack) if len(prompt) > CHUNK_TOKENS]
    assert len(suite) >= 4
    async with stack.client(stack.executor("decode")) as client:
        chunked = await colocated(client, suite, stack.revision, b"1C")
    async with executor("whole", tmp_path, options=["--no-chunked-prefill"]) as te:
        await te.load(small_model_path, stack.revision, dtype="float32", kv_cache_bytes=1 << 30)
        async with te.connect() as client:
            whole = await colocated(client, suite, stack.revision, b"whole")
    assert [run.tokens for run in whole] == [run.tokens for run in chunked]


async def test_bfloat16_stays_close_to_the_float32_reference(
    stack_default: Stack, reference: Reference
) -> None:
    stack = stack_default
    suite = await tokenized(stack)
    async with (
        stack.client(stack.executor("prefill")) as prefill,
        stack.client(stack.executor("decode")) as decode,
    ):
        runs = await asyncio.gather(
            *(
                generate_disaggregated(
                    prefill,
                    decode,
                    prompt,
                    revision=stack.revision,
                    max_tokens=NEW_TOKENS,
                    sampling=greedy(ignore_eos=True),
                    timeout=600,
                )
                for prompt in suite
            )
        )
    agreements = [reference.agreement(prompt, run.tokens) for prompt, run in zip(suite, runs, strict=True)]
    tokens = sum(agreement.tokens for agreement in agreements)
    equal = sum(agreement.equal for agreement in agreements)
    assert tokens == len(suite) * NEW_TOKENS
    assert equal / tokens >= 0.97
    assert max(agreement.worst_gap for agreement in agreements) <= 0.3
    await stack.wait_clean()
