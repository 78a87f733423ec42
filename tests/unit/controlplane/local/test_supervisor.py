"""The supervisor with real processes: a real Valkey; shell and gateway are stand-ins (tests/fakes/stack)."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis

from controlplane.local import scaling
from controlplane.local import supervisor as supervisor_module
from controlplane.local.control import ask
from controlplane.local.errors import AlreadyRunning, NotRunning, StackError
from controlplane.local.listener import bind
from controlplane.local.settings import ModelSpec, StackSettings, StatePaths
from controlplane.local.supervisor import Supervisor
from controlplane.local.topology import parse_topology

pytestmark = pytest.mark.model

FAKES = Path(__file__).parents[3] / "fakes" / "stack"


def _free_port() -> int:
    listener = bind("127.0.0.1", 0)
    with listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def settings(small_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StackSettings:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(FAKES), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.delenv("DEEPFLOW_CLUSTER_TOKEN", raising=False)
    spec = ModelSpec(f"file://{small_model_path}", "small", parse_topology("1P1D"))
    return StackSettings(
        state_dir=tmp_path / "state", models=(spec,), port=_free_port(), threads=1, start_timeout=60.0
    )


async def _until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    async with asyncio.timeout(seconds):
        while not (value := condition()):
            await asyncio.sleep(0.02)
        return value


@asynccontextmanager
async def _up(settings: StackSettings) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(settings)
    task = asyncio.create_task(supervisor.run())
    try:
        await _until(lambda: task.done() or supervisor.state == "ready", 60.0)
        if task.done():
            task.result()
        yield supervisor
    finally:
        supervisor.request_stop("test")
        await asyncio.wait({task}, timeout=60)
    task.result()


def _pid(supervisor: Supervisor, name: str) -> int | None:
    pids = {child["name"]: child["pid"] for child in supervisor.describe()["children"]}
    return pids[name]  # type: ignore[no-any-return]  # from a JSON-like description


def _roles(supervisor: Supervisor) -> dict[str, tuple[str, int]]:
    return {e["te_id"]: (e["role"], e["role_epoch"]) for e in supervisor.describe()["executors"]}


async def test_a_stack_starts_heals_and_ends_without_a_trace(settings: StackSettings) -> None:
    paths = StatePaths(settings.state_dir)
    async with _up(settings) as supervisor, httpx.AsyncClient(trust_env=False, timeout=20) as client:
        status = await asyncio.to_thread(ask, paths.control, {"command": "status"})
        assert status["state"] == "ready"
        assert [e["role"] for e in status["executors"]] == ["prefill", "decode"]
        assert status["models"][0]["revision"].startswith("small@b179c9523d0e")
        processes = [psutil.Process(child["pid"]) for child in status["children"]]
        assert len(processes) == 5  # with the template
        before = _roles(supervisor)

        # An executor that is killed comes back with its model and its role.
        victim = _pid(supervisor, "te-1")
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        await _until(lambda: supervisor.describe()["state"] == "degraded")
        await _until(lambda: supervisor.describe()["state"] == "ready")
        assert _pid(supervisor, "te-1") != victim
        assert _roles(supervisor) == before

        # Roles change live, under a higher epoch.
        answer = await asyncio.to_thread(
            ask, paths.control, {"command": "role", "te": "te-0", "role": "colocated"}
        )
        assert answer["epoch"] > max(epoch for _, epoch in before.values())
        await _until(lambda: _live_role(supervisor, "te-0") == (1, answer["epoch"]))
        with pytest.raises(ValueError, match="no executor 'te-9'"):
            await asyncio.to_thread(ask, paths.control, {"command": "role", "te": "te-9", "role": "decode"})
        with pytest.raises(ValueError, match="no role 'boss'"):
            await asyncio.to_thread(ask, paths.control, {"command": "role", "te": "te-0", "role": "boss"})

        # While a gateway restarts, connections wait: nobody is refused.
        victim = _pid(supervisor, "gw-0")
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        answers = await asyncio.gather(*(client.get(f"{settings.url}/readyz") for _ in range(5)))
        assert {response.status_code for response in answers} == {200}
        assert answers[0].json()["pid"] != victim

        # Valkey comes back with its data.
        with redis.Redis.from_url(status["redis_url"]) as database:
            database.set("kept", "yes")
            await asyncio.sleep(1.2)  # appendfsync everysec
        victim = _pid(supervisor, "valkey")
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        await _until(lambda: _pid(supervisor, "valkey") not in (None, victim))
        with redis.Redis.from_url(status["redis_url"]) as database:
            assert await _until(lambda: _get(database, "kept")) == b"yes"

        metrics = (await client.get(status["metrics_url"])).text
        assert 'deepflow_local_child_restarts_total{child="te-1"}' in metrics
        processes += [psutil.Process(child["pid"]) for child in supervisor.describe()["children"]]

    assert not [process for process in processes if process.is_running()]
    left = {path.name for path in settings.state_dir.iterdir()}
    assert left == {"valkey", "logs", "supervisor.lock", "cluster-token", "role-epoch"}
    with pytest.raises(NotRunning):
        ask(paths.control, {"command": "status"})


def _live_role(supervisor: Supervisor, te_id: str) -> tuple[int, int] | None:
    status = supervisor._executors[te_id].status
    return (status.load.role, status.load.role_epoch) if status is not None else None


def _get(database: redis.Redis, key: str) -> object:
    try:
        return database.get(key)
    except redis.RedisError:
        return None


async def test_a_second_supervisor_of_one_state_folder_is_refused(settings: StackSettings) -> None:
    async with _up(settings):
        with pytest.raises(AlreadyRunning):
            await Supervisor(settings).run()


async def test_a_busy_port_is_named(settings: StackSettings) -> None:
    owner = rf"port {settings.port} on 127.0.0.1 is in use by .*pid {os.getpid()}"
    with bind("127.0.0.1", settings.port), pytest.raises(StackError, match=owner):
        await Supervisor(settings).run()


async def test_an_executor_that_cannot_start_ends_the_start_with_its_log(
    settings: StackSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SHELL", "crash")
    with pytest.raises(StackError, match=r"(?s)te-[01] exited with code 1.*no such device") as caught:
        await Supervisor(settings).run()
    assert "3 times" in str(caught.value)
    assert not StatePaths(settings.state_dir).run.exists()


async def test_a_model_that_no_executor_can_load_ends_the_start(
    settings: StackSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SHELL", "unsupported")
    with pytest.raises(StackError, match=r"te-[01] cannot load small: architecture 'x' is not supported"):
        await Supervisor(settings).run()


async def test_a_stop_during_the_start_ends_everything(settings: StackSettings) -> None:
    supervisor = Supervisor(settings)
    task = asyncio.create_task(supervisor.run())
    await _until(lambda: len(supervisor.describe()["children"]) > 1)
    os.kill(os.getpid(), signal.SIGTERM)  # as Ctrl-C or a service manager would
    await asyncio.wait_for(task, 30)
    assert all(child["pid"] is None for child in supervisor.describe()["children"])


async def test_a_redis_that_does_not_answer_is_named(settings: StackSettings) -> None:
    from dataclasses import replace

    with pytest.raises(StackError, match="REDIS_URL does not answer"):
        await Supervisor(replace(settings, redis_url="redis://127.0.0.1:9/0")).run()


async def test_deep_state_folders_work(settings: StackSettings, tmp_path: Path) -> None:
    from dataclasses import replace

    deep = replace(settings, state_dir=tmp_path / ("d" * 100))
    async with _up(deep):
        sockets = StatePaths(deep.state_dir).sockets
        assert str(sockets).startswith(tempfile.gettempdir())
    assert not sockets.exists()


async def test_executors_come_and_go_with_the_load(
    settings: StackSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "STABLE_SECONDS", 2.0)
    monkeypatch.setattr(scaling, "DOWN_SECONDS", 2.0)
    monkeypatch.setattr(supervisor_module, "SCALE_SECONDS", 0.3)
    tasks = tmp_path / "tasks"
    monkeypatch.setenv("FAKE_SHELL_TASKS", str(tasks))
    async with _up(dataclasses.replace(settings, autoscale=2)) as supervisor:

        def roles() -> list[str]:
            return sorted(e["role"] for e in supervisor.describe()["executors"] if e["ready"])

        await asyncio.sleep(1.0)
        assert roles() == ["decode", "prefill"]
        tasks.write_text("3")
        await _until(lambda: roles() == ["decode", "prefill", "prefill"])  # nobody decodes much
        assert supervisor.describe()["state"] == "ready"
        await asyncio.sleep(1.0)
        assert roles() == ["decode", "prefill", "prefill"]  # two are the most
        processes = [psutil.Process(child["pid"]) for child in supervisor.describe()["children"]]
        tasks.write_text("0")
        await _until(lambda: len(supervisor.describe()["executors"]) == 2)
        assert roles() == ["decode", "prefill"] and supervisor.describe()["state"] == "ready"
        assert sum(not process.is_running() for process in processes) == 1
