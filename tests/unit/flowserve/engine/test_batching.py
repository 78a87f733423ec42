"""Continuous batching, chunked prefill, prefix reuse, preemption: the answers never change. Needs nothing."""

from __future__ import annotations

import threading

import pytest

from flowserve.engine.budget import StepShape
from flowserve.engine.config import EngineConfig
from flowserve.engine.types import ErrorCode, FinishReason, Role, SamplingParams, TaskKind
from tests.support.engine import (
    BLOCK_TOKENS,
    EOS,
    FakeClock,
    Rig,
    expected_output,
    make_task,
    next_token,
    tokens_of,
)

CONFIG = EngineConfig(max_running=16, max_batch_tokens=64)


def check(rig: Rig, prompts: dict[str, list[int]], max_output: int = 12) -> None:
    for task_id, prompt in prompts.items():
        answer = rig.answers[(task_id, 0)]
        expected, finish = expected_output(prompt, max_output)
        assert answer.final is not None and answer.final.finish is finish, answer.final
        assert answer.tokens == expected, f"{task_id} got other tokens"


def submit_all(rig: Rig, prompts: dict[str, list[int]], max_output: int = 12) -> None:
    for task_id, prompt in prompts.items():
        rig.submit(make_task(prompt, max_output, task_id=task_id))


def test_many_sequences_run_in_one_batch_and_get_their_own_tokens() -> None:
    rig = Rig()
    prompts = {f"t{i}": tokens_of(i, 3 + i) for i in range(8)}
    submit_all(rig, prompts)
    rig.run()
    check(rig, prompts)
    assert max(len(batch) for batch in rig.executor.batches) == 8
    rig.assert_clean()


def test_long_prompts_are_chunked_within_the_token_budget_while_decodes_go_on() -> None:
    rig = Rig(num_blocks=128, config=EngineConfig(max_running=8, max_batch_tokens=16))
    first = rig.submit(make_task(tokens_of(1, 5), 30, task_id="first"))
    rig.step(3)
    before = len(first.tokens)
    rig.submit(make_task(tokens_of(2, 100), 4, task_id="long"))
    rig.step(5)
    assert len(first.tokens) == before + 5, "a running stream gets a token in every step"
    rig.run()
    assert all(sum(count for _, count in batch) <= 16 for batch in rig.executor.batches)
    check(rig, {"first": tokens_of(1, 5)}, 30)
    check(rig, {"long": tokens_of(2, 100)}, 4)
    rig.assert_clean()


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_chunked_and_cached_answers_are_the_undisturbed_ones(chunked: bool, cached: bool) -> None:
    config = EngineConfig(
        max_running=8, max_batch_tokens=24, chunked_prefill=chunked, enable_prefix_cache=cached
    )
    rig = Rig(num_blocks=128, config=config)
    shared = tokens_of(0, 37)
    prompts = {f"t{i}": shared + tokens_of(i, 7 * i) for i in range(6)}
    submit_all(rig, prompts)
    rig.run()
    check(rig, prompts)
    if not chunked:
        assert (0, len(prompts["t5"])) in {
            piece for batch in rig.executor.batches for piece in batch
        } or cached
    rig.assert_clean()


def test_a_repeated_prompt_recomputes_only_its_last_block() -> None:
    rig = Rig()
    prompt = tokens_of(1, 5 * BLOCK_TOKENS)
    submit_all(rig, {"a": prompt})
    rig.run()
    rig.executor.batches.clear()
    again = rig.submit(make_task(prompt, 12, task_id="b"))
    rig.run()
    assert rig.executor.batches[0] == [(4 * BLOCK_TOKENS, BLOCK_TOKENS)]
    assert again.first is not None and again.first.cached_tokens == 4 * BLOCK_TOKENS
    assert rig.answers[("a", 0)].first.cached_tokens == 0
    check(rig, {"a": prompt, "b": prompt})


