"""The ledger of KV transfers: which blocks a peer may still read from, or write into, and until when.

Blocks leave it in exactly one way per direction: an offer's when `release_transfer` comes, a pull's
when `pull_done` comes, however the task itself ended meanwhile. Freeing earlier is how other engines
corrupt memory; never freeing is how they leak it (FlowKV section B3). Engine's thread only.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import TypeVar

from flowserve.engine.sequence import Sequence, SequenceProcessor
from flowserve.engine.types import EngineTask, ErrorCode, Handover, KVHandover, PullRequest, TaskError

log = logging.getLogger(__name__)

T = TypeVar("T")

_TOKEN = struct.Struct("<I")


class HandoverFailed(Exception):
    """The transfer side refused; `error` is what the task ends with."""

    def __init__(self, error: TaskError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(slots=True)
class Offer:
    """KV on offer to a peer. `blocks` is None while the sequence holds them itself."""

    transfer_id: str
    sequence: Sequence
    lease_seconds: float
    since: float
    blocks: list[int] | None = None
    withdrawn: bool = False
    staged: list[int] = field(default_factory=list)  # copies that the peer reads instead of blocks


@dataclass(slots=True)
class Pull:
    """A peer's KV on its way in. `quarantined`: the task has ended, its blocks are still written to."""

    sequence: Sequence
    since: float
    quarantined: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Continuation:
    """What an early decode needs beside the KV: the token its prefill sampled, the processor's state."""

    token: int
    processor_state: bytes = b""

    def encode(self) -> bytes:
        return _TOKEN.pack(self.token) + self.processor_state

    @classmethod
    def decode(cls, payload: bytes) -> Continuation:
        """Raises ValueError for a payload without a token."""
        if len(payload) < _TOKEN.size:
            raise ValueError("the prefill's executor sent no token with its KV")
        (token,) = _TOKEN.unpack_from(payload)
        return cls(token, payload[_TOKEN.size :])


def transfer_id_of(key: tuple[str, int]) -> str:
    return f"{key[0]}.{key[1]}"


def continue_after(
    sequence: Sequence,
    payload: bytes,
    vocab_size: int,
    make_processor: Callable[[EngineTask], SequenceProcessor | None],
) -> TaskError | None:
    """Takes the prefill's token and processor into an early decode. The error to end it with, if any."""
    try:
        come = Continuation.decode(payload)
        if come.token >= vocab_size:
            raise ValueError(f"the prefill's token {come.token} is outside of the vocabulary of {vocab_size}")
        if come.processor_state:
            sequence.processor = make_processor(replace(sequence.task, processor_state=come.processor_state))
    except ValueError as problem:
        return TaskError(ErrorCode.KV_TRANSFER_FAILED, str(problem), retryable=True)
    sequence.output.append(come.token)
    sequence.tokens.append(come.token)
    return None


