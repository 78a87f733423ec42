"""The executors behind the pods: what each says of itself, and the calls that the leader makes.

Level-triggered, as the local supervisor is: every executor that somebody owns is asked for its status, often
while it changes and rarely while it serves; what it last said is what planners see. Loads and other calls
run beside that, one of a kind per executor, and are safe to repeat. An address is not an identity (pods'
addresses come again), so an answer counts only if it carries the executor's own name.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import grpc
import grpc.aio
from deepflow.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from controlplane.api.resources.modelserving import Role
from controlplane.api.resources.names import PORT_FETCH, PORT_GRPC
from controlplane.fleet.cards import revision_of
from controlplane.operator import metrics
from controlplane.operator.plan.values import Te, TeState
from controlplane.scheduling.forks import fork_sources
from kvtransfer.auth import call_metadata
from kvtransfer.channel import open_channel
from kvtransfer.tls import SERVER_NAME, Tls

TE_METADATA = "x-deepflow-te"
"""Which executor is meant; executors need not look at it."""
STATUS_SECONDS = 10.0
FAST_SECONDS = 0.5  # while an executor starts, loads or drains
SLOW_SECONDS = 5.0
POLLS_PER_SECOND = 200
"""Bound of the steady polls (ours: each costs about a millisecond); more executors, rarer polls."""
MAX_CALLS = 128
MAX_CHANNELS = 512
LOAD_SECONDS = 1800.0
FETCH_FIRST_POLL_SECONDS, FETCH_POLL_SECONDS = 0.02, 0.5
"""A file that lies there is checked in milliseconds, and somebody may be waiting; a download takes long."""
FETCH_SECONDS = 3600.0
HUNG_STEP_SECONDS = 120.0
RETRY_FIRST_SECONDS = 1.0
RETRY_MAX_SECONDS = 60.0
MAX_HASHES = 1024
"""Models whose content is remembered (ours), so that it need not be fetched to be named."""
NO_FILE = "/none"
"""A path where nothing lies: the weights come from other executors alone."""

log = logging.getLogger(__name__)

_ROLES = {
    Role.COLOCATED: common_pb2.ROLE_COLOCATED,
    Role.PREFILL: common_pb2.ROLE_PREFILL,
    Role.DECODE: common_pb2.ROLE_DECODE,
}
_ROLE_OF = {value: role for role, value in _ROLES.items()}
_STATES = {
    worker_pb2.EXECUTOR_STATE_WARM: TeState.WARM,
    worker_pb2.EXECUTOR_STATE_LOADING: TeState.LOADING,
    worker_pb2.EXECUTOR_STATE_READY: TeState.READY,
    worker_pb2.EXECUTOR_STATE_SLEEPING: TeState.SLEEPING,
    worker_pb2.EXECUTOR_STATE_DRAINING: TeState.DRAINING,
    worker_pb2.EXECUTOR_STATE_FAILED: TeState.FAILED,
}
# Refused so, it will be refused again: the model is not there, or is none that this engine runs.
_HOPELESS = {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT}


@dataclass(frozen=True, slots=True)
class Target:
    """What an executor shall load."""

    model_id: str
    uri: str
    dtype: str
    quantization: str  # "" = none
    kv_cache_bytes: int
    max_model_len: int

    def revision(self, sha256: str) -> str:
        """As the local supervisor names it: another file under the same id never meets old KV."""
        return revision_of(self.model_id, sha256, self.quantization)


@dataclass(frozen=True, slots=True)
class Address:
    """Where an executor is, and who it must be."""

    te_id: str
    host: str

    @property
    def grpc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{PORT_GRPC}"

    @property
    def fetch(self) -> str:
        """Host and port of its fetcher."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{PORT_FETCH}"


def ask_fetcher(
    session: aiohttp.ClientSession, address: Address, uri: str, token: str, tls: Tls | None
) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
    """What a pod's fetcher says of a model; it begins to fetch what it has not."""
    scheme, options = "http", dict[str, Any]()
    if tls is not None:
        scheme, options = "https", {"ssl": tls.client_context(), "server_hostname": SERVER_NAME}
    headers = {"Authorization": f"Bearer {token}", TE_METADATA: address.te_id}
    url = f"{scheme}://{address.fetch}/v1/models"
    return session.post(url, json={"uri": uri}, headers=headers, **options)


