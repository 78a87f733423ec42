"""Rate, token and concurrency bounds per key, over all gateways; and the bound of this process.

Requests and tokens are counted in sliding windows of a minute (the previous minute's count weighs by how
much of it is still inside the window), running requests in a sorted set whose members expire with their
request: a killed gateway leaks nothing. One Lua script decides all three at once, so a refused request
counts nowhere. While Redis is away each gateway counts alone.

Keys: `deepflow:limit:{ID}:<minute>` (hash r, t; 3 minutes) and `deepflow:limit:{ID}:live` (sorted set).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from controlplane.api.errors import ApiError
from controlplane.gateway import metrics
from controlplane.gateway.auth import Principal
from controlplane.gateway.keys import KeyLimits
from controlplane.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

WINDOW_SECONDS = 60
_LOCAL_WINDOWS = 10_000  # ids counted locally at once; the oldest go first

# KEYS: this minute, last minute, live. ARGV: share of last minute inside the window, requests/min,
# tokens/min, concurrent (-1 = unbounded each), tokens asked, member, now, member's expiry.
# Answers {which bound refused or 0, requests used, tokens used, live}.
_ADMIT = """
local share = tonumber(ARGV[1])
local now_r, now_t = unpack(redis.call('HMGET', KEYS[1], 'r', 't'))
local old_r, old_t = unpack(redis.call('HMGET', KEYS[2], 'r', 't'))
local r = (tonumber(now_r) or 0) + share * (tonumber(old_r) or 0)
local t = (tonumber(now_t) or 0) + share * (tonumber(old_t) or 0)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', ARGV[7])
local live = redis.call('ZCARD', KEYS[3])
local rpm, tpm, most = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local refused = 0
if most >= 0 and live + 1 > most then refused = 3
elseif rpm >= 0 and r + 1 > rpm then refused = 1
elseif tpm >= 0 and t + tonumber(ARGV[5]) > tpm then refused = 2 end
if refused == 0 then
  redis.call('HINCRBY', KEYS[1], 'r', 1)
  redis.call('HINCRBY', KEYS[1], 't', ARGV[5])
  redis.call('EXPIRE', KEYS[1], 180)
  redis.call('ZADD', KEYS[3], ARGV[8], ARGV[6])
  redis.call('EXPIREAT', KEYS[3], math.ceil(tonumber(ARGV[8])) + 60)
end
return {refused, math.floor(r), math.floor(t), live}
"""
# KEYS: this minute, live. ARGV: tokens, member.
_RELEASE = """
redis.call('ZREM', KEYS[2], ARGV[2])
if tonumber(ARGV[1]) > 0 then
  redis.call('HINCRBY', KEYS[1], 't', ARGV[1])
  redis.call('EXPIRE', KEYS[1], 180)
