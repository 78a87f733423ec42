"""A list of one kind, kept current by a watch.

`Reflector.run` lists once, then watches from there; bookmarks keep the place while nothing happens, so that
a watch that ends (the server ends each after some minutes) goes on without another list. 410 means the place
is lost: list again, and tell handlers the difference. Between failures it waits, longer each time up to a
bound, with jitter, because all watchers of a restarted API server come back at once.

`Store` is what readers see. It takes writers' answers too (`assume`): whoever acted on the store finds his
own write in it at once and not when the watch brings it, so that no decision is taken twice.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from controlplane.kube import metrics
from controlplane.kube.client import Gone, KubeApi, KubeError
from controlplane.kube.resources import Json, Key, ResourceType, key_of, newer, uid_of, version_of

BACKOFF_FIRST_SECONDS = 0.2
BACKOFF_MAX_SECONDS = 30.0  # as client-go's reflector
HEALTHY_SECONDS = 30.0
"""A watch that lasted so long ends a row of failures."""
MAX_TOMBSTONES = 20_000

log = logging.getLogger(__name__)

Handler = Callable[[Json | None, Json | None], None]
"""Called with (before, now) of an object; None: it did not exist, or is gone. On the loop; must not raise."""
Indexer = Callable[[Json], Iterable[str]]
Trim = Callable[[Json], Json]


def drop_managed_fields(obj: Json) -> Json:
    """Without metadata.managedFields, which is most of a small object's weight."""
    obj.get("metadata", {}).pop("managedFields", None)
    return obj


class Store:
    """Objects by key, and by what indexers say of them. Values are shared: never change one."""

    def __init__(self, resource: ResourceType, indexers: dict[str, Indexer] | None = None) -> None:
        self.resource = resource
        self._indexers = indexers or {}
        self._objects: dict[Key, Json] = {}
        self._index: dict[str, dict[str, dict[Key, Json]]] = {
            name: defaultdict(dict) for name in self._indexers
        }
        self._deleted: dict[tuple[Key, str], None] = {}
        self._handlers: list[Handler] = []

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[Json]:
        return iter(list(self._objects.values()))

    def get(self, key: Key) -> Json | None:
        return self._objects.get(key)

    def by(self, index: str, value: str) -> list[Json]:
        """Objects of which the indexer said `value`."""
        found = self._index[index].get(value)
        return list(found.values()) if found else []

    def on_change(self, handler: Handler) -> None:
        self._handlers.append(handler)

    def assume(self, obj: Json) -> None:
        """The API server's answer to a write of ours. An older one changes nothing."""
        key = key_of(obj)
        known = self._objects.get(key)
        if (
            known is not None
            and uid_of(known) == uid_of(obj)
            and not newer(version_of(obj), version_of(known))
        ):
            return
        if (key, uid_of(obj)) in self._deleted:
            return
        self._put(key, obj)

    def forget(self, key: Key, uid: str) -> None:
        """A delete of ours succeeded and nothing holds the object: late events do not bring it back."""
        known = self._objects.get(key)
        if known is not None and uid_of(known) == uid:
            self._bury(key, uid)
            self._drop(key)

    # -- the reflector's side ----------------------------------------------------------------------------

    def take(self, kind: str, obj: Json) -> None:
        """One watch event."""
        key = key_of(obj)
        if kind == "DELETED":
            self._bury(key, uid_of(obj))
            known = self._objects.get(key)
            if known is not None and uid_of(known) == uid_of(obj):
                self._drop(key)
        else:
            self.assume(obj)

    def replace(self, items: Iterable[Json]) -> None:
        """A full list: what is not in it is gone."""
        listed = {key_of(obj): obj for obj in items}
        for key in [key for key in self._objects if key not in listed]:
            self._drop(key)
        self._deleted.clear()
        for key, obj in listed.items():  # also older ones: the server may have been restored from a backup
            known = self._objects.get(key)
            if known is None or version_of(known) != version_of(obj) or uid_of(known) != uid_of(obj):
                self._put(key, obj)

    def _bury(self, key: Key, uid: str) -> None:
        self._deleted[key, uid] = None
        if len(self._deleted) > MAX_TOMBSTONES:
            del self._deleted[next(iter(self._deleted))]

    def _put(self, key: Key, obj: Json) -> None:
        before = self._objects.get(key)
        self._objects[key] = obj
        for name, indexer in self._indexers.items():
            now = set(indexer(obj))
            if before is not None:
                for value in set(indexer(before)) - now:
                    self._unindex(name, value, key)
            for value in now:
                self._index[name][value][key] = obj
        self._tell(before, obj)

    def _drop(self, key: Key) -> None:
        before = self._objects.pop(key)
        for name, indexer in self._indexers.items():
            for value in set(indexer(before)):
                self._unindex(name, value, key)
        self._tell(before, None)

    def _unindex(self, name: str, value: str, key: Key) -> None:
        found = self._index[name].get(value)
        if found is not None:
            found.pop(key, None)
            if not found:
                del self._index[name][value]

    def _tell(self, before: Json | None, now: Json | None) -> None:
        metrics.OBJECTS.labels(self.resource.plural).set(len(self._objects))
        for handler in self._handlers:
            handler(before, now)


