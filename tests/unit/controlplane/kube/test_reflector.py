"""Calls, errors, the reflector's place, the lease and Events, against an API server that keeps versions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from kubernetes.aio import client as kubernetes_client

from controlplane.kube import client, reflector
from controlplane.kube.client import Conflict, Gone, KubeApi, NotFound, Unavailable
from controlplane.kube.events import EventRecorder
from controlplane.kube.lease import LeaderElection, LeaseTimes
from controlplane.kube.reflector import Reflector, Store
from controlplane.kube.resources import EVENTS, LEASES, MODEL_SERVINGS, PODS, Json, newer
from tests.support.kube_api import Fault, KubeApiServer, kube_api


@pytest.fixture
async def server() -> AsyncIterator[KubeApiServer]:
    async with kube_api() as running:
        yield running


@pytest.fixture
async def api(server: KubeApiServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KubeApi]:
    monkeypatch.setattr(client, "RETRY_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(reflector, "BACKOFF_FIRST_SECONDS", 0.01)
    async with connect(server) as connected:
        yield connected


def connect(server: KubeApiServer) -> KubeApi:
    return KubeApi(kubernetes_client.Configuration(host=str(server.url).rstrip("/")))


def pod(name: str, **labels: str) -> Json:
    return {"metadata": {"namespace": "n", "name": name, "labels": labels}, "spec": {}}


@contextlib.asynccontextmanager
async def running(work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_store_follows_what_happens(api: KubeApi) -> None:
    store = Store(PODS, {"app": lambda o: [o["metadata"].get("labels", {}).get("app", "")]})
    await api.create(PODS, pod("a", app="x"), manager="t")
    follower = Reflector(api, store)
    async with running(follower.run):
        await asyncio.wait_for(follower.synced.wait(), 10)
        await api.create(PODS, pod("b", app="x"), manager="t")
        await until(lambda: len(store.by("app", "x")) == 2)
        await api.patch(PODS, "n", "a", {"metadata": {"labels": {"app": "y"}}}, manager="t")
        await until(lambda: len(store.by("app", "y")) == 1)
        assert len(store.by("app", "x")) == 1
        await api.delete(PODS, "n", "b")
        await until(lambda: len(store) == 1)
        assert store.by("app", "x") == []


async def test_a_dropped_watch_goes_on_without_a_list(api: KubeApi, server: KubeApiServer) -> None:
    store = Store(PODS)
    follower = Reflector(api, store)
    lists = client.metrics.LISTS.labels("pods", "gone")
    before = lists._value.get()
    async with running(follower.run):
        await asyncio.wait_for(follower.synced.wait(), 10)
        for number in range(5):
            server.drop_watches()
            await api.create(PODS, pod(f"p{number}"), manager="t")
        await until(lambda: len(store) == 5)
    assert lists._value.get() == before


async def test_after_410_the_difference_is_told(api: KubeApi, server: KubeApiServer) -> None:
    store = Store(PODS)
    gone: list[str] = []
    store.on_change(lambda old, new: gone.append(old["metadata"]["name"]) if old and not new else None)
    await api.create(PODS, pod("a"), manager="t")
    follower = Reflector(api, store)
    async with running(follower.run):
        await asyncio.wait_for(follower.synced.wait(), 10)
        for watcher in server.watchers:
            watcher.plural = "nothing"  # this watch hears no more
        await api.delete(PODS, "n", "a")
        await api.create(PODS, pod("b"), manager="t")
        server.compact()
        await until(lambda: gone == ["a"] and store.get(("n", "b")) is not None)


async def test_lists_come_in_pages(api: KubeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAGE_ITEMS", 3)
    for number in range(8):
        await api.create(PODS, pod(f"p{number}", even=str(number % 2)), manager="t")
    assert len((await api.list(PODS))[0]) == 8
    assert len((await api.list(PODS, "n", label_selector="even=0"))[0]) == 4


async def test_own_writes_are_in_the_store_at_once_and_never_go_back(api: KubeApi) -> None:
    store = Store(PODS)
    old = await api.create(PODS, pod("a"), manager="t")
    store.take("ADDED", old)
    new = await api.patch(PODS, "n", "a", {"metadata": {"labels": {"x": "1"}}}, manager="t")
    store.assume(new)
    store.take("MODIFIED", old)  # the watch is behind
    found = store.get(("n", "a"))
    assert found is not None and found["metadata"]["labels"] == {"x": "1"}
    store.forget(("n", "a"), new["metadata"]["uid"])
    store.take("MODIFIED", new)  # and still is
    assert store.get(("n", "a")) is None


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_refusals_that_pass_are_repeated(api: KubeApi, server: KubeApiServer, status: int) -> None:
    await api.create(PODS, pod("a"), manager="t")
    server.faults.append(Fault(status, times=2))
    assert (await api.get(PODS, "n", "a"))["metadata"]["name"] == "a"
    server.faults.append(Fault(status, times=client.RETRIES))
    with pytest.raises(Unavailable):
        await api.get(PODS, "n", "a")


async def test_errors_are_typed(api: KubeApi, server: KubeApiServer) -> None:
    with pytest.raises(NotFound):
        await api.get(PODS, "n", "none")
    created = await api.create(PODS, pod("a"), manager="t")
    with pytest.raises(Conflict):
        await api.create(PODS, pod("a"), manager="t")
    with pytest.raises(Conflict):
        await api.delete(PODS, "n", "a", uid="another")
    await api.patch(PODS, "n", "a", {"metadata": {"labels": {"x": "1"}}}, manager="t")
    version = created["metadata"]["resourceVersion"]
    stale = {"metadata": {"resourceVersion": version, "labels": {"y": "1"}}}
    with pytest.raises(Conflict):
        await api.patch(PODS, "n", "a", stale, manager="t")
    server.compact()
    with pytest.raises(Gone):
        async for _ in api.watch(PODS, version="1"):
            pass


async def test_who_applies_a_field_owns_it(api: KubeApi) -> None:
    body = {"metadata": {"namespace": "n", "name": "a"}, "spec": {"x": 1}}
    await api.apply(MODEL_SERVINGS, body, manager="one")
    with pytest.raises(Conflict):
        await api.apply(MODEL_SERVINGS, {**body, "spec": {"x": 2}}, manager="two")
    forced = await api.apply(MODEL_SERVINGS, {**body, "spec": {"x": 2}}, manager="two", force=True)
    assert forced["spec"] == {"x": 2}
    writes = api.writes
    again = await api.apply(MODEL_SERVINGS, {**body, "spec": {"x": 2}}, manager="two")
    assert again["metadata"]["resourceVersion"] == forced["metadata"]["resourceVersion"]
    assert api.writes == writes + 1


async def test_one_leads_and_the_next_takes_over(api: KubeApi, server: KubeApiServer) -> None:
    times = LeaseTimes(duration=1.0, deadline=0.6, retry=0.05)
    leading: list[str] = []

    async def lead(name: str) -> None:
        leading.append(name)
        await asyncio.sleep(3600)

    elections = [LeaderElection(api, "n", "lease", name, times=times) for name in ("a", "b")]
    tasks = [
        asyncio.create_task(e.run(lambda e=e: lead(e.identity)))  # type: ignore[misc]  # bound early
        for e in elections
    ]
    await until(lambda: len(leading) == 1)
    await asyncio.sleep(0.5)
    assert leading == [next(e.identity for e in elections if e.leading)]
    first = next(i for i, e in enumerate(elections) if e.leading)
    tasks[first].cancel()  # releases: the other need not wait for the lease to lapse
    await until(lambda: len(leading) == 2)
    assert leading[0] != leading[1]
    lease = await api.get(LEASES, "n", "lease")
    assert lease["spec"]["holderIdentity"] == leading[1] and lease["spec"]["leaseTransitions"] >= 1
    tasks[1 - first].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_leader_that_cannot_renew_stops_before_others_begin(
    api: KubeApi, server: KubeApiServer
) -> None:
    times = LeaseTimes(duration=2.0, deadline=0.3, retry=0.05)
    election = LeaderElection(api, "n", "lease", "a", times=times)
    stopped = asyncio.Event()

    async def lead() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            stopped.set()

    task = asyncio.create_task(election.run(lead))
    await until(lambda: election.leading)
    server.faults.append(Fault(403, times=10_000, plural="leases"))
    await asyncio.wait_for(stopped.wait(), 10)
    assert (await asyncio.gather(task, return_exceptions=True)) == [None]


async def test_the_same_event_is_written_once(api: KubeApi) -> None:
    target = await api.create(PODS, pod("a"), manager="t")
    recorder = EventRecorder(api, "deepflow.dev/operator", "op-1")
    async with running(recorder.run):
        for _ in range(50):
            recorder.record(target, "Pod", "v1", "Claimed", "claimed by x")
        recorder.record(target, "Pod", "v1", "LoadFailed", "no such file", warning=True)
        await until(lambda: api.writes == 3)
        await asyncio.sleep(0.05)
    items, _ = await api.list(EVENTS)
    assert sorted(item["reason"] for item in items) == ["Claimed", "LoadFailed"]


def test_versions_are_ordered_as_numbers() -> None:
    assert newer("10", "9") and not newer("9", "10") and not newer("9", "9")
