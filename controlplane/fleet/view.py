"""`FleetView`: every executor this gateway knows, as one thing.

The job executor takes snapshots from it for `scheduling`, submits and aborts through it, and is told of
changes; the gateway lists it. It owns the registry reader and a channel per executor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepflow.v1.worker_pb2 import ExecutorRecord, PrefixSource, StepEvent, SubmitTask, Welcome
from redis.asyncio import Redis

from controlplane.fleet import metrics
from controlplane.fleet.channel import (
    ChannelSettings,
    ExecutorChannel,
    Link,
    LinkUnavailable,
    TaskListener,
)
from controlplane.fleet.member import Member, Unreported
from controlplane.fleet.registry import Registry
from controlplane.scheduling.columns import Columns, Slots
from controlplane.scheduling.prefix import Matches, PrefixIndex
from controlplane.scheduling.types import Policy

EAGER_EXECUTORS = 64
"""Streams are opened at discovery up to so many executors, beyond at first use (ours: a stream costs both
sides a connection and a load report a second)."""

log = logging.getLogger(__name__)


class FleetView:
    """Use inside one event loop; `run` until cancelled."""

    def __init__(
        self,
        redis: Redis,
        settings: ChannelSettings,
        *,
        poll_seconds: float = 1.0,
        eager: int = EAGER_EXECUTORS,
        prefix_blocks: int = 262_144,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = Registry(redis, self._take_records, poll_seconds=poll_seconds)
        self._slots = Slots()
        self.prefixes = PrefixIndex(prefix_blocks, self._slots)
        self.on_change: Callable[[], None] = lambda: None
        """Called when a task that found no executor may find one now."""
        self.on_start: Callable[[ExecutorRecord, float], None] | None = None
        """Called when an executor that began to serve can be sent to, with the time (Unix seconds)."""
        self._settings = settings
        self._eager = eager
        self._clock = clock
        self._wall_clock = wall_clock
        self._began = wall_clock()
        self._members: dict[str, Member] = {}
        self._policy = policy or Policy()
        self._columns: dict[str, Columns] = {}  # per model revision; "" = warm
        self._revision_of: dict[str, str] = {}  # in whose columns an executor stands
        self._stale: set[str] = set()  # executors whose row is behind
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None

    # -- reading -------------------------------------------------------------------------------------

    def executors(self) -> list[dict[str, Any]]:
        """For the HTTP API: record, load and link state of each, by id."""
        now = self._clock()
        return [self._members[te_id].to_json(now) for te_id in sorted(self._members)]

    def cluster_view(self, model_revision: str) -> Columns:
        """The executors that hold the revision, now. Good until the next await."""
        for te_id in self._stale:
            self._refresh(te_id)
        self._stale.clear()
        columns = self._columns.get(model_revision)
        return columns if columns is not None else Columns(self._policy, self._slots)

    def _refresh(self, te_id: str) -> None:
        """Brings one row up to date."""
        member = self._members.get(te_id)
        revision = None if member is None else member.record.model_revision
        before = self._revision_of.get(te_id)
        if before is not None and before != revision:
            columns = self._columns[before]
            columns.remove(te_id)
            if not len(columns):
                del self._columns[before]
            del self._revision_of[te_id]
        if member is None or revision is None:
            return
        if revision not in self._columns:
            self._columns[revision] = Columns(self._policy, self._slots)
        self._columns[revision].put(member.view(self._clock()))
        self._revision_of[te_id] = revision

    def can_serve(self, model_revision: str) -> bool:
        return any(
            member.serves and member.record.model_revision == model_revision
            for member in self._members.values()
        )

    def block_tokens(self, model_revision: str) -> int | None:
        """Tokens per block of the revision's executors; None if they differ or there is none."""
        sizes = {
            member.record.block_tokens
            for member in self._members.values()
            if member.record.model_revision == model_revision and member.record.block_tokens
        }
        return sizes.pop() if len(sizes) == 1 else None

    def cached_blocks(self, hashes: Sequence[bytes]) -> Matches:
        return self.prefixes.match(hashes)

    def prefix_source(self, hashes: Sequence[bytes], block_tokens: int, te_id: str) -> PrefixSource | None:
        """The executor that holds most leading blocks of a prompt, if that is more than what `te_id` does.

        Only one whose stream is up: the others may be gone.
        """
        found = self.prefixes.match(hashes)
        for other, blocks in found.beyond(found.get(te_id, 0)):
            member = self._members.get(other)
            if member is not None and member.serves:
                record = member.record
                return PrefixSource(
                    te_id=record.te_id,
                    incarnation=record.incarnation,
                    address=record.address,
                    tokens=blocks * block_tokens,
                )
        return None

    def link(self, te_id: str) -> Link:
        member = self._members.get(te_id)
        return member.channel.link if member is not None else Link.CLOSED

    # -- tasks ---------------------------------------------------------------------------------------

    def submit(
        self, te_id: str, incarnation: str, task: SubmitTask, listener: TaskListener, *, uncached_tokens: int
    ) -> None:
        """Raises LinkUnavailable if that executor process cannot be sent to now."""
        member = self._members.get(te_id)
        if member is None or member.record.incarnation != incarnation:
            raise LinkUnavailable(f"executor {te_id} is gone")
        member.channel.submit(task, listener)
        tokens = (len(task.prompt_tokens) + len(task.output_tokens)) // 4
        blocks = -(-tokens // (member.record.block_tokens or 16))
        member.submitted((task.task_id, task.attempt), Unreported(self._clock(), uncached_tokens, blocks))
        self._stale.add(te_id)

    def abort(self, te_id: str, task_id: str, attempt: int, reason: str) -> None:
        """Does nothing if the executor is gone: it drops this gateway's tasks with the stream."""
        member = self._members.get(te_id)
        if member is not None:
            member.heard((task_id, attempt))
            self._stale.add(te_id)
            member.channel.abort(task_id, attempt, reason)

    # -- life ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                group.create_task(self._count(), name="fleet-metrics")
                await self.registry.run()
            finally:
                self._group = None
                for task in (*self._runs.values(), *self._closing):
                    task.cancel()

    def _take_records(self, records: Mapping[str, ExecutorRecord]) -> None:
        for te_id, member in list(self._members.items()):
            member.listed = te_id in records
            # A lease can lapse (Redis came back empty) while the stream shows the executor alive.
            if not member.listed and member.channel.link not in (Link.UP, Link.SUSPECT):
                self._remove(te_id)
        for te_id, record in records.items():
            known = self._members.get(te_id)
            if known is not None and known.record.incarnation != record.incarnation:
                if record.started_unix_ms < known.record.started_unix_ms and known.channel.link is Link.UP:
                    continue  # a late write of the process before
                self._remove(te_id)
                known = None
            if known is None:
                self._add(record)
                continue
            changed = known.record != record
            known.record = record
            if changed:
                self._stale.add(te_id)
                self._reached(known)
                self.on_change()

    def _add(self, record: ExecutorRecord) -> None:
        if self._group is None:
            return
        te_id = record.te_id
        channel = ExecutorChannel(
            record,
            self._settings,
            on_welcome=lambda welcome: self._welcomed(channel, welcome),
            on_step=lambda step: self._stepped(channel, step),
            on_link=lambda link: self._link_changed(channel, link),
            clock=self._clock,
            lazy=len(self._members) >= self._eager,
        )
        self._members[te_id] = Member(record, channel)
        self._stale.add(te_id)
        self._runs[te_id] = self._group.create_task(self._run_channel(channel), name=f"channel-{te_id}")
        log.info("executor %s found at %s", te_id, record.address)

    async def _run_channel(self, channel: ExecutorChannel) -> None:
        """A task boundary: one broken channel must not end the others."""
        while True:
            try:
                await channel.run()
            except Exception:  # reported; the channel starts over
                log.exception("the channel to executor %s failed", channel.te_id)
                metrics.LINKS.labels("failed").inc()
                await asyncio.sleep(self._settings.backoff_max)

    def _remove(self, te_id: str) -> None:
        log.info("executor %s (%s) left", te_id, self._members[te_id].record.address)
        del self._members[te_id]
        self.prefixes.drop(te_id)
        self._refresh(te_id)
        self._slots.release(te_id)
        task = self._runs.pop(te_id)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        task.cancel()

    def _member_of(self, channel: ExecutorChannel) -> Member | None:
        """None for a channel whose executor was replaced or left."""
        member = self._members.get(channel.te_id)
        return member if member is not None and member.channel is channel else None

    def _welcomed(self, channel: ExecutorChannel, welcome: Welcome) -> None:
        member = self._member_of(channel)
        if member is not None:
            member.reported(welcome.load, self._clock())
            self._stale.add(channel.te_id)

    def _stepped(self, channel: ExecutorChannel, step: StepEvent) -> None:
        te_id, member = channel.te_id, self._member_of(channel)
        if member is None:
            return
        self._stale.add(te_id)
        if member.awaits:  # a step of running tasks alone, the common one, is not looked through
            for delta in step.deltas:
                member.heard((delta.task_id, delta.attempt))
        if step.HasField("kv_events"):
            events = step.kv_events
            if not self.prefixes.apply(
                te_id, events.sequence, events.stored, events.removed, cleared=events.cleared
            ):
                metrics.PREFIX_GAPS.inc()
        if step.HasField("load"):
            was_draining = member.draining
            member.reported(step.load, self._clock())
            if member.draining != was_draining:
                self.registry.look()
            self.on_change()

    def _link_changed(self, channel: ExecutorChannel, link: Link) -> None:
        member = self._member_of(channel)
        if member is None:
            return
        self._stale.add(channel.te_id)
        if link in (Link.DOWN, Link.CLOSED):
            member.lost()
            self.prefixes.drop(channel.te_id)
            self.registry.look()  # a new incarnation may be registered already
        self._reached(member)
        self.on_change()

    def _reached(self, member: Member) -> None:
        seconds = member.reached(self._wall_clock(), self._began)
        if seconds is not None:
            path = member.record.start_path or "cold"
            metrics.ACTUATION.labels("scaler_post", path).observe(seconds)
            if self.on_start is not None:
                self.on_start(member.record, self._wall_clock())
            log.info("executor %s can be sent to %.3f s after it was ready", member.record.te_id, seconds)

    async def _count(self) -> None:
        while True:
            links = Counter(member.channel.link for member in self._members.values())
            for link in Link:
                metrics.EXECUTORS.labels(str(link)).set(links.get(link, 0))
            metrics.PREFIX_BLOCKS.set(len(self.prefixes))
            with contextlib.suppress(TimeoutError):
                await asyncio.sleep(1)
