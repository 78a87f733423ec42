"""When a decode executor is chosen before its prefill has ended. Needs nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controlplane.scheduling.decide import decide_decode
from controlplane.scheduling.early import Late, decide_early
from controlplane.scheduling.types import ClusterView, Decision, ExecutorView, Policy, RequestView, Role

POLICY = Policy()


def executor(te_id: str, role: Role = Role.DECODE, **fields: object) -> ExecutorView:
    values = {"kv_blocks_total": 1000, "kv_blocks_free": 1000, "prefill_tokens_per_second": 1000.0, **fields}
    return ExecutorView(te_id, f"{te_id}-1", role, "m@1", **values)  # type: ignore[arg-type]


PREFILL = executor("p", Role.PREFILL)


def decided(
    *decodes: ExecutorView, tokens: int = 320, policy: Policy = POLICY, **kwargs: int
) -> Decision | Late:
    view = ClusterView((PREFILL, *decodes))
    request = RequestView("m@1", tokens, never=frozenset({"p"}))
    return decide_early(view, request, policy, prefill_te="p", **kwargs)


def test_early_where_there_is_room() -> None:
    decision = decided(executor("d"))
    assert isinstance(decision, Decision) and decision.te_id == "d"


def test_late_when_switched_off() -> None:
    assert decided(executor("d"), policy=Policy(early_decode=False)) == Late("off")


def test_late_when_blocks_would_be_missed() -> None:
    """320 tokens and the next one take 21 blocks of 16: a quarter of 1,000 must be left beside them."""
    assert isinstance(decided(executor("d", kv_blocks_free=271)), Decision)
    assert decided(executor("d", kv_blocks_free=270)) == Late("the decode executor's KV is short")


def test_a_long_prefill_chooses_late_among_several_but_not_where_there_is_no_choice() -> None:
    several = executor("d"), executor("e")
    assert isinstance(decided(*several, tokens=5000), Decision)
    assert decided(*several, tokens=5001) == Late("the load moves sooner than the prefill ends")
    assert isinstance(decided(executor("d"), tokens=5001), Decision)


def test_finished_prefills_that_wait_go_first() -> None:
    late = decided(executor("d"), handovers_waiting=1)
    assert late == Late("handovers wait for decode executors")


def test_late_without_an_executor_that_prefers_decoding() -> None:
    assert decided(executor("c", Role.COLOCATED)) == Late("no executor prefers decoding")
    assert isinstance(decided(), Late)


@given(
    st.lists(
        st.tuples(st.sampled_from(Role), st.integers(0, 1000), st.integers(0, 300), st.booleans()), max_size=5
    ),
    st.integers(1, 20_000),
    st.integers(0, 2),
)
def test_an_early_choice_is_the_one_that_would_be_made_late(
    executors: list[tuple[Role, int, int, bool]], tokens: int, waiting: int
) -> None:
    others = [
        executor(f"e{i}", role, kv_blocks_free=free, tasks=tasks, ready=ready)
        for i, (role, free, tasks, ready) in enumerate(executors)
    ]
    decision = decided(*others, tokens=tokens, handovers_waiting=waiting)
    if isinstance(decision, Late):
        assert decision.reason
        return
    request = RequestView("m@1", tokens, never=frozenset({"p"}))
    assert decision == decide_decode(ClusterView((PREFILL, *others)), request, POLICY)
    chosen = next(view for view in others if view.te_id == decision.te_id)
    assert chosen.role is Role.DECODE and chosen.ready and not waiting
    assert chosen.kv_blocks_free - tokens // 16 >= 0.25 * chosen.kv_blocks_total
