"""Which pods shall hold which models ahead of their load, and what is said of it. Pure, as all plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from controlplane.api.resources.modelcache import CacheState, ModelCache
from controlplane.api.resources.names import ConditionType, Reason
from controlplane.api.resources.warmpool import WarmPool
from controlplane.operator.plan.status import Json, Said

_ORDER = (CacheState.FAILED, CacheState.PENDING, CacheState.FETCHING, CacheState.READY)


@dataclass(frozen=True, slots=True)
class Keeper:
    """A pod whose fetcher can be asked."""

    uid: str
    namespace: str
    node: str
    pool: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A model in one pod, as its fetcher last said."""

    state: CacheState = CacheState.PENDING
    done: int = 0
    total: int | None = None
    message: str = ""


PENDING = Kept()


def keepers(cache: ModelCache, pods: Iterable[Keeper]) -> list[Keeper]:
    """The pods that shall keep the cache's models."""
    pools = set(cache.spec.pools)
    return [
        pod for pod in pods if pod.namespace == cache.metadata.namespace and (not pools or pod.pool in pools)
    ]


def wanted(
    caches: Iterable[ModelCache], pools: Iterable[WarmPool], pods: Sequence[Keeper]
) -> set[tuple[str, str]]:
    """(pod's uid, URI) of all that shall be kept."""
    found = {
        (pod.uid, model.uri)
        for cache in caches
        for pod in keepers(cache, pods)
        for model in cache.spec.models
    }
    of_pool = {pool.key: pool.spec.models for pool in pools}
    return found | {(pod.uid, uri) for pod in pods for uri in of_pool.get((pod.namespace, pod.pool), ())}


def progress(
    cache: ModelCache, pods: Sequence[Keeper], kept: Mapping[tuple[str, str], Kept]
) -> tuple[Json, Said]:
    """The status but for its conditions, and `Ready`. A node has a model when all of its pods have it."""
    nodes: list[Json] = []
    mine = keepers(cache, pods)
    behind: list[Kept] = []
    ready = 0
    for node in sorted({pod.node for pod in mine}):
        here = [pod for pod in mine if pod.node == node]
        models: list[Json] = []
        last = [
            (
                model.uri,
                min(
                    (kept.get((pod.uid, model.uri), PENDING) for pod in here),
                    key=lambda one: (_ORDER.index(one.state), one.done),
                ),
            )
            for model in cache.spec.models
        ]
        for uri, one in last:
            entry: Json = {
                "uri": uri,
                "state": one.state.value,
                "bytesDone": one.done,
                "message": one.message,
            }
            if one.total is not None:
                entry["bytesTotal"] = one.total
            models.append(entry)
        nodes.append({"name": node, "pods": len(here), "models": models})
        late = [one for _, one in last if one.state is not CacheState.READY]
        behind += late
        ready += not late
    status: Json = {"nodes": nodes, "readyNodes": ready, "wantedNodes": len(nodes)}
    return status, _ready(behind, ready, len(nodes))


def _ready(behind: Sequence[Kept], ready: int, nodes: int) -> Said:
    count = f"{ready} of {nodes} nodes have all models."
    if not nodes:
        return Said(ConditionType.READY, False, Reason.NO_PODS, "No pod of these pools runs.")
    if not behind:
        return Said(ConditionType.READY, True, Reason.CACHED, count)
    failed = next((one for one in behind if one.state is CacheState.FAILED), None)
    if failed is not None:
        return Said(ConditionType.READY, False, Reason.FETCH_FAILED, f"{count} {failed.message}")
    return Said(ConditionType.READY, False, Reason.FETCHING, count)
