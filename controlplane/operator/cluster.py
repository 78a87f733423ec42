"""What the controllers share: the stores that watches keep, the executors, and what is spoken for.

Every object and executor that changes adds the keys of those who care to their queues; it decides nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from controlplane.api.resources.modelserving import Role
from controlplane.api.resources.names import LABEL_POOL, LABEL_SERVING, LABEL_STATE, PodState
from controlplane.fleet.demand import Demand
from controlplane.kube.client import KubeApi, NotFound
from controlplane.kube.events import EventRecorder
from controlplane.kube.reflector import Reflector, Store, drop_managed_fields
from controlplane.kube.resources import (
    MODEL_SERVINGS,
    PODS,
    ROLE_SCALERS,
    WARM_POOLS,
    Json,
    Key,
    ResourceType,
    key_of,
    uid_of,
)
from controlplane.operator.executors import Address, Executors
from controlplane.operator.plan.claim import Want
from controlplane.operator.plan.values import Pod, Te
from controlplane.operator.pods import EXECUTOR_SELECTOR, profile, read_pod, te_id
from controlplane.operator.scalers import ScalingState
from controlplane.operator.settings import OperatorSettings

_STATUS_KEPT = ("phase", "podIP", "conditions", "containerStatuses")


def trim_pod(obj: Json) -> Json:
    """Of thousands of pods only what is read is kept: of the spec its node, no managed fields."""
    status = obj.get("status") or {}
    meta = obj["metadata"]
    meta.pop("managedFields", None)
    spec = {"nodeName": (obj.get("spec") or {}).get("nodeName") or ""}
    return {
        "metadata": meta,
        "spec": spec,
        "status": {name: status[name] for name in _STATUS_KEPT if name in status},
    }


def _namespaced(label: str) -> Callable[[Json], Iterator[str]]:
    """Indexer by namespace and a label's value."""

    def index(obj: Json) -> Iterator[str]:
        value = (obj["metadata"].get("labels") or {}).get(label)
        if value:
            yield f"{obj['metadata'].get('namespace', '')}/{value}"

    return index


def _warm(obj: Json) -> Iterator[str]:
    """Indexer of warm pods by pool: of a pool's thousands, claims look at these alone."""
    labels = obj["metadata"].get("labels") or {}
    if labels.get(LABEL_POOL) and labels.get(LABEL_STATE) == PodState.WARM:
        yield f"{obj['metadata'].get('namespace', '')}/{labels[LABEL_POOL]}"


def model_names(obj: Json) -> set[str]:
    """What a ModelServing is called in the API: its id and aliases."""
    model = (obj.get("spec") or {}).get("model") or {}
    return {str(model.get("id") or obj["metadata"]["name"]), *map(str, model.get("aliases") or [])}


def scaler_name(serving: str, role: Role) -> str:
    return f"{serving}-{role.value}"


