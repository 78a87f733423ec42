"""What gateways tell whoever scales: which models are wanted, how many requests wait, how long answers took.

Written by every gateway process (`DemandWriter`), read by the operator or the local supervisor
(`DemandReader`). Small and lossy on purpose: nothing here decides about a request, and a gauge that a
fast request could slip between is not used: a model's *last activity* stays until it is newer.

    deepflow:demand:last            sorted set: model -> last activity, ms of the Redis server's clock
    deepflow:demand:gateways        sorted set: gateway process -> last report, same clock
    deepflow:demand:gateway:<id>    its report (JSON below), expires after REPORT_TTL_SECONDS
    deepflow:demand:events          channel: the model that requests began to wait for

A report: `{"held": {model: requests}, "ttft": {model: {bucket: count}}, "tpot": {…}}`; counts only grow over
the life of the process. A *model* is an opaque name both sides agree on: `<namespace>/<name>` of a
ModelServing in a cluster, the model's id on one machine. All times are ages or the Redis server's clock,
so hosts' clocks need not agree.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from controlplane.fleet import metrics
from controlplane.fleet.registry import heed_cancellation

LAST_KEY = "deepflow:demand:last"
GATEWAYS_KEY = "deepflow:demand:gateways"
REPORT_PREFIX = "deepflow:demand:gateway:"
HINT_CHANNEL = "deepflow:demand:events"

MAX_MODELS = 4096
"""Models one process reports and the set keeps, newest activity first (ours: catalogues are far smaller)."""
MAX_GATEWAYS = 1024
LAST_DAYS = 30
"""Activity older than that is forgotten, which whoever scales takes for "never"."""
REPORT_TTL_SECONDS = 20.0
FLUSH_SECONDS = 1.0
"""Between two writes of a process; a model that begins to be wanted is written at once."""
REWRITE_SECONDS = 5.0
"""An unchanged report is written again so often, so that it outlives three lost writes."""
CALL_SECONDS = 2.0
BACKOFF_MAX_SECONDS = 5.0

BUCKETS_PER_DOUBLING = 4
"""A latency is known to within 19 %: better than the spread of one model's answers."""
FIRST_BUCKET_SECONDS = 0.001
BUCKETS = 20 * BUCKETS_PER_DOUBLING
"""Up to 17 minutes, above the default deadline of a request."""

log = logging.getLogger(__name__)

# KEYS: last, gateways, report. ARGV: gateway, report, its ttl (ms), models kept, how long (ms), hint channel,
# number of hints, hints..., then pairs (age in ms, model). The server's clock is the only one.
_WRITE = """
local t = redis.call('time')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call('set', KEYS[3], ARGV[2], 'px', ARGV[3])
redis.call('zadd', KEYS[2], now, ARGV[1])
redis.call('zremrangebyscore', KEYS[2], '-inf', now - ARGV[3])
local hints = tonumber(ARGV[7])
for i = 8 + hints, #ARGV, 2 do
  redis.call('zadd', KEYS[1], 'GT', now - ARGV[i], ARGV[i + 1])
end
redis.call('zremrangebyscore', KEYS[1], '-inf', now - ARGV[5])
redis.call('zremrangebyrank', KEYS[1], 0, -1 - ARGV[4])
for i = 8, 7 + hints do redis.call('publish', ARGV[6], ARGV[i]) end
return now
"""


def bucket_of(seconds: float) -> int:
    """Index of the bucket that `seconds` falls into."""
    if seconds <= FIRST_BUCKET_SECONDS:
        return 0
    index = math.ceil(BUCKETS_PER_DOUBLING * math.log2(seconds / FIRST_BUCKET_SECONDS) - 1e-9)
    return min(index, BUCKETS)


def bucket_seconds(index: int) -> float:
    """Upper bound of a bucket."""
    return FIRST_BUCKET_SECONDS * float(2 ** (index / BUCKETS_PER_DOUBLING))


def above(counts: Mapping[int, int], threshold: float) -> int:
    """How many of the counted latencies lie above `threshold` seconds; those of its own bucket do not."""
    own = bucket_of(threshold)
    return sum(count for index, count in counts.items() if index > own)


