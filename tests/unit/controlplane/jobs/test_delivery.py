"""Merging and ending of a job's deltas."""

from __future__ import annotations

import asyncio

from controlplane.jobs.delivery import Delivery
from controlplane.jobs.serving import ServingError, TokenLogprobs


async def test_what_a_slow_consumer_finds_is_one_delta_a_choice() -> None:
    delivery = Delivery(2)
    delivery.push(0, [1], [TokenLogprobs(1, -1.0, 1)], cached_tokens=16)
    delivery.push(1, [5], None)
    delivery.push(0, [2], [TokenLogprobs(2, -2.0, 1)])
    delivery.close(0, "stop")
    delivery.close(1, "error", ServingError(500, "x", "y"))
    delivery.close(1, "stop")  # too late
    deltas = [delta async for delta in delivery.deltas()]
    assert [(d.index, d.tokens, d.finish) for d in deltas] == [(0, [1, 2], "stop"), (1, [5], "error")]
    assert [entry.token for entry in deltas[0].logprobs or ()] == [1, 2]
    assert deltas[0].cached_tokens == 16


async def test_a_waiting_consumer_is_woken() -> None:
    delivery = Delivery(1)
    reading = asyncio.create_task(anext(delivery.deltas()))
    await asyncio.sleep(0)
    delivery.push(0, [1], None)
    assert (await reading).tokens == [1]


def test_a_listener_is_told_and_takes_what_is_ready() -> None:
    delivery = Delivery(2)
    told: list[int] = []
    delivery.push(1, [7], None)
    delivery.listen(lambda: told.append(len(told)))
    assert told == [0], "of what was ready before"
    delivery.push(0, [1], None)
    delivery.push(1, [8], None)
    assert [(d.index, d.tokens) for d in delivery.take()] == [(1, [7, 8]), (0, [1])]
    assert delivery.take() == [] and not delivery.ended
    delivery.close(0, "stop")
    delivery.close(1, "length")
    assert not delivery.ended, "the last deltas are still to be taken"
    assert [(d.index, d.finish) for d in delivery.take()] == [(0, "stop"), (1, "length")]
    assert delivery.ended and len(told) == 5
