"""`KubeApi`: one API server, raw JSON, typed errors, a bound on every call.

Configuration, credentials and TLS are the official client's (`kubernetes.aio`); requests are made through its
REST layer without its models. Reads and idempotent writes that the server asks to repeat (429, 5xx with or
without Retry-After) are repeated here a few times with jitter; everything longer is the caller's queue.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

import aiohttp
import orjson
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

from controlplane.kube import metrics
from controlplane.kube.resources import Json, ResourceType

CALL_SECONDS = 15.0
LIST_SECONDS = 60.0
PAGE_ITEMS = 500  # as client-go's pager: bounds what one answer weighs
RETRIES = 4
RETRY_FIRST_SECONDS = 0.1
RETRY_MAX_SECONDS = 5.0
RETRY_AFTER_MAX_SECONDS = 30.0
WATCH_SECONDS = 300
"""The server ends a watch after this; another begins where it stopped."""
WATCH_SILENCE_SECONDS = WATCH_SECONDS + 30.0
MAX_EVENT_BYTES = 16 << 20  # etcd refuses objects above 1.5 MiB; a line holds one
CONNECTIONS = 64

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_RETRIED = {429, 500, 502, 503, 504}
_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"


class KubeError(Exception):
    """The API server refused or could not be reached. `status` 0: no answer."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message or reason)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after


class NotFound(KubeError):
    """404."""


class Conflict(KubeError):
    """409: changed meanwhile, owned by another field manager, or exists already. Read again."""


class Gone(KubeError):
    """410: the resourceVersion is too old. List again."""


class Invalid(KubeError):
    """400 or 422: the object itself; repeating it does not help."""


class Forbidden(KubeError):
    """401 or 403."""


class Unavailable(KubeError):
    """No answer, 429 or 5xx after the retries."""


_KINDS: dict[int, type[KubeError]] = {
    400: Invalid, 401: Forbidden, 403: Forbidden, 404: NotFound, 409: Conflict, 410: Gone, 422: Invalid,
}  # fmt: skip


def error_of(status: int, body: bytes | Json, retry_after: float | None = None) -> KubeError:
    """The typed error of an answer, with the server's reason and message."""
    value: Any = body
    if isinstance(body, bytes):
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError:
            value = {"message": body[:500].decode(errors="replace")}
    value = value if isinstance(value, dict) else {}
    kind = _KINDS.get(status, Unavailable if status in _RETRIED else KubeError)
    details = value.get("details")
    if retry_after is None and isinstance(details, dict) and details.get("retryAfterSeconds"):
        retry_after = float(details["retryAfterSeconds"])
    return kind(status, str(value.get("reason") or ""), str(value.get("message") or ""), retry_after)