@dataclass(slots=True)
class _Model:
    """What one process knows of one model."""

    used: float  # monotonic
    written: float = -math.inf  # the activity last written
    running: int = 0
    held: int = 0
    ttft: dict[int, int] = field(default_factory=dict)
    tpot: dict[int, int] = field(default_factory=dict)


class DemandWriter:
    """A gateway process's side. Recording never blocks and never fails; `run` writes until cancelled."""

    def __init__(self, redis: Redis, gateway: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`gateway` names this process and no other, not even its successor under the same name."""
        self._redis = redis
        self._gateway = gateway
        self._clock = clock
        self._models: dict[str, _Model] = {}
        self._hints: set[str] = set()
        self._wake = asyncio.Event()
        self._dirty = False

    def record_demand(self, model: str, now: float | None = None) -> None:
        """A request for `model` arrived, runs or ended, at `now` (this process's monotonic clock)."""
        entry = self._entry(model, self._clock() if now is None else now)
        if entry is not None and entry.used - entry.written > REWRITE_SECONDS:
            self._changed()

    def began(self, model: str) -> None:
        """A request for `model` arrived. Until `ended` the model is in use, however long that takes: an
        answer longer than the time after which a model goes to zero must not count as none."""
        self.record_demand(model)
        if (entry := self._models.get(model)) is not None:
            entry.running += 1

    def ended(self, model: str) -> None:
        """The end of what `began`."""
        self.record_demand(model)
        if (entry := self._models.get(model)) is not None and entry.running:
            entry.running -= 1

    def record_held(self, model: str, count: int) -> None:
        """`count` requests wait in this process for `model` to wake. The first one is told at once."""
        entry = self._entry(model, self._clock())
        if entry is None or entry.held == count:
            return
        if entry.held == 0:
            self._hints.add(model)
        entry.held = count
        self._changed()

    def record_answer(self, model: str, *, ttft: float | None, tpot: float | None) -> None:
        """An answer ended: seconds to its first token, mean seconds of its further tokens. None: none."""
        entry = self._entry(model, self._clock())
        if entry is None:
            return
        for counts, seconds in ((entry.ttft, ttft), (entry.tpot, tpot)):
            if seconds is not None:
                bucket = bucket_of(seconds)
                counts[bucket] = counts.get(bucket, 0) + 1
        self._dirty = True

    async def run(self) -> None:
        """Writes until cancelled."""
        backoff = FLUSH_SECONDS
        wrote_at = -math.inf
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REWRITE_SECONDS if not self._dirty else FLUSH_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            if not self._models or (not self._dirty and self._clock() - wrote_at < REWRITE_SECONDS):
                continue
            if await self.flush():
                wrote_at, backoff = self._clock(), FLUSH_SECONDS
                await asyncio.sleep(FLUSH_SECONDS / 4)  # a burst of new models is one write
            else:
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, BACKOFF_MAX_SECONDS)
            heed_cancellation()

    async def flush(self) -> bool:
        """One write of everything. False if Redis could not be reached: the next one has it all."""
        hints, self._hints = self._hints, set()
        self._dirty = False
        now = self._clock()
        for model in self._models.values():
            if model.running or model.held:
                model.used = now
        fresh = {name: entry.used for name, entry in self._models.items() if entry.used > entry.written}
        ages: list[str | int] = []
        for name, used in fresh.items():
            ages += [max(0, round(1000 * (now - used))), name]
        args = [
            *(self._gateway, json.dumps(self._report()), round(1000 * REPORT_TTL_SECONDS), MAX_MODELS),
            *(LAST_DAYS * 86_400_000, HINT_CHANNEL, len(hints), *hints, *ages),
        ]
        keys = (LAST_KEY, GATEWAYS_KEY, REPORT_PREFIX + self._gateway)
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await cast("Awaitable[object]", self._redis.eval(_WRITE, len(keys), *keys, *args))
        except (RedisError, OSError, TimeoutError) as error:
            metrics.DEMAND_WRITES.labels("failed").inc()
            log.debug("demand not written: %s", error)
            self._hints |= hints
            self._dirty = True
            return False
        metrics.DEMAND_WRITES.labels("ok").inc()
        for name, used in fresh.items():
            if (entry := self._models.get(name)) is not None:
                entry.written = used
        return True

    def _report(self) -> dict[str, dict[str, Any]]:
        models = self._models.items()
        return {
            "held": {name: entry.held for name, entry in models if entry.held},
            "ttft": {name: entry.ttft for name, entry in models if entry.ttft},
            "tpot": {name: entry.tpot for name, entry in models if entry.tpot},
        }

    def _entry(self, model: str, now: float) -> _Model | None:
        entry = self._models.get(model)
        if entry is None:
            if len(self._models) >= MAX_MODELS and not self._evict():
                metrics.DEMAND_DROPPED.inc()
                return None
            entry = self._models[model] = _Model(now)
        entry.used = max(entry.used, now)
        return entry

    def _evict(self) -> bool:
        """Makes room: the model used longest ago of those that nobody waits for and that are written."""
        idle = [
            (entry.used, name)
            for name, entry in self._models.items()
            if not entry.held and not entry.running and entry.written >= entry.used
        ]
        if not idle:
            return False
        del self._models[min(idle)[1]]
        return True

    def _changed(self) -> None:
        self._dirty = True
        self._wake.set()


@dataclass(frozen=True, slots=True)
class GatewayReport:
    """What one gateway process last said; counts only grow over its life."""

    held: Mapping[str, int]
    ttft: Mapping[str, Mapping[int, int]]  # model -> bucket -> answers
    tpot: Mapping[str, Mapping[int, int]]


@dataclass(frozen=True, slots=True)
class Demand:
    """One read. Times are seconds of the Redis server's clock."""

    now: float
    last: Mapping[str, float]  # model -> last activity; absent: none that is remembered
    gateways: Mapping[str, GatewayReport]

    def held(self, model: str) -> int:
        """Requests that wait for the model, over all gateways."""
        return sum(report.held.get(model, 0) for report in self.gateways.values())


class DemandReader:
    """The side of whoever scales."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def read(self) -> Demand:
        """Raises redis.RedisError, OSError or TimeoutError while Redis cannot be reached."""
        async with asyncio.timeout(CALL_SECONDS):
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.time()
                pipe.zrevrange(LAST_KEY, 0, MAX_MODELS - 1, withscores=True)
                pipe.zrevrange(GATEWAYS_KEY, 0, MAX_GATEWAYS - 1)
                (seconds, micros), last, names = await pipe.execute()
            gateways = [_text(name) for name in names]
            reports = await self._redis.mget([REPORT_PREFIX + name for name in gateways]) if gateways else []
        parsed = {
            name: report
            for name, value in zip(gateways, reports, strict=True)
            if (report := _parse(value)) is not None
        }
        scores = {_text(name): score / 1000 for name, score in last}
        return Demand(now=int(seconds) + int(micros) / 1e6, last=scores, gateways=parsed)

    async def follow(self, woken: Callable[[str], None]) -> None:
        """Calls `woken` with models that requests begin to wait for, until cancelled. Hints may be lost."""
        while True:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe(HINT_CHANNEL)
                    while True:
                        message = await pubsub.get_message(timeout=CALL_SECONDS)
                        heed_cancellation()
                        if message is not None:
                            woken(_text(message["data"]))
            heed_cancellation()
            await asyncio.sleep(FLUSH_SECONDS)


def _parse(value: bytes | str | None) -> GatewayReport | None:
    """None for a report that expired or that an unknown version wrote."""
    if value is None:
        return None
    try:
        raw = json.loads(value)
        held = {str(model): int(count) for model, count in raw["held"].items()}
        histograms = [
            {
                str(model): {int(bucket): int(count) for bucket, count in counts.items()}
                for model, counts in raw[name].items()
            }
            for name in ("ttft", "tpot")
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        log.warning("a gateway's report cannot be read: %.80r", value)
        return None
    return GatewayReport(held, histograms[0], histograms[1])


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
