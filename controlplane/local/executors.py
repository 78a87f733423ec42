"""The leader's side of one task executor: its model is loaded, its role set, its health watched.

Level-triggered: each turn reads the executor's status and does the one thing that is missing, so a
restarted executor, a lost answer or a role changed behind our back heal the same way. The leader of
a cluster (the operator) does the same with pods.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grpc
from deepflow.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from controlplane.local import metrics
from controlplane.local.children import Child, backoff_seconds
from controlplane.local.settings import read_json, write_atomically
from controlplane.local.topology import RoleName
from kvtransfer.auth import call_metadata

log = logging.getLogger("deepflow.local")

POLL_STARTING_SECONDS = 0.1
POLL_READY_SECONDS = 2.0
POLL_CONTROLLED_SECONDS = 0.5  # where role control looks each second
STATUS_TIMEOUT_SECONDS = 10.0
LOAD_TIMEOUT_SECONDS = 1800.0  # large weights from a slow disk
# Start of the interpreter and its libraries: about 5 s on two idle cores; ours, for busy ones.
ENDPOINT_TIMEOUT_SECONDS = 180.0
# No answer, or a step loop that stands still with work to do, for this long: the process is replaced.
UNRESPONSIVE_SECONDS = 60.0
HUNG_STEP_SECONDS = 120.0

# A load refused so will be refused again: the model is not there, or is none that this engine runs.
HOPELESS = {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT}

ROLES = {
    RoleName.COLOCATED: common_pb2.ROLE_COLOCATED,
    RoleName.PREFILL: common_pb2.ROLE_PREFILL,
    RoleName.DECODE: common_pb2.ROLE_DECODE,
}


class RoleEpochs:
    """The leader's counter: every role it sets has an epoch above all before, over restarts too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._last = int(path.read_text())
        except (OSError, ValueError):
            self._last = 0

    def next(self, above: int = 0) -> int:
        """A new epoch, above every one given before and above `above`; on disk before it is used.

        Where the disk takes nothing it is used all the same: executors know their own epoch, which is
        what `above` is for.
        """
        self._last = max(self._last, above) + 1
        try:
            write_atomically(self._path, str(self._last))
        except OSError as error:
            log.warning("cannot write %s: %s", self._path, error.strerror or error)
        return self._last


class Source(NamedTuple):
    """An executor that may feed weights."""

    te_id: str
    incarnation: str
    address: str


@dataclass(frozen=True, slots=True)
class ModelTarget:
    """What an executor shall have loaded."""

    model_id: str
    revision: str
    path: str
    dtype: str
    kv_cache_bytes: int
    max_model_len: int
    quantization: str = ""
    fork_from: tuple[Source, ...] = ()  # executors that may have its weights


