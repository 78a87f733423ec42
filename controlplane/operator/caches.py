"""Models that are kept ahead: asks the fetchers of executors' pods for what ModelCaches and pools name.

One loop beside the controllers. What a pod has said to hold is not asked for again while the pod lives; what
failed is, later. Statuses are written when they change, progress at most every few seconds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import aiohttp
from pydantic import ValidationError

from controlplane.api.resources.modelcache import CacheState, ModelCache
from controlplane.api.resources.names import LABEL_POOL
from controlplane.api.resources.warmpool import WarmPool
from controlplane.kube.client import KubeError
from controlplane.kube.reflector import Reflector, Store
from controlplane.kube.resources import MODEL_CACHES, Json, uid_of
from controlplane.operator import metrics
from controlplane.operator.ahead import Ahead
from controlplane.operator.cluster import Cluster
from controlplane.operator.executors import Address, ask_fetcher
from controlplane.operator.plan.cache import Keeper, Kept, progress, wanted
from controlplane.operator.pods import te_id
from controlplane.operator.statuses import conditions_of, write_status

LOOK_SECONDS = 2.0
"""Between looks while something is fetched; otherwise it waits for a change, or:"""
IDLE_SECONDS = 30.0
WRITE_SECONDS = 5.0
"""Between two statuses of one ModelCache that differ in bytes only."""
ASK_SECONDS = 10.0
ASKS_AT_ONCE = 32
FAILED_SECONDS = 60.0
HOPELESS_SECONDS = 600.0
"""Until what failed is asked for again; a file that is not there may have been put there meanwhile."""

log = logging.getLogger("deepflow.operator")

T = TypeVar("T", ModelCache, WarmPool)


class CacheLoop:
    """`run` until cancelled; `store` is followed by whoever owns the cluster's watches."""

    def __init__(self, cluster: Cluster, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._clock = clock
        self.store = Store(MODEL_CACHES)
        self.reflector = Reflector(cluster.api, self.store, namespace=cluster.settings.namespace)
        self._kept: dict[tuple[str, str], Kept] = {}
        self._again: dict[tuple[str, str], float] = {}  # when what failed is asked for
        self._files: dict[
            tuple[str, str], tuple[str, str]
        ] = {}  # (path in the pod, SHA-256) of what is there
        self._ahead = Ahead(cluster, clock)
        self._written: dict[str, float] = {}  # ModelCache's uid -> when its status was written
        self._changed = asyncio.Event()
        for store in (self.store, cluster.pods, cluster.pools):
            store.on_change(lambda before, now: self._changed.set())

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=ASK_SECONDS)
        async with asyncio.TaskGroup() as group, aiohttp.ClientSession(timeout=timeout) as session:
            group.create_task(self.reflector.run(), name="watch-modelcaches")
            await self.reflector.synced.wait()
            try:
                while True:
                    self._changed.clear()
                    busy = await self._look(session)
                    try:
                        async with asyncio.timeout(LOOK_SECONDS if busy else IDLE_SECONDS):
                            await self._changed.wait()
                        await asyncio.sleep(0 if busy else LOOK_SECONDS / 4)  # changes come in crowds
                    except TimeoutError:
                        pass
            finally:
                await self._ahead.close()

    async def _look(self, session: aiohttp.ClientSession) -> bool:
        """Asks and writes once; whether something is under way."""
        caches = [cache for obj in self.store if (cache := _parse(ModelCache, obj)) is not None]
        pools = [pool for obj in self._cluster.pools if (pool := _parse(WarmPool, obj)) is not None]
        addresses = self._addresses()
        pods = list(addresses)
        ahead = self._ahead.wanted(pools, {model.uri for cache in caches for model in cache.spec.models})
        by_uid = {pod.uid: address for pod, address in addresses.items()}
        want = wanted(caches, pools, pods) | {
            (uid, target.uri) for uid, target in ahead.items() if uid in by_uid
        }
        for known in [pair for pair in self._kept if pair not in want]:
            del self._kept[known]
            self._again.pop(known, None)
            self._files.pop(known, None)
        now = self._clock()
        due = [pair for pair in sorted(want) if self._due(pair, now)]
        gate = asyncio.Semaphore(ASKS_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for uid, uri in due:
                group.create_task(self._ask(session, gate, uid, by_uid[uid], uri))
        self._ahead.put(ahead, self._files, by_uid)
        self._cluster.ahead = self._ahead.held
        self._cluster.fetched = {pair for pair, one in self._kept.items() if one.state is CacheState.READY}
        for cache in caches:
            await self._say(cache, pods)
        for state in CacheState:
            metrics.KEPT.labels(state.value).set(sum(one.state is state for one in self._kept.values()))
        return any(self._kept[pair].state in (CacheState.PENDING, CacheState.FETCHING) for pair in want)

    def _addresses(self) -> dict[Keeper, Address]:
        found: dict[Keeper, Address] = {}
        for obj in self._cluster.pods:
            pod, meta = self._cluster.pod(obj), obj["metadata"]
            host = (obj.get("status") or {}).get("podIP")
            if pod is None or pod.deleting or pod.ended or not pod.ready or not host:
                continue
            namespace = str(meta.get("namespace") or "")
            keeper = Keeper(
                uid=pod.uid,
                namespace=namespace,
                node=str((obj.get("spec") or {}).get("nodeName") or "unknown"),
                pool=str((meta.get("labels") or {}).get(LABEL_POOL) or ""),
            )
            found[keeper] = Address(te_id(namespace, meta["name"]), str(host))
        return found

    def _due(self, pair: tuple[str, str], now: float) -> bool:
        known = self._kept.get(pair)
        if known is None or known.state in (CacheState.PENDING, CacheState.FETCHING):
            return True
        return known.state is CacheState.FAILED and now >= self._again.get(pair, 0.0)

    async def _ask(
        self, session: aiohttp.ClientSession, gate: asyncio.Semaphore, uid: str, address: Address, uri: str
    ) -> None:
        async with gate:
            answer: dict[str, Any]
            try:
                settings = self._cluster.settings
                async with ask_fetcher(session, address, uri, settings.token, settings.tls) as response:
                    answer = await response.json()
                    if response.status != 200:
                        answer = {
                            "state": "failed",
                            "message": f"its fetcher refuses: {answer.get('message')}",
                        }
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                message = f"its fetcher does not answer: {error or type(error).__name__}"
                answer = {"state": "failed", "message": message}
        pair, state = (uid, uri), str(answer.get("state"))
        if state == "failed":
            wait = HOPELESS_SECONDS if answer.get("hopeless") else FAILED_SECONDS
            self._again[pair] = self._clock() + wait
            self._kept[pair] = Kept(CacheState.FAILED, message=str(answer.get("message"))[:1000])
            log.warning("%s does not get %s: %s", address.te_id, uri, answer.get("message"))
            return
        if state == "ready":
            self._files[pair] = (str(answer["path"]), str(answer["sha256"]))
        total = answer.get("total")
        self._kept[pair] = Kept(
            CacheState.READY if state == "ready" else CacheState.FETCHING,
            int(answer.get("done") or 0),
            int(total) if total is not None else None,
        )

    async def _say(self, cache: ModelCache, pods: list[Keeper]) -> None:
        obj = self.store.get(cache.key)
        if obj is None:
            return
        status, said = progress(cache, pods, self._kept)
        before: Json = obj.get("status") or {}
        generation = cache.metadata.generation
        status["observedGeneration"] = generation
        status["conditions"] = conditions_of([said], before, generation, self._cluster.wall())
        uid, now = uid_of(obj), self._clock()
        same = all(before.get(name) == value for name, value in status.items() if name != "nodes")
        if same and _shape(before) == _shape(status) and now - self._written.get(uid, 0.0) < WRITE_SECONDS:
            return
        try:
            if await write_status(self._cluster.api, self.store, MODEL_CACHES, obj, status):
                self._written[uid] = now
        except KubeError as error:
            log.warning("the status of ModelCache %s is not written: %s", cache.metadata.name, error)
        self._written = {known: at for known, at in self._written.items() if now - at < IDLE_SECONDS}


def _shape(status: Json) -> list[tuple[object, list[object]]]:
    """A status without its bytes."""
    nodes: list[Json] = status.get("nodes") or []
    return [(node["name"], [model.get("state") for model in node.get("models") or []]) for node in nodes]


def _parse(kind: type[T], obj: Json) -> T | None:
    try:
        return kind.model_validate(obj)
    except ValidationError as error:
        log.error("%s cannot be read: %s", obj["metadata"].get("name"), error.errors()[0]["msg"])
        return None
