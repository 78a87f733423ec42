"""The executor on the real small model: how tokens are batched and cut never changes what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from flowserve.devices.native.library import DISABLE_ENV, library
from flowserve.engine.types import SamplingParams, TokenLogprobs
from flowserve.executor import local
from flowserve.executor.interface import SampleSpec, SequenceSlice, SliceResult
from flowserve.executor.local import LocalExecutor, open_executor
from flowserve.models.errors import ModelNotFound, UnsupportedModel
from kvtransfer.pool import PoolError

pytestmark = pytest.mark.model
BLOCK = 16
NEW = 8
KV_BYTES = 64 << 20
GREEDY = SamplingParams(temperature=0.0, logprobs=2)
# Real text in the model's tokens, of unequal lengths; the third is longer than several blocks.
STORY = [504, 4971, 282, 23472, 436, 582, 282, 260, 3995, 282, 260, 3201, 905, 30, 4781, 44091, 3408, 732]
STORY += [436, 1343, 282, 11572, 28, 282, 4513, 284, 282, 260, 5703, 28, 284]
PROMPTS = [STORY[:5], STORY, STORY * 4 + STORY[:13], STORY[7:24]]


@pytest.fixture(scope="module", params=["compiled", "torch"])
def executor(request: pytest.FixtureRequest, small_model_path: Path) -> Iterator[LocalExecutor]:
    """Float32, with the compiled step and without it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setenv(DISABLE_ENV, "0")
        library.cache_clear()
        opened = open_executor(
            small_model_path, revision="m@1", dtype="float32", kv_cache_bytes=KV_BYTES, threads=1
        )
    library.cache_clear()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def reference(executor: LocalExecutor) -> list[Run]:
    """Every prompt whole and alone, greedy."""
    return alone(executor)


class Run:
    """A sequence that is fed to an executor in slices, with blocks of its own."""

    def __init__(self, prompt: Sequence[int], blocks: Sequence[int], params: SamplingParams = GREEDY) -> None:
        self.prompt, self.blocks, self.params = list(prompt), list(blocks), params
        self.output: list[int] = []
        self.scores: list[TokenLogprobs] = []
        self.done = 0

    def slice(self, count: int) -> SequenceSlice:
        tokens = [*self.prompt, *self.output]
        part = tokens[self.done : self.done + count]
        self.done += len(part)
        spec = SampleSpec(self.params, self.prompt, tuple(self.output), len(self.output))
        return SequenceSlice(
            part, self.done - len(part), self.blocks, sample=spec if self.done == len(tokens) else None
        )

    def take(self, result: SliceResult) -> None:
        assert result.error is None
        if result.token is not None:
            self.output.append(result.token)
            assert result.logprobs is not None
            self.scores.append(result.logprobs)


def runs(executor: LocalExecutor, params: SamplingParams = GREEDY) -> list[Run]:
    """Blocks interleaved and in falling order: nothing may lean on their numbers."""
    made, count = [], executor.store.num_blocks
    for index, prompt in enumerate(PROMPTS):
        needed = -(-(len(prompt) + NEW) // BLOCK)
        made.append(Run(prompt, [count - 1 - (index + len(PROMPTS) * i) for i in range(needed)], params))
    return made


def drive(executor: LocalExecutor, batch: list[Run], chunk: int) -> None:
    while left := [run for run in batch if len(run.output) < NEW]:
        for run, result in zip(left, executor.execute([run.slice(chunk) for run in left]), strict=True):
            run.take(result)


def same(a: list[Run], b: list[Run]) -> None:
    for mine, theirs in zip(a, b, strict=True):
        assert mine.output == theirs.output
        for x, y in zip(mine.scores, theirs.scores, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-3)
            assert [token for token, _ in x.top] == [token for token, _ in y.top]


def alone(executor: LocalExecutor, params: SamplingParams = GREEDY) -> list[Run]:
    made = runs(executor, params)
    for run in made:
        drive(executor, [run], 10_000)
    return made


@pytest.mark.parametrize("chunk", [10_000, 7])
def test_batched_and_chunked_is_alone_and_whole(
    executor: LocalExecutor, reference: list[Run], chunk: int
) -> None:
    together = runs(executor)
    drive(executor, together, chunk)
    same(together, reference)


def test_a_model_that_slept_computes_as_before(executor: LocalExecutor, reference: list[Run]) -> None:
    store = executor.store
    executor.sleep()
    executor.wake()
    assert executor.store is not store and executor.store.num_blocks == store.num_blocks
    same(alone(executor), reference)


def test_prefills_and_decodes_share_a_batch(executor: LocalExecutor, reference: list[Run]) -> None:
    """One sequence decodes while another's prompt arrives in pieces."""
    early, late = runs(executor)[1:3]
    while len(early.output) < 4:
        early.take(executor.execute([early.slice(100)])[0])
    while len(late.output) < NEW:
        batch = [late, early] if len(early.output) < NEW else [late]
        for run, result in zip(batch, executor.execute([run.slice(9) for run in batch]), strict=True):
            run.take(result)
    drive(executor, [early], 9)
    same([early, late], reference[1:3])


def test_a_seed_draws_the_same_tokens_in_any_company(executor: LocalExecutor) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95, top_k=200, min_p=0.001, seed=77, logprobs=0)
    together = runs(executor, params)
    drive(executor, together, 11)
    same(together, alone(executor, params))