class Executor:
    """One executor as its leader sees it. `tend()` is a task of the supervisor."""

    def __init__(
        self,
        te_id: str,
        *,
        child: Child,
        endpoint_file: Path,
        role: RoleName,
        epochs: RoleEpochs,
        token: str,
        on_change: Callable[[], None],
        poll_seconds: float = POLL_READY_SECONDS,
    ) -> None:
        self.te_id = te_id
        self.child = child
        self.role = role
        self.target: ModelTarget | None = None
        self._decided = time.time()  # when it was to serve: given its model, or its process found gone
        self.ready = False
        self.message = ""
        self.load_failures = 0  # in a row
        self.load_hopeless = False  # the last one was the model's or the request's fault
        self.leaving_since: float | None = None  # it takes no more tasks, and will not come back
        self.address = ""
        self.metrics_url = ""
        self.status: worker_pb2.ExecutorStatus | None = None
        self._endpoint_file = endpoint_file
        self._epochs = epochs
        self._epoch = epochs.next()
        self._metadata = call_metadata(token)
        self._on_change = on_change
        self._poll_seconds = poll_seconds
        self._wake = asyncio.Event()

    def set_role(self, role: RoleName) -> int:
        """Wants another role from now on; returns the epoch under which it will be set."""
        self.role = role
        self._epoch = self._epochs.next()
        self._wake.set()
        return self._epoch

    @property
    def number(self) -> int:
        """Higher for younger ones."""
        return int(self.te_id.rpartition("-")[2])

    @property
    def tasks(self) -> int:
        return self.status.tasks if self.status is not None else 0

    @property
    def empty(self) -> bool:
        """It takes no tasks and has none left, nor KV that somebody reads."""
        status = self.status
        if status is None or status.record.state == worker_pb2.EXECUTOR_STATE_WARM:
            return True
        draining = status.record.state == worker_pb2.EXECUTOR_STATE_DRAINING
        return draining and status.tasks + status.load.transfers_out == 0

    def leave(self, now: float) -> None:
        """Drains from now on; the supervisor ends it once it is empty."""
        self.leaving_since = now
        self._wake.set()

    def look(self) -> None:
        """Its process has changed: what was known of the one before is no longer true."""
        self._wake.set()
        self._on_change()

    def set_target(self, target: ModelTarget) -> None:
        self.target = target
        self._decided = time.time()
        self._wake.set()

    async def tend(self) -> None:
        """Follows the executor's process from one life to the next until cancelled."""
        while True:
            address, pid = await self._endpoint()
            channel = grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
            try:
                await self._tend_process(worker_pb2_grpc.TaskExecutorStub(channel), pid)
            finally:
                await channel.close()
                self._decided = time.time()
                self._set_ready(False, "")
                self.status = None

    async def _endpoint(self) -> tuple[str, int]:
        """Waits until the current process says where it serves."""
        seen, since = self.child.pid, time.monotonic()
        while True:
            pid = self.child.pid
            endpoint = read_json(self._endpoint_file)
            if pid is not None and endpoint is not None and endpoint.get("pid") == pid:
                self.address = str(endpoint["address"])
                self.metrics_url = str(endpoint.get("metrics_url") or "")
                return self.address, pid
            if pid != seen:
                seen, since = pid, time.monotonic()
            if pid is not None and time.monotonic() - since > ENDPOINT_TIMEOUT_SECONDS:
                self.child.kill(f"did not serve within {ENDPOINT_TIMEOUT_SECONDS:.0f} s")
                since = time.monotonic()
            await asyncio.sleep(POLL_STARTING_SECONDS)

    async def _tend_process(self, stub: worker_pb2_grpc.TaskExecutorAsyncStub, pid: int) -> None:
        answered = time.monotonic()
        while self.child.pid == pid:
            self._wake.clear()
            try:
                status = await stub.GetStatus(
                    worker_pb2.GetStatusRequest(), metadata=self._metadata, timeout=STATUS_TIMEOUT_SECONDS
                )
                answered = time.monotonic()
                self.status = status
                await self._advance(stub, status)
            except grpc.aio.AioRpcError as error:
                self._set_ready(False, f"{error.code().name}: {error.details()}")
                if time.monotonic() - answered > UNRESPONSIVE_SECONDS and self.child.pid == pid:
                    self.child.kill(f"gave no answer for {UNRESPONSIVE_SECONDS:.0f} s ({error.code().name})")
            wait = self._poll_seconds if self.ready else POLL_STARTING_SECONDS
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait)

    async def _advance(
        self, stub: worker_pb2_grpc.TaskExecutorAsyncStub, status: worker_pb2.ExecutorStatus
    ) -> None:
        """Does the next missing thing."""
        record, load, target = status.record, status.load, self.target
        if self.leaving_since is not None:
            return await self._drain(stub, record.state)
        if target is None:
            return self._set_ready(False, "waits for its model")
        if record.state == worker_pb2.EXECUTOR_STATE_FAILED:
            self._set_ready(False, record.message)
            return self.child.kill(f"failed: {record.message}")
        busy = load.waiting + load.running > 0
        if busy and load.age_seconds > HUNG_STEP_SECONDS:
            self._set_ready(False, "its step loop hangs")
            return self.child.kill(f"its step loop stood still for {load.age_seconds:.0f} s")
        if load.role != ROLES[self.role] or load.role_epoch != self._epoch:
            await self._send_role(stub, load.role_epoch)
        if record.state in (worker_pb2.EXECUTOR_STATE_WARM, worker_pb2.EXECUTOR_STATE_SLEEPING):
            self._set_ready(False, "loads its model")  # or wakes it: somebody put it to sleep by hand
            await self._send_model(stub, target)
        elif record.state == worker_pb2.EXECUTOR_STATE_READY and record.model_revision == target.revision:
            self._set_ready(True, "")
        else:
            self._set_ready(False, worker_pb2.ExecutorState.Name(record.state).rsplit("_", 1)[-1].lower())
        return None

    async def _send_model(self, stub: worker_pb2_grpc.TaskExecutorAsyncStub, target: ModelTarget) -> None:
        request = worker_pb2.LoadModelRequest(
            model_revision=target.revision,
            path=target.path,
            dtype=target.dtype,
            kv_cache_bytes=target.kv_cache_bytes,
            max_model_len=target.max_model_len,
            quantization=target.quantization,
            decided_unix_ms=int(self._decided * 1000),
            fork_from=[worker_pb2.WeightPeer(**source._asdict()) for source in target.fork_from],
        )
        try:
            loaded = await stub.LoadModel(request, metadata=self._metadata, timeout=LOAD_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise  # the process ended, which is not the model's fault
            self.load_failures += 1
            self.load_hopeless = error.code() in HOPELESS
            wait = backoff_seconds(self.load_failures)
            self._set_ready(False, f"cannot load {target.model_id}: {error.details()}")
            log.warning("%s %s; trying again in %.1f s", self.te_id, self.message, wait)
            await asyncio.sleep(wait)
            return
        self.load_failures = 0
        log.info("%s loaded %s in %.1f s: %d KV blocks of %d tokens, context %d",
                 self.te_id, target.revision, loaded.load_seconds, loaded.kv_blocks, loaded.block_tokens,
                 loaded.max_model_len)  # fmt: skip
        self._wake.set()

    async def _drain(self, stub: worker_pb2_grpc.TaskExecutorAsyncStub, state: int) -> None:
        self._set_ready(False, "leaves: less load")
        if state in (worker_pb2.EXECUTOR_STATE_READY, worker_pb2.EXECUTOR_STATE_SLEEPING):
            request = worker_pb2.DrainRequest(timeout_ms=1, exit=False)
            await stub.Drain(request, metadata=self._metadata, timeout=STATUS_TIMEOUT_SECONDS)

    async def _send_role(self, stub: worker_pb2_grpc.TaskExecutorAsyncStub, current: int) -> None:
        if current > self._epoch:  # another leader's, or our counter was lost: go above it
            self._epoch = self._epochs.next(above=current)
        request = worker_pb2.SetRoleRequest(role=ROLES[self.role], epoch=self._epoch)
        await stub.SetRole(request, metadata=self._metadata, timeout=STATUS_TIMEOUT_SECONDS)
        metrics.ROLE_CHANGES.labels(self.role.value).inc()
        log.info("%s is now %s (epoch %d)", self.te_id, self.role.value, self._epoch)

    def _set_ready(self, ready: bool, message: str) -> None:
        if (ready, message) != (self.ready, self.message):
            self.ready, self.message = ready, message
            metrics.EXECUTOR_READY.labels(self.te_id).set(ready)
            self._on_change()

    def describe(self) -> dict[str, object]:
        """What `deepflow status` shows of it."""
        value: dict[str, object] = {
            "te_id": self.te_id,
            "model": self.target.model_id if self.target else "",
            "role": self.role.value,
            "role_epoch": self._epoch,
            "ready": self.ready,
            "message": self.message,
            "address": self.address,
            "metrics_url": self.metrics_url,
        }
        if self.status is not None:
            load, record = self.status.load, self.status.record
            value |= {
                "start": {
                    "path": record.start_path,
                    "seconds": {phase.phase: phase.seconds for phase in record.start_phases},
                },
                "state": worker_pb2.ExecutorState.Name(record.state).rsplit("_", 1)[-1].lower(),
                "waiting": load.waiting,
                "running": load.running,
                "kv_blocks_total": load.kv_blocks_total,
                "kv_blocks_free": load.kv_blocks_free,
                "leaked_blocks": self.status.leaked_blocks,
                "stuck_tasks": self.status.stuck_tasks,
            }
        return value
