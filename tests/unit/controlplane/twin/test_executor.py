"""The simulated executor against the real engine: same tasks, same step costs, simulated time for both."""

from __future__ import annotations

import random

import pytest

from controlplane.scheduling.admission import DropReason
from controlplane.scheduling.types import Role
from controlplane.twin.baselines import LeastRequests, StaticSplit, split_roles
from controlplane.twin.cluster import Cluster, Place
from controlplane.twin.costs import CostProfile
from controlplane.twin.results import tpot, ttft
from controlplane.twin.workload import Workload, build
from flowserve.engine.budget import StepShape
from flowserve.engine.config import EngineConfig
from flowserve.engine.engine import Engine
from flowserve.engine.types import EngineTask, SamplingParams, StepEvent, TaskKind
from flowserve.executor.interface import ModelInfo, SequenceSlice, SliceResult
from flowserve.rtc import RTC
from tests.support.engine import FakeClock, PageStore

UNIT = 64


def profile(**changes: object) -> CostProfile:
    """A line over tokens, so that the engine's own model learns it exactly."""
    values: dict[str, object] = {
        "name": "line", "source": "test", "knots": (1, 512), "seconds": (0.0205, 0.276),
        "sample_seconds": 0.0, "pair_seconds": 1e-7, "context_seconds": 1e-7, "kv_bytes_per_token": 1000,
        "transfer_bytes_per_second": 1e8, "transfer_seconds": 0.002, "load_seconds": 1.0, "kv_tokens": 8192,
        "max_batch_tokens": 512, "max_running": 32, "chunk_seconds": 0.1, "max_model_len": 4096,
    }  # fmt: skip
    return CostProfile(**{**values, **changes})  # type: ignore[arg-type]  # named above


class PacedExecutor:
    """Takes as long as the profile says, on the test's clock; every token is 7."""

    def __init__(self, costs: CostProfile, clock: FakeClock) -> None:
        self.info = ModelInfo("paced@1", 1, 1, 2, 1000, costs.max_model_len, (0,), "float16")
        self._costs, self._clock = costs, clock

    def execute(self, batch: list[SequenceSlice]) -> list[SliceResult]:
        shape = StepShape.of((piece.start, len(piece.tokens)) for piece in batch)
        self._clock.now += self._costs.step(shape.tokens, 0, shape.pairs, 0)
        return [SliceResult(token=7 if piece.sample else None) for piece in batch]

    def close(self) -> None: ...


