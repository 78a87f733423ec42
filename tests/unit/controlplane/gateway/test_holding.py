"""The bounds of holding hold whatever comes: any order of requests, wakes, sleeps, ends and time."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.api.errors import ApiError
from controlplane.fleet.demand import DemandWriter
from controlplane.gateway.catalogue import CatalogueEntry, HoldLimits, ServedModel
from controlplane.gateway.holding import Held, Holding
from controlplane.gateway.settings import GatewaySettings
from controlplane.gateway.wake import Stage

LIMITS = HoldLimits(requests=3, bytes=1000, seconds=10)
TOTAL_BYTES = 1500


class Executor:
    """Which models are up."""

    accepting = True

    def __init__(self) -> None:
        self.up: set[str] = set()

    def can_serve(self, revision: str) -> bool:
        return revision in self.up


class Model:
    def __init__(self, name: str) -> None:
        self.entry = CatalogueEntry(
            id=name, revision=f"{name}@1", path="", wakes=True, demand=f"ns/{name}", hold=LIMITS
        )


MODELS = [cast("ServedModel", Model(name)) for name in "ab"]
MODEL = st.integers(0, len(MODELS) - 1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), MODEL, st.integers(0, 600), st.integers(-1, 1)),
        st.tuples(st.just("leave"), st.integers(0, 20)),
        st.tuples(st.just("up"), MODEL),
        st.tuples(st.just("down"), MODEL),
        st.tuples(st.just("wait"), st.floats(0, 6)),
        st.tuples(st.just("look")),
    ),
    max_size=60,
)


class Bench:
    """Holding with a clock of the test's, and what it should be holding."""

    def __init__(self) -> None:
        self.now = 0.0
        self.executor = Executor()
        self.demand = DemandWriter(cast("Any", None), "g", clock=lambda: self.now)
        self.holding = Holding(
            cast("Any", self.executor),
            self.demand,
            GatewaySettings(hold_total_bytes=TOTAL_BYTES),
            stage=lambda entry: Stage("starting"),
            clock=lambda: self.now,
        )
        self.live: list[tuple[ServedModel, Held]] = []

    def ask(self, index: int, size: int, priority: int) -> None:
        model = MODELS[index]
        mine = [held for other, held in self.live if other is model and not held.up.done()]
        total = sum(held.size for _, held in self.live)
        try:
            held = self.holding.enter(model, size=size, priority=priority)
        except ApiError as error:
            assert error.status == 429 and error.retry_after is not None and 0 <= error.retry_after <= 60
            full = len(mine) >= LIMITS.requests or sum(one.size for one in mine) + size > LIMITS.bytes
            assert full or total + size > TOTAL_BYTES or any(held.up.done() for _, held in self.live)
            return
        assert (held is None) == self.executor.can_serve(model.entry.revision)
        if held is not None:
            self.live.append((model, held))

    def leave(self, index: int) -> None:
        if self.live:
            _, held = self.live.pop(index % len(self.live))
            self.holding.leave(held._sleeping, held._number)
            self.holding.leave(held._sleeping, held._number)  # idempotent

    def check(self) -> None:
        assert self.holding._bytes == sum(held.size for _, held in self.live) <= TOTAL_BYTES
        for model in MODELS:
            mine = [held for other, held in self.live if other is model]
            entry = self.demand._models.get(model.entry.demand_key)
            assert (entry.held if entry is not None else 0) == len(mine)
        for sleeping in self.holding._sleeping.values():
            assert 0 < len(sleeping.held) <= LIMITS.requests
            assert sleeping.bytes == sum(held.size for held in sleeping.held.values()) <= LIMITS.bytes

    def look(self) -> None:
        self.holding.look()
        for model, held in self.live:
            if self.executor.can_serve(model.entry.revision):
                assert held.up.done(), "nobody waits for a model that is up"
            elif held.overdue:
                assert held.up.done(), "nobody waits longer than promised"


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_counts_bytes_and_ages_stay_within_bounds_and_nothing_is_forgotten(steps: list[Any]) -> None:
    async def play() -> None:
        bench = Bench()
        for step in steps:
            match step:
                case ("ask", index, size, priority):
                    bench.ask(index, size, priority)
                case ("leave", index):
                    bench.leave(index)
                case ("up", index):
                    bench.executor.up.add(MODELS[index].entry.revision)
                case ("down", index):
                    bench.executor.up.discard(MODELS[index].entry.revision)
                case ("wait", seconds):
                    bench.now += seconds
                case _:
                    bench.look()
            bench.check()
        bench.executor.up = {model.entry.revision for model in MODELS}
        bench.look()
        while bench.live:
            bench.leave(0)
        bench.check()
        assert not bench.holding._sleeping and not bench.holding._held

    asyncio.run(play())


async def test_higher_priorities_are_released_first() -> None:
    bench, order = Bench(), list[int]()
    for priority in (0, 1, -1):
        bench.ask(0, 1, priority)
    for _, held in bench.live:
        held.up.add_done_callback(lambda _, priority=held.priority: order.append(priority))
    bench.executor.up.add(MODELS[0].entry.revision)
    bench.look()
    await asyncio.sleep(0)
    assert order == [1, 0, -1]