class Cluster:
    """One operator's picture of its cluster."""

    def __init__(
        self,
        api: KubeApi,
        settings: OperatorSettings,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.api = api
        self.wall = wall
        self.settings = settings
        self.events = EventRecorder(api, "deepflow.dev/operator", settings.identity or "operator")
        self.servings = Store(MODEL_SERVINGS, {"model": model_names})
        self.scalers = Store(ROLE_SCALERS, {"serving": _namespaced(LABEL_SERVING)})
        self.pools = Store(WARM_POOLS, {"namespace": lambda obj: [obj["metadata"].get("namespace", "")]})
        self.pods = Store(
            PODS,
            {
                "serving": _namespaced(LABEL_SERVING),
                "pool": _namespaced(LABEL_POOL),
                "warm": _warm,
                "uid": lambda obj: [uid_of(obj)],
            },
        )
        self.executors = Executors(settings.token, self._executor_changed, wall=wall, tls=settings.tls)
        self.demand: Demand | None = None
        self._parsed: dict[str, tuple[Json, Te | None, str, Pod | None]] = {}
        self.wants: dict[Key, Want] = {}
        self.profiles: dict[Key, str] = {}  # ModelServing -> accelerator that it wants executors of
        self.scaling: dict[Key, ScalingState] = {}  # what the scaling loop last saw and decided
        self.reserved: set[str] = set()  # uids of pods that a claim or a deletion under way names
        self.on_serving: Callable[[Key], None] = lambda _: None
        self.on_executor: Callable[[Key], None] = lambda _: None
        self.on_pool: Callable[[Key], None] = lambda _: None
        self.pods.on_change(self._pod_changed)
        self.servings.on_change(self._serving_changed)
        self.scalers.on_change(self._scaler_changed)
        self.pools.on_change(self._pool_changed)
        self.ahead: set[tuple[str, str]] = set()  # (pod's uid, model URI) of weights that lie in its memory
        self.fetched: set[tuple[str, str]] = set()  # (pod's uid, model URI) of files that were fetched ahead
        namespace = settings.namespace
        self.reflectors = [
            Reflector(api, self.servings, namespace=namespace),
            Reflector(api, self.scalers, namespace=namespace, trim=lambda obj: obj),
            Reflector(api, self.pools, namespace=namespace),
            Reflector(api, self.pods, namespace=namespace, label_selector=EXECUTOR_SELECTOR, trim=trim_pod),
        ]

    async def run(self) -> None:
        """Watches and polls until cancelled."""
        async with asyncio.TaskGroup() as group:
            for reflector in self.reflectors:
                group.create_task(reflector.run(), name=f"watch-{reflector.store.resource.plural}")
            group.create_task(self.executors.run(), name="executors")
            group.create_task(self.events.run(), name="events")

    async def synced(self) -> None:
        for reflector in self.reflectors:
            await reflector.synced.wait()

    # -- reading ---------------------------------------------------------------------------------------

    def pod(self, obj: Json) -> Pod | None:
        """The pod as a value, made once for each state of object and executor."""
        uid = uid_of(obj)
        te, error = self.executors.te(uid), self.executors.load_error(uid)[0]
        known = self._parsed.get(uid)
        if known is not None and known[0] is obj and known[1] is te and known[2] == error:
            return known[3]
        pod = read_pod(obj, te, error)
        self._parsed[uid] = (obj, te, error, pod)
        return pod

    def warm_pods(self, key: Key) -> list[Pod]:
        """Pods of a pool that nobody has claimed."""
        found = self.pods.by("warm", f"{key[0]}/{key[1]}")
        return [pod for obj in found if (pod := self.pod(obj)) is not None]

    def pods_of_serving(self, key: Key) -> list[Pod]:
        found = self.pods.by("serving", f"{key[0]}/{key[1]}")
        return [pod for obj in found if (pod := self.pod(obj)) is not None]

    def pods_of_pool(self, key: Key) -> list[Pod]:
        found = self.pods.by("pool", f"{key[0]}/{key[1]}")
        return [pod for obj in found if (pod := self.pod(obj)) is not None]

    def pools_of(self, namespace: str, wanted: str) -> list[Json]:
        """Pools of the profile (`pods.profile`), by name."""
        found = self.pools.by("namespace", namespace)
        mine = [
            obj
            for obj in found
            if profile(str(obj["spec"].get("accelerator")), str(obj["spec"].get("engine") or "flowserve"))
            == wanted
        ]
        return sorted(mine, key=lambda obj: str(obj["metadata"]["name"]))

    def scaler(self, key: Key, role: Role) -> Json | None:
        return self.scalers.get((key[0], scaler_name(key[1], role)))

    async def refresh(self, resource: ResourceType, store: Store, key: Key, uid: str) -> Json | None:
        """The object as the API server has it now, into the store too; None if that one is gone."""
        try:
            obj = await self.api.get(resource, *key)
        except NotFound:
            store.forget(key, uid)
            return None
        if resource is PODS:
            obj = trim_pod(obj)
        elif resource is not ROLE_SCALERS:
            obj = drop_managed_fields(obj)
        store.assume(obj)
        return obj if uid_of(obj) == uid else None

    # -- who is told of what -----------------------------------------------------------------------------

    def want(self, key: Key, accelerator: str, want: Want | None) -> None:
        """Notes what a ModelServing lacks, for its pools and for those that compete."""
        before = self.wants.get(key)
        if want is None or want.missing <= 0:
            self.wants.pop(key, None)
        else:
            self.wants[key] = want
        self.profiles[key] = accelerator
        if (before.missing if before else 0) != (want.missing if want else 0):
            for pool in self.pools_of(key[0], accelerator):
                self.on_pool(key_of(pool))

    def competitors(self, key: Key, accelerator: str) -> list[Want]:
        return [
            want
            for other, want in self.wants.items()
            if other != key and other[0] == key[0] and self.profiles.get(other) == accelerator
        ]

    def _executor_changed(self, uid: str) -> None:
        for obj in self.pods.by("uid", uid):
            meta = obj["metadata"]
            serving = (meta.get("labels") or {}).get(LABEL_SERVING)
            if serving:  # a claimed executor's state is nothing to its pool
                self.on_executor((meta.get("namespace", ""), serving))

    def tell(self, obj: Json) -> None:
        """A pod changed: its ModelServing and its pool look again."""
        meta = obj["metadata"]
        labels = meta.get("labels") or {}
        if labels.get(LABEL_SERVING):
            self.on_serving((meta.get("namespace", ""), labels[LABEL_SERVING]))
        if labels.get(LABEL_POOL):
            self.on_pool((meta.get("namespace", ""), labels[LABEL_POOL]))

    def _pod_changed(self, before: Json | None, now: Json | None) -> None:
        self._poll(before, now)
        if now is None and before is not None:
            self._parsed.pop(uid_of(before), None)
            self.executors.drop(uid_of(before))
        for obj in (before, now):
            if obj is not None:
                self.tell(obj)
        if now is not None and now["metadata"].get("labels", {}).get(LABEL_STATE) == PodState.WARM:
            self._tell_waiting(now)

    def _tell_waiting(self, pod: Json) -> None:
        """A warm pod changed: those that wait for one look again."""
        namespace = pod["metadata"].get("namespace", "")
        for key in self.wants:
            if key[0] == namespace:
                self.on_serving(key)

    def _poll(self, before: Json | None, now: Json | None) -> None:
        obj = now or before
        if obj is None:
            return
        meta, status = obj["metadata"], obj.get("status") or {}
        state = (meta.get("labels") or {}).get(LABEL_STATE)
        address = status.get("podIP") or ""
        owned = state in (PodState.CLAIMED, PodState.SERVING, PodState.ASLEEP, PodState.DRAINING)
        if now is None or not owned or not address:
            self.executors.drop(uid_of(obj))
        else:
            name = te_id(meta.get("namespace", ""), meta["name"])
            fast = state not in (PodState.SERVING, PodState.ASLEEP)
            self.executors.watch(uid_of(obj), Address(name, address), fast=fast)

    def _serving_changed(self, before: Json | None, now: Json | None) -> None:
        self.on_serving(key_of(now or before or {}))
        if before is None or (now is not None and before.get("spec") == now.get("spec")):
            return
        for name in model_names(before):  # given up, perhaps: who was refused for it looks again
            for other in self.servings.by("model", name):
                self.on_serving(key_of(other))

    def _scaler_changed(self, before: Json | None, now: Json | None) -> None:
        obj = now or before or {}
        serving = (obj.get("spec") or {}).get("modelServing")
        if serving:
            self.on_serving((obj["metadata"].get("namespace", ""), serving))

    def _pool_changed(self, before: Json | None, now: Json | None) -> None:
        obj = now or before
        if obj is None:
            return
        self.on_pool(key_of(obj))
        if before is None or now is None or before.get("spec") != now.get("spec"):
            for serving in self.servings:
                if serving["metadata"].get("namespace") == obj["metadata"].get("namespace"):
                    self.on_serving(key_of(serving))
