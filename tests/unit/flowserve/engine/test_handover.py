"""Prefill on one engine, decode on another: tokens, blocks and terminal events. Needs nothing."""

from __future__ import annotations

import pytest

from flowserve.engine.config import EngineConfig
from flowserve.engine.types import ErrorCode, FinishReason, KVSource, TaskKind
from tests.support.engine import Answer, Rig, Wire, expected_output, make_task, tokens_of


class Pair:
    """Two engines, a wire, and a gateway's part: a decode task follows each handover."""

    def __init__(self, blocks_p: int = 64, blocks_d: int = 64, batch: int = 32) -> None:
        self.wire = Wire()
        config = EngineConfig(max_running=8, max_batch_tokens=batch)
        self.p = Rig(blocks_p, wire=self.wire, config=config)
        self.d = Rig(blocks_d, wire=self.wire, config=config, clock=self.p.clock)

    def prefill(self, prompt: list[int], max_output: int = 10, **fields: object) -> Answer:
        return self.p.submit(make_task(prompt, max_output, kind=TaskKind.PREFILL, **fields))

    def decode(self, prompt: list[int], output: list[int], max_output: int = 10, **fields: object) -> Answer:
        task_id = str(fields.get("task_id", "t"))
        source = KVSource(f"{task_id}.0", "te-p", "1", "p:1")
        task = make_task(prompt, max_output, kind=TaskKind.DECODE, output=output, kv_source=source, **fields)
        return self.d.submit(task)

    def handed_over(self, prompt: list[int], max_output: int = 10, **fields: object) -> Answer:
        answer = self.prefill(prompt, max_output, **fields)
        self.p.run(answer)
        assert answer.final.finish is FinishReason.HANDOVER
        return answer

    def assert_clean(self) -> None:
        self.p.assert_clean()
        self.d.assert_clean()
        assert all(transfer.released for transfer in self.wire.transfers.values())
        assert not self.wire.pulls


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 31, 64, 65])
def test_a_decode_continues_exactly_where_the_prefill_stopped(length: int) -> None:
    pair = Pair()
    prompt = tokens_of(7, length)
    first = pair.handed_over(prompt)
    handover = first.final.handover
    assert handover.length == length and handover.transfer_id == "t.0" and len(first.tokens) == 1
    assert pair.p.cache.held_blocks == -(-length // 4), "blocks stay while they are on offer"
    second = pair.decode(prompt, first.tokens)
    pair.d.step()
    assert pair.d.engine.load().transfers_in == 1 and pair.p.engine.load().transfers_out == 1
    pair.wire.pump()
    pair.d.run()
    assert (second.tokens, second.final.finish) == expected_output(prompt, 10)
    pair.p.step()
    pair.assert_clean()


def test_chunks_are_announced_as_they_are_computed() -> None:
    pair = Pair(batch=8)
    pair.prefill(tokens_of(1, 30))
    pair.p.step(2)
    transfer = pair.wire.transfers["t.0"]
    assert transfer.tokens == 16 and len(transfer.announced) == 4 and not transfer.complete
    pair.p.run()
    assert transfer.tokens == 30 and transfer.complete


def test_a_cached_prefix_is_announced_with_the_first_chunk() -> None:
    pair = Pair()
    prompt = tokens_of(1, 30)
    pair.handed_over(prompt)
    pair.wire.release("t.0", "acked")
    again = pair.handed_over(prompt, task_id="u")
    assert again.first.cached_tokens == 28
    assert len(pair.wire.transfers["u.0"].announced) == 8
    pair.wire.release("u.0", "acked")
    pair.assert_clean()


def test_released_blocks_stay_as_prefix() -> None:
    pair = Pair()
    pair.handed_over(tokens_of(1, 20))
    pair.wire.release("t.0", "acked")
    pair.p.assert_clean()
    assert pair.p.cache.idle_blocks == 5


@pytest.mark.parametrize("length", [16, 18])
def test_blocks_the_decode_side_has_are_not_pulled(length: int) -> None:
    pair = Pair()
    prompt = tokens_of(1, length)
    warm = pair.d.submit(make_task(prompt, 2, task_id="warm"))
    pair.d.run(warm)
    first = pair.handed_over(prompt)
    second = pair.decode(prompt, first.tokens)
    pair.d.step()
    (pull,) = pair.wire.pulls
    assert pull.request.skip_blocks == 4 and len(pull.request.blocks) == -(-length // 4)
    pair.wire.pump()
    pair.d.run()
    assert second.tokens == expected_output(prompt, 10)[0]
    pair.assert_clean()


def test_the_block_of_the_token_to_feed_is_never_shared() -> None:
    pair = Pair()
    prompt = tokens_of(1, 15)
    first = pair.handed_over(prompt)
    warm = pair.d.submit(make_task(prompt + first.tokens, 2, task_id="warm"))
    pair.d.run(warm)
    second = pair.decode(prompt, first.tokens)
    pair.d.step()
    assert pair.wire.pulls[0].request.skip_blocks == 3
    pair.wire.pump()
    pair.d.run()
    assert second.tokens == expected_output(prompt, 10)[0]
    pair.assert_clean()


def test_chunks_below_a_block_are_announced_when_the_block_is_full() -> None:
    wire = Wire()
    rig = Rig(wire=wire, config=EngineConfig(max_running=2, max_batch_tokens=2))
    answer = rig.submit(make_task(tokens_of(1, 11), kind=TaskKind.PREFILL))
    while answer.final is None:
        rig.step()
        transfer = wire.transfers["t.0"]
        assert transfer.complete or transfer.tokens % 4 == 0
    assert transfer.tokens == 11


def test_a_prefill_whose_first_token_is_the_last_offers_nothing() -> None:
    pair = Pair()
    answer = pair.prefill(tokens_of(1, 9), max_output=1)
    pair.p.run()
    assert answer.final.finish is FinishReason.LENGTH and not pair.wire.offered
    pair.assert_clean()


def test_a_prefill_that_ends_with_a_stop_token_withdraws() -> None:
    from flowserve.engine.types import SamplingParams

    pair = Pair()
    prompt = tokens_of(1, 9)
    stop = SamplingParams(temperature=0.0, stop_token_ids=(expected_output(prompt, 1)[0][0],))
    answer = pair.prefill(prompt, sampling=stop)
    pair.p.run()
    assert answer.final.finish is FinishReason.STOP
    assert pair.wire.transfers["t.0"].withdrawn is not None
    assert pair.p.cache.held_blocks > 0, "a peer may still be reading"
    pair.wire.pump()
    pair.assert_clean()


def test_a_failed_pull_ends_the_task_with_a_retryable_error() -> None:
    pair = Pair()
    prompt = tokens_of(1, 9)
    first = pair.handed_over(prompt)
    second = pair.decode(prompt, first.tokens)
    pair.d.step()
    pair.wire.pump(fail=True)
    pair.d.run()
    assert second.final.error.code is ErrorCode.KV_TRANSFER_FAILED and second.final.error.retryable
    pair.assert_clean()
    replay = pair.d.submit(make_task(prompt, 10, attempt=1, output=first.tokens))
    pair.d.run(replay)
    assert replay.tokens == expected_output(prompt, 10)[0]
    pair.assert_clean()


def test_an_abort_while_pulling_quarantines_the_blocks() -> None:
    pair = Pair(blocks_d=6)
    prompt = tokens_of(1, 16)
    first = pair.handed_over(prompt)
    second = pair.decode(prompt, first.tokens)
    pair.d.step()
    pair.wire.pump(blocks=2)
    pair.d.engine.abort("t", 0, "client left")
    pair.d.step()
    assert second.final.finish is FinishReason.ABORTED
    assert pair.d.cache.held_blocks == 5 and pair.d.engine.audit().leaked_blocks == 0
    other = pair.d.submit(make_task(tokens_of(2, 10), 4, task_id="other"))
    pair.d.step(3)
    assert other.final is None and not other.tokens, "quarantined blocks are nobody's"
    pair.wire.pump()
    pair.d.run(other)
    assert other.tokens == expected_output(tokens_of(2, 10), 4)[0]
    pair.assert_clean()


def test_a_deadline_while_pulling_quarantines_the_blocks_too() -> None:
    pair = Pair()
    prompt = tokens_of(1, 16)
    first = pair.handed_over(prompt)
    second = pair.decode(prompt, first.tokens, deadline=pair.d.clock.now + 0.05)
    pair.d.step(8)
    assert second.final.error.code is ErrorCode.DEADLINE_EXCEEDED
    assert pair.d.cache.held_blocks == 5
    pair.wire.pump()
    pair.assert_clean()


def test_an_abort_during_the_prefill_keeps_blocks_until_the_release() -> None:
    pair = Pair(batch=8)
    answer = pair.prefill(tokens_of(1, 40))
    pair.p.step(2)
    pair.p.engine.abort("t", 0, "client left")
    pair.p.step()
    assert answer.final.finish is FinishReason.ABORTED
    assert pair.wire.transfers["t.0"].withdrawn == "client left"
    assert pair.p.cache.held_blocks == 10
    pair.wire.pump()
    pair.assert_clean()


@pytest.mark.parametrize("by_owner", [False, True])
def test_an_abort_after_the_handover_withdraws_the_offer(by_owner: bool) -> None:
    pair = Pair()
    pair.handed_over(tokens_of(1, 9), owner="gw/1")
    if by_owner:
        pair.p.engine.abort_owner("gw/1")
    else:
        pair.p.engine.abort("t", 0)
    pair.p.step()
    assert pair.wire.transfers["t.0"].withdrawn is not None
    pair.wire.pump()
    pair.assert_clean()


def test_a_late_release_only_delays_the_blocks() -> None:
    pair = Pair()
    pair.wire.hold_releases = True
    prompt = tokens_of(1, 20)
    first = pair.handed_over(prompt)
    second = pair.decode(prompt, first.tokens)
    pair.d.step()
    pair.wire.pump()
    pair.d.run(second)
    pair.p.step(20)
    assert pair.p.cache.held_blocks == 5 and pair.p.engine.audit().leaked_blocks == 0
    pair.p.clock.now += 1000
    assert pair.p.engine.audit().stuck_tasks == 1, "an offer far past its lease is a defect"
    pair.wire.expire()
    pair.p.engine.release_transfer("t.0", "acked")  # a second terminal event is ignored
    pair.assert_clean()


def test_a_transfer_that_ends_before_its_prefill_fails_it() -> None:
    pair = Pair(batch=8)
    answer = pair.prefill(tokens_of(1, 40))
    pair.p.step(2)
    pair.wire.release("t.0", "aborted")
    pair.p.run()
    assert answer.final.error.code is ErrorCode.KV_TRANSFER_FAILED and answer.final.error.retryable
    pair.assert_clean()


@pytest.mark.parametrize("call", ["offer", "announce", "complete"])
def test_a_sender_that_refuses_fails_the_prefill_only(call: str) -> None:
    pair = Pair()
    pair.p.handover.refuse.add(call)
    answer = pair.prefill(tokens_of(1, 9))
    other = pair.p.submit(make_task(tokens_of(2, 9), 3, task_id="other"))
    pair.p.run()
    assert answer.final.error.code is ErrorCode.KV_TRANSFER_FAILED
    assert other.tokens == expected_output(tokens_of(2, 9), 3)[0]
    pair.wire.pump()
    pair.assert_clean()


def test_a_receiver_that_refuses_fails_the_decode() -> None:
    pair = Pair()
    prompt = tokens_of(1, 9)
    first = pair.handed_over(prompt)
    pair.d.handover.refuse.add("start_pull")
    second = pair.decode(prompt, first.tokens)
    pair.d.run()
    assert second.final.error.code is ErrorCode.KV_TRANSFER_FAILED
    pair.wire.expire()
    pair.assert_clean()


def test_a_decode_waits_for_blocks_and_its_lease_is_not_its_problem() -> None:
    pair = Pair(blocks_d=8)
    blocker = pair.d.submit(make_task(tokens_of(5, 20), 6, task_id="blocker"))
    pair.d.step()
    prompt = tokens_of(1, 16)
    first = pair.handed_over(prompt)
    second = pair.decode(prompt, first.tokens)
    pair.d.step(2)
    assert not pair.wire.pulls and second.final is None
    pair.d.run(blocker)
    pair.d.step()
    pair.wire.pump()
    pair.d.run()
    assert second.tokens == expected_output(prompt, 10)[0]
    pair.assert_clean()


def test_a_preempted_decode_is_recomputed_from_its_ids() -> None:
    pair = Pair(blocks_d=12)
    prompts = {f"t{i}": tokens_of(i, 8) for i in range(4)}
    answers = {}
    for task_id, prompt in prompts.items():
        first = pair.handed_over(prompt, 24, task_id=task_id)
        answers[task_id] = pair.decode(prompt, first.tokens, 24, task_id=task_id)
    for _ in range(400):
        pair.d.step()
        pair.wire.pump()
    assert sum(answer.final.timings.preemptions for answer in answers.values()) > 0
    for task_id, prompt in prompts.items():
        assert answers[task_id].tokens == expected_output(prompt, 24)[0]
    pair.assert_clean()


def test_a_prefill_on_offer_is_never_preempted() -> None:
    pair = Pair(blocks_p=13, batch=8)
    stream = pair.p.submit(make_task(tokens_of(9, 8), 20, task_id="stream"))
    pair.p.step(2)
    answer = pair.prefill(tokens_of(1, 36), priority=-1)
    for _ in range(300):
        pair.p.step()
        if answer.final is not None:
            break
    assert answer.final.finish is FinishReason.HANDOVER and answer.final.timings.preemptions == 0
    pair.wire.release("t.0", "acked")
    pair.p.run()
    assert stream.tokens == expected_output(tokens_of(9, 8), 20)[0]
    assert stream.final.timings.preemptions > 0, "the stream gave way instead"
    pair.assert_clean()


def test_a_processors_state_travels_with_the_handover() -> None:
    class Counting:
        def __init__(self, state: bytes) -> None:
            self.seen = int(state or b"0")

        def advance(self, token: int) -> None:
            self.seen += 1

        def state(self) -> bytes:
            return str(self.seen).encode()

    made: list[Counting] = []

    def factory(task: object) -> Counting:
        made.append(Counting(task.processor_state))  # type: ignore[attr-defined]  # an EngineTask
        return made[-1]

    wire = Wire()
    p = Rig(wire=wire, processor_factory=factory)
    d = Rig(wire=wire, processor_factory=factory)
    prompt = tokens_of(1, 9)
    first = p.submit(make_task(prompt, 5, kind=TaskKind.PREFILL))
    p.run()
    state = first.final.handover.processor_state
    assert state == b"1"
    source = KVSource("t.0", "te-p", "1", "p:1")
    second = d.submit(
        make_task(
            prompt, 5, kind=TaskKind.DECODE, output=first.tokens, kv_source=source, processor_state=state
        )
    )
    d.step()
    wire.pump()
    d.run()
    assert made[-1].seen == len(second.tokens)


def test_without_a_transfer_side_only_unified_tasks_are_taken() -> None:
    from flowserve.engine.types import TaskRejected

    rig = Rig()
    with pytest.raises(TaskRejected) as refused:
        rig.submit(make_task([1, 2], kind=TaskKind.PREFILL))
    assert refused.value.error.code is ErrorCode.INVALID_ARGUMENT


def early(pair: Pair, prompt: list[int], max_output: int = 10, **fields: object) -> Answer:
    """A decode submitted while its prefill computes."""
    return pair.decode(prompt, [], max_output, early=True, **fields)


@pytest.mark.parametrize("length", [3, 16, 31, 65])
def test_an_early_decode_copies_chunks_while_the_next_is_computed(length: int) -> None:
    pair = Pair(batch=8)
    prompt = tokens_of(7, length)
    first = pair.prefill(prompt, tell_start=True)
    pair.p.step()
    assert first.first.handover is not None and first.first.finish is None
    assert (first.first.handover.transfer_id, first.first.handover.length) == ("t.0", 0)
    second = early(pair, prompt)
    while first.final is None:
        pair.d.step()
        pair.wire.pump()
        transfer = pair.wire.transfers["t.0"]
        assert pair.wire.pulls[0].copied == len(transfer.announced), "nothing announced is left to copy"
        assert not second.tokens
        pair.p.step()
    pair.d.step()
    pair.wire.pump()
    pair.d.run(second)
    assert first.tokens + second.tokens == expected_output(prompt, 10)[0]
    pair.p.step()
    pair.assert_clean()


def test_an_early_decode_whose_prefill_fails_ends_with_a_retryable_error() -> None:
    pair = Pair(batch=8)
    prompt = tokens_of(1, 40)
    pair.prefill(prompt)
    pair.p.step(2)
    second = early(pair, prompt)
    pair.d.step()
    pair.wire.pump()
    pair.p.engine.abort("t", 0, "client left")
    pair.p.step()
    pair.wire.pump()
    pair.d.run(second)
    assert second.final.error.code is ErrorCode.KV_TRANSFER_FAILED and second.final.error.retryable
    pair.p.step()
    pair.assert_clean()


def test_an_early_decode_that_fails_leaves_the_prefill_to_another() -> None:
    pair = Pair(batch=8)
    prompt = tokens_of(1, 40)
    first = pair.prefill(prompt)
    pair.p.step(2)
    failed = early(pair, prompt)
    pair.d.step()
    pair.wire.pump(fail=True)
    pair.d.run(failed)
    pair.p.run(first)
    assert first.final.finish is FinishReason.HANDOVER
    late = pair.decode(prompt, first.tokens, attempt=1)
    pair.d.step()
    pair.wire.pump()
    pair.d.run(late)
    assert late.tokens == expected_output(prompt, 10)[0]
    pair.p.step()
    pair.assert_clean()


@pytest.mark.parametrize("payload", [b"", b"\xff\xff\xff\xff"])
def test_an_early_decode_without_a_usable_token_is_retried(payload: bytes) -> None:
    pair = Pair()
    prompt = tokens_of(1, 9)
    pair.prefill(prompt)
    second = early(pair, prompt)
    pair.p.run(*(a for k, a in pair.p.answers.items()))
    pair.wire.transfers["t.0"].payload = payload
    pair.d.step()
    pair.wire.pump()
    pair.d.run(second)
    assert second.final.error.code is ErrorCode.KV_TRANSFER_FAILED and second.final.error.retryable
    pair.p.step()
    pair.assert_clean()


def test_an_early_decode_holds_the_block_of_its_first_token() -> None:
    """A prompt that fills its blocks needs one more as soon as the prefill's token is known."""
    pair = Pair(blocks_d=5)
    prompt = tokens_of(1, 16)
    pair.prefill(prompt)
    second = early(pair, prompt, max_output=4)
    pair.d.step()
    assert pair.d.cache.held_blocks == 5
    pair.p.run(*pair.p.answers.values())
    pair.wire.pump()
    pair.d.run(second)
    assert second.final.finish is FinishReason.LENGTH and second.final.timings.preemptions == 0
    pair.p.step()
    pair.assert_clean()