def test_an_answer_is_reusable_as_the_prefix_of_the_next_turn() -> None:
    rig = Rig()
    first = rig.submit(make_task(tokens_of(1, 10), 14, task_id="a"))
    rig.run()
    turn = [*tokens_of(1, 10), *first.tokens, 5, 6]
    second = rig.submit(make_task(turn, 4, task_id="b"))
    rig.run()
    assert second.first is not None and second.first.cached_tokens == (10 + len(first.tokens) - 1) // 4 * 4
    check(rig, {"b": turn}, 4)


def test_choices_of_one_prompt_compute_it_once() -> None:
    rig = Rig(config=EngineConfig(max_running=16, max_batch_tokens=32))
    prompt = tokens_of(1, 70)
    submit_all(rig, {f"t{i}": prompt for i in range(4)})
    rig.run()
    computed = sum(
        count for batch in rig.executor.batches for start, count in batch if start < 68 and count > 1
    )
    assert computed <= 70 + 3 * BLOCK_TOKENS
    check(rig, {f"t{i}": prompt for i in range(4)})
    rig.assert_clean()


def test_waiting_for_a_prefix_is_bounded() -> None:
    config = EngineConfig(max_running=16, max_batch_tokens=16, prefix_wait_seconds=0.02)
    rig = Rig(config=config, num_blocks=200)
    prompt = tokens_of(1, 200)
    submit_all(rig, {"a": prompt, "b": prompt}, 2)
    rig.step(20)
    assert len(rig.engine._core.scheduler.waiting) == 0, "b gave up waiting for a"
    rig.run()
    check(rig, {"a": prompt, "b": prompt}, 2)
    rig.assert_clean()


@pytest.mark.parametrize("num_blocks", [13, 17, 24])
def test_answers_survive_preemption_in_a_tiny_pool(num_blocks: int) -> None:
    rig = Rig(num_blocks=num_blocks)
    prompts = {f"t{i}": tokens_of(i, 4 + i) for i in range(7)}
    submit_all(rig, prompts, 30)
    rig.run()
    check(rig, prompts, 30)
    assert sum(a.final.timings.preemptions for a in rig.answers.values() if a.final and a.final.timings) > 0
    assert rig.answers[("t0", 0)].final.timings.preemptions == 0, "the first in order never loses its blocks"
    rig.assert_clean()


def test_priority_goes_first_and_is_preempted_last() -> None:
    rig = Rig(num_blocks=10, config=EngineConfig(max_running=2, max_batch_tokens=64))
    low = [rig.submit(make_task(tokens_of(i, 8), 16, task_id=f"low{i}")) for i in range(2)]
    rig.step()
    high = rig.submit(make_task(tokens_of(9, 8), 16, task_id="high", priority=5))
    later = rig.submit(make_task(tokens_of(8, 8), 16, task_id="later"))
    rig.run(high)
    assert later.final is None
    rig.run()
    assert high.final.timings.preemptions == 0
    assert all(answer.final is not None for answer in low)
    rig.assert_clean()


def test_a_context_as_large_as_the_pool_is_filled_and_cut_by_length() -> None:
    rig = Rig(num_blocks=5)
    prompt = tokens_of(3, 7)
    answer = rig.submit(make_task(prompt, 100))
    rig.run()
    expected, finish = expected_output(prompt, 100, limit=20)
    assert answer.tokens == expected and answer.final.finish is finish
    rig.assert_clean()


def test_the_models_context_cuts_generation() -> None:
    rig = Rig(max_model_len=16)
    prompt = tokens_of(3, 7)
    answer = rig.submit(make_task(prompt, 100))
    rig.run()
    expected, finish = expected_output(prompt, 100, limit=16)
    assert (answer.tokens, answer.final.finish) == (expected, finish)


def test_stop_tokens_end_the_answer_and_are_part_of_it() -> None:
    prompt = tokens_of(1, 6)
    full, _ = expected_output(prompt, 6)
    rig = Rig()
    stop = SamplingParams(temperature=0.0, stop_token_ids=(full[3],))
    answer = rig.submit(make_task(prompt, 6, sampling=stop))
    rig.run()
    assert answer.tokens == full[: full.index(full[3]) + 1] and answer.final.finish is FinishReason.STOP