class Reflector:
    """Keeps `store` current until cancelled. `synced` is set after the first list."""

    def __init__(
        self,
        api: KubeApi,
        store: Store,
        *,
        namespace: str = "",
        label_selector: str = "",
        trim: Trim = drop_managed_fields,
        rand: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.synced = asyncio.Event()
        self.failures = 0
        self._api = api
        self._namespace = namespace
        self._selector = label_selector
        self._trim = trim
        self._rand = rand
        self._clock = clock
        self._heard: float | None = None
        self._version = ""  # to watch from; "" = list first

    @property
    def silence(self) -> float:
        """Seconds since the API server last said anything; infinite before the first list."""
        return float("inf") if self._heard is None else self._clock() - self._heard

    async def run(self) -> None:
        cause = "start"
        plural = self.store.resource.plural
        while True:
            began = self._clock()
            try:
                if not self._version:
                    await self._list(cause)
                    began = self._clock()
                await self._watch()
                self.failures = 0
            except Gone as error:
                log.info("%s: the watch lost its place, listing again: %s", plural, error)
                self._version, cause = "", "gone"
                await self._pause()
            except KubeError as error:
                if self._clock() - began > HEALTHY_SECONDS:
                    self.failures = 0
                level = logging.WARNING if self.failures == 0 else logging.DEBUG
                log.log(level, "%s: %s (%d %s)", plural, error, error.status, error.reason)
                if error.status in (401, 403, 404):
                    self._version, cause = "", "refused"
                await self._pause()

    async def _pause(self) -> None:
        wait = min(BACKOFF_FIRST_SECONDS * 2 ** min(self.failures, 16), BACKOFF_MAX_SECONDS)
        self.failures += 1
        await asyncio.sleep(wait * (0.5 + self._rand()))

    async def _list(self, cause: str) -> None:
        items, version = await self._api.list(
            self.store.resource, self._namespace, label_selector=self._selector
        )
        metrics.LISTS.labels(self.store.resource.plural, cause).inc()
        self._heard = self._clock()
        self.store.replace(self._trim(item) for item in items)
        self._version = version
        self.synced.set()

    async def _watch(self) -> None:
        """Until the server ends the watch. What was read stays read, however it ends."""
        events = metrics.WATCH_EVENTS.labels(self.store.resource.plural)
        async for kind, obj in self._api.watch(
            self.store.resource, self._namespace, label_selector=self._selector, version=self._version
        ):
            self._heard = self._clock()
            events.inc()
            if kind != "BOOKMARK":
                self.store.take(kind, self._trim(obj))
            self._version = version_of(obj) or self._version
