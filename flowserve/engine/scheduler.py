"""What the next step runs: one pass over the tasks, which reads as the policy.

    running decodes      every sequence that has its KV and streams tokens moves by one token
    prefills under way   in chunks, within the step's token and time budget
    admission            by priority, then first come first served; holds all blocks of its tokens at once

When a decode finds no block, sequences behind it in that order lose theirs and are recomputed later,
the last one first. The order is total and a sequence never loses blocks to one behind it, so the
first one always moves on: no livelock. A prefill whose blocks are announced to a peer is never
preempted; it ends soon by itself.

The pass does no I/O and reads no clock. It moves sequences between its two lists and takes blocks
from the cache; everything towards peers and gateways is left in the plan for the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flowserve.engine.budget import CostModel, StepBudget
from flowserve.engine.config import EngineConfig
from flowserve.engine.sequence import Sequence, State
from flowserve.engine.types import Role, TaskKind
from flowserve.rtc import RTC, PrefixMatch

DECODE_ROLE_SHARE = 0.5
"""Part of the step time that prefills get on an executor that prefers decode (ours): half the wait
between two tokens of a running stream."""

_PREFERRED = {
    Role.PREFILL: {TaskKind.PREFILL},
    Role.DECODE: {TaskKind.DECODE},
    Role.COLOCATED: set[TaskKind](),
}


@dataclass(frozen=True, slots=True)
class Work:
    """`count` tokens of `sequence` from position `start` on; `sample`: draw the token that follows."""

    sequence: Sequence
    start: int
    count: int
    sample: bool


@dataclass(slots=True)
class Plan:
    """One step. Lists hold what the engine still has to do for sequences this pass has moved."""

    work: list[Work] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)  # hold blocks since this pass
    populates: list[tuple[Sequence, PrefixMatch]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(work.count for work in self.work)


class Scheduler:
    """Owns the waiting and the running list (`running`: everything that holds blocks)."""

    def __init__(self, cache: RTC, config: EngineConfig, costs: CostModel) -> None:
        self._cache = cache
        self._config = config
        self._costs = costs
        self.role = Role.COLOCATED
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    def schedule(self, now: float) -> Plan:
        plan = Plan()
        share = DECODE_ROLE_SHARE if self.role is Role.DECODE else 1.0
        budget = StepBudget(
            self._costs,
            self._config.max_batch_tokens,
            self._config.chunk_seconds * share,
            min_chunk=self._cache.block_tokens,
        )
        self._run_decodes(plan, budget)
        self._run_prefills(plan, budget)
        self._admit(plan, budget, now)
        return plan

    # -- the lists -------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence; its blocks are the caller's."""
        for group in (self.waiting, self.running):
            if sequence in group:
                group.remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Takes the blocks away; the sequence waits to be recomputed from its token ids."""
        self._cache.free(sequence.reset())
        sequence.preemptions += 1
        self.running.remove(sequence)
        self.waiting.append(sequence)

    def _order(self, sequence: Sequence) -> tuple[int, float, int]:
        """Priority, then arrival (moved ahead for kinds the role prefers), then number."""
        bonus = self._config.role_bonus_seconds if sequence.kind in _PREFERRED[self.role] else 0.0
        return (-sequence.task.priority, sequence.arrival - bonus, sequence.number)

    # -- running ---------------------------------------------------------------------------------

    def _run_decodes(self, plan: Plan, budget: StepBudget) -> None:
        for sequence in sorted(self.running, key=self._order):
            if sequence.state is not State.RUNNING or sequence.remaining != 1:
                continue
            if budget.full:
                return
            if self._grow(sequence, plan):
                self._put(plan, budget, sequence, 1)

    def _grow(self, sequence: Sequence, plan: Plan) -> bool:
        """Makes room for the next token's KV. False: the sequence itself had to give way."""
        while len(sequence.blocks) * self._cache.block_tokens < len(sequence.tokens):
            block = self._cache.append_block(sequence.blocks)
            if block is not None:
                sequence.blocks.append(block)
                continue
            victim = self._victim(sequence)
            self.preempt(victim)
            plan.preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def _victim(self, requester: Sequence) -> Sequence:
        """The last in order that may lose its blocks: the requester itself, if nobody behind it may."""
        behind = [
            sequence
            for sequence in self.running
            if sequence.state is State.RUNNING
            and sequence.transfer_id is None
            and self._order(sequence) > self._order(requester)
        ]
        return max(behind, key=self._order, default=requester)

    def _run_prefills(self, plan: Plan, budget: StepBudget) -> None:
        for sequence in sorted(self.running, key=self._order):
            if sequence.state is State.RUNNING and sequence.remaining > 1:
                count = self._chunk(budget, sequence, sequence.computed)
                if count:
                    self._put(plan, budget, sequence, count)

    def _chunk(self, budget: StepBudget, sequence: Sequence, start: int) -> int:
        """Tokens to compute now from `start` on. All but the last chunk end with a full block."""
        remaining = len(sequence.tokens) - start
        if sequence.logprobs_pending() and start < len(sequence.prompt):
            remaining = len(sequence.prompt) - start  # scores are of prompt tokens: a chunk of its own
        if not self._config.chunked_prefill:
            return remaining
        count = budget.chunk(start, remaining)
        if count < remaining:
            aligned = count - (start + count) % self._cache.block_tokens
            count = aligned if aligned > 0 else count
        return count

    def _put(self, plan: Plan, budget: StepBudget, sequence: Sequence, count: int) -> None:
        start = sequence.computed
        last = start + count == len(sequence.tokens)
        plan.work.append(Work(sequence, start, count, sample=last and sequence.wants_tokens))
        budget.take(start, count)

    # -- admission -------------------------------------------------------------------------------

    def _admit(self, plan: Plan, budget: StepBudget, now: float) -> None:
        if not self.waiting or plan.preempted:  # who was just preempted would only be preempted again
            return
        coming = self._coming_identities()
        for sequence in sorted(self.waiting, key=self._order):
            if len(self.running) >= self._config.max_running:
                return
            found = self._match(sequence)
            match = self._worth_populating(found)
            if not sequence.pulls and self._waits_for_prefix(sequence, match, coming, now):
                continue
            start = len(match) * self._cache.block_tokens
            count = 0 if sequence.pulls else self._chunk(budget, sequence, start)
            if not sequence.pulls and count == 0:
                continue  # no time left in this step; pulls behind it cost none
            table = self._reserve(sequence, match)
            if table is None:
                return  # blocks go to the first in order, or a long prompt would starve
            if match is not found:
                self._cache.decline_populate(found)
            self._start(sequence, table, match, now, plan)
            if sequence.state is State.RUNNING:
                self._put(plan, budget, sequence, count)
                coming.update(self._uncomputed(sequence))

    def _match(self, sequence: Sequence) -> PrefixMatch:
        """Preserved KV it may start from: at least its last token stays, or there would be no logit."""
        if not self._config.enable_prefix_cache or sequence.logprobs_pending():
            return PrefixMatch()
        self.identify(sequence)
        usable = sequence.pull_length if sequence.pulls else len(sequence.tokens) - 1
        match = self._cache.match_identities(sequence.identities[: usable // self._cache.block_tokens])
        return match.device_prefix() if sequence.pulls else match

    def _worth_populating(self, match: PrefixMatch) -> PrefixMatch:
        """The match, cut before what is computed sooner than it is brought back to the device."""
        if match.on_device:
            return match
        first = match.blocks.index(None)
        step = self._cache.block_tokens
        computing = self._costs.prefill_seconds(
            first * step, (len(match) - first) * step, self._config.chunk_seconds
        )
        if computing is None or self._cache.populate_seconds(match) <= computing:
            return match
        return match.first(first)

    def _reserve(self, sequence: Sequence, match: PrefixMatch) -> list[int] | None:
        coming = int(sequence.pulls and sequence.task.early)  # the prefill's token
        total = -(-(len(sequence.tokens) + coming) // self._cache.block_tokens)
        new = total - len(match)
        reserve = 0
        if self.running:
            reserve = max(1, int(self._cache.num_blocks * self._config.admission_reserve))
        from_host = sum(1 for block in match.blocks if block is None)
        if new + from_host + reserve > self._cache.available(match):
            return None
        return self._cache.alloc_blocks(new, match)

    def _start(
        self, sequence: Sequence, table: list[int], match: PrefixMatch, now: float, plan: Plan
    ) -> None:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        plan.admitted.append(sequence)
        sequence.blocks = table
        sequence.computed = len(match) * self._cache.block_tokens
        sequence.committed = len(match)
        sequence.last_progress = now
        if sequence.first_scheduled is None:
            sequence.first_scheduled = now
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(sequence.computed, len(sequence.prompt))
        if sequence.pulls:
            sequence.state = State.PULLING
        elif not match.on_device:
            sequence.state = State.POPULATING
            plan.populates.append((sequence, match))
        else:
            sequence.state = State.RUNNING

    # -- prefixes --------------------------------------------------------------------------------

    def identify(self, sequence: Sequence) -> None:
        """Brings the identities of a sequence's full blocks up to its tokens."""
        step = self._cache.block_tokens
        known = len(sequence.identities)
        if len(sequence.tokens) // step > known:
            task = sequence.task
            sequence.extend_identities(
                self._cache.identities(
                    sequence.tokens[known * step :],
                    adapter_id=task.adapter_id,
                    salt=task.cache_salt,
                    parent=sequence.identities[-1] if known else None,
                )
            )

    def _uncomputed(self, sequence: Sequence) -> list[bytes]:
        return sequence.identities[sequence.computed // self._cache.block_tokens :]

    def _coming_identities(self) -> set[bytes]:
        """Blocks that prefills which hold their blocks will have computed, or brought, soon."""
        if not self._config.enable_prefix_cache:
            return set()
        coming: set[bytes] = set()
        for sequence in self.running:
            if sequence.state in (State.RUNNING, State.POPULATING) and sequence.remaining > 1:
                self.identify(sequence)
                coming.update(self._uncomputed(sequence))
        return coming

    def _waits_for_prefix(
        self, sequence: Sequence, match: PrefixMatch, coming: set[bytes], now: float
    ) -> bool:
        """Whether the next block it lacks is being computed by another (n choices of one prompt)."""
        if not self._config.enable_prefix_cache or sequence.logprobs_pending():
            return False
        usable = (len(sequence.tokens) - 1) // self._cache.block_tokens
        if len(match) >= usable or sequence.identities[len(match)] not in coming:
            return False
        if sequence.prefix_wait_since is None:
            sequence.prefix_wait_since = now
        return now - sequence.prefix_wait_since < self._config.prefix_wait_seconds
