"""What one gateway is still to be told: deltas merged per task, exact KV events, a load report.

The engine never waits for a gateway. While one reads slowly its deltas grow together (bounded by
tasks times tokens), and its KV events, once they are too many, are dropped and replaced by a new
snapshot. On the event loop's thread only; the one reader is the stream's writer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
from collections import deque

from flowserve.engine.types import KVEvents, TaskDelta
from flowserve.shell import metrics

# Identities that may wait: 1 MiB of 16 bytes. A snapshot of a pool of 65,536 blocks is not larger.
KV_BACKLOG = 1 << 16
# Deltas that may wait before no further submit is read from the gateway (a refusal is a delta too):
# eight times the engine's default bound of tasks.
MAX_DELTAS = 2048
# Values (tokens, log-probabilities) of one message; about 10 bytes each, so far below gRPC's limit.
MESSAGE_VALUES = 1 << 20

Key = tuple[str, int]


class KVState(enum.Enum):
    NEEDS_SNAPSHOT = "needs_snapshot"  # events are dropped: the snapshot to come includes them
    SNAPSHOTTING = "snapshotting"  # events are kept: some follow the snapshot
    FOLLOWING = "following"


class Outbox:
    """Filled by the engine's events, emptied by `take_deltas` and `take_kv`."""

    def __init__(self, kv_backlog: int = KV_BACKLOG) -> None:
        self._deltas: dict[Key, TaskDelta] = {}
        self._earlier: list[TaskDelta] = []  # could not be merged with what came after them
        self._kv: deque[KVEvents] = deque()
        self._kv_size = 0
        self._kv_backlog = kv_backlog
        self._kv_removed: set[bytes] = set()  # of the last entry, which may still grow
        self._kv_next: int | None = None  # number of the change that must come next
        self.kv_state = KVState.NEEDS_SNAPSHOT
        self.kv_reason = "connect"
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    # -- waiting ---------------------------------------------------------------------------------

    def poke(self) -> None:
        """Wakes the writer: there is something to send."""
        self._wake.set()

    async def wait(self, timeout: float) -> None:
        """Returns when something was added since the last `wait`, or after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()

    async def room(self) -> None:
        """Returns when another refusal can be held."""
        await self._room.wait()

    @property
    def empty(self) -> bool:
        return not (self._deltas or self._earlier or self._kv)

    def __len__(self) -> int:
        """Merged deltas that wait."""
        return len(self._deltas) + len(self._earlier)

    # -- deltas ----------------------------------------------------------------------------------

    def add_delta(self, delta: TaskDelta) -> None:
        """Takes a delta in; the caller's object stays as it is."""
        key = (delta.task_id, delta.attempt)
        held = self._deltas.get(key)
        if held is not None and not _follows(held, delta):
            self._earlier.append(self._deltas.pop(key))
            held = None
        if held is None:
            self._deltas[key] = _copy(delta)
            metrics.OUTBOX_DELTAS.inc()
        else:
            _merge(held, delta)
        if len(self) >= MAX_DELTAS:
            self._room.clear()
        self._wake.set()

    def take_deltas(self, values: int = MESSAGE_VALUES) -> list[TaskDelta]:
        """Deltas in the order their tasks were first heard of, about `values` values; the rest waits."""
        taken: list[TaskDelta] = []
        size = 0
        while (self._earlier or self._deltas) and (not taken or size < values):
            delta = self._earlier.pop(0) if self._earlier else self._deltas.pop(next(iter(self._deltas)))
            size += _size(delta)
            taken.append(delta)
        metrics.OUTBOX_DELTAS.dec(len(taken))
        if len(self) < MAX_DELTAS:
            self._room.set()
        return taken

    def close(self) -> None:
        """The stream is gone: what waits is dropped, nobody waits for room."""
        metrics.OUTBOX_DELTAS.dec(len(self))
        self._deltas.clear()
        self._earlier.clear()
        self._drop_kv()
        self._room.set()

    # -- KV events -------------------------------------------------------------------------------

    def add_kv(self, events: KVEvents) -> None:
        """The next changes. A gap, or too many that wait, ends in a new snapshot."""
        if self.kv_state is KVState.NEEDS_SNAPSHOT:
            return
        if self._kv_next is not None and not events.cleared and events.sequence != self._kv_next:
            if events.sequence > self._kv_next:
                self.restart_kv("gap")
            return  # else the snapshot included it: the event was on its way meanwhile
        if self._kv_size + _kv_size(events) > self._kv_backlog:
            self.restart_kv("slow_reader")
            return
        self._kv_next = events.sequence if events.cleared else events.sequence + _kv_size(events)
        self._append_kv(events)
        self._wake.set()

    def restart_kv(self, reason: str) -> None:
        """Everything said before is void; a snapshot has to be taken."""
        self._drop_kv()
        self.kv_state = KVState.NEEDS_SNAPSHOT
        self.kv_reason = reason
        self._wake.set()

    def begin_snapshot(self) -> None:
        """A snapshot is being taken: from now on events are kept, for those that it does not include."""
        self._drop_kv()
        self.kv_state = KVState.SNAPSHOTTING

    def finish_snapshot(self, snapshot: KVEvents) -> None:
        """`snapshot` has `cleared` set; its `sequence` is the number of the first change after it."""
        if self.kv_state is not KVState.SNAPSHOTTING:
            return  # restarted meanwhile: the next snapshot counts
        later = [events for events in self._kv if events.sequence >= snapshot.sequence]
        self._drop_kv()
        metrics.KV_RESYNCS.labels(self.kv_reason).inc()
        self.kv_state = KVState.FOLLOWING
        self._kv_next = snapshot.sequence
        self._kv.append(snapshot)  # its size does not count: it is what a slow reader gets instead
        for events in later:
            self.add_kv(events)
        self._wake.set()

    def take_kv(self) -> KVEvents | None:
        """The next message's worth of changes; more may wait."""
        if self.kv_state is not KVState.FOLLOWING or not self._kv:
            return None
        events = self._kv.popleft()
        if not events.cleared:
            self._kv_size -= _kv_size(events)
        if not self._kv:
            self._kv_removed.clear()
        return events

    def _append_kv(self, events: KVEvents) -> None:
        self._kv_size += _kv_size(events)
        last = self._kv[-1] if self._kv else None
        # A message is read as (held | stored) - removed, so what was removed and is stored again
        # needs a message of its own. While a snapshot is taken nothing is merged: it cuts between.
        if (
            last is not None
            and self.kv_state is KVState.FOLLOWING
            and not last.cleared
            and not events.cleared
            and self._kv_removed.isdisjoint(events.stored)
        ):
            last.stored.extend(events.stored)
            last.removed.extend(events.removed)
            self._kv_removed.update(events.removed)
            return
        self._kv.append(KVEvents(events.sequence, list(events.stored), list(events.removed), events.cleared))
        self._kv_removed = set(events.removed)

    def _drop_kv(self) -> None:
        self._kv.clear()
        self._kv_removed.clear()
        self._kv_size = 0
        self._kv_next = None