end
return 1
"""

_BOUNDS = {1: "requests per minute", 2: "tokens per minute", 3: "concurrent requests"}


@dataclass(slots=True)
class _Window:
    minute: int = 0
    counts: list[float] = field(default_factory=lambda: [0, 0, 0, 0])  # r, t, previous r, previous t
    live: dict[str, float] = field(default_factory=dict)

    def roll(self, minute: int, now: float) -> None:
        if minute == self.minute + 1:
            self.counts = [0, 0, self.counts[0], self.counts[1]]
        elif minute != self.minute:
            self.counts = [0, 0, 0, 0]
        self.minute = minute
        self.live = {member: expiry for member, expiry in self.live.items() if expiry > now}


class Lease:
    """One admitted request. Release it exactly once or more often; only the first call counts."""

    __slots__ = ("_limiter", "_limits", "_member", "_released", "headers", "limit_id")

    def __init__(
        self,
        limiter: Limiter,
        limit_id: str,
        limits: KeyLimits,
        member: str,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        self._limiter = limiter
        self._limits = limits
        self._member = member
        self._released = False
        self.limit_id = limit_id
        self.headers = headers

    @property
    def waits(self) -> bool:
        """Its release is a call to Redis."""
        return not self._limits.unbounded

    def release(self, completion_tokens: int) -> asyncio.Task[None] | None:
        """Frees the slot and counts the tokens. Await the answer to know it before telling the client."""
        if self._released:
            return None
        self._released = True
        return self._limiter._release(self, self._limits, self._member, completion_tokens)


class Limiter:
    """Admits generations. `in_flight` is bounded per process whatever the key allows."""

    def __init__(
        self, redis: Redis | None, settings: GatewaySettings, clock: Callable[[], float] = time.time
    ) -> None:
        self._redis = redis
        self._settings = settings
        self._clock = clock
        self._local: dict[str, _Window] = {}
        self._releases: set[asyncio.Task[None]] = set()
        self.in_flight = 0

    async def admit(self, principal: Principal, request_id: str, prompt_tokens: int) -> Lease:
        """Raises ApiError 429 with Retry-After; a refused request is not counted."""
        if self.in_flight >= self._settings.max_in_flight:
            metrics.LIMITED.labels("in_flight").inc()
            raise ApiError(
                429, "The server is at its bound of running requests.", code="queue_full", retry_after=1
            )
        limits, limit_id = principal.limits, principal.limit_id
        member = ""
        headers: list[tuple[bytes, bytes]] = []
        # The slot is taken before the first await, so that a burst cannot pass the bound together.
        self.in_flight += 1
        metrics.IN_FLIGHT.inc()
        try:
            if not limits.unbounded:
                # The client chooses its request id: equal ids must not count as one running request.
                member = f"{request_id}/{secrets.token_hex(8)}"
                headers = await self._check(limit_id, limits, member, prompt_tokens)
        except BaseException:
            self._leave()
            raise
        return Lease(self, limit_id, limits, member, headers)

    async def close(self) -> None:
        """Waits for releases under way."""
        if self._releases:
            await asyncio.wait(self._releases, timeout=2 * self._settings.redis_seconds)

    def _leave(self) -> None:
        self.in_flight -= 1
        metrics.IN_FLIGHT.dec()

    async def _check(
        self, limit_id: str, limits: KeyLimits, member: str, tokens: int
    ) -> list[tuple[bytes, bytes]]:
        now = self._clock()
        minute, share = int(now // WINDOW_SECONDS), 1 - (now % WINDOW_SECONDS) / WINDOW_SECONDS
        expiry = now + self._settings.request_seconds + 2 * self._settings.request_grace_seconds
        bounds = [
            -1 if bound is None else bound
            for bound in (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent)
        ]
        try:
            if self._redis is None:
                raise RedisError("no Redis")
            async with asyncio.timeout(self._settings.redis_seconds):
                answer = await cast(
                    Any,
                    self._redis.eval(
                        _ADMIT, 3, _minute(limit_id, minute), _minute(limit_id, minute - 1), _live(limit_id),
                        share, *bounds, tokens, member, now, expiry,
                    ),
                )  # fmt: skip
            refused, used_r, used_t, _live_now = (int(value) for value in answer)
        except (RedisError, OSError, TimeoutError) as error:
            metrics.REDIS_ERRORS.labels("limits").inc()
            log.debug("limits are counted locally: %s", error)
            refused, used_r, used_t = self._check_local(
                limit_id=limit_id,
                bounds=bounds,
                tokens=tokens,
                member=member,
                now=now,
                minute=minute,
                share=share,
                expiry=expiry,
            )
        if refused:
            metrics.LIMITED.labels(_BOUNDS[refused].replace(" ", "_")).inc()
            raise _refusal(refused, limits, tokens, used_t, retry=_retry(refused, now))
        return _headers(limits, used_r + 1, used_t + tokens)

    def _check_local(
        self,
        *,
        limit_id: str,
        bounds: list[int],
        tokens: int,
        member: str,
        now: float,
        minute: int,
        share: float,
        expiry: float,
    ) -> tuple[int, int, int]:
        """The script above, in this process's memory."""
        window = self._local.pop(limit_id, None) or _Window(minute)
        self._local[limit_id] = window  # newest last
        while len(self._local) > _LOCAL_WINDOWS:
            self._local.pop(next(iter(self._local)))
        window.roll(minute, now)
        used_r = window.counts[0] + share * window.counts[2]
        used_t = window.counts[1] + share * window.counts[3]
        rpm, tpm, most = bounds
        if most >= 0 and len(window.live) + 1 > most:
            return 3, int(used_r), int(used_t)
        if rpm >= 0 and used_r + 1 > rpm:
            return 1, int(used_r), int(used_t)
        if tpm >= 0 and used_t + tokens > tpm:
            return 2, int(used_r), int(used_t)
        window.counts[0] += 1
        window.counts[1] += tokens
        window.live[member] = expiry
        return 0, int(used_r), int(used_t)

    def _release(
        self, lease: Lease, limits: KeyLimits, member: str, tokens: int
    ) -> asyncio.Task[None] | None:
        self._leave()
        if limits.unbounded:
            return None
        window = self._local.get(lease.limit_id)
        if window is not None:
            window.live.pop(member, None)
            window.counts[1] += tokens
        if self._redis is None:
            return None
        task = asyncio.get_running_loop().create_task(self._release_in_redis(lease.limit_id, member, tokens))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)
        return task

    async def _release_in_redis(self, limit_id: str, member: str, tokens: int) -> None:
        assert self._redis is not None
        minute = int(self._clock() // WINDOW_SECONDS)
        try:
            async with asyncio.timeout(self._settings.redis_seconds):
                await cast(
                    Any,
                    self._redis.eval(_RELEASE, 2, _minute(limit_id, minute), _live(limit_id), tokens, member),
                )
        except (RedisError, OSError, TimeoutError):
            metrics.REDIS_ERRORS.labels("limits").inc()  # the member expires by itself


def _minute(limit_id: str, minute: int) -> str:
    return f"deepflow:limit:{{{limit_id}}}:{minute}"


def _live(limit_id: str) -> str:
    return f"deepflow:limit:{{{limit_id}}}:live"


def _retry(refused: int, now: float) -> float:
    """Seconds until a try makes sense: the window's turn, or soon for a slot."""
    return 1.0 if refused == 3 else WINDOW_SECONDS - now % WINDOW_SECONDS


def _refusal(refused: int, limits: KeyLimits, tokens: int, used: int, retry: float) -> ApiError:
    bound = {1: limits.requests_per_minute, 2: limits.tokens_per_minute, 3: limits.concurrent}[refused]
    detail = f" Used {used}, requested {tokens}." if refused == 2 else ""
    return ApiError(
        429,
        f"Rate limit reached: {bound} {_BOUNDS[refused]} for this key.{detail}",
        code="rate_limit_exceeded",
        retry_after=retry,
    )


def _headers(limits: KeyLimits, requests: int, tokens: int) -> list[tuple[bytes, bytes]]:
    """OpenAI's `x-ratelimit-*`, for the bounds that exist."""
    headers: list[tuple[bytes, bytes]] = []
    for name, bound, used in (
        ("requests", limits.requests_per_minute, requests),
        ("tokens", limits.tokens_per_minute, tokens),
    ):
        if bound is not None:
            headers.append((f"x-ratelimit-limit-{name}".encode(), str(bound).encode()))
            headers.append((f"x-ratelimit-remaining-{name}".encode(), str(max(0, bound - used)).encode()))
    return headers
