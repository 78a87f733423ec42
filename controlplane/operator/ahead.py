"""Weights that warm pods hold ahead: who is told to put which model's into its node's memory (plan/ahead.py).

Told once for each pod and model; a refusal is believed for a while. The file comes first, by the pod's
fetcher (caches.py), then Preload converts it, so that a claim finds what a load needs in memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc
import grpc.aio
from deepflow.v1 import worker_pb2, worker_pb2_grpc
from pydantic import ValidationError

from controlplane.api.resources.modelserving import Engine, ModelServing, ScalingMode
from controlplane.api.resources.names import ANNOTATION_PAUSED, PodState
from controlplane.api.resources.warmpool import WarmPool
from controlplane.fleet import cron
from controlplane.kube.resources import Json, Key, key_of, version_of
from controlplane.operator import metrics
from controlplane.operator.cluster import Cluster
from controlplane.operator.executors import TE_METADATA, Address, Target
from controlplane.operator.plan.ahead import SCHEDULE_SECONDS, Outlook, assign
from controlplane.operator.pods import weights_bytes
from controlplane.operator.servings import target_of
from kvtransfer.auth import call_metadata
from kvtransfer.channel import open_channel

CALL_SECONDS = 1800.0
"""As long as an executor may load."""
CALLS_AT_ONCE = 8
"""Conversions that this operator has asked for and not heard of (ours: each takes a core of its node)."""
REFUSED_SECONDS = 600.0

log = logging.getLogger("deepflow.operator")


@dataclass(slots=True)
class _Known:
    """A ModelServing, read once for each of its versions."""

    version: str
    serving: ModelServing | None
    target: Target | None
    schedules: tuple[tuple[cron.Cron, float], ...] = ()


class Ahead:
    """One leader's. `wanted` says what is to be fetched, `put` asks executors; calls end with `close`."""

    def __init__(self, cluster: Cluster, clock: Callable[[], float]) -> None:
        self._cluster = cluster
        self._clock = clock
        self._servings: dict[Key, _Known] = {}
        self._chosen: dict[str, Key] = {}
        self._done: dict[str, Target] = {}  # pod's uid -> what it holds
        self._refused: dict[tuple[str, Target], float] = {}  # until when it is not asked again
        self._calls: dict[str, asyncio.Task[None]] = {}

    def wanted(self, pools: list[WarmPool], kept: set[str]) -> dict[str, Target]:
        """The model of each warm pod that shall hold one ahead, by uid; `kept` are URIs somebody names."""
        cluster, found = self._cluster, dict[str, Target]()
        chosen: dict[str, Key] = {}
        for pool in pools:
            if not pool.spec.weights.ahead or not weights_bytes(pool):
                continue
            warm = [p for p in cluster.warm_pods(pool.key) if p.ready and not p.deleting and not p.ended]
            free = sorted(
                (p for p in warm if p.uid not in cluster.reserved), key=lambda p: (p.created, p.key)
            )
            known = self._outlooks(pool, kept | set(pool.spec.models)) if free else []
            targets = {outlook.key: target for outlook, target in known}
            told = [outlook for outlook, _ in known]
            for uid, key in assign(told, [pod.uid for pod in free], self._chosen).items():
                chosen[uid], found[uid] = key, targets[key]
        self._chosen = chosen
        self._forget()
        return found

    def put(self, wanted: Mapping[str, Target], files: Mapping[tuple[str, str], tuple[str, str]],
            addresses: Mapping[str, Address]) -> None:  # fmt: skip
        """Asks those whose file is there: `files` are (path, SHA-256) by pod's uid and URI."""
        now = self._clock()
        for uid, target in wanted.items():
            file = files.get((uid, target.uri))
            if file is None or self._done.get(uid) == target or uid in self._calls or uid not in addresses:
                continue
            if self._refused.get((uid, target), 0.0) > now or len(self._calls) >= CALLS_AT_ONCE:
                continue
            call = asyncio.create_task(self._put(uid, addresses[uid], target, *file), name=f"preload-{uid}")
            self._calls[uid] = call

    @property
    def held(self) -> set[tuple[str, str]]:
        """(pod's uid, URI) of weights that lie in a pod's memory."""
        return {(uid, target.uri) for uid, target in self._done.items()}

    async def close(self) -> None:
        calls = list(self._calls.values())
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def _put(self, uid: str, address: Address, target: Target, path: str, sha256: str) -> None:
        settings = self._cluster.settings
        request = worker_pb2.LoadModelRequest(
            model_revision=target.revision(sha256),
            path=path,
            dtype=target.dtype,
            max_model_len=target.max_model_len,
            quantization=target.quantization,
        )
        outcome = "ok"
        try:
            async with open_channel(address.grpc, settings.tls) as channel:
                answer = await worker_pb2_grpc.TaskExecutorStub(channel).Preload(
                    request,
                    metadata=(*call_metadata(settings.token), (TE_METADATA, address.te_id)),
                    timeout=CALL_SECONDS,
                )
            self._done[uid] = target
            log.info("%s holds %s ahead (%s, %.2f s)", address.te_id, request.model_revision,
                     answer.weights, answer.seconds)  # fmt: skip
        except grpc.aio.AioRpcError as error:
            outcome = error.code().name.lower()
            self._refused[uid, target] = self._clock() + REFUSED_SECONDS
            log.info("%s does not hold %s ahead: %s", address.te_id, target.model_id, error.details())
        except Exception:  # a task boundary: nobody waits for it, and a claim works without
            outcome = "failed"
            self._refused[uid, target] = self._clock() + REFUSED_SECONDS
            log.exception("%s was not told to hold %s", address.te_id, target.model_id)
        finally:
            metrics.PRELOADS.labels(outcome).inc()
            self._calls.pop(uid, None)

    # -- what is known of the models -----------------------------------------------------------------------

    def _outlooks(self, pool: WarmPool, kept: set[str]) -> list[tuple[Outlook, Target]]:
        found: list[tuple[Outlook, Target]] = []
        for obj in self._cluster.servings:
            known = self._read(obj)
            serving, target = known.serving, known.target
            if serving is None or target is None or serving.metadata.namespace != pool.metadata.namespace:
                continue
            if serving.spec.accelerator == pool.spec.accelerator:
                found.append((self._outlook(known, serving, target.uri in kept), target))
        for key in self._servings.keys() - {key_of(obj) for obj in self._cluster.servings}:
            del self._servings[key]
        return found

    def _outlook(self, known: _Known, serving: ModelServing, kept: bool) -> Outlook:
        cluster, key = self._cluster, serving.key
        pods = cluster.pods_of_serving(key)
        most = sum(bounds.max for _, bounds in serving.spec.roles.items())
        demand = cluster.demand
        last = demand.last.get(f"{key[0]}/{key[1]}") if demand is not None else None
        now = cluster.wall()
        opens = serving.spec.scaling.mode is not ScalingMode.MANUAL and any(
            when.open_since(now + SCHEDULE_SECONDS, min(SCHEDULE_SECONDS, seconds)) is not None
            for when, seconds in known.schedules
        )
        return Outlook(
            key=key,
            room=most - sum(pod.state is not PodState.DRAINING for pod in pods),
            idle=demand.now - last if demand is not None and last is not None else None,
            opens=opens,
            kept=kept,
            served=any(pod.serves for pod in pods),
        )

    def _read(self, obj: Json) -> _Known:
        key, version = key_of(obj), version_of(obj)
        known = self._servings.get(key)
        if known is None or known.version != version:
            known = self._servings[key] = _read(obj, version)
        return known

    def _forget(self) -> None:
        """Of pods that are not warm any more."""
        warm = {pod.uid for obj in self._cluster.pods if (pod := self._cluster.pod(obj)) is not None
                and pod.state is PodState.WARM}  # fmt: skip
        self._done = {uid: target for uid, target in self._done.items() if uid in warm}
        self._refused = {pair: until for pair, until in self._refused.items() if pair[0] in warm}


def _read(obj: Json, version: str) -> _Known:
    try:
        serving = ModelServing.model_validate(obj)
    except ValidationError:
        return _Known(version, None, None)
    paused = serving.metadata.annotations.get(ANNOTATION_PAUSED) == "true"
    if paused or serving.spec.engine is not Engine.FLOWSERVE or serving.metadata.deletion_timestamp:
        return _Known(version, None, None)
    schedules = []
    for schedule in serving.spec.scaling.schedules:
        try:
            schedules.append(
                (cron.parse(schedule.cron, schedule.time_zone), float(schedule.duration_seconds))
            )
        except cron.BadCron:
            continue  # the autoscaler says so
    return _Known(version, serving, target_of(serving), tuple(schedules))