def seed_that_ends() -> tuple[list[int], int]:
    """A prompt whose second token is EOS."""
    for seed in range(20000):
        prompt = tokens_of(seed, 2)
        token = next_token(prompt)
        if token != EOS and next_token([*prompt, token]) == EOS:
            return prompt, token
    raise AssertionError("no such prompt")


def test_eos_stops_unless_it_is_ignored() -> None:
    prompt, _ = seed_that_ends()
    rig = Rig()
    stopped = rig.submit(make_task(prompt, 6, task_id="a"))
    ignoring = SamplingParams(temperature=0.0, ignore_eos=True)
    ignored = rig.submit(make_task(prompt, 6, task_id="b", sampling=ignoring))
    rig.run()
    assert stopped.tokens[-1] == EOS and stopped.final.finish is FinishReason.STOP
    assert len(ignored.tokens) == 6 and ignored.final.finish is FinishReason.LENGTH


def test_a_replay_continues_after_the_tokens_already_delivered() -> None:
    rig = Rig()
    prompt = tokens_of(1, 9)
    expected, _ = expected_output(prompt, 10)
    answer = rig.submit(make_task(prompt, 10, attempt=1, output=expected[:4]))
    rig.run()
    assert answer.tokens == expected
    rig.assert_clean()


@pytest.mark.parametrize("batch_tokens", [8, 64])
@pytest.mark.parametrize("new_tokens", [0, 3])
def test_prompt_scores_cover_every_prompt_token_once(batch_tokens: int, new_tokens: int) -> None:
    rig = Rig(config=EngineConfig(max_running=4, max_batch_tokens=batch_tokens))
    prompt = tokens_of(1, 21)
    rig.submit(make_task(prompt, 2, task_id="warm"))
    rig.run()
    scoring = SamplingParams(temperature=0.0, prompt_logprobs=0)
    answer = rig.submit(make_task(prompt, new_tokens, task_id="scored", sampling=scoring))
    rig.run()
    scores = answer.first.prompt_logprobs
    assert scores is not None and scores[0] is None and [s.token for s in scores[1:]] == prompt[1:]
    assert [s.logprob for s in scores[1:]] == [-float(next_token(prompt[:i])) for i in range(1, 21)]
    assert answer.first.cached_tokens == 0 and answer.final.finish is FinishReason.LENGTH
    assert answer.tokens == expected_output(prompt, 3)[0][:new_tokens]
    rig.assert_clean()


def test_zero_new_tokens_end_with_length_and_without_a_token() -> None:
    rig = Rig()
    answer = rig.submit(make_task(tokens_of(1, 9), 0))
    rig.run()
    assert answer.tokens == [] and answer.final.finish is FinishReason.LENGTH
    rig.assert_clean()


def test_deadlines_end_running_and_waiting_tasks() -> None:
    rig = Rig(num_blocks=6)
    running = rig.submit(make_task(tokens_of(1, 16), 8, task_id="running", deadline=rig.clock.now + 0.035))
    waiting = rig.submit(make_task(tokens_of(2, 16), 8, task_id="waiting", deadline=rig.clock.now + 0.015))
    rig.step(5)
    for answer in (running, waiting):
        assert answer.final is not None and answer.final.error.code is ErrorCode.DEADLINE_EXCEEDED
    assert len(running.tokens) > 0 and not waiting.tokens
    rig.assert_clean()


def test_evicted_prefixes_come_back_from_the_host_tier() -> None:
    rig = Rig(num_blocks=12, host_bytes=1 << 20)
    prompt = tokens_of(1, 30)
    submit_all(rig, {"a": prompt}, 4)
    rig.run()
    submit_all(rig, {"other": tokens_of(2, 40)}, 4)
    rig.run()
    rig.executor.batches.clear()
    again = rig.submit(make_task(prompt, 4, task_id="b"))
    for _ in range(2000):
        rig.step()
        if again.final is not None:
            break
    assert again.first.cached_tokens == 28
    assert rig.executor.batches[0] == [(28, 2)]
    check(rig, {"a": prompt, "b": prompt}, 4)
    rig.assert_clean()
    rig.cache.close()


