"""Rate windows and usage while Redis is absent, with a clock of our own."""

from __future__ import annotations

import pytest

from controlplane.api.errors import ApiError
from controlplane.gateway.auth import Authenticator, Principal
from controlplane.gateway.keys import KeyLimits
from controlplane.gateway.limits import Limiter
from controlplane.gateway.metering import Meter
from controlplane.gateway.settings import GatewaySettings


class Clock:
    now = 6000.0

    def __call__(self) -> float:
        return self.now


async def test_the_local_window_slides() -> None:
    clock = Clock()
    limiter = Limiter(None, GatewaySettings(), clock)
    who = Principal("t", "k", limits=KeyLimits(requests_per_minute=10))
    for index in range(10):
        (await limiter.admit(who, f"r{index}", 1)).release(0)
    with pytest.raises(ApiError) as caught:
        await limiter.admit(who, "r10", 1)
    assert caught.value.status == 429 and caught.value.retry_after == 60
    clock.now += 60 + 30  # half of the last minute still counts
    for index in range(5):
        (await limiter.admit(who, f"s{index}", 1)).release(0)
    with pytest.raises(ApiError):
        await limiter.admit(who, "s5", 1)
    assert limiter.in_flight == 0


async def test_concurrency_is_freed_once_and_expires() -> None:
    clock = Clock()
    limiter = Limiter(None, GatewaySettings(request_seconds=10), clock)
    who = Principal("t", "k", limits=KeyLimits(concurrent=1))
    lease = await limiter.admit(who, "a", 1)
    with pytest.raises(ApiError):
        await limiter.admit(who, "b", 1)
    lease.release(3)
    lease.release(3)
    assert limiter.in_flight == 0
    await limiter.admit(who, "c", 1)
    clock.now += 3600  # never released: the member expires with its request
    await limiter.admit(who, "d", 1)


async def test_the_process_bound_holds_for_everyone() -> None:
    limiter = Limiter(None, GatewaySettings(max_in_flight=1))
    lease = await limiter.admit(Principal("t"), "a", 1)
    with pytest.raises(ApiError) as caught:
        await limiter.admit(Principal("t"), "b", 1)
    assert caught.value.code == "queue_full"
    lease.release(0)
    await limiter.admit(Principal("t"), "c", 1)


def test_usage_rows_are_merged_and_bounded() -> None:
    made = GatewaySettings(usage_pending=4)
    meter = Meter(None, Authenticator(None, made), made, Clock())
    for tenant in ("a", "a", "b"):
        meter.record(tenant, "m", prompt=2, cached=1, completion=3)
    assert meter._pending == {
        ("1970-01-01", "a|m|requests"): 2,
        ("1970-01-01", "a|m|prompt_tokens"): 4,
        ("1970-01-01", "a|m|cached_tokens"): 2,
        ("1970-01-01", "a|m|completion_tokens"): 6,
    }


def test_settings_come_from_the_environment() -> None:
    env = {"DEEPFLOW_GATEWAY_MAX_BODY_BYTES": "4096", "DEEPFLOW_GATEWAY_PEEK_SECONDS": "0.5", "OTHER": "1"}
    made = GatewaySettings.from_env(env, {"gateway_id": "gw-7"})
    assert (made.max_body_bytes, made.peek_seconds, made.gateway_id) == (4096, 0.5, "gw-7")
    with pytest.raises(ValueError):
        GatewaySettings.from_env({"DEEPFLOW_GATEWAY_MAX_N": "-1"})