def run_engine(load: Workload, costs: CostProfile) -> tuple[dict[int, float], dict[int, float], RTC]:
    """(first token, end) of each request on the real engine."""
    clock = FakeClock()
    start = clock.now
    first: dict[int, float] = {}
    ended: dict[int, float] = {}

    def on_event(event: StepEvent) -> None:
        for delta in event.deltas:
            request = int(delta.task_id)
            if delta.tokens:
                first.setdefault(request, clock.now - start)
            if delta.finish is not None:
                ended[request] = clock.now - start

    store = PageStore(costs.kv_tokens // costs.block_tokens, costs.block_tokens)
    cache = RTC(store, clock=clock)
    config = EngineConfig(
        max_running=costs.max_running,
        max_batch_tokens=costs.max_batch_tokens,
        chunk_seconds=costs.chunk_seconds,
    )
    executor = PacedExecutor(costs, clock)
    engine = Engine(executor, cache, config, handover=None, on_event=on_event, clock=clock)  # type: ignore[arg-type]
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    at = 0
    while len(ended) < len(load):
        while at < len(load) and load.arrival[at] <= clock.now - start + 1e-9:
            units = load.units[load.first[at] : load.first[at + 1]]
            prompt = [1 + int(unit) % 900 for unit in units for _ in range(UNIT)]
            prompt += [1 + (13 * at + i) % 900 for i in range(int(load.prompt[at]) - len(prompt))]
            task = EngineTask(str(at), 1, TaskKind.UNIFIED, prompt, sampling, int(load.output[at]))
            engine.submit(task)
            at += 1
        if not engine.step_once():
            clock.now = start + float(load.arrival[at])
    audit = engine.audit()
    assert (audit.leaked_blocks, audit.stuck_tasks) == (0, 0)
    return first, ended, cache


def traffic(seed: int, count: int, rate: float, *, shared: bool = False) -> Workload:
    rng = random.Random(seed)
    arrival, at = [], 0.0
    for _ in range(count):
        arrival.append(at)
        at += rng.expovariate(rate)
    prompts = [rng.randint(20, 700) for _ in range(count)]
    outputs = [rng.randint(1, 120) for _ in range(count)]
    units: list[list[int]] = []
    if shared:
        for prompt in prompts:
            family, depth = rng.randrange(6), rng.randint(0, prompt // UNIT)
            units.append([family * 100 + i for i in range(depth)])
    return build("test", arrival, prompts, outputs, units=units, unit_tokens=UNIT)


@pytest.mark.parametrize("rate", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("shared", [False, True], ids=["unique", "shared prefixes"])
def test_a_simulated_executor_keeps_the_time_of_the_real_engine(rate: float, shared: bool) -> None:
    load, costs = traffic(3, 120, rate, shared=shared), profile()
    first, ended, _ = run_engine(load, costs)
    twin = Cluster(load, [Role.COLOCATED], costs, LeastRequests())
    twin.run()
    real_ttft = sum(first[i] - load.arrival[i] for i in range(len(load))) / len(load)
    real_end = sum(ended[i] - load.arrival[i] for i in range(len(load))) / len(load)
    assert ttft(twin).mean() == pytest.approx(real_ttft, rel=0.05)
    assert (twin.ended_at - load.arrival).mean() == pytest.approx(real_end, rel=0.03)


def test_running_out_of_blocks_preempts_as_the_engine_does() -> None:
    load, costs = traffic(5, 60, 6.0), profile(kv_tokens=2048)
    _, ended, _ = run_engine(load, costs)
    twin = Cluster(load, [Role.COLOCATED], costs, LeastRequests())
    twin.run()
    assert twin.tes[0].preemptions > 0
    real = sum(ended[i] - load.arrival[i] for i in range(len(load))) / len(load)
    assert (twin.ended_at - load.arrival).mean() == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_left_when_all_has_ended(seed: int) -> None:
    load, costs = traffic(seed, 200, 5.0, shared=True), profile(kv_tokens=2048)
    for roles, policy in (([Role.COLOCATED] * 2, LeastRequests()), (split_roles(3, 1), StaticSplit())):
        twin = Cluster(load, roles, costs, policy)
        twin.run()
        assert not twin.reasons
        assert (twin.ended_at >= twin.first_at).all()
        for te in twin.tes:
            assert (te.tasks, te.running, te.waiting, te.queued, te.context) == (0, 0, 0, 0, 0)
            assert (te.transfers_in, te.transfers_out) == (0, 0)
            assert te.free_blocks == te.total_blocks
            assert twin.inflight[te.number] == 0


def test_a_lone_request_takes_what_its_steps_cost() -> None:
    costs = profile()
    twin = Cluster(build("one", [0.0], [100], [11]), [Role.COLOCATED], costs, LeastRequests())
    twin.run()
    chunk = costs.step(100, 1, 5050, 0)
    assert ttft(twin)[0] == pytest.approx(chunk)
    steps = [costs.step(1, 1, 0, 101 + i) for i in range(10)]
    assert tpot(twin)[0] == pytest.approx(sum(steps) / 10)


def test_a_handed_over_request_pays_its_transfer_once() -> None:
    costs = profile()
    load = build("one", [0.0], [100], [11])
    whole = Cluster(load, [Role.COLOCATED], costs, LeastRequests())
    split = Cluster(load, split_roles(2, 1), costs, StaticSplit())
    whole.run()
    split.run()
    assert split.first_at[0] == pytest.approx(whole.first_at[0])
    assert split.ended_at[0] - whole.ended_at[0] == pytest.approx(costs.transfer(100))
    assert split.split[0]


def test_a_flip_changes_the_next_step_and_drops_nothing() -> None:
    load, costs = traffic(7, 100, 4.0), profile()

    class Flipping(StaticSplit):
        def tick(self, now: float) -> list[tuple[int, Role]]:
            roles = [Role.PREFILL, Role.DECODE] if int(now) % 2 else [Role.DECODE, Role.PREFILL]
            return list(enumerate(roles))

    twin = Cluster(load, split_roles(2, 1), costs, Flipping())
    twin.run()
    assert twin.flips > 10
    assert not twin.reasons


def test_a_hand_over_that_finds_no_decode_executor_goes_on_unified() -> None:
    class Nobody(StaticSplit):
        def place_decode(self, request: int, source: int, now: float) -> int | None:
            return None

    load = build("few", [0.0, 0.1], [100, 200], [11, 20])
    twin = Cluster(load, split_roles(2, 1), profile(), Nobody())
    twin.policy.place = lambda request, now: Place(0, disaggregated=True)  # type: ignore[method-assign]
    twin.run()
    assert twin.given_up == 2
    assert (twin.ended_at > 10).all()
    assert (twin.first_at < 2).all()
    for te in twin.tes:
        assert (te.tasks, te.queued, te.transfers_out, te.free_blocks) == (0, 0, 0, te.total_blocks)


def test_what_waits_goes_by_priority_and_ends_with_a_reason() -> None:
    class Full(LeastRequests):
        open = 0.0

        def place(self, request: int, now: float) -> Place | None:
            return super().place(request, now) if now >= self.open else None

    load = build("three", [0.0, 0.1, 0.2], [50, 50, 50], [5, 5, 5], priority=[0, 0, 9])
    late = Full()
    late.open = 1e9
    twin = Cluster(load, [Role.COLOCATED], profile(), late)
    twin.run()
    assert set(twin.reasons.values()) == {DropReason.EVICTED_TIMEOUT}
    soon = Full()
    soon.open = 1.5
    twin = Cluster(load, [Role.COLOCATED], profile(max_running=1, max_batch_tokens=512), soon)
    twin.run()
    assert twin.first_at[2] == twin.first_at.min()
