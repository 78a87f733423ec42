"""What runs before a release of the chart is removed: executors finish their tasks and go, intent stays.

In order: the operator stops, so that nobody refills what is taken away; executors drain together and their
pods are deleted; finalizers of ours come off, since nobody is left to take them off; statuses say that
nothing serves. ModelServings, RoleScalers and WarmPools stay: a release installed later serves them again.
Each step may be repeated: Helm runs the hook again where it failed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import grpc
from deepflow.v1 import worker_pb2, worker_pb2_grpc

from controlplane.api.resources import names
from controlplane.kube.client import Conflict, KubeApi, NotFound
from controlplane.kube.resources import MODEL_SERVINGS, PODS, WARM_POOLS, Json, ResourceType
from kvtransfer.auth import call_metadata
from kvtransfer.channel import open_channel
from kvtransfer.tls import Tls

log = logging.getLogger("deepflow.uninstall")

DEPLOYMENTS = ResourceType("apps", "v1", "Deployment", "deployments")
EXECUTORS = f"{names.LABEL_COMPONENT}={names.COMPONENT_EXECUTOR},{names.LABEL_PART_OF}={names.PART_OF}"
MANAGER = "deepflow-uninstall"
OPERATOR_SECONDS = 60.0  # above its grace period of 30 s
GONE_SECONDS = 60.0  # a deleted pod's end, beyond its drain
POLL_SECONDS = 1.0
ATTEMPTS = 5  # at an object that others write meanwhile

Drain = Callable[[str, float], Awaitable[bool]]


@dataclass(slots=True)
class Outcome:
    """What was done; printed at the end."""

    executors: int = 0
    undrained: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def drainer(token: str, tls: Tls | None = None) -> Drain:
    """Asks the executor at an address to finish its tasks; whether it did."""

    async def drain(address: str, seconds: float) -> bool:
        async with open_channel(address, tls) as channel:
            request = worker_pb2.DrainRequest(timeout_ms=round(1000 * seconds), exit=False)
            try:
                answer = await worker_pb2_grpc.TaskExecutorStub(channel).Drain(
                    request, metadata=call_metadata(token), timeout=seconds + 10
                )
            except grpc.aio.AioRpcError as error:
                log.warning("%s does not drain: %s", address, error.details())
                return False
            return bool(answer.drained)

    return drain


async def uninstall(
    api: KubeApi,
    namespace: str,
    *,
    operator: str,
    drain_seconds: float,
    drain: Drain,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Outcome:
    """Takes executors away; raises KubeError where the API server refuses."""
    outcome = Outcome()
    await _stop_operator(api, namespace, operator)
    pods, _ = await api.list(PODS, namespace, label_selector=EXECUTORS)
    outcome.executors = len(pods)
    async with asyncio.TaskGroup() as group:
        for pod in pods:
            group.create_task(_remove(api, pod, drain_seconds, drain, outcome))
    for kind in (MODEL_SERVINGS, WARM_POOLS):
        for obj in (await api.list(kind, namespace))[0]:
            await _release(api, kind, obj, now())
    outcome.left = await _wait_gone(api, namespace, EXECUTORS, GONE_SECONDS)
    return outcome


async def _stop_operator(api: KubeApi, namespace: str, operator: str) -> None:
    try:
        found = await api.get(DEPLOYMENTS, namespace, operator)
        await api.patch(DEPLOYMENTS, namespace, operator, {"spec": {"replicas": 0}}, manager=MANAGER)
    except NotFound:
        return
    labels = found["spec"]["selector"]["matchLabels"]
    selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
    if left := await _wait_gone(api, namespace, selector, OPERATOR_SECONDS):
        log.warning("the operator still runs: %s", ", ".join(left))


async def _remove(api: KubeApi, pod: Json, seconds: float, drain: Drain, outcome: Outcome) -> None:
    meta, status = pod["metadata"], pod.get("status") or {}
    name, state = meta["name"], (meta.get("labels") or {}).get(names.LABEL_STATE)
    address = status.get("podIP")
    if address and status.get("phase") == "Running" and state != names.PodState.WARM:
        host = f"[{address}]" if ":" in address else address
        if not await drain(f"{host}:{names.PORT_GRPC}", seconds):
            outcome.undrained.append(name)
    await _without_finalizer(api, PODS, pod)
    await api.delete(PODS, meta["namespace"], name, uid=meta["uid"])


async def _release(api: KubeApi, kind: ResourceType, obj: Json, now: datetime) -> None:
    """Takes our finalizer off, and says in the status that nothing serves it."""
    await _without_finalizer(api, kind, obj)
    meta, status = obj["metadata"], obj.get("status") or {}
    if meta.get("deletionTimestamp"):
        return
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    ready = {
        "type": names.ConditionType.READY.value,
        "status": "False",
        "reason": names.Reason.UNINSTALLED.value,
        "message": "DeepFlow was removed from this namespace; it is served again once it is back.",
        "lastTransitionTime": stamp,
        "observedGeneration": meta.get("generation", 0),
    }
    others = [c for c in status.get("conditions") or () if c.get("type") != ready["type"]]
    counts: Json = {"replicas": "", "readyReplicas": 0, "roles": []}
    if kind is WARM_POOLS:
        counts = {"replicas": 0, "ready": 0, "starting": 0, "claimed": 0}
    try:
        await api.patch(
            kind, meta["namespace"], meta["name"],
            {"metadata": {"uid": meta["uid"]}, "status": {**counts, "conditions": [*others, ready]}},
            manager=MANAGER, subresource="status",
        )  # fmt: skip
    except (NotFound, Conflict):
        return  # it went, and another may have come under its name


async def _without_finalizer(api: KubeApi, kind: ResourceType, obj: Json) -> None:
    namespace, name = obj["metadata"]["namespace"], obj["metadata"]["name"]
    for _ in range(ATTEMPTS):
        meta = obj["metadata"]
        kept = [each for each in meta.get("finalizers") or () if each != names.FINALIZER_DRAIN]
        if len(kept) == len(meta.get("finalizers") or ()):
            return
        change = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"], "finalizers": kept or None}
        try:
            await api.patch(kind, namespace, name, {"metadata": change}, manager=MANAGER)
        except NotFound:
            return
        except Conflict:
            try:
                obj = await api.get(kind, namespace, name)
            except NotFound:
                return
        else:
            return
    log.warning("%s %s keeps its finalizer: it changed %d times meanwhile", kind.kind, name, ATTEMPTS)


async def _wait_gone(api: KubeApi, namespace: str, selector: str, seconds: float) -> list[str]:
    """Names of the pods that are still there after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        pods, _ = await api.list(PODS, namespace, label_selector=selector)
        if not pods or time.monotonic() > deadline:
            return [pod["metadata"]["name"] for pod in pods]
        await asyncio.sleep(POLL_SECONDS)
