"""Two engines with tiny pools under random tasks, aborts and faults. Needs nothing.

Whatever happens: each attempt ends exactly once, its tokens are a prefix of the undisturbed answer
(all of it if it ends well), and in the end no block is held.
"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from flowserve.engine.config import EngineConfig
from flowserve.engine.types import FinishReason, KVSource, Role, SamplingParams, TaskKind, TaskRejected
from tests.support.engine import Answer, Rig, Wire, expected_output, make_task, tokens_of

ENDED_WELL = {FinishReason.STOP, FinishReason.LENGTH}
LIMIT = 40  # tokens the smaller pool holds


class EnginesMachine(RuleBasedStateMachine):
    @property
    def rigs(self) -> tuple[Rig, Rig]:
        return (self.p, self.d)

    def __init__(self) -> None:
        super().__init__()
        self.wire = Wire()
        config = EngineConfig(max_tasks=10, max_running=5, max_batch_tokens=12)
        self.p = Rig(12, wire=self.wire, config=config)
        self.d = Rig(10, wire=self.wire, config=config, clock=self.p.clock, host_bytes=4 * 32)
        self.number = 0
        self.prompts: dict[str, tuple[list[int], int]] = {}
        self.open: list[tuple[Rig, str, Answer]] = []

    def submit(self, rig: Rig, task_id: str, kind: TaskKind, **fields: object) -> None:
        prompt, max_output = self.prompts[task_id]
        try:
            answer = rig.submit(make_task(prompt, max_output, task_id=task_id, kind=kind, **fields))
        except TaskRejected as refused:
            assert refused.error.retryable, refused
            return
        self.open.append((rig, task_id, answer))

    @rule(
        kind=st.sampled_from([TaskKind.UNIFIED, TaskKind.PREFILL]),
        on=st.integers(0, 1),
        shared=st.integers(0, 3),
        own=st.integers(1, 9),
        max_output=st.integers(0, 12),
        priority=st.integers(0, 1),
        timed=st.booleans(),
        owner=st.sampled_from(["a", "b"]),
        scored=st.booleans(),
    )
    def new_task(
        self, kind: TaskKind, on: int, shared: int, own: int, max_output: int, priority: int, timed: bool,
        owner: str, scored: bool,
    ) -> None:  # fmt: skip
        self.number += 1
        task_id = f"t{self.number}"
        prompt = tokens_of(99, shared * 5) + tokens_of(self.number % 4, own)
        self.prompts[task_id] = (prompt, max_output)
        rig = self.rigs[on]
        self.submit(
            rig,
            task_id,
            kind,
            priority=priority,
            deadline=rig.clock.now + 0.3 if timed else None,
            owner=owner,
            sampling=SamplingParams(temperature=0.0, prompt_logprobs=0 if scored else None),
        )

    @rule(turns=st.integers(1, 6))
    def turn(self, turns: int) -> None:
        for _ in range(turns):
            for rig in self.rigs:
                rig.step()
        self.collect()

    @rule(blocks=st.integers(1, 4), fail=st.booleans())
    def transfer(self, blocks: int, fail: bool) -> None:
        self.wire.pump(blocks=blocks, fail=fail)

    @rule()
    def transfer_all(self) -> None:
        self.wire.pump()

    @rule()
    def lease_ends(self) -> None:
        self.wire.expire()

    @rule(hold=st.booleans())
    def hold_releases(self, hold: bool) -> None:
        self.wire.hold_releases = hold

    @rule(on=st.integers(0, 1))
    def executor_fails(self, on: int) -> None:
        self.rigs[on].executor.fail_next = 1

    @rule(role=st.sampled_from(list(Role)), on=st.integers(0, 1))
    def role_changes(self, role: Role, on: int) -> None:
        self.rigs[on].engine.set_role(role)

    @precondition(lambda self: self.open)
    @rule(pick=st.integers(0, 100))
    def abort(self, pick: int) -> None:
        rig, task_id, _ = self.open[pick % len(self.open)]
        rig.engine.abort(task_id, 0)

    @precondition(lambda self: self.prompts)
    @rule(pick=st.integers(0, 100), on=st.integers(0, 1))
    def abort_anything(self, pick: int, on: int) -> None:
        self.rigs[on].engine.abort(list(self.prompts)[pick % len(self.prompts)], 0)

    @rule(on=st.integers(0, 1), owner=st.sampled_from(["a", "b"]))
    def owner_is_lost(self, on: int, owner: str) -> None:
        self.rigs[on].engine.abort_owner(owner)

    def collect(self) -> None:
        """Checks what has ended; hands over what is on offer to the other engine."""
        for rig in self.rigs:
            audit = rig.engine.audit()
            assert audit.leaked_blocks == 0
        still = []
        ended, self.open = self.open, still
        for rig, task_id, answer in ended:
            if answer.final is None:
                still.append((rig, task_id, answer))
                continue
            self.check(rig, task_id, answer)
            if answer.final.finish is FinishReason.HANDOVER:
                other = self.d if rig is self.p else self.p
                source = KVSource(f"{task_id}.0", "te", "1", "h:1")
                if (task_id, 0) not in other.answers:
                    self.submit(other, task_id, TaskKind.DECODE, output=answer.tokens, kv_source=source)

    def check(self, rig: Rig, task_id: str, answer: Answer) -> None:
        prompt, max_output = self.prompts[task_id]
        limit = rig.cache.num_blocks * 4
        expected, _ = expected_output(prompt, max_output, limit) if max_output else ([], None)
        if answer.final.finish in ENDED_WELL:
            assert answer.tokens == expected, f"{task_id}: wrong tokens"
        else:
            assert answer.tokens == expected[: len(answer.tokens)], f"{task_id}: wrong tokens"
        if answer.first is not None and answer.first.prompt_logprobs is not None:
            assert [s.token for s in answer.first.prompt_logprobs[1:]] == prompt[1:]

    def teardown(self) -> None:
        self.wire.hold_releases = False
        for turn in range(900):
            self.wire.pump()
            if turn % 100 == 99:  # offers whose decode task was refused hold blocks until their lease ends
                self.wire.expire()
            for rig in self.rigs:
                rig.executor.fail_next = 0
                rig.step()
            self.collect()
            if not self.open and not self.wire.pulls:
                break
        assert not self.open, [(task_id, str(rig.engine.load())) for rig, task_id, _ in self.open]
        self.wire.expire()
        for rig in self.rigs:
            rig.assert_clean()
            rig.cache.close()
        assert all(transfer.released for transfer in self.wire.transfers.values())


TestEngines = EnginesMachine.TestCase
TestEngines.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