def _copy(delta: TaskDelta) -> TaskDelta:
    return dataclasses.replace(
        delta,
        tokens=list(delta.tokens),
        logprobs=None if delta.logprobs is None else list(delta.logprobs),
    )


def _follows(held: TaskDelta, delta: TaskDelta) -> bool:
    """Whether both can be said as one delta."""
    if held.finish is not None:
        return False
    if not held.tokens or not delta.tokens:
        return True
    contiguous = held.start_index + len(held.tokens) == delta.start_index
    return contiguous and (held.logprobs is None) == (delta.logprobs is None)


def _merge(held: TaskDelta, delta: TaskDelta) -> None:
    if delta.tokens:
        if not held.tokens:
            held.start_index = delta.start_index
        held.tokens.extend(delta.tokens)
        if delta.logprobs is not None:
            if held.logprobs is None:
                held.logprobs = []
            held.logprobs.extend(delta.logprobs)
    held.finish = delta.finish or held.finish
    held.error = delta.error or held.error
    held.handover = delta.handover or held.handover
    held.timings = delta.timings or held.timings
    if delta.cached_tokens is not None:
        held.cached_tokens = delta.cached_tokens
    if delta.prompt_logprobs is not None:
        held.prompt_logprobs = delta.prompt_logprobs


def _size(delta: TaskDelta) -> int:
    entries = [*(delta.logprobs or ()), *(entry for entry in delta.prompt_logprobs or () if entry)]
    return 1 + len(delta.tokens) + sum(3 + 2 * len(entry.top) for entry in entries)


def _kv_size(events: KVEvents) -> int:
    return len(events.stored) + len(events.removed)
