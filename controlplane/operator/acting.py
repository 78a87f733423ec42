"""Actions of plans, done: one write or one call each, against the very object that was planned for.

A pod's kubelet writes to it too, so a conflict is ordinary: the object is read again, and if it still is what
the plan saw (state, owner, role) the write is made again on the fresh version. Otherwise somebody else acted,
and the next plan begins from there.
"""

from __future__ import annotations

import logging

from controlplane.api.resources.names import (
    ANNOTATION_ASLEEP_SINCE,
    ANNOTATION_CLAIMED_AT,
    ANNOTATION_DRAIN_SINCE,
    ANNOTATION_LOAD_HASH,
    ANNOTATION_REVISION,
    ANNOTATION_ROLE_EPOCH,
    ANNOTATION_SERVING_UID,
    ANNOTATION_START_PATH,
    LABEL_ROLE,
    LABEL_SERVING,
    LABEL_STATE,
    OWNER_OPERATOR,
    PodState,
    Reason,
)
from controlplane.kube.client import Conflict, KubeError, NotFound
from controlplane.kube.resources import MODEL_SERVINGS, PODS, Json, owner_reference
from controlplane.operator import metrics
from controlplane.operator.cluster import Cluster, trim_pod
from controlplane.operator.executors import Target
from controlplane.operator.plan.values import (
    Action,
    Assign,
    Claim,
    Delete,
    DrainTe,
    Load,
    Mark,
    Pod,
    PushRole,
    SleepTe,
    WakePod,
)
from controlplane.operator.pods import format_time

CONFLICT_RETRIES = 4
COLD_SECONDS = 30.0
"""A pod that is younger when it is claimed was made for the claim: a cold start (ours)."""
SLEEP_SECONDS = 10.0
"""For tasks to end before their executor sleeps (ours); where they take longer it serves on."""

log = logging.getLogger(__name__)


def path_of(pod: Pod) -> str:
    """What a serving executor started from: a pod that was made for its claim started cold, else as the
    executor says."""
    if pod.start_path == "cold" or pod.te is None:
        return pod.start_path or "warm"
    return pod.te.start_path or pod.start_path or "warm"


