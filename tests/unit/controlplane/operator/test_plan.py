"""Properties of the planners: from any state, with any failures on the way, plans converge, stay within
bounds, take away nothing that serves before its replacement does, and want nothing once they are met."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.api.resources.modelserving import Role
from controlplane.api.resources.names import PodState
from controlplane.operator.plan import plan_pool, plan_serving
from controlplane.operator.plan.claim import Want, claimable, fastest, share
from controlplane.operator.plan.values import (
    Assign,
    Claim,
    Create,
    Delete,
    DrainTe,
    Load,
    Mark,
    Plan,
    Pod,
    Pool,
    PushRole,
    Serving,
    SleepTe,
    Te,
    TeState,
    WakePod,
)

HASH, TEMPLATE = "load-1", "template-1"
TEMPLATES = frozenset({TEMPLATE})
STEP = 5.0
ROUNDS = 400

roles = st.sampled_from(list(Role))
te_states = st.sampled_from(list(TeState))
counts = st.dictionaries(roles, st.integers(0, 3))


@st.composite
def tes(draw: st.DrawFn) -> Te | None:
    if draw(st.integers(0, 4)) == 0:
        return None
    state = draw(te_states)
    silent = draw(st.sampled_from([0.0, 900.0, 999.0])) if state is TeState.UNREACHABLE else None
    return Te(
        state,
        role=draw(roles),
        epoch=draw(st.integers(0, 5)),
        revision="m@1" if state in (TeState.READY, TeState.LOADING) else "",
        tasks=draw(st.integers(0, 2)),
        hung=draw(st.integers(0, 9)) == 0,
        silent_since=silent,
    )


@st.composite
def pods(draw: st.DrawFn) -> list[Pod]:
    made = []
    for number in range(draw(st.integers(0, 7))):
        state = draw(
            st.sampled_from(
                [PodState.CLAIMED, PodState.SERVING, PodState.SERVING, PodState.ASLEEP, PodState.DRAINING]
            )
        )
        made.append(
            Pod(
                key=("n", f"p{number}"),
                uid=f"u{number}",
                version="1",
                state=state,
                pool="pool",
                serving_uid=draw(st.sampled_from(["s", "s", "s", "old"])),
                role=draw(roles),
                epoch=draw(st.integers(0, 3)),
                load_hash=draw(st.sampled_from([HASH, HASH, "load-0"])),
                template_hash=draw(st.sampled_from([TEMPLATE, TEMPLATE, "template-0"])),
                created=0.0,
                claimed_at=draw(st.sampled_from([0.0, 990.0])),
                drain_since=990.0 if state is PodState.DRAINING else None,
                asleep_since=990.0 if state is PodState.ASLEEP else None,
                ended=draw(st.integers(0, 9)) == 0,
                ready=draw(st.booleans()),
                te=draw(tes()),
            )
        )
    return made


@dataclass
class Sim:
    """A cluster of one ModelServing and one pool, that does what plans say, and some of it not."""

    serving: Serving
    pool: Pool
    pods: dict[str, Pod]
    now: float = 1000.0
    ids: itertools.count = field(default_factory=lambda: itertools.count(100))  # type: ignore[type-arg]

    def all(self) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.state is not PodState.WARM]

    def warm(self) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.state is PodState.WARM]

    def plan(self) -> Plan:
        free = claimable(self.warm())
        return plan_serving(
            self.serving, self.all(), free, self.now, may_claim=len(free), template_hashes=TEMPLATES
        )

    def turn(self, lost: set[int] = frozenset()) -> Plan:  # type: ignore[assignment]
        """One turn of both controllers; actions whose number is in `lost` do not happen."""
        plan = self.plan()
        for number, action in enumerate(plan.actions):
            if number not in lost:
                self.act(action)
        self.pool = replace(self.pool, missing=plan.missing)
        for action in plan_pool(self.pool, list(self.pods.values()), self.now).actions:
            self.act(action)
        self.world()
        return plan

    def act(self, action: object) -> None:
        match action:
            case Create(count):
                for _ in range(count):
                    number = next(self.ids)
                    self.pods[f"u{number}"] = Pod(
                        ("n", f"p{number}"), f"u{number}", "1", PodState.WARM, pool="pool",
                        template_hash=self.pool.template_hash, created=self.now,
                    )  # fmt: skip
            case Claim(pod, role, epoch):
                assert self.pods[pod.uid].state is PodState.WARM
                self.put(pod, state=PodState.CLAIMED, role=role, epoch=epoch, te=Te(TeState.WARM))
                self.put(pod, serving_uid="s", load_hash=HASH, claimed_at=self.now)
            case Assign(pod, role, epoch):
                assert epoch > pod.epoch
                self.put(pod, role=role, epoch=epoch)
                self.tell(pod, role=role, epoch=epoch)
            case PushRole(pod, role, epoch):
                self.tell(pod, role=role, epoch=epoch)
            case Load(pod):
                te = self.pods[pod.uid].te
                if te is not None and te.state in (TeState.WARM, TeState.SLEEPING):
                    self.tell(pod, state=TeState.LOADING)
            case SleepTe(pod):
                te = self.pods[pod.uid].te
                if te is not None and te.state is TeState.READY and not te.tasks:
                    self.tell(pod, state=TeState.SLEEPING, revision="")
            case WakePod(pod, role, epoch):
                assert self.pods[pod.uid].state is PodState.ASLEEP and epoch > pod.epoch
                self.put(pod, state=PodState.CLAIMED, role=role, epoch=epoch, claimed_at=self.now)
                self.tell(pod, role=role, epoch=epoch)
            case Mark(pod, state, _, revision):
                since = self.now if state is PodState.DRAINING else None
                slept = self.now if state is PodState.ASLEEP else None
                self.put(pod, state=state, drain_since=since, asleep_since=slept)
                assert state is not PodState.SERVING or revision
            case DrainTe(pod):
                te = self.pods[pod.uid].te
                if te is None or te.state is not TeState.UNREACHABLE:
                    self.tell(pod, state=TeState.DRAINING)
            case Delete(pod):
                del self.pods[pod.uid]

    def put(self, pod: Pod, **changes: object) -> None:
        self.pods[pod.uid] = replace(self.pods[pod.uid], **changes)  # type: ignore[arg-type]

    def tell(self, pod: Pod, **changes: object) -> None:
        te = self.pods[pod.uid].te or Te(TeState.WARM)
        if te.state is not TeState.UNREACHABLE:
            self.put(pod, te=replace(te, **changes))  # type: ignore[arg-type]

    def world(self) -> None:
        """What happens by itself."""
        self.now += STEP
        for pod in list(self.pods.values()):
            te = pod.te
            if pod.state is PodState.WARM:
                self.put(pod, ready=True)
            elif te is None and not pod.ended:
                self.put(
                    pod,
                    te=Te(TeState.WARM if pod.state is PodState.CLAIMED else TeState.READY, revision="m@1"),
                )
            elif te is not None and te.state is TeState.LOADING:
                self.put(pod, te=replace(te, state=TeState.READY, revision="m@1"))
            elif te is not None and te.tasks and te.state is TeState.DRAINING:
                self.put(pod, te=replace(te, tasks=te.tasks - 1))

    def met(self) -> bool:
        have = dict.fromkeys(Role, 0)
        for pod in self.all():
            if not pod.serves or pod.role is None:
                return False
            have[pod.role] += 1
        return have == {role: self.serving.want.get(role, 0) for role in Role}


def sim(
    found: list[Pod],
    want: dict[Role, int],
    *,
    deleting: bool = False,
    sleep_seconds: float = 0.0,
    crowded: bool = False,
) -> Sim:
    serving = Serving(
        ("n", "m"), "s", want, HASH, drain_seconds=30.0, deleting=deleting,
        sleep_seconds=sleep_seconds, crowded=crowded,
    )  # fmt: skip
    pool = Pool(("n", "pool"), "pool", 1, 40, TEMPLATE)
    return Sim(serving, pool, {pod.uid: pod for pod in found})


sleeps = st.sampled_from([0.0, 60.0])
losses = st.lists(st.sets(st.integers(0, 12), max_size=6), max_size=8)


@settings(max_examples=75, deadline=None)
@given(pods(), counts, losses, sleeps)
def test_plans_converge_and_then_want_nothing(
    found: list[Pod], want: dict[Role, int], lost: list[set[int]], sleep_seconds: float
) -> None:
    world = sim(found, want, sleep_seconds=sleep_seconds)
    for losing in lost:
        world.turn(losing)
    for _ in range(ROUNDS):
        plan = world.turn()
        if world.met() and plan.again_after is None:
            break
    assert world.met(), (world.serving.want, world.all())
    assert world.plan().actions == () and world.plan().again_after is None
    assert len(world.warm()) == world.pool.size


@pytest.mark.parametrize("state", list(TeState))
def test_only_while_every_executor_answers_and_serves_nobody_looks_again(state: TeState) -> None:
    serving = Serving(("n", "m"), "s", {Role.COLOCATED: 1}, HASH)
    now = 1000.0
    te = Te(
        state,
        role=Role.COLOCATED,
        epoch=1,
        revision="m@1",
        silent_since=now if state is TeState.UNREACHABLE else None,
    )
    pod = Pod(
        ("n", "p"),
        "u",
        "1",
        PodState.SERVING,
        serving_uid="s",
        role=Role.COLOCATED,
        epoch=1,
        load_hash=HASH,
        ready=True,
        te=te,
    )
    plan = plan_serving(serving, [pod], (), now, may_claim=0)
    assert (plan.again_after is None) == (state is TeState.READY)


moments = st.floats(0.0, 4000.0)


@settings(max_examples=300, deadline=None)
@given(pods(), counts, st.booleans(), moments, sleeps)
def test_what_time_alone_will_bring_has_a_look_of_its_own(
    found: list[Pod], want: dict[Role, int], deleting: bool, later: float, sleep_seconds: float
) -> None:
    serving = Serving(
        key=("n", "s"), uid="s", want=want, load_hash=HASH, deleting=deleting, sleep_seconds=sleep_seconds
    )
    now, then = (
        plan_serving(serving, found, (), 1000.0 + moment, may_claim=0, template_hashes=TEMPLATES)
        for moment in (0.0, later)
    )
    assert now.again_after is not None or (now.actions, now.counts) == (then.actions, then.counts)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.floats(0.0, 50.0), moments)
def test_a_pool_that_waits_looks_again_when_it_may(size: int, there: int, hold: float, later: float) -> None:
    pool = Pool(("n", "p"), "p", size=size, max_pods=9, template_hash=TEMPLATE, hold_until=1000.0 + hold)
    found = [Pod(("n", f"p{n}"), f"u{n}", "1", PodState.WARM, template_hash=TEMPLATE) for n in range(there)]
    now, then = (plan_pool(pool, found, 1000.0 + moment) for moment in (0.0, later))
    if now.actions != then.actions:
        assert now.again_after is not None and now.again_after <= hold + 1e-6


@settings(max_examples=75, deadline=None)
@given(pods(), counts, losses, sleeps)
def test_what_serves_goes_only_once_enough_others_do(
    found: list[Pod], want: dict[Role, int], lost: list[set[int]], sleep_seconds: float
) -> None:
    world = sim(found, want, sleep_seconds=sleep_seconds)
    total = sum(want.values())
    for losing in [*lost, *[set()] * 40]:
        plan = world.plan()
        doomed = {
            a.pod.uid
            for a in plan.actions
            if (isinstance(a, Mark) and a.state is not PodState.SERVING)
            or (isinstance(a, Delete) and a.pod.state is not PodState.DRAINING)
        }
        # An executor that is dead or lost its model serves nobody, whatever its label says.
        dead = {
            p.uid for p in world.all() if p.ended or (p.te and (p.te.hung or p.te.state is TeState.FAILED))
        }
        ours = {p.uid for p in world.all() if p.serves and p.serving_uid == world.serving.uid} - dead
        dead |= {
            p.uid  # silent to us, and its kubelet does not call it ready either
            for p in world.all()
            if p.te is not None and p.te.state is TeState.UNREACHABLE and not p.ready
        }
        taken = len(ours & doomed - dead)
        assert not taken or len(ours) - taken >= total
        world.turn(losing)


@settings(max_examples=50, deadline=None)
@given(pods(), counts, losses, sleeps)
def test_executors_never_exceed_the_wanted_by_more_than_the_surge(
    found: list[Pod], want: dict[Role, int], lost: list[set[int]], sleep_seconds: float
) -> None:
    world = sim(found, want, sleep_seconds=sleep_seconds)
    for losing in [*lost, *[set()] * 20]:
        active = [p for p in world.all() if p.state is not PodState.DRAINING and p.serving_uid == "s"]
        claimed = sum(isinstance(action, Claim) for action in world.plan().actions)
        if claimed:
            kept = sum(not p.ended for p in active)
            assert claimed <= sum(want.values()) and (
                claimed + kept <= max(sum(want.values()), kept) + len(Role) + sum(want.values())
            )
            good = [p for p in active if p.load_hash == HASH and p.template_hash == TEMPLATE and not p.ended]
            for role in Role:
                mine = sum(p.role is role for p in good)
                more = sum(isinstance(a, Claim) and a.role is role for a in world.plan().actions)
                assert more == 0 or mine + more <= want.get(role, 0) + len(good)
        assert len(world.pods) <= world.pool.max_pods
        world.turn(losing)


def serving_pods(count: int, role: Role = Role.COLOCATED) -> list[Pod]:
    return [
        Pod(
            ("n", f"p{n}"), f"u{n}", "1", PodState.SERVING, pool="pool", serving_uid="s", role=role, epoch=1,
            load_hash=HASH, template_hash=TEMPLATE, ready=True,
            te=Te(TeState.READY, role=role, epoch=1, revision="m@1"),
        )
        for n in range(count)
    ]  # fmt: skip


def test_what_is_not_needed_sleeps_is_woken_before_a_claim_and_given_back_in_time() -> None:
    world = sim(serving_pods(3), {Role.COLOCATED: 0}, sleep_seconds=60.0)
    for _ in range(3):
        plan = world.turn()
        assert not any(isinstance(action, DrainTe | Delete) for action in plan.actions)
    assert plan.asleep[Role.COLOCATED] == 3 and plan.counts[Role.COLOCATED] == (0, 0, 0)
    assert all(pod.te is not None and pod.te.state is TeState.SLEEPING for pod in world.all())
    assert plan.actions == () and 0 < (plan.again_after or 0) <= 10
    world.serving = replace(world.serving, want={Role.PREFILL: 1, Role.DECODE: 1})
    plan = world.turn()
    assert [action.role for action in plan.actions if isinstance(action, WakePod)] == [
        Role.PREFILL,
        Role.DECODE,
    ]
    assert not any(isinstance(action, Claim) for action in plan.actions)
    for _ in range(4):
        plan = world.turn()
    assert plan.counts[Role.PREFILL][0] == plan.counts[Role.DECODE][0] == 1
    assert sum(plan.asleep.values()) == 1  # the third sleeps on, until its time is over
    for _ in range(20):
        plan = world.turn()
    assert not sum(plan.asleep.values()) and world.met() and plan.again_after is None


def test_a_sleeper_goes_where_others_lack_executors() -> None:
    world = sim(serving_pods(1), {Role.COLOCATED: 0}, sleep_seconds=3600.0)
    for _ in range(3):
        world.turn()
    assert world.all()[0].state is PodState.ASLEEP
    world.serving = replace(world.serving, crowded=True)
    for _ in range(4):
        world.turn()
    assert world.all() == []
    world = sim(serving_pods(1), {Role.COLOCATED: 0}, sleep_seconds=3600.0, crowded=True)
    assert [a.state for a in world.turn().actions if isinstance(a, Mark)] == [PodState.DRAINING]


def test_an_executor_with_tasks_is_asked_again_and_serves_meanwhile() -> None:
    busy = [replace(pod, te=replace(pod.te, tasks=2)) for pod in serving_pods(1) if pod.te is not None]
    world = sim(busy, {Role.COLOCATED: 0}, sleep_seconds=60.0)
    for _ in range(3):
        plan = world.turn()
    assert [type(action) for action in plan.actions] == [SleepTe] and plan.again_after == STEP


def test_an_executor_that_others_put_to_sleep_is_loaded_again() -> None:
    asleep = [replace(pod, te=Te(TeState.SLEEPING, Role.COLOCATED, 1)) for pod in serving_pods(1)]
    world = sim(asleep, {Role.COLOCATED: 1})
    assert {type(action) for action in world.turn().actions} == {Mark, Load}
    for _ in range(3):
        plan = world.turn()
    assert world.met() and plan.again_after is None


@settings(max_examples=60, deadline=None)
@given(pods(), losses, sleeps)
def test_deleting_ends_every_executor(found: list[Pod], lost: list[set[int]], sleep_seconds: float) -> None:
    world = sim(found, {Role.COLOCATED: 3}, deleting=True, sleep_seconds=sleep_seconds)
    for losing in [*lost, *[set()] * ROUNDS]:
        assert not any(isinstance(action, Claim) for action in world.plan().actions)
        world.turn(losing)
        if not world.all():
            return
    assert not world.all()


@settings(max_examples=50, deadline=None)
@given(pods(), counts)
def test_a_plan_is_a_function_of_what_is_there(found: list[Pod], want: dict[Role, int]) -> None:
    world = sim(found, want)
    assert world.plan() == world.plan()
    shuffled = replace_order(world)
    ours = sorted(map(repr, world.plan().actions))
    assert ours == sorted(map(repr, shuffled.plan().actions))


def replace_order(world: Sim) -> Sim:
    return Sim(world.serving, world.pool, dict(reversed(world.pods.items())))


@settings(max_examples=75, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([TEMPLATE, "old"])), max_size=12),
    st.integers(0, 6),
    st.integers(0, 4),
    st.integers(1, 12),
    st.integers(0, 5),
)
def test_a_pool_converges_within_its_bounds(
    warm: list[tuple[bool, bool, str]], size: int, missing: int, max_pods: int, claimed: int
) -> None:
    pool = Pool(("n", "pool"), "pool", min(size, max_pods), max_pods, TEMPLATE, missing=missing)
    found = {
        f"w{i}": Pod(
            ("n", f"w{i}"), f"w{i}", "1", PodState.WARM, ready=ready, ended=ended, template_hash=template
        )
        for i, (ready, ended, template) in enumerate(warm)
    }
    for number in range(claimed):
        found[f"c{number}"] = Pod(("n", f"c{number}"), f"c{number}", "1", PodState.SERVING)
    ids = itertools.count()
    start = len(found)
    for _ in range(60):
        plan = plan_pool(pool, list(found.values()), 0.0)
        ready = sum(p.ready and not p.ended for p in found.values() if p.state is PodState.WARM)
        for action in plan.actions:
            if isinstance(action, Create):
                for _ in range(action.count):
                    name = f"n{next(ids)}"
                    found[name] = Pod(("n", name), name, "1", PodState.WARM, template_hash=TEMPLATE)
            elif isinstance(action, Delete):
                assert action.pod.state is PodState.WARM and action.unchanged
                del found[action.pod.uid]
        assert len(found) <= max(start, max_pods)
        room = max(0, max_pods - claimed)
        want = min(pool.size + missing, room)
        left = sum(p.ready and not p.ended for p in found.values() if p.state is PodState.WARM)
        assert left >= min(ready, want) - 1
        if not plan.actions:
            break
        found = {uid: replace(pod, ready=True) for uid, pod in found.items()}
    assert plan.actions == ()
    mine = [pod for pod in found.values() if pod.state is PodState.WARM]
    assert len(mine) == want and all(pod.template_hash == TEMPLATE for pod in mine)


@given(
    st.integers(0, 10),
    st.lists(st.tuples(st.integers(-2, 2), st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=6),
)
def test_warm_pods_are_shared_once_and_by_priority(free: int, wants: list[tuple[int, int, int]]) -> None:
    everyone = [
        Want(("n", f"m{number}"), priority, missing, float(since))
        for number, (priority, missing, since) in enumerate(wants)
    ]
    given = {want.key: share(free, want, everyone) for want in everyone}
    assert sum(given.values()) <= free or sum(want.missing for want in everyone) <= free
    assert sum(given.values()) == min(free, sum(want.missing for want in everyone))
    for want in everyone:
        if given[want.key] < want.missing:
            assert all(given[o.key] == 0 for o in everyone if o.priority < want.priority)


def test_pods_that_have_the_file_are_claimed_before_older_ones() -> None:
    pods = [
        Pod(("n", f"p{number}"), f"u{number}", "1", PodState.WARM, created=float(number), ready=True)
        for number in range(4)
    ]
    has = {(pods[2].uid, "file:///m"), (pods[0].uid, "file:///other")}
    ordered = fastest(claimable(pods), "file:///m", has)
    assert [pod.key[1] for pod in ordered] == ["p2", "p0", "p1", "p3"]
    ordered = fastest(claimable(pods), "file:///m", {(pods[3].uid, "file:///m")}, has)
    assert [pod.key[1] for pod in ordered] == ["p3", "p2", "p0", "p1"]
