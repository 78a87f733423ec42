"""Usage per tenant and model: counted for every request, whatever its end; written behind the answers.

Redis: hash `deepflow:usage:<YYYY-MM-DD>` (UTC), fields `<tenant>|<model>|<kind>` with kinds `requests`,
`prompt_tokens`, `cached_tokens`, `completion_tokens`; a day is kept `usage_days`. Rows wait, merged, while
Redis is away; beyond the bound new rows are lost and counted. A write whose answer was lost is repeated:
usage is counted at least once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from controlplane.fleet.registry import heed_cancellation
from controlplane.gateway import metrics
from controlplane.gateway.auth import Authenticator
from controlplane.gateway.keys import touch_keys
from controlplane.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

USAGE_PREFIX = "deepflow:usage:"


class Meter:
    """`record` is called on the loop, without waiting; `run` writes every second until it is cancelled."""

    def __init__(
        self,
        redis: Redis | None,
        auth: Authenticator,
        settings: GatewaySettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._redis = redis
        self._auth = auth
        self._settings = settings
        self._clock = clock
        self._pending: dict[tuple[str, str], int] = {}  # (day, field) -> count
        self._tenant = metrics.LabelCap(settings.metric_labels)
        self._model = metrics.LabelCap(settings.metric_labels)
        self._warned = False

    def record(self, tenant: str, model: str, *, prompt: int, cached: int, completion: int) -> None:
        """One request's tokens. `model` is the catalogue's id, never the client's spelling."""
        day = time.strftime("%Y-%m-%d", time.gmtime(self._clock()))
        rows = {
            "requests": 1,
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "completion_tokens": completion,
        }
        tenant_label, model_label = self._tenant(tenant), self._model(model)
        for kind, count in rows.items():
            if not count:
                continue
            if kind != "requests":
                metrics.TOKENS.labels(tenant_label, model_label, kind.removesuffix("_tokens")).inc(count)
            row = (day, f"{tenant}|{model}|{kind}")
            if row in self._pending or len(self._pending) < self._settings.usage_pending:
                self._pending[row] = self._pending.get(row, 0) + count
            else:
                metrics.USAGE_LOST.inc()
        metrics.USAGE_PENDING.set(len(self._pending))

    async def run(self) -> None:
        """Owned by the app's lifespan; a last write follows its cancellation through `flush`."""
        while True:
            await asyncio.sleep(self._settings.usage_flush_seconds)
            await self.flush()
            heed_cancellation()

    async def flush(self) -> None:
        """Writes what waits. Failures keep the rows and are logged once per outage."""
        if self._redis is None:
            return
        rows, self._pending = self._pending, {}
        used, self._auth.used = self._auth.used, {}
        if not rows and not used:
            return
        try:
            async with asyncio.timeout(2 * self._settings.redis_seconds):
                if rows:
                    await self._write(self._redis, rows)
                    rows = {}
                if used:
                    await touch_keys(self._redis, used)
            self._warned = False
        except asyncio.CancelledError:
            self._keep(rows)  # the last flush, at the end, writes them
            raise
        except (RedisError, OSError, TimeoutError) as error:
            metrics.REDIS_ERRORS.labels("usage").inc()
            self._keep(rows)
            if not self._warned:
                log.warning("usage waits for Redis: %s", error)
                self._warned = True
        metrics.USAGE_PENDING.set(len(self._pending))

    def _keep(self, rows: dict[tuple[str, str], int]) -> None:
        for row, count in rows.items():
            self._pending[row] = self._pending.get(row, 0) + count

    async def _write(self, redis: Redis, rows: dict[tuple[str, str], int]) -> None:
        async with redis.pipeline(transaction=True) as pipe:
            for (day, name), count in rows.items():
                pipe.hincrby(USAGE_PREFIX + day, name, count)
            for day in {day for day, _ in rows}:
                pipe.expire(USAGE_PREFIX + day, self._settings.usage_days * 86_400)
            await pipe.execute()


async def read_usage(redis: Redis, day: str) -> dict[tuple[str, str], dict[str, int]]:
    """A day's usage ("YYYY-MM-DD"): (tenant, model) -> kind -> count."""
    usage: dict[tuple[str, str], dict[str, int]] = {}
    raw = await cast(Any, redis.hgetall(USAGE_PREFIX + day))
    for name, count in raw.items():
        text = name.decode() if isinstance(name, bytes) else name
        tenant, _, rest = text.partition("|")
        model, _, kind = rest.rpartition("|")
        usage.setdefault((tenant, model), {})[kind] = int(count)
    return usage
