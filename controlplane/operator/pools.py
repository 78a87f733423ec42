"""The controller of WarmPools: keeps them filled, renews what is outdated, says what is."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import replace

from pydantic import ValidationError

from controlplane.api.resources.names import (
    ANNOTATION_PAUSED,
    LABEL_POOL,
    LABEL_STATE,
    OWNER_OPERATOR,
    ConditionType,
    PodState,
    Reason,
)
from controlplane.api.resources.warmpool import WarmPool
from controlplane.kube.client import Conflict, Forbidden, Invalid, KubeError
from controlplane.kube.resources import PODS, WARM_POOLS, Json, Key, key_of, uid_of
from controlplane.operator import metrics
from controlplane.operator.acting import Actor
from controlplane.operator.cluster import Cluster, trim_pod
from controlplane.operator.plan import plan_pool
from controlplane.operator.plan.pool import HOLD_SECONDS
from controlplane.operator.plan.status import Said, pool_condition
from controlplane.operator.plan.values import Create, Delete, Pod, Pool
from controlplane.operator.pods import hash_of, profile, template_of, warm_pod
from controlplane.operator.statuses import conditions_of, write_status

CREATES_AT_ONCE = 16
MAX_HOLD_SECONDS = 300.0
EVERY_SECONDS = 600.0
ACTED_AGAIN_SECONDS = 5.0
"""After a turn that did something (as STARTING_AGAIN_SECONDS of a ModelServing)."""

log = logging.getLogger(__name__)


class PoolController:
    def __init__(self, cluster: Cluster, suffix: Callable[[], str] = lambda: secrets.token_hex(4)) -> None:
        self._cluster = cluster
        self._actor = Actor(cluster)
        self._wall = cluster.wall
        self._suffix = suffix
        self._holds: dict[Key, tuple[float, int, str]] = {}  # until, failures in a row, the last one's words

    async def reconcile(self, key: Key) -> float | None:
        obj = self._cluster.pools.get(key)
        if obj is None:
            self._holds.pop(key, None)  # its warm pods go with it: the garbage collector's
            return None
        try:
            pool = WarmPool.model_validate(obj)
        except ValidationError as error:
            said = Said(ConditionType.READY, False, Reason.INVALID_SOURCE, str(error.errors()[0]["msg"]))
            await self._write(obj, {}, said)
            return None
        settings = self._cluster.settings
        spec = template_of(pool, settings)
        until, failures, words = self._holds.get(key, (0.0, 0, ""))
        wanted = Pool(
            key=key,
            uid=uid_of(obj),
            size=pool.spec.size,
            max_pods=pool.spec.max_pods,
            template_hash=hash_of(spec),
            accelerator=profile(pool.spec.accelerator, pool.spec.engine),
            missing=self._missing(key, pool),
            hold_until=until,
            deleting=pool.metadata.deletion_timestamp is not None,
        )
        pods = self._pods(key)
        plan = plan_pool(wanted, pods, self._wall())
        if pool.metadata.annotations.get(ANNOTATION_PAUSED) != "true":
            for action in plan.actions:
                if isinstance(action, Create):
                    await self._create(key, obj, pool, spec, action.count)
                elif isinstance(action, Delete):
                    if action.reason is Reason.POD_FAILED:
                        self._hold(key, f"pod {action.pod.key[1]} failed: {action.pod.problem_text}")
                    await self._actor.act(action, obj, None)
        pods = self._pods(key)
        ready = sum(pod.ready and pod.state is PodState.WARM and not pod.deleting for pod in pods)
        if failures and ready >= wanted.size:
            self._holds.pop(key, None)
        until, _, words = self._holds.get(key, (0.0, 0, ""))
        await self._say(obj, wanted, pods, words)
        # What was tried may have come to nothing, and then no watch says anything: a name that was taken, a
        # quota that refused all pods.
        held = until - self._wall()
        again = [after for after in (plan.again_after, held) if after is not None and after > 0]
        return min([*again, ACTED_AGAIN_SECONDS if plan.actions and not again else EVERY_SECONDS])

    def _pods(self, key: Key) -> list[Pod]:
        """A warm pod that a claim under way names counts as claimed."""
        reserved = self._cluster.reserved
        return [
            replace(pod, state=PodState.CLAIMED)
            if pod.state is PodState.WARM and pod.uid in reserved
            else pod
            for pod in self._cluster.pods_of_pool(key)
        ]

    def _missing(self, key: Key, pool: WarmPool) -> int:
        """This pool's part of what ModelServings of its profile lack: the first pool by name with room."""
        accelerator = profile(pool.spec.accelerator, pool.spec.engine)
        total = sum(
            want.missing
            for other, want in self._cluster.wants.items()
            if other[0] == key[0] and self._cluster.profiles.get(other) == accelerator
        )
        metrics.MISSING.labels(accelerator).set(total)
        for found in self._cluster.pools_of(key[0], accelerator):
            other = key_of(found)
            if other == key:
                return total
            spec = found["spec"]
            used = sum(pod.state is not PodState.WARM for pod in self._cluster.pods_of_pool(other))
            room = max(0, int(spec.get("maxPods") or 10_000) - used - int(spec.get("size") or 0))
            total = max(0, total - room)
        return 0

    async def _create(self, key: Key, obj: Json, pool: WarmPool, spec: Json, count: int) -> None:
        gate = asyncio.Semaphore(CREATES_AT_ONCE)
        refused: list[KubeError] = []

        async def one() -> None:
            async with gate:
                if refused:
                    return
                try:
                    body = warm_pod(pool, obj, spec, self._suffix())
                    made = await self._cluster.api.create(PODS, body, manager=OWNER_OPERATOR)
                except Conflict:
                    return  # the name is taken: the next turn draws another
                except (Forbidden, Invalid) as error:  # a quota, an admission, a field of the template
                    refused.append(error)
                    return
                self._cluster.pods.assume(trim_pod(made))
                metrics.ACTIONS.labels("create", "done").inc()

        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(one())
        if refused:
            metrics.ACTIONS.labels("create", "failed").inc()
            self._hold(key, f"pods are refused: {refused[0]}")
            self._cluster.events.record(
                obj,
                WARM_POOLS.kind,
                WARM_POOLS.api_version,
                Reason.POD_FAILED.value,
                str(refused[0]),
                warning=True,
            )

    def _hold(self, key: Key, words: str) -> None:
        until, failures, _ = self._holds.get(key, (0.0, 0, ""))
        if until > self._wall():
            return  # pods of before it: they say nothing new
        wait = min(HOLD_SECONDS * float(2 ** min(failures, 10)), MAX_HOLD_SECONDS)
        self._holds[key] = (self._wall() + wait, failures + 1, words[:500])
        log.warning("pool %s: %s; no new pods for %.0f s", key, words, wait)

    async def _say(self, obj: Json, wanted: Pool, pods: list[Pod], words: str) -> None:
        free = [pod for pod in pods if pod.state is PodState.WARM and not pod.deleting]
        ready = sum(pod.ready for pod in free)
        status: Json = {
            "replicas": len(free),
            "ready": ready,
            "starting": len(free) - ready,
            "claimed": sum(pod.state is not PodState.WARM for pod in pods),
            "selector": f"{LABEL_POOL}={wanted.key[1]},{LABEL_STATE}={PodState.WARM.value}",
        }
        await self._write(obj, status, pool_condition(wanted, pods, words))

    async def _write(self, obj: Json, status: Json, said: Said) -> None:
        fresh = self._cluster.pools.get(key_of(obj))
        if fresh is None:
            return
        generation = int(fresh["metadata"].get("generation") or 0)
        status["observedGeneration"] = generation
        status["conditions"] = conditions_of([said], fresh.get("status") or {}, generation, self._wall())
        await write_status(self._cluster.api, self._cluster.pools, WARM_POOLS, fresh, status)
