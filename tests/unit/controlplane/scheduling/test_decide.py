"""Placement: nobody unfit is ever chosen, somebody fit always is, and each policy does what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.scheduling.decide import decide, decide_decode, dropped_for, queue_seconds
from controlplane.scheduling.types import (
    ClusterView,
    Decision,
    Draw,
    Drop,
    ExecutorView,
    Mode,
    Policy,
    PolicyName,
    Reason,
    RequestView,
    Role,
    Unplaceable,
)

REVISION = "model@1"


def executor(te_id: str = "te-0", role: Role = Role.COLOCATED, **changes: object) -> ExecutorView:
    base = ExecutorView(
        te_id=te_id,
        incarnation="i",
        role=role,
        model_revision=REVISION,
        kv_blocks_total=100,
        kv_blocks_free=100,
    )
    return replace(base, **changes)  # type: ignore[arg-type]  # fields by name


def view(*executors: ExecutorView) -> ClusterView:
    return ClusterView(executors)


def request(**changes: object) -> RequestView:
    return replace(RequestView(model_revision=REVISION, tokens=40), **changes)  # type: ignore[arg-type]


def placed(answer: Decision | Unplaceable) -> Decision:
    assert isinstance(answer, Decision), answer
    return answer


def refused(answer: Decision | Unplaceable) -> Unplaceable:
    assert isinstance(answer, Unplaceable), answer
    return answer


# -- properties ----------------------------------------------------------------------------------

IDS = [f"te-{i}" for i in range(6)]
ids = st.frozensets(st.sampled_from(IDS))


@st.composite
def executors(draw: st.DrawFn, te_id: str) -> ExecutorView:
    total = draw(st.sampled_from([0, 2, 10, 100]))
    return ExecutorView(
        te_id=te_id,
        incarnation="i",
        role=draw(st.sampled_from(list(Role))),
        model_revision=draw(st.sampled_from([REVISION, REVISION, REVISION, "other@2", ""])),
        ready=draw(st.integers(0, 9)) > 0,
        draining=draw(st.integers(0, 9)) == 0,
        link_up=draw(st.integers(0, 9)) > 0,
        step_age_seconds=draw(st.sampled_from([0.0, 0.4, 60.0])),
        tasks=draw(st.integers(0, 5)),
        max_tasks=draw(st.sampled_from([1, 4, 256])),
        queued_tokens=draw(st.integers(0, 10_000)),
        prefill_tokens_per_second=draw(st.sampled_from([0.0, 100.0, 5000.0])),
        decode_step_seconds=draw(st.sampled_from([0.0, 0.02])),
        kv_blocks_total=total,
        kv_blocks_free=draw(st.integers(0, total)),
        max_model_len=draw(st.sampled_from([0, 64, 4096])),
    )


clusters = st.tuples(*(executors(te_id) for te_id in IDS)).flatmap(
    lambda everyone: st.integers(0, len(everyone)).map(lambda count: ClusterView(everyone[:count]))
)
requests = st.builds(
    RequestView,
    model_revision=st.just(REVISION),
    tokens=st.sampled_from([1, 16, 40, 500]),
    output_left=st.integers(1, 200),
    unified_only=st.booleans(),
    cached_tokens=st.dictionaries(st.sampled_from(IDS), st.integers(0, 600)),
    excluded=ids,
    never=ids,
    prefer=st.none() | st.sampled_from(IDS),
)
policies = st.builds(
    Policy, name=st.sampled_from(list(PolicyName)), min_uncached_tokens=st.sampled_from([0, 32, 10_000])
)
draws = st.builds(Draw, turn=st.integers(0, 1 << 40), seed=st.integers(0, (1 << 64) - 1))


@given(clusters, requests, policies, draws)
def test_only_the_fit_are_chosen_and_nothing_is_refused_while_one_is(
    cluster: ClusterView, asked: RequestView, policy: Policy, draw: Draw
) -> None:
    fit = {e.te_id for e in cluster.executors if dropped_for(e, asked, policy) is None}
    answer = decide(cluster, asked, policy, draw)
    assert isinstance(answer, Decision) == bool(fit)
    if isinstance(answer, Decision):
        assert answer.te_id in fit
        assert answer.te_id not in asked.never
        assert answer.te_id not in asked.excluded or fit <= asked.excluded
        assert answer.te_id in answer.scores
        assert set(answer.scores) <= fit
        chosen = next(e for e in cluster.executors if e.te_id == answer.te_id)
        assert 0 <= answer.cached_tokens <= asked.tokens
        if answer.mode is Mode.DISAGGREGATED:
            assert chosen.role is Role.PREFILL
            assert not asked.unified_only
            assert any(
                e.role is Role.DECODE and dropped_for(e, asked, policy, decode=True) is None
                for e in cluster.executors
            )


@given(clusters, requests, policies, draws)
def test_only_the_fit_get_the_decode_half(
    cluster: ClusterView, asked: RequestView, policy: Policy, draw: Draw
) -> None:
    fit = {e.te_id for e in cluster.executors if dropped_for(e, asked, policy, decode=True) is None}
    answer = decide_decode(cluster, asked, policy, draw)
    assert isinstance(answer, Decision) == bool(fit)
    if isinstance(answer, Decision):
        assert answer.te_id in fit
        assert answer.te_id not in asked.excluded or fit <= asked.excluded
        roles = {e.te_id: e.role for e in cluster.executors}
        open_to = fit - asked.excluded or fit
        if any(roles[te_id] is not Role.PREFILL for te_id in open_to):
            assert roles[answer.te_id] is not Role.PREFILL


@given(clusters, requests, policies, draws)
def test_the_same_arguments_give_the_same_answer(
    cluster: ClusterView, asked: RequestView, policy: Policy, draw: Draw
) -> None:
    assert decide(cluster, asked, policy, draw) == decide(cluster, asked, policy, draw)


@given(clusters, requests, policies, draws)
def test_the_answer_does_not_depend_on_the_order_of_the_view(
    cluster: ClusterView, asked: RequestView, policy: Policy, draw: Draw
) -> None:
    there = decide(cluster, asked, policy, draw)
    back = decide(ClusterView(cluster.executors[::-1]), asked, policy, draw)
    if isinstance(there, Decision):
        assert placed(back).te_id == there.te_id
    else:
        assert refused(back).reason is there.reason


# -- fitness -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"ready": False}, Drop.NOT_READY),
        ({"model_revision": "other@2"}, Drop.REVISION),
        ({"draining": True}, Drop.DRAINING),
        ({"link_up": False}, Drop.LINK),
        ({"step_age_seconds": 1e3}, Drop.HUNG),
        ({"kv_blocks_total": 2, "kv_blocks_free": 2}, Drop.TOO_LARGE),
        ({"max_model_len": 39}, Drop.TOO_LARGE),
        ({"tasks": 8, "max_tasks": 8}, Drop.TASKS_FULL),
        ({"tasks": 1, "kv_blocks_free": 2}, Drop.KV_FULL),
    ],
)
def test_an_unfit_executor_is_dropped_with_its_reason(changes: dict[str, object], why: Drop) -> None:
    bad = executor("te-bad", **changes)
    assert dropped_for(bad, request(), Policy()) is why
    assert placed(decide(view(bad, executor("te-good")), request(), Policy())).dropped == {"te-bad": why}
    assert refused(decide(view(bad), request(), Policy())).dropped == {"te-bad": why}


def test_an_idle_executor_takes_what_its_pool_can_hold() -> None:
    """Else a request as large as the pool would wait for ever: free blocks never exceed the total."""
    idle = executor(kv_blocks_total=3, kv_blocks_free=3)
    assert placed(decide(view(idle), request(tokens=48), Policy())).te_id == "te-0"


def test_the_reason_tells_waiting_from_hopeless() -> None:
    full = executor("te-full", tasks=8, max_tasks=8)
    small = executor("te-small", kv_blocks_total=2, kv_blocks_free=2)
    gone = executor("te-gone", link_up=False)
    assert refused(decide(view(), request(), Policy())).reason is Reason.NO_EXECUTOR
    assert refused(decide(view(gone), request(), Policy())).reason is Reason.NO_EXECUTOR
    assert refused(decide(view(gone, small), request(), Policy())).reason is Reason.TOO_LARGE
    assert refused(decide(view(gone, small, full), request(), Policy())).reason is Reason.BUSY


def test_a_failed_executor_is_avoided_but_better_than_none() -> None:
    both = view(executor("te-0"), executor("te-1", tasks=50))
    failed = request(excluded=frozenset({"te-0"}))
    assert placed(decide(both, failed, Policy())).te_id == "te-1"
    assert placed(decide(view(executor("te-0")), failed, Policy())).te_id == "te-0"


def test_an_executor_that_cannot_run_it_is_never_chosen() -> None:
    assert refused(decide(view(executor("te-0")), request(never=frozenset({"te-0"})), Policy()))


# -- mode ----------------------------------------------------------------------------------------

PREFILL = executor("te-p", Role.PREFILL)
DECODE = executor("te-d", Role.DECODE)
COLOCATED = executor("te-c", Role.COLOCATED)


def test_one_prefill_and_one_decode_executor_split_every_prompt_by_default() -> None:
    for tokens in (1, 5, 1000):
        answer = placed(decide(view(PREFILL, DECODE), request(tokens=tokens), Policy()))
        assert (answer.mode, answer.te_id) == (Mode.DISAGGREGATED, "te-p")


def test_a_prompt_below_the_threshold_runs_where_decoding_happens() -> None:
    policy = Policy(min_uncached_tokens=64)
    answer = placed(decide(view(PREFILL, DECODE), request(tokens=40), policy))
    assert (answer.mode, answer.te_id) == (Mode.UNIFIED, "te-d")


def test_the_threshold_counts_uncached_tokens() -> None:
    policy = Policy(min_uncached_tokens=64)
    long = request(tokens=100)
    assert placed(decide(view(PREFILL, DECODE), long, policy)).mode is Mode.DISAGGREGATED
    known = replace(long, cached_tokens={"te-p": 48, "te-d": 48})
    assert placed(decide(view(PREFILL, DECODE), known, policy)).mode is Mode.UNIFIED


@pytest.mark.parametrize("role", list(Role))
def test_any_role_alone_runs_everything(role: Role) -> None:
    answer = placed(decide(view(executor("te-0", role)), request(), Policy()))
    assert (answer.mode, answer.te_id) == (Mode.UNIFIED, "te-0")


@pytest.mark.parametrize("gone", [{"link_up": False}, {"draining": True}, {"tasks": 256}])
def test_without_a_fit_partner_the_other_role_runs_it_whole(gone: dict[str, object]) -> None:
    no_decode = view(PREFILL, replace(DECODE, **gone))  # type: ignore[arg-type]
    no_prefill = view(replace(PREFILL, **gone), DECODE)  # type: ignore[arg-type]
    assert placed(decide(no_decode, request(), Policy())).te_id == "te-p"
    assert placed(decide(no_decode, request(), Policy())).mode is Mode.UNIFIED
    assert placed(decide(no_prefill, request(), Policy())).te_id == "te-d"
    assert placed(decide(no_prefill, request(), Policy())).mode is Mode.UNIFIED


def test_unified_only_is_kept_to() -> None:
    answer = placed(decide(view(PREFILL, DECODE, COLOCATED), request(unified_only=True), Policy()))
    assert (answer.mode, answer.te_id) == (Mode.UNIFIED, "te-c")


def test_decode_goes_to_decode_then_colocated_then_prefill_executors() -> None:
    other = executor("te-p2", Role.PREFILL)
    asked = request(never=frozenset({"te-p"}))
    assert placed(decide_decode(view(PREFILL, other, COLOCATED, DECODE), asked, Policy())).te_id == "te-d"
    assert placed(decide_decode(view(PREFILL, other, COLOCATED), asked, Policy())).te_id == "te-c"
    assert placed(decide_decode(view(PREFILL, other), asked, Policy())).te_id == "te-p2"
    assert refused(decide_decode(view(PREFILL), asked, Policy())).reason is Reason.NO_EXECUTOR


def test_decode_asks_for_room_to_grow() -> None:
    tight = executor("te-d", Role.DECODE, tasks=1, kv_blocks_free=4)
    asked = request(tokens=40, output_left=200)
    assert refused(decide_decode(view(tight), asked, Policy())).reason is Reason.BUSY
    assert placed(decide_decode(view(tight), replace(asked, output_left=8), Policy()))


def test_decode_follows_kv_headroom_and_load() -> None:
    roomy = executor("te-a", Role.DECODE, tasks=4, kv_blocks_free=90)
    tight = executor("te-b", Role.DECODE, tasks=4, kv_blocks_free=20)
    busy = executor("te-c", Role.DECODE, tasks=60, kv_blocks_free=90)
    for seed in range(8):
        answer = placed(decide_decode(view(roomy, tight, busy), request(), Policy(), Draw(seed=seed)))
        assert answer.te_id == "te-a"


# -- policies ------------------------------------------------------------------------------------


def test_round_robin_takes_turns() -> None:
    three = view(*(executor(f"te-{i}", tasks=i) for i in range(3)))
    policy = Policy(name=PolicyName.ROUND_ROBIN)
    turns = [placed(decide(three, request(), policy, Draw(turn=turn))).te_id for turn in range(6)]
    assert turns == ["te-0", "te-1", "te-2"] * 2


def test_least_loaded_counts_seconds_not_tasks() -> None:
    fast = executor("te-fast", queued_tokens=2000, prefill_tokens_per_second=10_000)
    slow = executor("te-slow", queued_tokens=500, prefill_tokens_per_second=100)
    policy = Policy(name=PolicyName.LEAST_LOADED)
    for seed in range(8):
        assert placed(decide(view(fast, slow), request(), policy, Draw(seed=seed))).te_id == "te-fast"


def test_a_prompt_goes_where_few_prompts_wait_though_more_decodes_run() -> None:
    reader = executor("reader", tasks=1, queued_tokens=2000, prefill_tokens_per_second=2000)
    writer = executor("writer", tasks=30, prefill_tokens_per_second=2000, decode_step_seconds=0.04)
    assert placed(decide(view(reader, writer), request(), Policy())).te_id == "writer"
    idle = replace(writer, te_id="idle", tasks=0)
    assert placed(decide(view(writer, idle), request(), Policy())).te_id == "idle"


def test_affinity_follows_the_longest_prefix() -> None:
    two = view(executor("te-0"), executor("te-1", tasks=2))
    asked = request(tokens=400, cached_tokens={"te-0": 16, "te-1": 320})
    answer = placed(decide(two, asked, Policy()))
    assert (answer.te_id, answer.cached_tokens) == ("te-1", 320)


def test_affinity_gives_way_to_load() -> None:
    swamped = executor("te-1", queued_tokens=100_000, prefill_tokens_per_second=1000)
    asked = request(tokens=400, cached_tokens={"te-1": 320})
    assert placed(decide(view(executor("te-0"), swamped), asked, Policy())).te_id == "te-0"


@given(clusters, requests, draws)
def test_affinity_never_exceeds_its_load_bound(cluster: ClusterView, asked: RequestView, draw: Draw) -> None:
    policy = Policy(name=PolicyName.PREFIX_AFFINITY)
    answer = decide(cluster, asked, policy, draw)
    if isinstance(answer, Decision):
        fastest = max(e.prefill_tokens_per_second for e in cluster.executors)
        told = [e for e in cluster.executors if e.te_id in answer.scores]
        queues = {e.te_id: queue_seconds(e, policy, fastest) for e in told}
        bound = min(queues.values()) * policy.affinity_slack_ratio + policy.affinity_slack_seconds
        assert queues[answer.te_id] <= bound


def test_siblings_are_kept_together_within_the_load_bound() -> None:
    asked = request(prefer="te-1")
    near = view(executor("te-0"), executor("te-1", tasks=3))
    far = view(executor("te-0"), executor("te-1", queued_tokens=1_000_000))
    for name in PolicyName:
        assert placed(decide(near, asked, Policy(name=name))).te_id == "te-1"
        assert placed(decide(far, asked, Policy(name=name))).te_id == "te-0"


def test_ties_are_broken_evenly_by_the_seed() -> None:
    four = view(*(executor(f"te-{i}") for i in range(4)))
    for name in (PolicyName.LEAST_LOADED, PolicyName.PREFIX_AFFINITY):
        counts = dict.fromkeys((e.te_id for e in four.executors), 0)
        for seed in range(1000):
            counts[placed(decide(four, request(), Policy(name=name), Draw(seed=seed))).te_id] += 1
        assert min(counts.values()) > 150, counts  # 250 expected each