class KubeApi:
    """Use as an async context manager, or close it."""

    def __init__(
        self,
        configuration: kubernetes_client.Configuration,
        *,
        namespace: str = "default",
        user_agent: str = "deepflow",
        rand: Callable[[], float] = random.random,
    ) -> None:
        configuration.connection_pool_maxsize = CONNECTIONS
        configuration.retries = None  # repeating is this class's
        self.namespace = namespace
        """Of the kubeconfig's context or of the pod."""
        self.host: str = configuration.host
        self._client = kubernetes_client.ApiClient(configuration)
        self._agent = user_agent
        self._rand = rand
        self.writes = 0
        """Successful requests that changed something (tests count them)."""

    async def __aenter__(self) -> KubeApi:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.close()

    # -- reading ---------------------------------------------------------------------------------------

    async def get(self, resource: ResourceType, namespace: str, name: str) -> Json:
        return await self._json("GET", resource.path(namespace, name))

    async def list(
        self, resource: ResourceType, namespace: str = "", *, label_selector: str = ""
    ) -> tuple[list[Json], str]:
        """All objects, page by page, and the resourceVersion to watch from. Raises Gone if a page expired."""
        items: list[Json] = []
        params = {"limit": str(PAGE_ITEMS)}
        if label_selector:
            params["labelSelector"] = label_selector
        while True:
            page = await self._json("GET", resource.path(namespace), params, seconds=LIST_SECONDS)
            items += page.get("items") or []
            meta = page.get("metadata") or {}
            if not meta.get("continue"):
                return items, str(meta.get("resourceVersion") or "")
            params["continue"] = meta["continue"]

    async def watch(
        self, resource: ResourceType, namespace: str = "", *, label_selector: str = "", version: str
    ) -> AsyncIterator[tuple[str, Json]]:
        """(type, object) until the server ends the watch. Raises Gone, KubeError; bookmarks are passed on."""
        params = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            # Spread, so that watches of many processes do not all begin again together.
            "timeoutSeconds": str(round(WATCH_SECONDS * (0.8 + 0.2 * self._rand()))),
        }
        if label_selector:
            params["labelSelector"] = label_selector
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CALL_SECONDS, sock_read=WATCH_SILENCE_SECONDS
        )
        try:
            response = await self._send("GET", resource.path(namespace), params, timeout=timeout)
            try:
                if response.status != 200:
                    raise error_of(response.status, await response.read())
                async for line in _lines(response.content):
                    yield _event(line)
            finally:
                response.close()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _unreachable(error) from error

    # -- writing ---------------------------------------------------------------------------------------

    async def create(self, resource: ResourceType, obj: Json, *, manager: str) -> Json:
        """Raises Conflict if it exists. Not repeated after a lost answer: the caller looks first."""
        namespace = str(obj["metadata"].get("namespace") or "")
        params = {"fieldManager": manager}
        return await self._json("POST", resource.path(namespace), params, body=obj, repeat=False)

    async def apply(
        self,
        resource: ResourceType,
        obj: Json,
        *,
        manager: str,
        force: bool = False,
        subresource: str = "",
    ) -> Json:
        """Server-side apply of exactly the fields in `obj` under `manager`. Raises Conflict where another
        manager owns one and `force` is not set, or where `obj` carries an outdated resourceVersion."""
        meta = obj["metadata"]
        path = resource.path(str(meta.get("namespace") or ""), meta["name"], subresource)
        params = {"fieldManager": manager, "force": "true" if force else "false"}
        body = {"apiVersion": resource.api_version, "kind": resource.kind, **obj}
        return await self._json("PATCH", path, params, body=body, content_type=_APPLY)

    async def patch(
        self,
        resource: ResourceType,
        namespace: str,
        name: str,
        patch: Json,
        *,
        manager: str,
        subresource: str = "",
    ) -> Json:
        """JSON merge patch. With metadata.uid and metadata.resourceVersion in it, the server refuses it
        (Conflict) unless the object is still that very one, unchanged."""
        path = resource.path(namespace, name, subresource)
        return await self._json("PATCH", path, {"fieldManager": manager}, body=patch, content_type=_MERGE)

    async def replace(self, resource: ResourceType, obj: Json, *, manager: str) -> Json:
        """PUT; obj carries the resourceVersion that was read."""
        path = resource.path(str(obj["metadata"].get("namespace") or ""), obj["metadata"]["name"])
        return await self._json("PUT", path, {"fieldManager": manager}, body=obj)

    async def delete(
        self,
        resource: ResourceType,
        namespace: str,
        name: str,
        *,
        uid: str = "",
        version: str = "",
        grace_seconds: int | None = None,
    ) -> None:
        """Nothing if it is gone already. Raises Conflict if it is another object (`uid`) or has changed."""
        preconditions = {key: value for key, value in (("uid", uid), ("resourceVersion", version)) if value}
        body: Json = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if preconditions:
            body["preconditions"] = preconditions
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        try:
            await self._json("DELETE", resource.path(namespace, name), body=body)
        except NotFound:
            return

    async def open_socket(
        self, path: str, params: Sequence[tuple[str, str]], *, protocol: str
    ) -> aiohttp.ClientWebSocketResponse:
        """A WebSocket, as exec takes one. Raises KubeError; OSError or aiohttp's errors without an answer."""
        headers = {"User-Agent": self._agent}
        queries = list(params)
        await self._client.update_params_for_auth(headers, queries, ["BearerToken"], path, "GET", None)
        rest = self._client.rest_client
        if rest.pool_manager is None:
            rest.pool_manager = rest._create_pool_manager()
        session: aiohttp.ClientSession = rest.pool_manager
        url = f"{self.host}{path}?{urlencode(queries)}"
        try:
            return await session.ws_connect(url, headers=headers, protocols=(protocol,), max_msg_size=0,
                                            proxy=rest.proxy)  # fmt: skip
        except aiohttp.WSServerHandshakeError as error:  # its body is not kept
            raise error_of(error.status, {"message": error.message}) from error

    # -- requests --------------------------------------------------------------------------------------

    async def _json(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        body: Json | None = None,
        content_type: str = "application/json",
        seconds: float = CALL_SECONDS,
        repeat: bool = True,
    ) -> Json:
        wait = RETRY_FIRST_SECONDS
        for left in reversed(range(RETRIES if repeat else 1)):
            try:
                value = await self._once(
                    method, path, params, body, content_type=content_type, seconds=seconds
                )
            except Unavailable as error:
                if not left:
                    raise
                metrics.RETRIES.labels(method).inc()
                delay = min(error.retry_after or wait, RETRY_AFTER_MAX_SECONDS)
                await asyncio.sleep(delay * (0.75 + 0.5 * self._rand()))
                wait = min(2 * wait, RETRY_MAX_SECONDS)
            else:
                if method != "GET":
                    self.writes += 1
                return value
        raise AssertionError("the loop returns or raises")

    async def _once(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        body: Json | None,
        *,
        content_type: str,
        seconds: float,
    ) -> Json:
        started = time.perf_counter()
        status = 0
        try:
            timeout = aiohttp.ClientTimeout(total=seconds)
            response = await self._send(
                method, path, params, body=body, content_type=content_type, timeout=timeout
            )
            status = response.status
            data = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _unreachable(error) from error
        finally:
            metrics.REQUESTS.labels(method, str(status) if status else "unreachable").inc()
            metrics.SECONDS.labels(method).observe(time.perf_counter() - started)
        if status >= 300:
            raise error_of(status, data, _retry_after(response.headers))
        value: Any = orjson.loads(data) if data else {}
        return cast("Json", value)

    async def _send(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        body: Json | None = None,
        content_type: str = "application/json",
        timeout: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": self._agent}
        queries: list[tuple[str, str]] = list((params or {}).items())
        await self._client.update_params_for_auth(headers, queries, ["BearerToken"], path, method, body)
        url = self.host + path + (f"?{urlencode(queries)}" if queries else "")
        response = await self._client.rest_client.request(
            method, url, headers=headers, body=body, _request_timeout=timeout
        )
        return cast("aiohttp.ClientResponse", response.response)


async def connect(*, kubeconfig: str = "", context: str = "", user_agent: str = "deepflow") -> KubeApi:
    """By `kubeconfig`, $KUBECONFIG or ~/.kube/config, in a pod by its service account. Raises KubeError."""
    configuration = kubernetes_client.Configuration()
    path = kubeconfig or os.environ.get("KUBECONFIG", "")
    in_pod = (SERVICE_ACCOUNT / "token").exists() and "KUBERNETES_SERVICE_HOST" in os.environ
    if path and not any(os.access(part, os.R_OK) for part in path.split(os.pathsep)):
        raise KubeError(0, "NoConfiguration", f"there is no kubeconfig at {path}")
    try:
        if in_pod and not path:
            kubernetes_config.load_incluster_config(configuration)
            namespace = (SERVICE_ACCOUNT / "namespace").read_text().strip()
            return KubeApi(configuration, namespace=namespace, user_agent=user_agent)
        await kubernetes_config.load_kube_config(
            path or None, context or None, configuration, persist_config=False
        )
        _, active = kubernetes_config.list_kube_config_contexts(path or None)
        namespace = (active.get("context") or {}).get("namespace") or "default"
    except (kubernetes_config.ConfigException, OSError, TypeError) as error:
        raise KubeError(0, "NoConfiguration", f"no cluster is configured: {error}") from None
    return KubeApi(configuration, namespace=namespace, user_agent=user_agent)


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length up to MAX_EVENT_BYTES: the reader's own line limit is below what objects weigh."""
    buffer = bytearray()
    async for chunk in stream.iter_any():
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            buffer += chunk[start:end]
            if buffer:
                yield bytes(buffer)
            buffer.clear()
            start = end + 1
        buffer += chunk[start:]
        if len(buffer) > MAX_EVENT_BYTES:
            raise KubeError(0, "EventTooLarge", f"a watch event is above {MAX_EVENT_BYTES} bytes")


def _event(line: bytes) -> tuple[str, Json]:
    """Raises the error that an ERROR event carries."""
    try:
        value: Json = orjson.loads(line)
        kind, obj = str(value["type"]), value["object"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise KubeError(0, "BadEvent", f"a watch event cannot be read: {error}") from error
    if kind == "ERROR":
        raise error_of(int(obj.get("code") or 500), cast("Json", obj))
    return kind, obj


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None


def _unreachable(error: Exception) -> Unavailable:
    return Unavailable(0, type(error).__name__, str(error) or type(error).__name__)
