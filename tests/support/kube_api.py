"""A Kubernetes API in this process: kmock's emulator with the rules that an operator depends on.

kmock parses requests and serves them; its own store knows no resourceVersions, preconditions or server-side
apply, so objects are kept here, as a real API server keeps them: versions that only grow, optimistic locking,
uid preconditions, field owners, status and scale as subresources, generations, finalizers, garbage collection
by owner, pages, label selectors, watches with bookmarks that begin at a version or are refused (410).
It checks no schemas and no CEL rules: for those the suite wants a real API server.

    async with kube_api() as api:
        api.url, api.writes, api.faults.append(...), api.drop_watches(), api.compact()
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp.web
import kmock

Json = dict[str, Any]
Key = tuple[str, str, str]  # plural, namespace, name
Writer = tuple[str, str, str]  # manager, operation, subresource

HISTORY = 200_000
BOOKMARK_SECONDS = 1.0
# Kinds whose spec has a generation and whose status is a subresource.
STATUS_KINDS = {"pods", "modelservings", "rolescalers", "warmpools", "modelcaches"}
GENERATIONS = STATUS_KINDS - {"pods"}


@dataclass(frozen=True, slots=True)
class Write:
    """One successful change, for tests that count."""

    verb: str
    plural: str
    namespace: str
    name: str
    subresource: str
    manager: str


@dataclass(slots=True)
class Fault:
    """Answers `status` instead of doing what was asked, `times` times. `after`: does it, and then loses the
    answer, as when a connection breaks."""

    status: int
    times: int = 1
    method: str = ""
    plural: str = ""
    after: bool = False
    retry_after: int | None = None

    def takes(self, request: kmock.Request) -> bool:
        plural = request.resource.plural if request.resource is not None else ""
        return (
            self.times > 0
            and self.method in ("", request.method.value)
            and self.plural in ("", plural)
            and request.params.get("watch") != "true"
        )


class Refused(Exception):
    def __init__(self, status: int, reason: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.headers = status, reason, headers or {}


@dataclass(slots=True, eq=False)
class Watcher:
    plural: str
    namespace: str
    selector: str
    queue: asyncio.Queue[tuple[str, Json] | None] = field(default_factory=asyncio.Queue)


class KubeApiServer(kmock.KubernetesEmulator):
    """Objects, versions and watches; see the module."""

    def prepare(self) -> None:
        self.objects_by_key: dict[Key, Json] = {}
        self.by_kind: dict[str, dict[Key, Json]] = {}
        self.owned: dict[str, set[Key]] = {}
        self.version = 1
        self.compacted = 0
        self.history: deque[tuple[int, str, str, Json]] = deque(maxlen=HISTORY)
        self.watchers: set[Watcher] = set()
        self.writes: list[Write] = []
        self.faults: list[Fault] = []
        self.on_write: Callable[[Write], None] = lambda _: None
        self.track_owners = True
        self._ids = itertools.count(1)

    # -- what tests do ---------------------------------------------------------------------------------

    def drop_watches(self) -> None:
        """Ends all watches, as an API server that restarts."""
        for watcher in self.watchers:
            watcher.queue.put_nowait(None)

    def compact(self) -> None:
        """Forgets the history: watches that begin before now get 410."""
        self.compacted = self.version
        self.history.clear()
        self.drop_watches()

    def list_objects(self, plural: str) -> list[Json]:
        return list(self.by_kind.get(plural, {}).values())

    # -- HTTP ------------------------------------------------------------------------------------------

    async def _handle(self, request: kmock.Request) -> aiohttp.web.StreamResponse:  # type: ignore[override]
        self._requests.clear()  # kmock keeps every request; a scale test makes a hundred thousand
        raw = request._raw_request
        assert raw is not None
        if request.resource is None or not request.resource.plural:
            return await super()._handle(request)
        fault = next((fault for fault in self.faults if fault.takes(request)), None)
        try:
            if fault is not None:
                fault.times -= 1
                if fault.after:
                    self._act(request)
                headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after is not None else {}
                raise Refused(fault.status, "Injected", "injected by the test", headers)
            if request.params.get("watch") == "true":
                return await self._watch(request, raw)
            status, value = self._act(request)
        except Refused as refused:
            body = {
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "code": refused.status, "reason": refused.reason, "message": str(refused),
            }  # fmt: skip
            return aiohttp.web.json_response(body, status=refused.status, headers=refused.headers)
        return aiohttp.web.Response(
            body=json.dumps(value).encode(), status=status, content_type="application/json"
        )

    def _act(self, request: kmock.Request) -> tuple[int, Json]:
        assert request.resource is not None
        plural = str(request.resource.plural)
        namespace, name = request.namespace or "", request.name or ""
        subresource = request.subresource or ""
        manager = request.params.get("fieldManager", "unknown")
        body: Any = json.loads(request.body) if request.body else {}
        method = request.method.value
        if method == "GET":
            return 200, (
                self._get(plural, namespace, name) if name else self._list(plural, namespace, request)
            )
        if method == "POST":
            return 201, self._create(plural, namespace, body, manager)
        if method == "DELETE":
            return 200, self._delete(plural, namespace, name, body)
        content_type = request.headers.get("Content-Type", "")
        if method == "PATCH" and "apply-patch" in content_type:
            force = request.params.get("force") == "true"
            return 200, self._apply(plural, namespace, name, subresource, body, manager, force)
        key = (plural, namespace, name)
        old = self._get(plural, namespace, name)
        if subresource == "scale":
            body = {"spec": {"replicas": (body.get("spec") or {}).get("replicas")}}
        new = merge(old, body) if method == "PATCH" else {**body}
        self._check_preconditions(old, body.get("metadata") or {})
        changed = self._store("patch", key, old, new, subresource, manager)
        return 200, changed

    # -- objects ---------------------------------------------------------------------------------------

    def _get(self, plural: str, namespace: str, name: str) -> Json:
        obj = self.objects_by_key.get((plural, namespace, name))
        if obj is None:
            raise Refused(404, "NotFound", f'{plural} "{name}" not found')
        return obj

    def _list(self, plural: str, namespace: str, request: kmock.Request) -> Json:
        selector = request.params.get("labelSelector", "")
        found = [
            (key, obj)
            for key, obj in sorted(self.by_kind.get(plural, {}).items(), key=lambda item: item[0])
            if (not namespace or key[1] == namespace) and selects(selector, obj)
        ]
        limit = int(request.params.get("limit") or 0)
        start = int(request.params.get("continue") or 0)
        page = found[start : start + limit] if limit else found
        meta: Json = {"resourceVersion": str(self.version)}
        if limit and start + limit < len(found):
            meta["continue"] = str(start + limit)
        return {"kind": "List", "apiVersion": "v1", "metadata": meta, "items": [obj for _, obj in page]}

    def _create(self, plural: str, namespace: str, body: Json, manager: str) -> Json:
        meta = body.setdefault("metadata", {})
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = f"{meta['generateName']}{next(self._ids):05x}"
        key = (plural, namespace, meta["name"])
        if key in self.objects_by_key:
            raise Refused(409, "AlreadyExists", f'{plural} "{meta["name"]}" already exists')
        if meta.get("resourceVersion"):
            raise Refused(400, "BadRequest", "resourceVersion should not be set on objects to be created")
        body = copy.deepcopy(body)
        if plural in STATUS_KINDS:
            body.pop("status", None)
        if plural == "pods":
            body["status"] = {"phase": "Pending"}
        return self._store("create", key, None, body, "", manager)

    def _delete(self, plural: str, namespace: str, name: str, body: Json) -> Json:
        key = (plural, namespace, name)
        obj = self._get(plural, namespace, name)
        self._check_preconditions(obj, (body or {}).get("preconditions") or {})
        meta = obj["metadata"]
        if meta.get("finalizers"):
            if meta.get("deletionTimestamp"):
                return obj
            new = copy.deepcopy(obj)
            new["metadata"]["deletionTimestamp"] = _now()
            return self._store("delete", key, obj, new, "", "")
        self._remove(key, obj)
        return obj

    def _check_preconditions(self, old: Json, wanted: Json) -> None:
        meta = old["metadata"]
        if wanted.get("uid") and wanted["uid"] != meta["uid"]:
            raise Refused(409, "Conflict", f"Precondition failed: UID in precondition: {wanted['uid']}")
        if wanted.get("resourceVersion") and wanted["resourceVersion"] != meta["resourceVersion"]:
            raise Refused(
                409, "Conflict", "the object has been modified; please apply your changes to the latest"
            )

    def _apply(
        self, plural: str, namespace: str, name: str, subresource: str, body: Json, manager: str, force: bool
    ) -> Json:
        key = (plural, namespace, name)
        old = self.objects_by_key.get(key)
        if old is None:
            if subresource:
                raise Refused(404, "NotFound", f'{plural} "{name}" not found')
            if (body.get("metadata") or {}).get("uid"):
                raise Refused(409, "Conflict", "uid mismatch: the object does not exist")
            old_fields: dict[str, Any] = {}
        else:
            self._check_preconditions(old, body.get("metadata") or {})
            old_fields = leaves(old)
        wanted = leaves(content(body))
        if plural in STATUS_KINDS:
            wanted = {
                path: value
                for path, value in wanted.items()
                if (path.split("\0")[0] == "status") is (subresource == "status")
            }
        owners = owners_of(old)
        writer = (manager, "Apply", subresource)
        conflicts = {
            owner[0]
            for path, value in wanted.items()
            for owner, paths in owners.items()
            if owner != writer and path in paths and old_fields.get(path) != value
        }
        if conflicts and not force:
            raise Refused(409, "Conflict", f"Apply failed with conflicts with {sorted(conflicts)}")
        new = copy.deepcopy(old) if old is not None else {"metadata": {"name": name, "namespace": namespace}}
        for path in owners.get(writer, set()) - set(wanted):
            if not any(path in paths for owner, paths in owners.items() if owner != writer):
                remove_path(new, path)
        for path, value in wanted.items():
            set_path(new, path, value)
        return self._store("apply", key, old, new, subresource, manager, applied=set(wanted), force=force)

    def _store(
        self, verb: str, key: Key, old: Json | None, new: Json, subresource: str, manager: str,
        *, applied: set[str] | None = None, force: bool = False,
    ) -> Json:  # fmt: skip
        plural, namespace, name = key
        new = {**new, "metadata": {**new.get("metadata", {})}}
        if old is not None and plural in STATUS_KINDS:
            if subresource == "status":
                new = {**old, "status": new.get("status", {}), "metadata": {**old["metadata"]}}
            elif old.get("status") is not None:
                new["status"] = old["status"]
        meta = new["metadata"]
        meta.update(name=name, namespace=namespace)
        if old is None:
            meta.update(uid=str(uuid.uuid4()), creationTimestamp=_now())
            if plural in GENERATIONS:
                meta["generation"] = 1
        else:
            for field_name in ("uid", "creationTimestamp"):
                meta[field_name] = old["metadata"][field_name]
            if plural in GENERATIONS:
                bumped = new.get("spec") != old.get("spec")
                meta["generation"] = int(old["metadata"].get("generation", 1)) + bumped
        meta.pop("resourceVersion", None)
        if self.track_owners:
            writer = (manager, "Update" if applied is None else "Apply", subresource)
            meta["managedFields"] = self._owners(old, new, writer, applied, force)
            if subresource == "scale" and not new["spec"].get("replicas"):
                for entry in meta["managedFields"]:  # a Scale leaves a zero out, and with it the owner
                    entry["fieldsV1"].get("f:spec", {}).pop("f:replicas", None)
        if old is not None and without_version(old) == without_version(new):
            return old
        self.version += 1
        meta["resourceVersion"] = str(self.version)
        if meta.get("deletionTimestamp") and not meta.get("finalizers"):
            self._count(Write(verb, plural, namespace, name, subresource, manager))
            self.objects_by_key[key] = new
            self.by_kind.setdefault(plural, {})[key] = new
            self._remove(key, new, counted=True)
            return new
        self._index_owner(key, old, new)
        self.objects_by_key[key] = new
        self.by_kind.setdefault(plural, {})[key] = new
        self._tell("ADDED" if old is None else "MODIFIED", plural, new, old)
        self._count(Write(verb, plural, namespace, name, subresource, manager))
        return new

    def _owners(
        self, old: Json | None, new: Json, writer: Writer, applied: set[str] | None, force: bool
    ) -> list[Json]:
        owners = owners_of(old)
        if applied is not None:
            mine = applied
            taken = applied if force else set()
        else:
            before, after = leaves(content(old)) if old else {}, leaves(content(new))
            taken = {path for path, value in after.items() if path not in before or before[path] != value}
            mine = owners.get(writer, set()) | taken
        for owner in owners:
            if owner != writer:
                owners[owner] -= taken
        owners[writer] = mine
        return [
            {"manager": manager, "operation": operation, "subresource": subresource, "apiVersion": "v1",
             "fieldsType": "FieldsV1", "fieldsV1": fields_v1(paths)}
            for (manager, operation, subresource), paths in owners.items() if paths
        ]  # fmt: skip

    def _remove(self, key: Key, obj: Json, *, counted: bool = False) -> None:
        plural, namespace, name = key
        self.version += 1
        gone = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.version)}}
        self._index_owner(key, obj, None)
        del self.objects_by_key[key]
        del self.by_kind[plural][key]
        self._tell("DELETED", plural, gone, obj)
        if not counted:
            self._count(Write("delete", plural, namespace, name, "", ""))
        for owned in list(self.owned.pop(obj["metadata"]["uid"], ())):  # the garbage collector
            child = self.objects_by_key.get(owned)
            if child is not None:
                with contextlib.suppress(Refused):
                    self._delete(*owned, {})

    def _index_owner(self, key: Key, old: Json | None, new: Json | None) -> None:
        for obj, add in ((old, False), (new, True)):
            for reference in ((obj or {}).get("metadata") or {}).get("ownerReferences") or ():
                keys = self.owned.setdefault(reference["uid"], set())
                (keys.add if add else keys.discard)(key)

    def _count(self, write: Write) -> None:
        self.writes.append(write)
        self.on_write(write)

    # -- watches ---------------------------------------------------------------------------------------

    def _tell(self, kind: str, plural: str, obj: Json, before: Json | None) -> None:
        self.history.append((self.version, kind, plural, obj))
        for watcher in self.watchers:
            if watcher.plural == plural and watcher.namespace in ("", obj["metadata"]["namespace"]):
                event = _seen(kind, watcher.selector, obj, before)
                if event is not None:
                    watcher.queue.put_nowait((event, obj))

    async def _watch(
        self, request: kmock.Request, raw: aiohttp.web.BaseRequest
    ) -> aiohttp.web.StreamResponse:
        assert request.resource is not None
        since = int(request.params.get("resourceVersion") or 0)
        if since < self.compacted:
            raise Refused(410, "Expired", f"too old resource version: {since} ({self.compacted})")
        selector = request.params.get("labelSelector", "")
        watcher = Watcher(str(request.resource.plural), request.namespace or "", selector)
        for version, kind, plural, obj in self.history:
            if (
                version > since
                and plural == watcher.plural
                and (watcher.namespace in ("", obj["metadata"]["namespace"]))
            ):
                event = _seen(kind, selector, obj, None)
                if event is not None:
                    watcher.queue.put_nowait((event, obj))
        self.watchers.add(watcher)
        response = aiohttp.web.StreamResponse(headers={"Content-Type": "application/json"})
        try:
            await response.prepare(raw)
            seconds = float(request.params.get("timeoutSeconds") or 3600)
            with contextlib.suppress(TimeoutError, ConnectionError, asyncio.CancelledError):
                async with asyncio.timeout(seconds):
                    await self._stream(watcher, response, request.params.get("allowWatchBookmarks") == "true")
        finally:
            self.watchers.discard(watcher)
        return response

    async def _stream(self, watcher: Watcher, response: aiohttp.web.StreamResponse, bookmarks: bool) -> None:
        said = self.version
        while True:
            try:
                item = await asyncio.wait_for(watcher.queue.get(), BOOKMARK_SECONDS)
            except TimeoutError:
                if bookmarks and said != self.version:
                    said = self.version
                    mark = {"metadata": {"resourceVersion": str(said)}}
                    await response.write(json.dumps({"type": "BOOKMARK", "object": mark}).encode() + b"\n")
                continue
            if item is None:
                return
            await response.write(json.dumps({"type": item[0], "object": item[1]}).encode() + b"\n")


def _seen(kind: str, selector: str, obj: Json, before: Json | None) -> str | None:
    """What a watcher with a selector is told: an object that no longer matches is DELETED to it."""
    now = selects(selector, obj)
    if not selector or kind == "DELETED":
        return kind if now else None
    was = before is not None and selects(selector, before)
    if now:
        return "MODIFIED" if was or (before is None and kind == "MODIFIED") else "ADDED"
    return "DELETED" if was else None


def selects(selector: str, obj: Json) -> bool:
    """`a=b,c!=d,e` over labels."""
    labels = (obj.get("metadata") or {}).get("labels") or {}
    for term in filter(None, selector.split(",")):
        if "!=" in term:
            name, value = term.split("!=", 1)
            if labels.get(name) == value:
                return False
        elif "=" in term:
            name, value = term.replace("==", "=").split("=", 1)
            if labels.get(name) != value:
                return False
        elif term not in labels:
            return False
    return True


def merge(old: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge(result.get(name), value)
    return result


def content(obj: Json) -> Json:
    """Without what the server sets."""
    hidden = (
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "generation",
        "managedFields",
        "name",
        "namespace",
    )
    meta = {name: value for name, value in (obj.get("metadata") or {}).items() if name not in hidden}
    rest = {k: v for k, v in obj.items() if k not in ("apiVersion", "kind", "metadata")}
    return {**rest, "metadata": meta} if meta else rest


def leaves(obj: Any, path: str = "") -> dict[str, Any]:
    """Paths of all values; lists are values (atomic)."""
    if isinstance(obj, dict) and obj:
        found: dict[str, Any] = {}
        for name, value in obj.items():
            found |= leaves(value, f"{path}\0{name}" if path else name)
        return found
    return {path: obj} if path else {}


def set_path(obj: Json, path: str, value: Any) -> None:
    *parents, last = path.split("\0")
    for name in parents:
        child = obj.get(name)
        obj[name] = obj = dict(child) if isinstance(child, dict) else {}
    obj[last] = value


def remove_path(obj: Json, path: str) -> None:
    """Removes a value, and the objects around it that are empty without it. `obj` is a copy of its own."""
    name, _, rest = path.partition("\0")
    if not rest:
        obj.pop(name, None)
        return
    child = obj.get(name)
    if isinstance(child, dict):
        obj[name] = dict(child)
        remove_path(obj[name], rest)
        if not obj[name]:
            del obj[name]


def fields_v1(paths: set[str]) -> Json:
    tree: Json = {}
    for path in paths:
        node = tree
        for name in path.split("\0"):
            node = node.setdefault(f"f:{name}", {})
    return tree


def owners_of(obj: Json | None) -> dict[Writer, set[str]]:
    owners: dict[Writer, set[str]] = {}
    for entry in ((obj or {}).get("metadata") or {}).get("managedFields") or ():
        paths = {path.replace("f:", "") for path in leaves(entry["fieldsV1"])}
        writer = (entry["manager"], entry["operation"], entry["subresource"])
        owners.setdefault(writer, set()).update(paths)
    return owners


def without_version(obj: Json) -> Json:
    meta = {k: v for k, v in obj["metadata"].items() if k not in ("resourceVersion", "managedFields")}
    return {**obj, "metadata": meta, "\0owners": owners_of(obj)}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextlib.asynccontextmanager
async def kube_api() -> AsyncIterator[KubeApiServer]:
    """A served emulator; `api.url` is where."""
    handler = KubeApiServer()
    handler.prepare()
    async with handler, kmock.Server(handler):
        yield handler
