"""Who is asking: API key → tenant, priority, limits. Called once a request, before anything is read.

- A key that is presented must be valid, wherever it comes from.
- Without a key only loopback clients are let in, as tenant "default", and only if nothing says that they
  are not what they look like: a proxy's forwarding header, a foreign `Host` (DNS rebinding) or a foreign
  `Origin` (a web page in the user's browser). `require_key` closes this door, and must be set behind a proxy
  on this machine that adds no header and rewrites `Host` (nginx's plain `proxy_pass`): nothing gives it away.
- Tenant and forwarding headers are never believed; a forwarding header can only take trust away.

Keys are looked up in Redis through a small cache (seconds, so that revocation is prompt). While Redis is
away, keys known before go on working for a bounded time.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.exceptions import RedisError
from starlette.requests import Request

from controlplane.api.errors import ApiError
from controlplane.gateway import metrics
from controlplane.gateway.keys import (
    DEFAULT_TENANT,
    KEY_PREFIX,
    MAX_KEY_CHARS,
    KeyLimits,
    KeyRecord,
    digest_of,
    find_key,
)
from controlplane.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

_FORWARDING = ("x-forwarded-for", "forwarded", "x-real-ip", "x-forwarded-host")
_HOSTS = 1024  # addresses and Host headers whose reading is remembered
_NEGATIVE_SECONDS = 1.0  # a key made just now works after this long at most
# What people type where a client library insists on a key and the server needs none (vLLM's, Ollama's and
# LM Studio's manuals among them). On keyless loopback these mean "no key"; anywhere else they are invalid.
_PLACEHOLDERS = frozenset(
    {"empty", "none", "null", "unused", "not-needed", "not-used", "no-key", "no-key-needed", "-", "x", "xxx"}
    | {"dummy", "ollama", "lm-studio", "local", "deepflow", "sk-no-key-required"}
)


@dataclass(frozen=True, slots=True)
class Principal:
    """On whose behalf a request runs."""

    tenant: str
    key_id: str = ""
    priority: int = 0
    limits: KeyLimits = field(default_factory=KeyLimits)
    sees_all_tenants: bool = False

    @property
    def limit_id(self) -> str:
        """What rate windows are counted under."""
        return self.key_id or f"tenant-{self.tenant}"


_LOOPBACK = Principal(tenant=DEFAULT_TENANT, sees_all_tenants=True)


class Authenticator:
    """Looks keys up; remembers which were used, for `Meter` to write."""

    def __init__(
        self, redis: Redis | None, settings: GatewaySettings, clock: Callable[[], float] = time.time
    ) -> None:
        self._redis = redis
        self._settings = settings
        self._clock = clock
        # digest -> (record, when it was read), least recently used first. Unknown keys are kept apart, so
        # that a flood of guesses cannot push known keys out.
        self._known: OrderedDict[str, tuple[KeyRecord, float]] = OrderedDict()
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._asking: dict[str, asyncio.Task[KeyRecord | None]] = {}  # bounded by the calls to Redis
        self.used: dict[str, float] = {}  # digest -> last use, since the last flush

    async def authenticate(self, request: Request) -> Principal:
        """Raises ApiError 401 (no or an invalid key) or 503 (an unknown key while Redis is away)."""
        token = _bearer(request)
        keyless = not self._settings.require_key and is_local(request)
        if keyless and (token is None or token.lower() in _PLACEHOLDERS):
            metrics.AUTH.labels("loopback").inc()
            return _LOOPBACK
        if token is None:
            metrics.AUTH.labels("missing").inc()
            raise ApiError(
                401,
                "You didn't provide an API key. Send it in the Authorization header: 'Bearer sk-df-…'.",
                type="invalid_request_error",
                code="missing_api_key",
            )
        record = None
        if token.startswith(KEY_PREFIX) and len(token) <= MAX_KEY_CHARS:
            digest = digest_of(token)
            record = await self._look_up(digest)
        if record is None or not record.usable(self._clock()):
            metrics.AUTH.labels("invalid").inc()
            raise ApiError(
                401, "Incorrect API key provided.", type="invalid_request_error", code="invalid_api_key"
            )
        metrics.AUTH.labels("key").inc()
        self.used[digest] = self._clock()
        return Principal(record.tenant, record.key_id, record.priority, record.limits, record.admin)

    async def _look_up(self, digest: str) -> KeyRecord | None:
        now = self._clock()
        known = self._known.get(digest)
        if known is not None:
            self._known.move_to_end(digest)
            if now - known[1] < self._settings.key_cache_seconds:
                return known[0]
        elif now - self._unknown.get(digest, 0.0) < _NEGATIVE_SECONDS:
            return None
        if self._redis is None:
            raise _unavailable()
        try:
            record = await self._answer(self._ask(self._redis, digest))
        except (RedisError, OSError, TimeoutError) as error:
            metrics.REDIS_ERRORS.labels("auth").inc()
            if known is not None and now - known[1] < self._settings.key_outage_seconds:
                return known[0]
            log.warning("a key could not be checked: %s", error)
            raise _unavailable() from None
        if record is None:
            self._known.pop(digest, None)
            self._unknown[digest] = now
            _trim(self._unknown, self._settings.key_cache_size)
        else:
            self._unknown.pop(digest, None)
            self._known[digest] = (record, now)
            self._known.move_to_end(digest)
            _trim(self._known, self._settings.key_cache_size)
        return record

    async def _answer(self, asking: asyncio.Task[KeyRecord | None]) -> KeyRecord | None:
        """Raises TimeoutError where Redis is slow. A timer that is late itself tells of this loop, which had
        too much to do to read the answer: it gets its time once more."""
        seconds = self._settings.redis_seconds
        started = time.monotonic()
        done, _ = await asyncio.wait({asking}, timeout=seconds)
        if not done and time.monotonic() - started > 1.2 * seconds:
            done, _ = await asyncio.wait({asking}, timeout=seconds)
        if not done:
            raise TimeoutError
        return asking.result()

    def _ask(self, redis: Redis, digest: str) -> asyncio.Task[KeyRecord | None]:
        """One call for all requests that wait for the same key."""
        asking = self._asking.get(digest)
        if asking is None:
            asking = self._asking[digest] = asyncio.create_task(find_key(redis, digest))
            asking.add_done_callback(lambda task: self._asked(digest, task))
        return asking

    def _asked(self, digest: str, task: asyncio.Task[KeyRecord | None]) -> None:
        del self._asking[digest]
        if not task.cancelled():
            task.exception()  # seen: its waiters may have given up


def _unavailable() -> ApiError:
    return ApiError(503, "API keys cannot be checked at the moment.", code="auth_unavailable", retry_after=2)


def _trim(cache: OrderedDict[str, Any], size: int) -> None:
    while len(cache) > size:
        cache.popitem(last=False)


def _bearer(request: Request) -> str | None:
    """The bearer token; None where no credential is presented."""
    header = request.headers.get("authorization")
    if header is None or not header.strip():
        return None
    scheme, _, token = header.strip().partition(" ")
    if scheme.lower() != "bearer":
        raise ApiError(
            401,
            "The Authorization header must be 'Bearer sk-df-…'.",
            type="invalid_request_error",
            code="invalid_api_key",
        )
    return token.strip() or None


def is_local(request: Request) -> bool:
    """The peer is on this machine, and nothing says that it speaks for someone else."""
    client = request.scope.get("client")
    if client is None or not _is_loopback(str(client[0])):
        return False
    headers = request.headers
    if any(name in headers for name in _FORWARDING):
        return False
    host = headers.get("host")
    if host and not _is_loopback_host(f"//{host}"):
        return False
    origin = headers.get("origin")
    return not origin or _is_loopback_host(origin)


@lru_cache(_HOSTS)
def _is_loopback_host(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    return host == "localhost" or host.endswith(".localhost") or _is_loopback(host)


@lru_cache(_HOSTS)
def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback
