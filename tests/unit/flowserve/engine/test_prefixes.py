"""Prefixes from other executors' caches: right tokens, whatever becomes of the source. Needs nothing."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from flowserve.engine.budget import StepShape
from flowserve.engine.config import EngineConfig
from flowserve.engine.prefixes import LendingBusy, NotCached
from flowserve.engine.types import FinishReason, PrefixSource, TaskKind
from tests.support.engine import Answer, PrefixWire, Rig, Wire, expected_output, make_task, tokens_of

PROMPT = tokens_of(1, 30)


def pair(**options: object) -> tuple[Rig, Rig]:
    """An executor that has computed PROMPT, and one that has not."""
    rigs: dict[str, Rig] = {}
    rigs["a"] = Rig(peers=rigs)
    rigs["b"] = Rig(peers=rigs, **options)  # type: ignore[arg-type]  # passed through
    rigs["a"].submit(make_task(PROMPT, 4, task_id="first"))
    rigs["a"].run()
    return rigs["a"], rigs["b"]


def wire(rig: Rig) -> PrefixWire:
    assert rig.exchange is not None
    return rig.exchange


def source(tokens: int = 28, te_id: str = "a") -> PrefixSource:
    return PrefixSource(te_id, "1", "127.0.0.1:1", tokens)


def finish(rig: Rig, answer: Answer, prompt: list[int] = PROMPT, tokens: int = 4) -> None:
    rig.run(answer)
    assert (answer.tokens, answer.final.finish) == expected_output(prompt, tokens)


def test_a_prefix_is_fetched_where_that_is_sooner_and_gives_the_same_tokens() -> None:
    a, b = pair()
    answer = b.submit(make_task(PROMPT, 4, prefix_source=source()))
    b.step()
    assert not b.executor.batches, "nothing is computed of what is on its way"
    wire(b).pump()
    finish(b, answer)
    assert answer.first.cached_tokens == 28 and b.executor.batches[0] == [(28, 2)]
    a.assert_clean()
    b.assert_clean()


def test_what_was_fetched_is_reusable_and_told_to_gateways() -> None:
    _, b = pair()
    answer = b.submit(make_task(PROMPT, 4, prefix_source=source()))
    b.step()
    wire(b).pump()
    finish(b, answer)
    again = b.submit(make_task(PROMPT, 4, task_id="again"))
    finish(b, again)
    assert again.first.cached_tokens == 28
    assert set(b.cache.identities(PROMPT)) <= b.held_identities


def test_a_prefix_is_computed_where_that_is_sooner() -> None:
    _, b = pair()
    wire(b).seconds = 1e6
    answer = b.submit(make_task(PROMPT, 4, prefix_source=source()))
    finish(b, answer)
    assert answer.first.cached_tokens == 0 and wire(b).declined == 1 and not wire(b).fetches
    wire(b).seconds = 1e-3
    for tokens in (4, 8, 16):
        b.engine._core.costs.observe(StepShape(tokens, 0), tokens * 1e-7)
    other = b.submit(make_task(tokens_of(2, 30), 4, task_id="other", prefix_source=source()))
    finish(b, other, tokens_of(2, 30))
    assert wire(b).declined == 2


@pytest.mark.parametrize("how", ["failed", "evicted", "unknown", "less"])
def test_a_source_that_lacks_it_is_a_miss_and_the_rest_is_computed(how: str) -> None:
    a, b = pair()
    hint = source(te_id="nobody" if how == "unknown" else "a")
    if how == "evicted":
        a.cache.clear()
    elif how == "less":
        longer = PROMPT + tokens_of(3, 20)
        answer = b.submit(make_task(longer, 4, prefix_source=source(48)))
        b.step()
        wire(b).pump()
        finish(b, answer, longer)
        assert answer.first.cached_tokens == 28
        return
    answer = b.submit(make_task(PROMPT, 4, prefix_source=hint))
    b.step()
    wire(b).pump(fail=how == "failed")
    finish(b, answer)
    assert answer.first.cached_tokens == 0
    assert not wire(b).fetches, "a task asks once"
    b.assert_clean()


def test_blocks_of_an_aborted_fetch_are_kept_until_nothing_writes_them() -> None:
    _, b = pair()
    answer = b.submit(make_task(PROMPT, 4, prefix_source=source()))
    b.step()
    b.engine.abort("t", 0)
    b.step()
    assert answer.final.finish is FinishReason.ABORTED
    (fetch,) = wire(b).fetches
    assert fetch.stopped and b.cache.held_blocks == len(fetch.blocks)
    assert b.engine.audit().leaked_blocks == 0
    wire(b).pump()
    b.step()
    b.assert_clean()


def test_what_is_cached_here_is_not_fetched() -> None:
    _, b = pair()
    finish(b, b.submit(make_task(PROMPT[:16], 2, task_id="own")), PROMPT[:16], 2)
    answer = b.submit(make_task(PROMPT, 4, prefix_source=source()))
    b.step()
    (fetch,) = wire(b).fetches
    assert len(fetch.blocks) == 3, "16 tokens are here, and 28 there"
    wire(b).pump()
    finish(b, answer)
    assert answer.first.cached_tokens == 28


def test_host_memory_first_and_the_peer_for_what_follows() -> None:
    _, b = pair(num_blocks=12, host_bytes=1 << 20)
    finish(b, b.submit(make_task(PROMPT[:16], 2, task_id="own")), PROMPT[:16], 2)
    finish(b, b.submit(make_task(tokens_of(9, 40), 2, task_id="other")), tokens_of(9, 40), 2)
    answer = b.submit(make_task(PROMPT, 4, prefix_source=source()))
    for _ in range(5000):
        b.step()
        if wire(b).fetches:
            break
    (fetch,) = wire(b).fetches
    assert len(fetch.blocks) == 3
    wire(b).pump()
    finish(b, answer)
    assert answer.first.cached_tokens == 28
    b.assert_clean()
    b.cache.close()


def test_choices_of_one_prompt_fetch_it_once() -> None:
    _, b = pair()
    answers = [b.submit(make_task(PROMPT, 4, task_id=f"n{i}", prefix_source=source())) for i in range(3)]
    b.step(3)
    assert len(wire(b).fetches) == 1
    wire(b).pump()
    for answer in answers:
        finish(b, answer)
    b.assert_clean()


def test_a_prefill_hands_over_what_it_fetched() -> None:
    rigs: dict[str, Rig] = {}
    between = Wire()
    for name in ("a", "p", "d"):
        rigs[name] = Rig(peers=rigs, wire=between, clock=rigs["a"].clock if rigs else None)
    rigs["a"].submit(make_task(PROMPT, 4, task_id="first"))
    rigs["a"].run()
    p = rigs["p"]
    prefill = p.submit(make_task(PROMPT, 4, kind=TaskKind.PREFILL, prefix_source=source()))
    p.step()
    wire(p).pump()
    p.run(prefill)
    assert prefill.final.finish is FinishReason.HANDOVER and prefill.first.cached_tokens == 28
    transfer = between.transfers[prefill.final.handover.transfer_id]
    assert len(transfer.announced) == 8
    between.release(prefill.final.handover.transfer_id, "acked")
    p.assert_clean()


def test_lending_is_bounded_and_holds_nothing_after_an_error() -> None:
    a, _ = pair()
    names = a.cache.identities(PROMPT)
    with pytest.raises(NotCached):
        a.engine.lend([b"\0" * 16])
    wire(a).refuse = True
    with pytest.raises(RuntimeError):
        a.engine.lend(names)
    assert a.cache.held_blocks == 0
    wire(a).refuse = False
    lent = [a.engine.lend(names) for _ in range(3)]  # 16 of 64 blocks in all
    assert [count for _, count in lent] == [7, 7, 2]
    with pytest.raises(LendingBusy):
        a.engine.lend(names)
    assert a.engine.audit().leaked_blocks == 0
    a.step()
    assert a.engine.load().transfers_out == len(lent)
    for transfer_id, _ in lent:
        a.engine.release_transfer(transfer_id, "expired")
    a.assert_clean()


def test_an_engine_that_stops_takes_back_what_it_lent() -> None:
    a, _ = pair()
    a.engine.lend(a.cache.identities(PROMPT))
    a.engine.stop()
    assert a.engine.audit().leaked_blocks == 0 and a.cache.held_blocks == 0
    with pytest.raises(NotCached):
        a.engine.lend(a.cache.identities(PROMPT))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_happens_tokens_are_right_and_nothing_is_left(data: st.DataObject) -> None:
    config = EngineConfig(max_running=4, max_batch_tokens=16)
    rigs: dict[str, Rig] = {}
    for name in ("a", "b"):
        rigs[name] = Rig(14, peers=rigs, config=config, clock=rigs["a"].clock if rigs else None)
    prompts = [PROMPT, PROMPT[:20] + tokens_of(7, 12), tokens_of(8, 25)]
    open_tasks: list[tuple[Rig, Answer, list[int]]] = []
    for number in range(data.draw(st.integers(2, 10), "tasks")):
        name = data.draw(st.sampled_from("ab"), "where")
        prompt = data.draw(st.sampled_from(prompts), "prompt")
        hint = source(data.draw(st.integers(0, 40), "hint"), "b" if name == "a" else "a")
        task = make_task(prompt, 3, task_id=f"t{number}", prefix_source=hint)
        open_tasks.append((rigs[name], rigs[name].submit(task), prompt))
        for rig in rigs.values():
            rig.step(data.draw(st.integers(0, 3), "turns"))
            what = data.draw(st.sampled_from(["pump", "fail", "wait", "clear"]), "then")
            if what == "clear":
                rig.cache.clear()
            elif what != "wait":
                wire(rig).pump(fail=what == "fail")
        if data.draw(st.booleans(), "abort"):
            rig, _, _ = data.draw(st.sampled_from(open_tasks), "whom")
            rig.engine.abort(data.draw(st.sampled_from([f"t{i}" for i in range(number + 1)]), "task"), 0)
    for _ in range(400):
        for rig in rigs.values():
            rig.step()
            wire(rig).pump()
    for _, answer, prompt in open_tasks:
        assert answer.final is not None
        if answer.final.finish is not FinishReason.ABORTED:
            assert (answer.tokens, answer.final.finish) == expected_output(prompt, 3)
    for rig in rigs.values():
        rig.assert_clean()