class TransferLedger:
    """Offers and pulls that have not had their terminal event."""

    def __init__(
        self,
        handover: KVHandover | None,
        block_tokens: int,
        stage: Callable[[Seq[int]], tuple[list[int], list[int]]],
    ) -> None:
        """`stage` says which blocks a peer should read in place of some, and which of them are copies."""
        self._handover = handover
        self._stage = stage
        self._block_tokens = block_tokens
        self.offers: dict[str, Offer] = {}
        self.pulls: dict[tuple[str, int], Pull] = {}

    @property
    def can_hand_over(self) -> bool:
        return self._handover is not None

    def held_blocks(self) -> Iterator[int]:
        """Blocks that no living sequence answers for."""
        for offer in self.offers.values():
            yield from offer.blocks or ()
            yield from offer.staged
        for pull in self.pulls.values():
            yield from pull.quarantined or ()

    # -- out -------------------------------------------------------------------------------------

    def offer(self, sequence: Sequence, now: float) -> Offer:
        """Opens the transfer of a prefill that starts. Raises HandoverFailed."""
        transfer_id = transfer_id_of(sequence.key)
        lease = self._call("offer", lambda to: to.offer(transfer_id, sequence.task))
        offer = self.offers[transfer_id] = Offer(transfer_id, sequence, lease, now)
        sequence.transfer_id = transfer_id
        return offer

    def announce(self, sequence: Sequence, final: bool) -> None:
        """Tells the peer which blocks it may read now. Raises HandoverFailed.

        Only full blocks before the end, so that no block is announced twice or changes afterwards.
        """
        transfer_id = self._open(sequence)
        step = self._block_tokens
        upto = -(-sequence.computed // step) if final else sequence.computed // step
        first = sequence.announced
        if upto <= first:
            return
        blocks, staged = self._stage(sequence.blocks[first:upto])
        self.offers[transfer_id].staged += staged
        tokens = min(sequence.computed, upto * step)
        self._call("announce", lambda to: to.announce(transfer_id, first, tuple(blocks), tokens))
        sequence.announced = upto

    def complete(self, sequence: Sequence) -> Handover:
        """The whole KV is in place; the lease runs from now on. Raises HandoverFailed."""
        transfer_id = self._open(sequence)
        length = sequence.computed
        state = sequence.processor.state() if sequence.processor is not None else b""
        payload = Continuation(sequence.output[-1], state).encode()
        self._call("complete", lambda to: to.complete(transfer_id, length, payload))
        return Handover(transfer_id, length, self.offers[transfer_id].lease_seconds, state)

    def leave(self, sequence: Sequence, withdraw_reason: str | None) -> bool:
        """The sequence has ended. True: its blocks stay here until released (or nobody needs them).

        `withdraw_reason` None = handed over; else the peer is told of the failure.
        """
        offer = self.offers.get(sequence.transfer_id or "")
        if offer is None:
            return False
        offer.blocks, sequence.blocks = sequence.blocks, []
        if withdraw_reason is not None:
            self.withdraw(offer, withdraw_reason)
        return True

    def withdraw(self, offer: Offer, reason: str) -> None:
        """Asks for the transfer's end; the blocks stay until `release`."""
        if offer.withdrawn:
            return
        offer.withdrawn = True
        try:
            self._call("withdraw", lambda to: to.withdraw(offer.transfer_id, reason))
        except HandoverFailed as failure:
            log.error("transfer %s cannot be withdrawn: %s", offer.transfer_id, failure)

    def release(self, transfer_id: str) -> Offer | None:
        """The transfer's terminal event; the caller frees `blocks`. None if it had ended before."""
        return self.offers.pop(transfer_id, None)

    # -- in --------------------------------------------------------------------------------------

    def start_pull(self, sequence: Sequence, skip_blocks: int, now: float) -> None:
        """Raises HandoverFailed."""
        task = sequence.task
        if task.kv_source is None:
            raise AssertionError("checked at submit")
        length = sequence.pull_length
        blocks = tuple(sequence.blocks[: -(-length // self._block_tokens)])
        request = PullRequest(
            task.task_id, task.attempt, task.kv_source, blocks, length, skip_blocks, task.deadline
        )
        self._call("start_pull", lambda to: to.start_pull(request))
        self.pulls[sequence.key] = Pull(sequence, now)

    def cancel_pull(self, sequence: Sequence) -> None:
        """The task ended while pulling: its blocks are quarantined until `pull_done`."""
        pull = self.pulls[sequence.key]
        pull.quarantined, sequence.blocks = sequence.blocks, []
        task = sequence.task
        try:
            self._call("cancel_pull", lambda to: to.cancel_pull(task.task_id, task.attempt))
        except HandoverFailed as failure:
            log.error("pull of %s cannot be cancelled: %s", sequence.key, failure)

    def pull_done(self, key: tuple[str, int]) -> Pull | None:
        """The pull's terminal event. None if it had ended before."""
        return self.pulls.pop(key, None)

    # -- inside ----------------------------------------------------------------------------------

    def _open(self, sequence: Sequence) -> str:
        """Its transfer id. Raises HandoverFailed where the peer side ended the transfer early."""
        if sequence.transfer_id is None or sequence.transfer_id not in self.offers:
            raise HandoverFailed(
                TaskError(
                    ErrorCode.KV_TRANSFER_FAILED, "the transfer ended before its prefill", retryable=True
                )
            )
        return sequence.transfer_id

    def _call(self, what: str, call: Callable[[KVHandover], T]) -> T:
        if self._handover is None:
            raise HandoverFailed(TaskError(ErrorCode.INVALID_ARGUMENT, "this executor has no KV transfer"))
        try:
            return call(self._handover)
        except Exception as error:  # a task boundary: one transfer fails, the step goes on
            log.exception("KV handover: %s failed", what)
            raise HandoverFailed(
                TaskError(ErrorCode.KV_TRANSFER_FAILED, f"{what} failed: {error}", retryable=True)
            ) from error