@dataclass(slots=True)
class _Known:
    address: Address
    fast: bool
    due: float = 0.0
    te: Te | None = None
    load: common_pb2.LoadReport | None = None
    failures: int = 0  # of loads, in a row
    load_error: str = ""
    load_hopeless: bool = False
    progress: float = 0.0
    next_load: float = 0.0
    incarnation: str = ""
    weight_cache: bool = False  # it can be fed weights, and feed others
    asleep: tuple[str, ...] = ()  # revisions whose weights wait there
    loading: str = ""  # revision that it was told to load and has not loaded yet


class LoadFailed(Exception):
    def __init__(self, message: str, *, hopeless: bool) -> None:
        super().__init__(message)
        self.hopeless = hopeless


class Executors:
    """Known by their pods' uids. `run` polls until cancelled and owns every call."""

    def __init__(
        self,
        token: str,
        on_change: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        tls: Tls | None = None,
    ) -> None:
        self._metadata = call_metadata(token)
        self._token = token
        self._tls = tls
        self._on_change = on_change
        self._clock = clock
        self._wall = wall
        self._known: dict[str, _Known] = {}
        self._due: list[tuple[float, int, str]] = []
        self._order = itertools.count()
        self._calls: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(MAX_CALLS)
        self._session: aiohttp.ClientSession | None = None
        self._hashes: OrderedDict[str, str] = OrderedDict()  # SHA-256 by URI, of what executors have loaded

    # -- what others see ---------------------------------------------------------------------------------

    def te(self, uid: str) -> Te | None:
        known = self._known.get(uid)
        return known.te if known is not None else None

    def load_report(self, uid: str) -> common_pb2.LoadReport | None:
        """The last one of an executor that answers."""
        known = self._known.get(uid)
        if known is None or known.te is None or known.te.state is TeState.UNREACHABLE:
            return None
        return known.load

    def load_error(self, uid: str) -> tuple[str, bool]:
        """Why its last load failed, and whether trying again is hopeless."""
        known = self._known.get(uid)
        return (known.load_error, known.load_hopeless) if known is not None else ("", False)

    def progress(self, uid: str) -> float:
        """Of fetch and load, 0 to 1."""
        known = self._known.get(uid)
        return known.progress if known is not None else 0.0

    def watch(self, uid: str, address: Address, *, fast: bool) -> None:
        """Polls it from now on; `fast` while something of it is expected to change."""
        known = self._known.get(uid)
        if known is None or known.address != address:
            self._known[uid] = known = _Known(address, fast)
            self._schedule(uid, known, 0.0)
        elif fast and not known.fast:
            self._schedule(uid, known, 0.0)
        known.fast = fast

    def drop(self, uid: str) -> None:
        if self._known.pop(uid, None) is not None:
            for (owner, _), call in list(self._calls.items()):
                if owner == uid:
                    call.cancel()

    def __len__(self) -> int:
        return len(self._known)

    # -- the leader's calls --------------------------------------------------------------------------------

    def load(self, uid: str, target: Target) -> None:
        """Fetches and loads, unless that is under way or failed a moment ago."""
        known = self._known.get(uid)
        if known is not None and self._clock() >= known.next_load:
            self._call(uid, "load", self._load(uid, known, target))

    def set_role(self, uid: str, role: Role, epoch: int) -> None:
        known = self._known.get(uid)
        if known is not None:
            self._call(uid, "role", self._set_role(known, role, epoch))

    def sleep(self, uid: str, seconds: float) -> None:
        """Its tasks may take `seconds` to end; where they take longer it serves on."""
        known = self._known.get(uid)
        if known is not None:
            self._call(uid, "sleep", self._sleep(known, seconds))

    def drain(self, uid: str) -> None:
        known = self._known.get(uid)
        if known is not None:
            self._call(uid, "drain", self._drain(known))

    # -- polling -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=STATUS_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            self._session = session
            try:
                while True:
                    wait = self._start_due()
                    self._wake.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(wait):
                            await self._wake.wait()
            finally:
                self._session = None
                calls = list(self._calls.values())
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
                for channel in self._channels.values():
                    await channel.close()
                self._channels.clear()

    def _start_due(self) -> float | None:
        now = self._clock()
        while self._due:
            due, _, uid = self._due[0]
            known = self._known.get(uid)
            if known is None or known.due != due:
                heapq.heappop(self._due)
            elif due > now:
                return due - now
            else:
                heapq.heappop(self._due)
                metrics.TE_POLL_AGE.set(now - due)
                period = (
                    FAST_SECONDS if known.fast else max(SLOW_SECONDS, len(self._known) / POLLS_PER_SECOND)
                )
                self._schedule(uid, known, period)
                self._call(uid, "status", self._poll(uid, known))
        return None

    def _schedule(self, uid: str, known: _Known, seconds: float) -> None:
        known.due = self._clock() + seconds
        heapq.heappush(self._due, (known.due, next(self._order), uid))
        self._wake.set()

    def _call(self, uid: str, kind: str, work: Coroutine[Any, Any, None]) -> None:
        """One call of a kind per executor at a time; another is not needed, the plan comes again."""
        if (uid, kind) in self._calls:
            work.close()
            return
        task = asyncio.create_task(self._guard(uid, kind, work), name=f"{kind}-{uid}")
        self._calls[uid, kind] = task
        task.add_done_callback(lambda _: self._calls.pop((uid, kind), None))

    async def _guard(self, uid: str, kind: str, work: Coroutine[Any, Any, None]) -> None:
        """A task boundary: a call's failure is told by the next status."""
        outcome = "ok"
        try:
            if kind in ("load", "sleep"):  # waits long and costs nothing here
                await work
            else:
                async with self._slots:
                    await work
        except grpc.aio.AioRpcError as error:
            outcome = error.code().name.lower()
            log.log(logging.DEBUG if kind == "status" else logging.INFO,
                    "%s of %s: %s", kind, self._name(uid), error.details())  # fmt: skip
        except Exception:
            outcome = "failed"
            log.exception("%s of %s failed", kind, self._name(uid))
        finally:
            work.close()
            metrics.TE_CALLS.labels(kind, outcome).inc()
        known = self._known.get(uid)
        if kind != "status" and known is not None:
            self._schedule(uid, known, 0.0)  # see what came of it

    def _name(self, uid: str) -> str:
        known = self._known.get(uid)
        return known.address.te_id if known is not None else uid

    async def _poll(self, uid: str, known: _Known) -> None:
        before = known.te
        try:
            status = await self._stub(known).GetStatus(
                worker_pb2.GetStatusRequest(), metadata=self._metadata_of(known), timeout=STATUS_SECONDS
            )
            known.incarnation, known.weight_cache = status.record.incarnation, status.record.weight_cache
            known.asleep = tuple(status.record.asleep)
            known.te, known.load = _te_of(status, known.address.te_id, self._wall()), status.load
        except grpc.aio.AioRpcError as error:
            known.te = self._silent(before, f"{error.code().name}: {error.details()}")
            if self._tls is not None and error.code() is grpc.StatusCode.UNAVAILABLE:
                # A channel shows the certificate that it was made with: another shows the renewed one.
                self._close(self._channels.pop(known.address.grpc, None))
            raise
        finally:
            if known.te is not None and known.te.state is TeState.UNREACHABLE and before is not None:
                since = before.silent_since if before.state is TeState.UNREACHABLE else None
                known.te = replace(known.te, silent_since=since or known.te.silent_since)
            if self._known.get(uid) is known and _differs(before, known.te):
                self._on_change(uid)

    def _silent(self, before: Te | None, message: str) -> Te:
        kept = before or Te(TeState.UNREACHABLE)
        since = kept.silent_since if kept.silent_since is not None else self._wall()
        return replace(kept, state=TeState.UNREACHABLE, silent_since=since, message=message[:300])

    def _stub(self, known: _Known) -> worker_pb2_grpc.TaskExecutorAsyncStub:
        address = known.address.grpc
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(address, self._tls)
            if len(self._channels) > MAX_CHANNELS:
                self._close(self._channels.popitem(last=False)[1])
        else:
            self._channels.move_to_end(address)
        return worker_pb2_grpc.TaskExecutorStub(channel)

    def _close(self, channel: grpc.aio.Channel | None) -> None:
        if channel is not None:
            name = f"{id(channel)}"
            closing = self._calls[name, "close"] = asyncio.ensure_future(channel.close(grace=STATUS_SECONDS))
            closing.add_done_callback(lambda _: self._calls.pop((name, "close"), None))

    def _metadata_of(self, known: _Known) -> tuple[tuple[str, str], ...]:
        return (*self._metadata, (TE_METADATA, known.address.te_id))

    # -- calls ---------------------------------------------------------------------------------------------

    async def _set_role(self, known: _Known, role: Role, epoch: int) -> None:
        await self._stub(known).SetRole(
            worker_pb2.SetRoleRequest(role=_ROLES[role], epoch=epoch),
            metadata=self._metadata_of(known),
            timeout=STATUS_SECONDS,
        )

    async def _sleep(self, known: _Known, seconds: float) -> None:
        await self._stub(known).Sleep(
            worker_pb2.SleepRequest(timeout_ms=max(1, round(1000 * seconds))),
            metadata=self._metadata_of(known),
            timeout=seconds + STATUS_SECONDS,
        )

    async def _drain(self, known: _Known) -> None:
        """Begins; the status tells when it is empty."""
        await self._stub(known).Drain(
            worker_pb2.DrainRequest(timeout_ms=1, exit=False),
            metadata=self._metadata_of(known),
            timeout=STATUS_SECONDS,
        )

    async def _load(self, uid: str, known: _Known, target: Target) -> None:
        decided = time.time()
        try:
            if not await self._fork(uid, known, target, decided):
                path, sha256 = await self._fetch(uid, known, target.uri)
                self._hashes[target.uri] = sha256
                self._hashes.move_to_end(target.uri)
                if len(self._hashes) > MAX_HASHES:
                    self._hashes.popitem(last=False)
                known.progress = 0.5
                self._on_change(uid)
                await self._send(uid, known, target, target.revision(sha256), path, decided)
        except LoadFailed as error:
            self._load_failed(uid, known, str(error), hopeless=error.hopeless)
            return
        except grpc.aio.AioRpcError as error:
            if (
                error.code() is not grpc.StatusCode.UNAVAILABLE
            ):  # else its process ended: not the model's fault
                message = f"the executor cannot load it: {error.details()}"
                self._load_failed(uid, known, message, hopeless=error.code() in _HOPELESS)
            raise
        finally:
            known.loading = ""
        known.failures, known.load_error, known.load_hopeless, known.progress = 0, "", False, 1.0

    async def _fork(self, uid: str, known: _Known, target: Target, decided: float) -> bool:
        """Wakes it, or loads from executors that have the weights, without fetching the model; False where
        that cannot be. Raises AioRpcError for an executor that is gone."""
        sha256 = self._hashes.get(target.uri)
        if sha256 is None:
            return False
        revision = target.revision(sha256)
        if revision not in known.asleep and not (known.weight_cache and self._sources(uid, revision)):
            return False
        try:
            await self._send(uid, known, target, target.revision(sha256), NO_FILE, decided)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise
            log.info("%s has no way to %s but a fetch: %s",
                     known.address.te_id, target.model_id, error.details())  # fmt: skip
            return False
        return True

    async def _send(  # noqa: PLR0917  one call's parts
        self, uid: str, known: _Known, target: Target, revision: str, path: str, decided: float
    ) -> None:
        sources = self._sources(uid, revision)
        known.loading = revision
        fed = f", may be fed by {', '.join(source.address.te_id for source in sources)}" if sources else ""
        log.info("%s loads %s from %s%s", known.address.te_id, revision, path, fed)
        request = worker_pb2.LoadModelRequest(
            model_revision=revision,
            path=path,
            dtype=target.dtype,
            kv_cache_bytes=target.kv_cache_bytes,
            max_model_len=target.max_model_len,
            quantization=target.quantization,
            decided_unix_ms=int(decided * 1000),
            fork_from=[
                worker_pb2.WeightPeer(
                    te_id=source.address.te_id, incarnation=source.incarnation, address=source.address.grpc
                )
                for source in sources
            ],
        )
        await self._stub(known).LoadModel(request, metadata=self._metadata_of(known), timeout=LOAD_SECONDS)

    def _sources(self, uid: str, revision: str) -> list[_Known]:
        """Who may feed an executor the weights of `revision`: those that serve it, and those that began to
        load it earlier, so that nobody waits in a circle."""
        ready: list[_Known] = []
        earlier: list[_Known] = []
        for other, known in self._known.items():
            te = known.te
            if other == uid or te is None or not known.weight_cache:
                continue
            if (te.state is TeState.READY and te.revision == revision) or (
                te.state is TeState.SLEEPING and revision in known.asleep
            ):
                ready.append(known)
            elif known.loading == revision:
                earlier.append(known)
        return fork_sources(ready, earlier)

    def _load_failed(self, uid: str, known: _Known, message: str, *, hopeless: bool) -> None:
        known.failures += 1
        known.load_error, known.load_hopeless = message[:1000], hopeless
        wait = min(RETRY_FIRST_SECONDS * float(2 ** min(known.failures - 1, 10)), RETRY_MAX_SECONDS)
        known.next_load = self._clock() + wait
        log.warning("%s: %s; again in %.0f s", known.address.te_id, message, wait)
        self._on_change(uid)

    async def _fetch(self, uid: str, known: _Known, uri: str) -> tuple[str, str]:
        """(path in the pod, SHA-256). Raises LoadFailed."""
        session = self._session
        if session is None:
            raise LoadFailed("the operator is stopping", hopeless=False)
        deadline, pause = self._clock() + FETCH_SECONDS, FETCH_FIRST_POLL_SECONDS
        while self._clock() < deadline:
            try:
                asked = ask_fetcher(session, known.address, uri, self._token, self._tls)
                async with asked as response:
                    answer: dict[str, Any] = await response.json()
                    status = response.status
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                raise LoadFailed(f"its fetcher does not answer: {error or type(error).__name__}",
                                 hopeless=False) from error  # fmt: skip
            if status != 200:
                raise LoadFailed(f"its fetcher refuses: {answer.get('message')}", hopeless=False)
            if answer["state"] == "ready":
                return str(answer["path"]), str(answer["sha256"])
            if answer["state"] == "failed":
                raise LoadFailed(str(answer["message"]), hopeless=bool(answer.get("hopeless")))
            total = answer.get("total") or 0
            known.progress = 0.5 * min(1.0, answer.get("done", 0) / total) if total else 0.0
            await asyncio.sleep(pause)
            pause = min(2 * pause, FETCH_POLL_SECONDS)
        raise LoadFailed(f"fetching takes longer than {FETCH_SECONDS:.0f} s", hopeless=False)


def _te_of(status: worker_pb2.ExecutorStatus, te_id: str, now: float) -> Te:
    record, load = status.record, status.load
    if record.te_id != te_id:
        return Te(TeState.UNREACHABLE, silent_since=now, message=f"{record.te_id!r} answers at its address")
    busy = load.waiting + load.running > 0
    return Te(
        state=_STATES.get(record.state, TeState.UNREACHABLE),
        role=_ROLE_OF.get(load.role) or _ROLE_OF.get(record.role),
        epoch=max(load.role_epoch, record.role_epoch),
        revision=record.model_revision,
        tasks=status.tasks,
        transfers=load.transfers_out,
        start_path=record.start_path,
        hung=busy and load.age_seconds > HUNG_STEP_SECONDS,
        message=record.message,
    )


def _differs(before: Te | None, now: Te | None) -> bool:
    """Whether planners would decide otherwise; a count of tasks alone matters while draining only."""
    if before is None or now is None:
        return before is not now
    if now.state is TeState.DRAINING:
        return before != now
    return replace(before, tasks=0, transfers=0, message="") != replace(now, tasks=0, transfers=0, message="")