def test_an_abort_while_populating_frees_the_blocks_when_nothing_writes_them() -> None:
    rig = Rig(num_blocks=12, host_bytes=1 << 20)
    submit_all(rig, {"a": tokens_of(1, 30)}, 4)
    rig.run()
    submit_all(rig, {"other": tokens_of(2, 40)}, 4)
    rig.run()
    gate = threading.Event()
    write = rig.store.store
    rig.store.store = lambda start, data: (gate.wait(5), write(start, data))[1]  # type: ignore[method-assign]
    again = rig.submit(make_task(tokens_of(1, 30), 4, task_id="b"))
    rig.step(2)
    rig.engine.abort("b", 0)
    rig.step()
    assert again.final.finish is FinishReason.ABORTED
    assert rig.cache.held_blocks > 0 and rig.engine.audit().leaked_blocks == 0
    gate.set()
    while rig.cache.populating:
        rig.step()
    rig.assert_clean()
    rig.cache.close()


def test_a_failed_population_is_computed_instead() -> None:
    rig = Rig(num_blocks=12, host_bytes=1 << 20)
    prompt = tokens_of(1, 30)
    submit_all(rig, {"a": prompt}, 4)
    rig.run()
    submit_all(rig, {"other": tokens_of(2, 40)}, 4)
    rig.run()
    rig.store.fail_stores = 1
    again = rig.submit(make_task(prompt, 4, task_id="b"))
    for _ in range(20000):
        rig.step()
        if again.final is not None:
            break
    check(rig, {"b": prompt}, 4)
    rig.assert_clean()
    rig.cache.close()


@pytest.mark.parametrize(("role", "first"), [(Role.COLOCATED, "u"), (Role.PREFILL, "p")])
def test_a_role_moves_its_kind_ahead_but_not_for_ever(role: Role, first: str) -> None:
    from tests.support.engine import Wire

    clock = FakeClock()
    rig = Rig(num_blocks=8, wire=Wire(), clock=clock, config=EngineConfig(max_running=1, max_batch_tokens=64))
    rig.engine.set_role(role)
    blocker = rig.submit(make_task(tokens_of(1, 4), 6, task_id="blocker"))
    rig.step()
    answers = {"u": rig.submit(make_task(tokens_of(2, 6), 2, task_id="u"))}
    clock.now += 0.1
    answers["p"] = rig.submit(make_task(tokens_of(3, 6), 9, task_id="p", kind=TaskKind.PREFILL))
    rig.run(blocker)
    while not any(answer.tokens for answer in answers.values()):
        rig.step()
    assert answers[first].tokens
    rig.run()


def test_a_prefix_is_computed_where_that_is_sooner_than_bringing_it_back() -> None:
    rig = Rig(num_blocks=12, host_bytes=1 << 20)
    prompt = tokens_of(1, 30)
    submit_all(rig, {"a": prompt}, 4)
    rig.run()
    submit_all(rig, {"other": tokens_of(2, 40)}, 4)
    rig.run()
    for tokens in (4, 8, 16):
        rig.engine._core.costs.observe(StepShape(tokens, 0), tokens * 1e-9)
    rig.executor.batches.clear()
    again = rig.submit(make_task(prompt, 4, task_id="b"))
    rig.run()
    assert again.first.cached_tokens == 0 and rig.executor.batches[0] == [(0, 30)]
    check(rig, {"b": prompt}, 4)
    rig.assert_clean()
    rig.cache.close()


def test_what_was_found_in_cache_is_told_after_a_population_failed() -> None:
    rig = Rig(num_blocks=12, host_bytes=1 << 20)
    prompt = tokens_of(1, 30)
    submit_all(rig, {"a": prompt}, 4)
    rig.run()
    submit_all(rig, {"other": tokens_of(2, 40)}, 4)
    rig.run()
    rig.store.fail_stores = 1
    again = rig.submit(make_task(prompt, 4, task_id="b"))
    for _ in range(20000):
        rig.step()
        if again.final is not None:
            break
    assert again.first.cached_tokens == 0
    rig.cache.close()
