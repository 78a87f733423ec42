"""Which transport is opened, and what is said of those that were not."""

from __future__ import annotations

from typing import Any, cast

import pytest
from prometheus_client import REGISTRY

from kvtransfer.errors import TransferError, TransportUnavailable
from kvtransfer.transports.choice import Opener, open_best


def opener(name: str, tried: list[str], fails: bool = False) -> Opener:
    async def open_() -> Any:
        tried.append(name)
        if fails:
            raise TransportUnavailable("socket", f"{name} is not there")
        return name

    return cast(Opener, open_)


async def test_the_best_that_opens_is_taken_and_the_others_are_counted() -> None:
    def counts() -> list[float]:
        labels = {"transport": "unix", "reason": "socket"}
        return [
            REGISTRY.get_sample_value("deepflow_kv_transport_fallbacks_total", labels) or 0.0,
            REGISTRY.get_sample_value("deepflow_kv_transport_chosen_total", {"transport": "tcp"}) or 0.0,
        ]

    before, tried = counts(), list[str]()
    openers = {name: opener(name, tried, fails=name == "unix") for name in ("grpc", "tcp", "unix")}
    assert cast(str, await open_best("auto", openers, "peer")) == "tcp"
    assert tried == ["unix", "tcp"]
    assert counts() == [count + 1 for count in before]


async def test_a_demanded_transport_is_not_replaced() -> None:
    tried: list[str] = []
    with pytest.raises(TransferError, match="unix is demanded but: unix is not there"):
        await open_best("unix", {"grpc": opener("grpc", tried), "unix": opener("unix", tried, True)}, "p")
    with pytest.raises(TransferError, match="tcp is demanded but: p does not offer it"):
        await open_best("tcp", {"grpc": opener("grpc", tried)}, "p")
    assert tried == ["unix"]
    assert cast(str, await open_best("grpc", {"grpc": opener("grpc", tried)}, "p")) == "grpc"
