"""One executor as this gateway knows it: record, last load report, and what was submitted since.

A load report is older than the submits on their way. Until the executor has said something about a task
(or long enough has passed for a report to include it) its needs are added to the report, so that a burst
of placements does not land on one executor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepflow.v1 import common_pb2, worker_pb2
from deepflow.v1.worker_pb2 import ExecutorRecord, ExecutorState

from controlplane.fleet.channel import ExecutorChannel, Link
from controlplane.scheduling.types import ExecutorView, Role

REPORTED_AFTER_SECONDS = 1.0
"""A report that came this long after a submit includes it: executors report at every step, below 0.5 s."""

_ROLES = {
    common_pb2.ROLE_UNSPECIFIED: Role.COLOCATED,
    common_pb2.ROLE_COLOCATED: Role.COLOCATED,
    common_pb2.ROLE_PREFILL: Role.PREFILL,
    common_pb2.ROLE_DECODE: Role.DECODE,
}
_READY_STATES = (worker_pb2.EXECUTOR_STATE_READY,)


@dataclass(frozen=True, slots=True)
class Unreported:
    """A submitted task that the load report does not include yet."""

    at: float
    prefill_tokens: int
    blocks: int


class Member:
    def __init__(self, record: ExecutorRecord, channel: ExecutorChannel) -> None:
        self.record = record
        self.channel = channel
        self.load: common_pb2.LoadReport | None = None
        self.load_at = 0.0
        self.listed = True  # in the registry at its last read
        self._routed = ("", 0)  # the model and the time of the start that was told
        self._unreported: dict[tuple[str, int], Unreported] = {}

    @property
    def role(self) -> Role:
        load = self.load
        if load is not None and load.role and load.role_epoch >= self.record.role_epoch:
            return _ROLES.get(load.role, Role.COLOCATED)
        return _ROLES.get(self.record.role, Role.COLOCATED)

    @property
    def draining(self) -> bool:
        reported = self.load is not None and self.load.draining
        return reported or self.record.state == worker_pb2.EXECUTOR_STATE_DRAINING

    @property
    def ready(self) -> bool:
        return self.record.state in _READY_STATES

    @property
    def serves(self) -> bool:
        return self.ready and not self.draining and self.channel.usable

    def reached(self, now_unix: float, since_unix: float) -> float | None:
        """Seconds from the executor's readiness until it can be sent tasks, once for each start, if that is
        now and its start was later than `since_unix` (Scaler-Post of DeepServe's five steps). Clocks of two
        hosts may differ: what lies ahead of us counts as now."""
        revision, ready = self.record.model_revision, self.record.ready_unix_ms / 1000
        start = (revision, self.record.ready_unix_ms)
        if not self.serves or not revision or self._routed == start or ready < since_unix:
            return None
        self._routed = start
        return max(0.0, now_unix - ready)

    def submitted(self, key: tuple[str, int], unreported: Unreported) -> None:
        self._unreported[key] = unreported

    @property
    def awaits(self) -> bool:
        """Something was submitted that the executor has not spoken of."""
        return bool(self._unreported)

    def heard(self, key: tuple[str, int]) -> None:
        """The executor spoke of this task (or it ended): reports include it."""
        self._unreported.pop(key, None)

    def reported(self, load: common_pb2.LoadReport, now: float) -> None:
        self.load, self.load_at = load, now
        limit = now - REPORTED_AFTER_SECONDS
        while self._unreported:
            key = next(iter(self._unreported))
            if self._unreported[key].at > limit:
                break
            del self._unreported[key]

    def lost(self) -> None:
        self._unreported.clear()
        self.load = None

    def view(self, now: float) -> ExecutorView:
        record, load = self.record, self.load
        extra_tasks = len(self._unreported)
        extra_tokens = sum(item.prefill_tokens for item in self._unreported.values())
        extra_blocks = sum(item.blocks for item in self._unreported.values())
        report = load if load is not None else common_pb2.LoadReport()
        total = report.kv_blocks_total or record.kv_blocks
        free = report.kv_blocks_free if load is not None else total
        return ExecutorView(
            te_id=record.te_id,
            incarnation=record.incarnation,
            role=self.role,
            model_revision=record.model_revision,
            ready=self.ready,
            draining=self.draining,
            link_up=self.channel.usable,
            step_age_seconds=report.age_seconds,
            tasks=report.waiting + report.running + extra_tasks,
            max_tasks=record.max_tasks or 256,
            queued_tokens=report.queued_prefill_tokens + extra_tokens,
            prefill_tokens_per_second=report.prefill_tokens_per_second,
            decode_step_seconds=report.decode_step_seconds,
            kv_blocks_total=total,
            kv_blocks_free=max(0, free - extra_blocks),
            block_tokens=record.block_tokens or 16,
            max_model_len=record.max_model_len,
        )

    def to_json(self, now: float) -> dict[str, Any]:
        record, load = self.record, self.load
        state = ExecutorState.Name(record.state).removeprefix("EXECUTOR_STATE_").lower()
        return {
            "te_id": record.te_id,
            "incarnation": record.incarnation,
            "role": str(self.role),
            "role_epoch": max(record.role_epoch, load.role_epoch if load else 0),
            "state": "draining" if self.draining and self.ready else state,
            "message": record.message,
            "address": record.address,
            "host": record.host,
            "pid": record.pid,
            "device": record.device,
            "dtype": record.dtype,
            "quantization": record.quantization or None,
            "model_revision": record.model_revision or None,
            "max_model_len": record.max_model_len,
            "kv_blocks": record.kv_blocks,
            "block_tokens": record.block_tokens,
            "max_tasks": record.max_tasks,
            "metrics_url": record.metrics_url,
            "started_at": record.started_unix_ms / 1000,
            "start": {
                "path": record.start_path,
                "seconds": {phase.phase: round(phase.seconds, 4) for phase in record.start_phases},
            }
            if record.start_path
            else None,
            "registered": self.listed,
            "link": str(self.channel.link),
            "link_error": self.channel.last_error or None,
            "heard_seconds_ago": round(now - self.channel.last_heard, 3)
            if self.channel.link in (Link.UP, Link.SUSPECT)
            else None,
            "tasks_of_this_gateway": self.channel.open_tasks,
            "load": None if load is None else _load_json(load),
        }


def _load_json(load: common_pb2.LoadReport) -> dict[str, Any]:
    return {
        "step": load.step,
        "waiting": load.waiting,
        "running": load.running,
        "queued_prefill_tokens": load.queued_prefill_tokens,
        "kv_blocks_total": load.kv_blocks_total,
        "kv_blocks_free": load.kv_blocks_free,
        "kv_blocks_cached": load.kv_blocks_cached,
        "prefill_tokens_per_second": load.prefill_tokens_per_second,
        "decode_step_seconds": load.decode_step_seconds,
        "transfers_out": load.transfers_out,
        "transfers_in": load.transfers_in,
        "step_age_seconds": load.age_seconds,
    }