def test_a_prompts_scores_do_not_depend_on_how_it_is_cut(
    executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, blocks = PROMPTS[2], range(10)
    whole = executor.execute([SequenceSlice(prompt, 0, blocks, prompt_logprobs=3)])[0].prompt_logprobs
    assert whole is not None and [score.token for score in whole] == prompt[1:]
    monkeypatch.setattr(local, "SCORE_BYTES", 5 * 4 * executor.info.vocab_size)  # five rows at a time
    cut: list[TokenLogprobs] = []
    for start in range(0, len(prompt), 30):
        part = prompt[start : start + 30]
        after = prompt[start + 30] if start + 30 < len(prompt) else None
        [result] = executor.execute([SequenceSlice(part, start, blocks, prompt_logprobs=3, next_token=after)])
        assert result.token is None and result.prompt_logprobs is not None
        cut += result.prompt_logprobs
    assert [score.token for score in cut] == [score.token for score in whole]
    for mine, theirs in zip(cut, whole, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert mine.rank == theirs.rank and len(mine.top) == 3


def test_scoring_and_sampling_in_one_slice(executor: LocalExecutor, reference: list[Run]) -> None:
    prompt = PROMPTS[1]
    sampled = SampleSpec(GREEDY, prompt, [], 0)
    both, other = executor.execute(
        [
            SequenceSlice(prompt, 0, range(2), prompt_logprobs=0, sample=sampled),
            SequenceSlice(PROMPTS[0], 0, [4], sample=SampleSpec(GREEDY, PROMPTS[0], [], 0)),
        ]
    )
    assert both.token == reference[1].output[0] and other.token == reference[0].output[0]
    assert both.prompt_logprobs is not None and len(both.prompt_logprobs) == len(prompt) - 1


def test_one_slices_trouble_is_its_own(executor: LocalExecutor, reference: list[Run]) -> None:
    broken = SampleSpec(SamplingParams(logit_bias={executor.info.vocab_size: 1.0}), [5], [], 0)
    good = SampleSpec(GREEDY, PROMPTS[0], [], 0)
    first, second = executor.execute(
        [SequenceSlice([5], 0, [3], sample=broken), SequenceSlice(PROMPTS[0], 0, [4], sample=good)]
    )
    assert first.token is None and first.error is not None and "vocabulary" in first.error
    assert second.token == reference[0].output[0]


def test_an_empty_batch_and_slices_that_cannot_run(executor: LocalExecutor) -> None:
    assert executor.execute([]) == []
    with pytest.raises(ValueError, match="blocks hold"):
        executor.execute([SequenceSlice([1] * 17, 0, [0])])
    with pytest.raises((ValueError, IndexError)):
        executor.execute([SequenceSlice([executor.info.vocab_size], 0, [0])])


def test_what_it_says_of_the_model(executor: LocalExecutor) -> None:
    info = executor.info
    assert (info.layers, info.kv_heads, info.head_dim, info.vocab_size) == (30, 3, 64, 49152)
    assert (info.revision, info.max_model_len, info.eos_token_ids, info.dtype) == (
        "m@1",
        8192,
        (2,),
        "float32",
    )
    layout = executor.store.layout
    assert (layout.model_revision, layout.block_tokens, layout.dtype) == ("m@1", BLOCK, "float32")
    assert executor.store.num_blocks == KV_BYTES // layout.block_bytes


def test_kv_copied_to_other_blocks_through_the_store_goes_on_as_before(
    executor: LocalExecutor, reference: list[Run]
) -> None:
    """What a transfer does: bytes of blocks out of one place, into another, and no difference."""
    run = runs(executor)[2]
    run.take(executor.execute([run.slice(10_000)])[0])
    used = -(-len(run.prompt) // BLOCK)
    moved = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    for source, target in zip(run.blocks[:used], moved, strict=False):
        executor.store.store(target, bytes(executor.store.load(source, 1)))
    run.blocks = moved
    drive(executor, [run], 1)
    same([run], reference[2:3])


def test_bfloat16_stays_close(small_model_path: Path, reference: list[Run]) -> None:
    """Every token of the float32 run is within 0.3 nats of bfloat16's own first choice."""
    small = open_executor(small_model_path, revision="m@1", kv_cache_bytes=8 << 20)
    try:
        assert small.info.dtype == "bfloat16"
        for run in reference:
            tokens = [*run.prompt, *run.output]
            [result] = small.execute([SequenceSlice(tokens, 0, range(12), prompt_logprobs=1)])
            assert result.prompt_logprobs is not None
            for score in result.prompt_logprobs[-NEW:]:
                assert score.top[0][1] - score.logprob < 0.3
    finally:
        small.close()


def test_closing_frees_and_may_be_repeated(small_model_path: Path) -> None:
    opened = open_executor(small_model_path, revision="m@1", kv_cache_bytes=2 << 20)
    opened.close()
    opened.close()
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        opened.execute([SequenceSlice([1], 0, [0])])


def test_what_cannot_be_opened_is_named(small_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        open_executor(tmp_path / "none.gguf", revision="x")
    with pytest.raises(UnsupportedModel, match="exceeds the model's 8192"):
        open_executor(small_model_path, revision="x", max_model_len=9000)
    with pytest.raises(PoolError, match="less than one block"):
        open_executor(small_model_path, revision="x", kv_cache_bytes=1000)
    with pytest.raises(PoolError, match="cannot allocate"):
        open_executor(small_model_path, revision="x", kv_cache_bytes=1 << 50)
    with pytest.raises(ValueError, match="is unknown"):
        open_executor(small_model_path, revision="x", device="tpu")
