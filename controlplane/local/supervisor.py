"""The supervisor: one asyncio process that starts the stack, keeps it whole and ends it in order.

Start: lock, port, Valkey, the template process, executors (warm) beside the models' download, catalogue,
gateways, models and roles, then `/readyz` for every model. End: gateways, executors, template, Valkey,
each with a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import httpx
from prometheus_client import start_http_server

from controlplane.local import commands, control, metrics, valkey
from controlplane.local.children import Child, ChildSpec
from controlplane.local.errors import StackError
from controlplane.local.executors import (
    POLL_CONTROLLED_SECONDS,
    POLL_READY_SECONDS,
    Executor,
    ModelTarget,
    RoleEpochs,
)
from controlplane.local.leftovers import clear, state_lock
from controlplane.local.listener import bind
from controlplane.local.processes import own_record
from controlplane.local.rolecontrol import CYCLE_SECONDS, RoleControl
from controlplane.local.scaling import SCALE_SECONDS, LocalScaling
from controlplane.local.settings import (
    ModelSpec,
    StackSettings,
    StatePaths,
    cores,
    threads_per_executor,
    write_atomically,
)
from controlplane.local.template import Orphans, Template, subreaper, supported
from controlplane.local.topology import RoleName
from controlplane.nodeagent.errors import SourceError
from controlplane.nodeagent.sources import FetchedModel, fetch

log = logging.getLogger("deepflow.local")

T = TypeVar("T")

WRITE_SECONDS = 0.2  # the status file is written at most so often
HOUSEKEEPING_SECONDS = 5.0
PROBE_SECONDS = 0.2
PROBE_TIMEOUT_SECONDS = 15.0
VALKEY_START_SECONDS = 120.0  # a large append-only file is read first
# A child that ended this often before the stack was ready will not make it: say so instead of trying on.
START_ATTEMPTS = 3
STEPS_KEPT = 100


class Supervisor:
    """One stack. `await run()` returns after an ordered stop; StackError if it could not start."""

    def __init__(self, settings: StackSettings, report: Callable[[str], None] = lambda _: None) -> None:
        self.settings = settings
        self.paths = StatePaths(settings.state_dir)
        self.state = "starting"  # | "ready" | "degraded" | "stopping"
        self._report = report
        self._children: list[Child] = []
        self._forks = settings.template and settings.device == "cpu" and supported()
        self._template: Template | None = None
        self._orphans = Orphans()
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._executors: dict[str, Executor] = {}
        self._number = 0  # of the next executor: a name never comes again
        self._roles: RoleControl | None = None
        self._scaling: LocalScaling | None = None
        self._revisions: dict[str, str] = {}
        self._steps: deque[str] = deque(maxlen=STEPS_KEPT)
        self._started = time.time()
        self._own = own_record()
        self._dirty = asyncio.Event()
        self._stop = asyncio.Event()
        self._failure: StackError | None = None
        self._redis_url = ""
        self._metrics_url = ""

    async def run(self) -> None:
        self.paths.prepare()
        with state_lock(self.paths), contextlib.ExitStack() as stack:
            self._clear_leftovers()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.request_stop, number.name)
                stack.callback(loop.remove_signal_handler, number)
            if self._forks:
                stack.enter_context(subreaper())
            listener = stack.enter_context(bind(self.settings.host, self.settings.port))
            stack.callback(clear, self.paths, grace=0.0)
            server = await control.serve(self.paths.control, self._command)
            self._metrics_url = _serve_metrics(stack)
            self._own_task(self._write_status(), "status-file")
            try:
                await self._until_stop(self._start(listener))
                if not self._stop.is_set():
                    self.state = "ready"
                    self._step("ready")
                    self._own_task(self._housekeeping(), "housekeeping")
                    if self._roles is not None:
                        self._own_task(self._control_roles(self._roles), "role-control")
                    if self._scaling is not None:
                        self._own_task(self._scale(self._scaling), "scaling")
                    await self._stop.wait()
            finally:
                await self._shutdown()
                server.close()
        if self._failure is not None:
            raise self._failure

    def request_stop(self, why: str) -> None:
        """Ends the stack in order; asked again while that goes on, at once."""
        if self._stop.is_set():
            for child in self._children:
                child.kill(f"{why} again")
        else:
            self._step(f"stopping ({why})")
            self._stop.set()

    # -- start -------------------------------------------------------------------------------------

    async def _start(self, listener: socket.socket) -> None:
        try:
            async with asyncio.timeout(self.settings.start_timeout):
                await self._start_steps(listener)
        except TimeoutError:
            raise StackError(
                f"not ready after {self.settings.start_timeout:.0f} s: {self._waiting_for()}"
            ) from None

    async def _start_steps(self, listener: socket.socket) -> None:
        settings, paths = self.settings, self.paths
        if self._forks:  # beside everything else: the first executors wait for its imports
            child = self._add_child(commands.template_spec(settings, paths, dict(os.environ)))
            self._template = Template(child, paths.template_socket)
        self._redis_url = await self._start_valkey()
        env = commands.base_env(paths, self._redis_url, self._token())
        epochs = RoleEpochs(paths.role_epoch)
        by_model = {
            model.id: [self._add_executor(role, env, epochs) for role in model.topology.roles]
            for model in settings.models
        }
        if settings.role_control:
            self._roles = RoleControl(by_model)
        threads = settings.threads or threads_per_executor(settings.executors, cores())
        self._step(f"starting {settings.executors} executors ({threads} threads each)")
        catalogue = []
        targets: dict[str, ModelTarget] = {}
        kv_bytes = commands.kv_bytes(settings)
        for model in settings.models:
            fetched = await self._prepare_model(model)
            revision = f"{model.id}@{fetched.sha256[:12]}"
            if settings.quantization:  # other weights, other KV: nothing is shared with the model as it is
                revision += f"+{settings.quantization}"
            self._revisions[model.id] = revision
            catalogue.append(self._catalogue_entry(model, fetched, revision))
            target = targets[model.id] = ModelTarget(
                model.id, revision, str(fetched.path), settings.dtype, kv_bytes,
                settings.max_model_len, settings.quantization,
            )  # fmt: skip
            for executor in by_model[model.id]:
                executor.set_target(target)
        write_atomically(paths.catalogue, json.dumps({"models": catalogue}, indent=1))
        if settings.gateways > 1:
            (paths.run / "prometheus").mkdir(exist_ok=True)
        self._step(f"starting {settings.gateways} gateway{'s' if settings.gateways > 1 else ''}")
        for index in range(settings.gateways):
            self._add_child(commands.gateway_spec(settings, paths, index, listener.fileno(), env))
        self._step(f"loading models ({kv_bytes >> 20} MiB of KV pool per executor)")
        await self._wait_executors()
        await self._wait_models()
        if settings.autoscale:

            def add(model_id: str, role: RoleName) -> Executor:
                executor = self._add_executor(role, env, epochs)
                executor.set_target(targets[model_id])
                return executor

            groups = {model.id: (model.topology, by_model[model.id]) for model in settings.models}
            self._scaling = LocalScaling(groups, settings.autoscale, add)

    def _add_executor(self, role: RoleName, env: dict[str, str], epochs: RoleEpochs) -> Executor:
        settings, paths = self.settings, self.paths
        te_id = f"te-{self._number}"
        self._number += 1
        controlled = settings.role_control or settings.autoscale
        executor = self._executors[te_id] = Executor(
            te_id,
            child=self._add_child(commands.executor_spec(settings, paths, te_id, role, env)),
            endpoint_file=paths.run / f"{te_id}.json",
            role=role,
            epochs=epochs,
            token=env["DEEPFLOW_CLUSTER_TOKEN"],
            on_change=self._changed,
            poll_seconds=POLL_CONTROLLED_SECONDS if controlled else POLL_READY_SECONDS,
        )
        executor.child.on_change = executor.look
        self._own_task(executor.tend(), f"tend-{te_id}")
        return executor

    async def _start_valkey(self) -> str:
        if self.settings.redis_url:
            why = await asyncio.to_thread(valkey.ping, self.settings.redis_url)
            if why is not None:
                raise StackError(f"REDIS_URL does not answer: {why}")
            self._step("using REDIS_URL")
            return self.settings.redis_url
        self._step("starting Valkey")
        try:
            self._add_child(commands.valkey_spec(self.paths))
        except valkey.ValkeyError as error:
            raise StackError(str(error)) from None
        url = valkey.socket_url(self.paths.valkey_socket)
        async with asyncio.timeout(VALKEY_START_SECONDS):
            while await asyncio.to_thread(valkey.ping, url, 1.0) is not None:
                self._check_children()
                await asyncio.sleep(0.05)
        return url

    def _token(self) -> str:
        """The credential of all internal calls; kept, so that a restart needs no agreement."""
        given = os.environ.get("DEEPFLOW_CLUSTER_TOKEN")
        if given:
            return given
        with contextlib.suppress(OSError):
            kept = self.paths.token.read_text().strip()
            if kept:
                return kept
        token = secrets.token_urlsafe(32)
        write_atomically(self.paths.token, token)
        return token

    async def _prepare_model(self, model: ModelSpec) -> FetchedModel:
        self._step(f"fetching {model.id} from {model.uri}")
        from controlplane.gateway.modelcard import CardError, build_card

        try:
            fetched = await asyncio.to_thread(fetch, model.uri)
            # Built once here, found in the cache by every gateway.
            await asyncio.to_thread(build_card, fetched.path, sha256=fetched.sha256)
        except SourceError as error:
            raise StackError(f"model {model.id}: {error}") from None
        except (CardError, OSError) as error:
            raise StackError(f"model {model.id} at {model.uri} cannot be served: {error}") from None
        return fetched

    def _catalogue_entry(self, model: ModelSpec, fetched: FetchedModel, revision: str) -> dict[str, Any]:
        return {
            "id": model.id,
            "revision": revision,
            "aliases": list(model.aliases),
            "path": str(fetched.path),
            "max_model_len": self.settings.max_model_len,
            "dtype": self.settings.dtype,
            "quantization": self.settings.quantization,
            "default": True,
        }

    async def _wait_executors(self) -> None:
        waiting = set(self._executors)
        while waiting:
            self._check_children()
            for te_id in sorted(waiting):
                executor = self._executors[te_id]
                if executor.ready:
                    waiting.discard(te_id)
                    self._step(f"{te_id} ({executor.role.value}) is ready")
            await asyncio.sleep(0.05)

    async def _wait_models(self) -> None:
        async with httpx.AsyncClient(
            base_url=self.settings.url, timeout=PROBE_TIMEOUT_SECONDS, trust_env=False
        ) as client:
            for model in self.settings.models:
                while True:
                    self._check_children()
                    with contextlib.suppress(httpx.TransportError):
                        answer = await client.get("/readyz", params={"model": model.id})
                        if answer.status_code == 200:
                            break
                    await asyncio.sleep(PROBE_SECONDS)
                self._step(f"{model.id} answers")

    def _check_children(self) -> None:
        """Gives up on a start in which a child keeps ending, or a model cannot be loaded."""
        for child in self._children:
            if child.restarts >= START_ATTEMPTS and child.spec.kind != "template":  # which nobody needs
                raise StackError(
                    f"{child.spec.name} {child.last_exit}, {child.restarts} times; "
                    f"the end of {child.spec.log}:\n{child.log_tail()}"
                )

        for executor in self._executors.values():
            if executor.load_failures >= (1 if executor.load_hopeless else START_ATTEMPTS):
                raise StackError(f"{executor.te_id} {executor.message}")

    def _waiting_for(self) -> str:
        waiting = [f"{e.te_id}: {e.message or 'starts'}" for e in self._executors.values() if not e.ready]
        return "; ".join(waiting) or "a gateway or a model does not answer /readyz"

    # -- run ---------------------------------------------------------------------------------------

    def _command(self, command: dict[str, Any]) -> dict[str, Any]:
        match command:
            case {"command": "status"}:
                return self.describe()
            case {"command": "stop"}:
                self.request_stop("asked by `deepflow down`")
                return {"pid": os.getpid()}
            case {"command": "role", "te": str(te_id), "role": str(role)}:
                executor = self._executors.get(te_id)
                if executor is None:
                    raise ValueError(f"no executor '{te_id}' (there are: {', '.join(self._executors)})")
                if role not in list(RoleName):
                    raise ValueError(f"no role '{role}' (there are: {', '.join(RoleName)})")
                if self._roles is not None:
                    self._roles.pin(te_id)
                return {"te": te_id, "role": role, "epoch": executor.set_role(RoleName(role))}
        raise ValueError("unknown command")

    def describe(self) -> dict[str, Any]:
        """The whole stack, for the control socket and the status file."""
        return {
            "supervisor": self._own.dump(),
            "state": self._current_state(),
            "url": self.settings.url,
            "redis_url": self._redis_url,
            "metrics_url": self._metrics_url,
            "started": self._started,
            "steps": list(self._steps),
            "models": [
                {"id": m.id, "uri": m.uri, "topology": str(m.topology),
                 "revision": self._revisions.get(m.id, "")}
                for m in self.settings.models
            ],
            "roles": self._roles.describe() if self._roles is not None else {},
            "executors": [executor.describe() for executor in self._executors.values()],
            "children": [
                {"name": c.spec.name, "kind": c.spec.kind, "pid": c.pid, "state": c.state,
                 "restarts": c.restarts, "last_exit": c.last_exit, "log": str(c.spec.log)}
                for c in self._children
            ],
            "processes": [c.record.dump() for c in self._children if c.record is not None],
        }  # fmt: skip

    def _current_state(self) -> str:
        if self.state != "ready":
            return self.state
        # Those that came with the load and are on their way, or leave with it, are missed by nobody.
        needed = [e for e in self._executors.values() if e.number < self.settings.executors]
        scaled = {e.te_id for e in self._executors.values()} - {e.te_id for e in needed}
        scaled |= {e.te_id for e in needed if e.leaving_since is not None}
        whole = all(e.ready or e.te_id in scaled for e in needed)
        spared = scaled | {"template"}  # executors start without it too
        running = all(c.state == "running" or c.spec.name in spared for c in self._children)
        return "ready" if whole and running else "degraded"

    async def _write_status(self) -> None:
        while True:
            self._dirty.clear()
            try:
                write_atomically(self.paths.status, json.dumps(self.describe(), indent=1))
            except OSError as error:  # a full disk must not stop what serves
                log.warning("cannot write %s: %s", self.paths.status, error.strerror or error)
                self._dirty.set()
                await asyncio.sleep(HOUSEKEEPING_SECONDS)
            await asyncio.sleep(WRITE_SECONDS)
            await self._dirty.wait()

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            for child in self._children:
                await asyncio.to_thread(child.rotate_log)
            if self._template is not None:
                self._template.measure()
                known = {child.pid for child in self._children if child.pid is not None}
                metrics.ORPHANS.inc(self._orphans.reap(known))
            self._changed()

    async def _control_roles(self, roles: RoleControl) -> None:
        while True:
            await asyncio.sleep(CYCLE_SECONDS)
            roles.cycle()

    async def _scale(self, scaling: LocalScaling) -> None:
        while True:
            await asyncio.sleep(SCALE_SECONDS)
            scaling.cycle()
            for executor in scaling.leavers():
                await self._remove(executor)

    async def _remove(self, executor: Executor) -> None:
        te_id = executor.te_id
        await _cancel([task for task in self._tasks if task.get_name() == f"tend-{te_id}"])
        await executor.child.stop()
        running = self._runs.pop(te_id)  # all of it goes at once: a stop may come at any wait
        self._children.remove(executor.child)
        del self._executors[te_id]
        metrics.EXECUTOR_READY.remove(te_id)
        self._step(f"{te_id} ({executor.role.value}) has left")
        await _cancel([running])

    # -- stop --------------------------------------------------------------------------------------

    async def _shutdown(self) -> None:
        self.state = "stopping"
        self._stop.set()
        self._changed()
        await _cancel(task for task in self._tasks if task.get_name().startswith(("tend-", "scaling")))
        for kind in ("gateway", "executor", "template", "valkey"):
            children = [child for child in self._children if child.spec.kind == kind]
            await asyncio.gather(*(child.stop() for child in children))
            await _cancel(self._runs[child.spec.name] for child in children)
        await _cancel(self._tasks)
        self._report("stopped")

    def _clear_leftovers(self) -> None:
        ended = clear(self.paths)
        if ended:
            self._step(f"ended {len(ended)} processes that an earlier supervisor had left")
        self.paths.prepare()

    # -- tasks -------------------------------------------------------------------------------------

    def _add_child(self, spec: ChildSpec) -> Child:
        child = Child(spec, self._changed, self._template.start if self._template is not None else None)
        self._children.append(child)
        self._runs[spec.name] = self._own_task(child.run(), f"run-{spec.name}")
        return child

    def _own_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task %s failed", task.get_name(), exc_info=error)
            self._failure = StackError(f"the supervisor's task {task.get_name()} failed: {error!r}")
            self._stop.set()

    async def _until_stop(self, work: Awaitable[T]) -> None:
        """Awaits `work`, or cancels it when a stop is asked for."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            for future in (task, stop):
                future.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)

    def _step(self, text: str) -> None:
        self._steps.append(text)
        log.info("%s", text)
        self._report(text)
        self._changed()

    def _changed(self) -> None:
        self._dirty.set()


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    chosen = list(tasks)
    for task in chosen:
        task.cancel()
    await asyncio.gather(*chosen, return_exceptions=True)


def _serve_metrics(stack: contextlib.ExitStack) -> str:
    """The supervisor's metrics on a free loopback port."""
    server, thread = start_http_server(0, "127.0.0.1", registry=metrics.REGISTRY)
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return f"http://127.0.0.1:{server.server_port}/metrics"