class Actor:
    """Does what plans of one ModelServing or WarmPool say."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._wall = cluster.wall

    async def act(self, action: Action, owner: Json, target: Target | None, load_hash: str = "") -> bool:
        """`owner`: the ModelServing or WarmPool, for Events. False if somebody else came first. Raises
        KubeError where the API server does not take it."""
        name = type(action).__name__.lower()
        try:
            done = await self._act(action, owner, target, load_hash)
        except KubeError:
            metrics.ACTIONS.labels(name, "failed").inc()
            raise
        metrics.ACTIONS.labels(name, "done" if done else "lost").inc()
        return done

    async def _act(self, action: Action, owner: Json, target: Target | None, load_hash: str) -> bool:
        executors = self._cluster.executors
        match action:
            case Claim():
                return await self._claim(action, owner, load_hash)
            case Assign(pod, role, epoch):
                patch = {LABEL_ROLE: role.value}
                done = await self._patch(pod, labels=patch, annotations={ANNOTATION_ROLE_EPOCH: str(epoch)})
                if done:
                    executors.set_role(pod.uid, role, epoch)
                    if pod.role is not role:
                        self._tell(owner, Reason.ROLE_CHANGED, f"{pod.key[1]} is now {role.value}")
                return done
            case PushRole(pod, role, epoch):
                executors.set_role(pod.uid, role, epoch)
            case Load(pod):
                if target is not None:
                    executors.load(pod.uid, target)
            case Mark():
                return await self._mark(action, owner)
            case SleepTe(pod):
                executors.sleep(pod.uid, SLEEP_SECONDS)
            case WakePod():
                return await self._wake(action, owner)
            case DrainTe(pod):
                executors.drain(pod.uid)
            case Delete():
                return await self._delete(action, owner)
            case _:
                raise AssertionError(f"{action} is a pool's")
        return True

    async def _claim(self, action: Claim, owner: Json, load_hash: str) -> bool:
        pod, now = action.pod, self._wall()
        path = "cold" if now - pod.created < COLD_SECONDS else "warm"
        done = await self._patch(
            pod,
            labels={
                LABEL_STATE: PodState.CLAIMED.value,
                LABEL_SERVING: owner["metadata"]["name"],
                LABEL_ROLE: action.role.value,
            },
            annotations={
                ANNOTATION_CLAIMED_AT: format_time(now),
                ANNOTATION_SERVING_UID: owner["metadata"]["uid"],
                ANNOTATION_ROLE_EPOCH: str(action.epoch),
                ANNOTATION_LOAD_HASH: load_hash,
                ANNOTATION_START_PATH: path,
            },
            owner=owner_reference(owner, MODEL_SERVINGS),
        )
        if done:
            self._tell(owner, Reason.CLAIMED, f"{pod.key[1]} of pool {pod.pool} as {action.role.value}")
        return done

    async def _wake(self, action: WakePod, owner: Json) -> bool:
        pod = action.pod
        done = await self._patch(
            pod,
            labels={LABEL_STATE: PodState.CLAIMED.value, LABEL_ROLE: action.role.value},
            annotations={
                ANNOTATION_CLAIMED_AT: format_time(self._wall()),
                ANNOTATION_ROLE_EPOCH: str(action.epoch),
                ANNOTATION_ASLEEP_SINCE: None,
                ANNOTATION_START_PATH: "wake",
            },
        )
        if done:
            self._cluster.executors.set_role(pod.uid, action.role, action.epoch)
            self._tell(owner, Reason.WOKEN, f"{pod.key[1]} as {action.role.value}")
        return done

    async def _mark(self, action: Mark, owner: Json) -> bool:
        pod = action.pod
        notes: dict[str, str | None] = {}
        if action.state is PodState.DRAINING:
            notes[ANNOTATION_DRAIN_SINCE] = format_time(self._wall())
        if action.state is PodState.ASLEEP:
            notes[ANNOTATION_ASLEEP_SINCE] = format_time(self._wall())
        path = path_of(pod)
        if action.revision:
            notes |= {ANNOTATION_REVISION: action.revision, ANNOTATION_START_PATH: path}
        done = await self._patch(pod, labels={LABEL_STATE: action.state.value}, annotations=notes)
        if done and action.state is PodState.DRAINING:
            self._cluster.executors.drain(pod.uid)
        if done and action.state is PodState.ASLEEP:
            self._cluster.executors.sleep(pod.uid, SLEEP_SECONDS)
            self._tell(owner, action.reason, f"{pod.key[1]} is not needed now")
        if done and action.state is PodState.SERVING:
            metrics.CLAIM_SECONDS.labels(path).observe(max(0.0, self._wall() - pod.claimed_at))
            self._tell(owner, action.reason, f"{pod.key[1]} serves {action.revision} ({path})")
        return done

    async def _patch(
        self,
        pod: Pod,
        *,
        labels: dict[str, str],
        annotations: dict[str, str | None] | dict[str, str],
        owner: Json | None = None,
    ) -> bool:
        version = pod.version
        for _ in range(CONFLICT_RETRIES):
            meta: Json = {
                "uid": pod.uid,
                "resourceVersion": version,
                "labels": labels,
                "annotations": annotations,
            }
            if owner is not None:
                meta["ownerReferences"] = [owner]
            try:
                changed = await self._cluster.api.patch(
                    PODS, *pod.key, {"metadata": meta}, manager=OWNER_OPERATOR
                )
            except NotFound:
                self._cluster.pods.forget(pod.key, pod.uid)
                return False
            except Conflict:
                fresh = await self._still(pod)
                if fresh is None:
                    return False
                version = fresh.version
                continue
            self._cluster.pods.assume(trim_pod(changed))
            return True
        raise Conflict(409, "Conflict", f"pod {pod.key[1]} keeps changing")

    async def _delete(self, action: Delete, owner: Json) -> bool:
        pod, version = action.pod, action.pod.version if action.unchanged else ""
        self._cluster.reserved.add(pod.uid)
        try:
            for _ in range(CONFLICT_RETRIES):
                try:
                    await self._cluster.api.delete(PODS, *pod.key, uid=pod.uid, version=version)
                except Conflict:
                    fresh = await self._still(pod)
                    if fresh is None:
                        return False
                    version = fresh.version if action.unchanged else ""
                    continue
                warning = action.reason in (Reason.DRAIN_TIMED_OUT, Reason.POD_FAILED)
                self._tell(owner, action.reason, f"pod {pod.key[1]} is deleted", warning=warning)
                # A pod stays until its containers have ended; the watch tells.
                await self._cluster.refresh(PODS, self._cluster.pods, pod.key, pod.uid)
                return True
            raise Conflict(409, "Conflict", f"pod {pod.key[1]} keeps changing")
        finally:
            self._cluster.reserved.discard(pod.uid)

    async def _still(self, pod: Pod) -> Pod | None:
        """The pod as it is now, if what the plan saw of it still holds."""
        obj = await self._cluster.refresh(PODS, self._cluster.pods, pod.key, pod.uid)
        fresh = self._cluster.pod(obj) if obj is not None else None
        if fresh is None or fresh.deleting:
            return None
        seen = (pod.state, pod.serving_uid, pod.role, pod.epoch)
        return fresh if (fresh.state, fresh.serving_uid, fresh.role, fresh.epoch) == seen else None

    def _tell(self, owner: Json, reason: Reason, note: str, *, warning: bool = False) -> None:
        kind = str(owner.get("kind") or MODEL_SERVINGS.kind)
        self._cluster.events.record(
            owner, kind, MODEL_SERVINGS.api_version, reason.value, note, warning=warning
        )
