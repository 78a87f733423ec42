"""The process: what is started, in which order, and how it all ends.

Start: sockets first (a warm executor is reachable in well under a second), libraries beside it on a
thread. End: no new tasks, running ones and offers finish within a bound, streams are told, the
registration is taken back, then memory is given back. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import grpc
import grpc.aio
from deepflow.v1 import worker_pb2 as pb
from deepflow.v1 import worker_pb2_grpc

from flowserve.engine.prefixes import LendingBusy, NotCached
from flowserve.engine.types import Role, StepEvent
from flowserve.rtc import folder
from flowserve.shell import convert, health, metrics, watchdog
from flowserve.shell.forks import Forks
from flowserve.shell.handover import Handover
from flowserve.shell.lifecycle import Lifecycle, State
from flowserve.shell.loading import Loader
from flowserve.shell.registry import Registry
from flowserve.shell.served import ServedModel
from flowserve.shell.service import Identity, TaskExecutorService
from flowserve.shell.settings import Endpoint, Settings
from flowserve.shell.start import process_age
from flowserve.shell.streams import Streams
from kvtransfer.auth import PROTOCOL_VERSION, TokenAuth
from kvtransfer.channel import SERVER_OPTIONS, add_port
from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.framed import StreamServer
from kvtransfer.prefixes import PrefixFetcher
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.service import KVTransferService
from kvtransfer.tls import Tls

if TYPE_CHECKING:
    from flowserve.models.weight_cache import Named, WeightCache
    from flowserve.vllm.loading import VllmLoader

log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_CANNOT_START = 1
EXIT_FAILED = 70  # EX_SOFTWARE: the supervisor starts another one
EXIT_NOW = 130
SERVER_GRACE_SECONDS = 2.0
"""For calls under way when the server stops: the answer of a Drain, the last deltas of a stream."""
CLOSE_SECONDS = 5.0
SOCKET_GRACE_SECONDS = 60.0
MAX_SOCKETS_LOOKED_AT = 1000

_STATES = {
    State.WARM: pb.EXECUTOR_STATE_WARM,
    State.LOADING: pb.EXECUTOR_STATE_LOADING,
    State.READY: pb.EXECUTOR_STATE_READY,
    State.SLEEPING: pb.EXECUTOR_STATE_SLEEPING,
    State.DRAINING: pb.EXECUTOR_STATE_DRAINING,
    State.FAILED: pb.EXECUTOR_STATE_FAILED,
}


class CannotStart(Exception):
    """This process can never serve; starting another one like it does not help."""


class TaskExecutorProcess:
    """One TE. `run` returns the process's exit code."""

    def __init__(self, settings: Settings) -> None:
        """On the event loop it will run on."""
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._started_ms = time.time_ns() // 1_000_000
        self.incarnation = f"{self._started_ms:x}-{secrets.token_hex(4)}"
        self._stop = asyncio.Event()
        self._drain_seconds = settings.drain_seconds
        self._signals = 0
        self._metrics_url = ""
        self._identity = Identity(settings.te_id, self.incarnation, "")
        self._tasks_server: StreamServer[pb.TasksRequest] | None = None
        self._tasks_address = ""
        self.streams = Streams()
        self._receiver = Receiver(
            None,
            settings.te_id,
            self.incarnation,
            token=settings.token,
            transports=settings.kv_transport,  # type: ignore[arg-type]  # argparse's choices are these
            checksum=settings.kv_checksum,
            host=settings.advertise_host,
            shm_dir=settings.shm_dir,
            lease_seconds=settings.lease_seconds,
            max_pulls=settings.max_running,
            max_waiting=settings.max_tasks,
            tls=settings.tls,
        )
        self._handover = Handover(lambda: self._sender, self._receiver, PrefixFetcher(self._receiver))
        self._sender = Sender(
            None,
            settings.te_id,
            self.incarnation,
            lease_seconds=settings.lease_seconds,
            on_released=self._handover.released,
        )
        data = settings.kv_data_listen
        self._forks = Forks(self._receiver, self._loaded_weights, self._busy, settings.feed_bytes_per_second)
        self._kv_service = KVTransferService(
            self._sender,
            token=settings.token,
            shm_dir=settings.shm_dir,
            data_listen=None if data is None else (data.host, data.port),
            library=settings.kv_transport,
            host=settings.advertise_host,
            lend=self._lend,
            images=self._forks.images,
        )
        self._loader = self._make_loader()
        self._registry: Registry | None = None
        self.lifecycle = Lifecycle(
            self._loader,
            role=Role(settings.role),
            on_model=self._on_model,
            on_sleep=self._on_sleep,
            on_change=self._on_change,
            transfers_left=lambda: self._sender.active,
            max_asleep=settings.max_asleep,
        )

    # -- what is wired together ------------------------------------------------------------------

    def _on_event(self, event: StepEvent) -> None:
        """On the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: so have the streams
            self._loop.call_soon_threadsafe(self.streams.dispatch, event)

    def _on_model(self, model: ServedModel) -> None:
        self._handover.attach(model.engine)
        if model.store is not None:
            self._kv_service.attach_store(model.store)
            self._receiver.attach_store(model.store)
        self.streams.restart_kv("load")

    def _make_loader(self) -> Loader | VllmLoader:
        settings = self._settings
        if settings.engine == "vllm":
            from flowserve.vllm.loading import VllmLoader

            return VllmLoader(settings, self._on_event)
        return Loader(settings, self._handover, self._on_event, self._forks)

    async def _on_sleep(self) -> None:
        """Nothing of the model's pool is held when this returns; peers that mapped it notice that it ends."""
        self._kv_service.detach_store("the model sleeps")
        await self._receiver.detach_store()
        self._handover.detach()

    def _lend(self, identities: Sequence[bytes]) -> tuple[str, int]:
        """On a worker thread. Raises TransferError."""
        model = self.lifecycle.model
        if model is None or self.lifecycle.state is not State.READY:
            raise TransferError(
                TransferErrorCode.NOT_CACHED, f"this executor is {self.lifecycle.state.value}"
            )
        try:
            return model.engine.lend(identities)
        except NotCached as error:
            raise TransferError(TransferErrorCode.NOT_CACHED, str(error)) from error
        except LendingBusy as error:
            raise TransferError(TransferErrorCode.BUSY, str(error)) from error

    def _loaded_weights(self) -> Iterator[tuple[str, WeightCache, Named]]:
        """Of the model that serves and of those that sleep, where they may be fed to others."""
        model, weights = self.lifecycle.model, self._loader.weights
        for one in (*((model,) if model is not None else ()), *self.lifecycle.sleepers):
            if weights is not None and one.image is not None:
                yield one.spec.revision, weights, one.image

    def _busy(self) -> bool:
        model = self.lifecycle.model
        return model is not None and model.engine.active_tasks > 0

    def _on_change(self) -> None:
        self.streams.poke()
        if self._registry is not None:
            self._registry.changed()

    def record(self) -> pb.ExecutorRecord:
        """What the registry and GetStatus say of this executor."""
        settings, lifecycle, model = self._settings, self.lifecycle, self.lifecycle.model
        record = pb.ExecutorRecord(
            te_id=settings.te_id,
            incarnation=self.incarnation,
            address=self._identity.address,
            state=_STATES[lifecycle.state],
            device=settings.device,
            role=convert.role_message(lifecycle.role),
            role_epoch=lifecycle.role_epoch,
            pid=os.getpid(),
            host=socket.gethostname(),
            started_unix_ms=self._started_ms,
            max_tasks=settings.max_tasks,
            protocol_version=PROTOCOL_VERSION,
            metrics_url=self._metrics_url,
            tasks_address=self._tasks_address,
            message=lifecycle.message,
            weight_cache=settings.weights_dir is not None
            and settings.tensor_parallel == 1
            and settings.engine == "flowserve",
            asleep=lifecycle.sleepers.revisions,
            preloaded=lifecycle.preloaded,
        )
        if model is not None:
            record.model_revision = model.spec.revision
            record.model_path = model.spec.path
            record.kv_blocks = model.num_blocks
            record.block_tokens = model.block_tokens
            record.max_model_len = model.max_model_len
            record.dtype = model.dtype
            record.quantization = model.spec.quantization
            record.start_path = model.start.path
            record.ready_unix_ms = int(model.start.ready_unix * 1000)
            for phase, seconds in model.start.seconds.items():
                record.start_phases.add(phase=phase, seconds=seconds)
        return record

    # -- life ------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Serves until a signal, a Drain with `exit`, or the watchdog. Returns the exit code."""
        settings = self._settings
        server = self._make_server()
        port = _bind(server, settings.listen, settings.tls)
        address = str(Endpoint(settings.advertise_host, port))
        self._identity = Identity(settings.te_id, self.incarnation, address)
        service = self._serve(server)
        await server.start()
        probes = await self._serve_probes()
        if settings.tasks_listen is not None:
            self._tasks_server = StreamServer(
                service.Tasks, pb.TasksRequest.FromString, token=settings.token, tls=settings.tls
            )
            listen = settings.tasks_listen
            tasks_port = await self._tasks_server.start(listen.host, listen.port)
            self._tasks_address = str(Endpoint(settings.advertise_host, tasks_port))
        if settings.shm_dir is not None:
            settings.shm_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            await asyncio.to_thread(remove_dead_sockets, settings.shm_dir)
        if settings.disk_cache is not None:
            await asyncio.to_thread(folder.prepare, settings.disk_cache)
        await self._kv_service.start()
        metrics_server = self._start_metrics()
        metrics.INFO.info(
            {"te_id": settings.te_id, "incarnation": self.incarnation, "device": settings.device}
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal, number)
        if settings.endpoint_file is not None:
            self._write_endpoint(settings.endpoint_file)
        metrics.START_SECONDS.labels("serving").set(process_age())
        log.info(
            "serving at %s, incarnation %s, %.2f s after start", address, self.incarnation, process_age()
        )
        code = EXIT_OK
        async with asyncio.TaskGroup() as group:
            background = [group.create_task(self._preload())]
            if settings.redis_url:
                self._registry = Registry(settings.redis_url, settings.te_id, self.record)
                background.append(group.create_task(self._registry.run()))
            pulls = group.create_task(self._handover.run())
            watching = group.create_task(
                watchdog.watch(self._watched, settings.watchdog_seconds), name="watchdog"
            )
            stopping = group.create_task(self._stop.wait())
            await asyncio.wait((watching, stopping), return_when=asyncio.FIRST_COMPLETED)
            if watching.done() and not stopping.done():
                stopping.cancel()
                code = EXIT_FAILED
                self.lifecycle.fail(watching.result())
            else:
                # A hung engine must not hold up the end: the drain is bounded, so this goes first.
                watching.cancel()
                await self.lifecycle.drain(self._drain_seconds)
            for task in background:
                task.cancel()
            await asyncio.wait(background, timeout=CLOSE_SECONDS)  # no beat may follow the removal
            await self._end(server, pulls, failed=code != EXIT_OK)
        if probes is not None:
            await probes.stop(None)
        if metrics_server is not None:
            await asyncio.to_thread(metrics_server.stop)
        if settings.endpoint_file is not None:
            self._remove_endpoint(settings.endpoint_file)
        log.info("exits with code %d", code)
        return code

    async def _end(self, server: grpc.aio.Server, pulls: asyncio.Task[None], *, failed: bool) -> None:
        """From serving to nothing. A failed executor leaves its record, which says why."""
        reason = f"executor {self._settings.te_id} stops"
        model = self.lifecycle.model
        if self._registry is not None:
            if failed:
                await self._registry.write()
            else:
                await self._registry.remove()
            await self._registry.close()
        if model is not None and not failed:
            await asyncio.to_thread(model.engine.stop, CLOSE_SECONDS)
            await asyncio.sleep(0)  # its last events are on the loop's queue: dispatch them first
        self.streams.end_all(grpc.StatusCode.UNAVAILABLE, reason)
        if self._tasks_server is not None:
            await self._tasks_server.stop(SERVER_GRACE_SECONDS)
        await server.stop(SERVER_GRACE_SECONDS)
        self._handover.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.wait((pulls,))
                await self._receiver.close()
                await self._kv_service.stop(reason)
        pulls.cancel()
        if model is not None and not failed:
            await asyncio.to_thread(model.close)

    def _watched(self) -> watchdog.Watched | None:
        return self.lifecycle.model.engine if self.lifecycle.model is not None else None

    async def _preload(self) -> None:
        """A missing library or device ends the process now, not at the first load."""
        started = time.monotonic()
        try:
            await asyncio.to_thread(self._loader.preload)
        except (ImportError, ValueError) as error:
            raise CannotStart(f"device {self._settings.device} cannot be used: {error}") from error
        metrics.START_SECONDS.labels("libraries").set(process_age())
        log.info(
            "libraries ready after %.2f s (%.2f s of it here)", process_age(), time.monotonic() - started
        )

    def _make_server(self) -> grpc.aio.Server:
        token = self._settings.token
        auth = [TokenAuth(token, exempt=(health.METHODS,))] if token else []
        if not token:
            log.warning("no cluster token: whoever reaches loopback may use this executor")
        return grpc.aio.server(interceptors=auth, options=SERVER_OPTIONS)

    def _serve(self, server: grpc.aio.Server) -> TaskExecutorService:
        service = TaskExecutorService(
            self._identity, self.lifecycle, self.streams, record=self.record, on_exit=self._on_drained
        )
        worker_pb2_grpc.add_TaskExecutorServicer_to_server(service, server)
        self._kv_service.add_to_server(server)
        self._add_health(server)
        return service

    def _add_health(self, server: grpc.aio.Server) -> None:
        health.add_to_server(
            server,
            alive=lambda: self.lifecycle.state is not State.FAILED,
            ready=lambda: self.lifecycle.state is State.READY,
        )

    async def _serve_probes(self) -> grpc.aio.Server | None:
        """Kubelets' gRPC probes speak no TLS: health alone has a port of its own for them. Raises OSError."""
        listen = self._settings.health_listen
        if listen is None:
            return None
        server = grpc.aio.server(options=SERVER_OPTIONS)
        self._add_health(server)
        _bind(server, listen, None)
        await server.start()
        return server

    def _start_metrics(self) -> metrics.MetricsServer | None:
        listen = self._settings.metrics_listen
        if listen is None:
            return None
        server = metrics.MetricsServer(listen.host, listen.port)
        host = self._settings.advertise_host if listen.host in ("0.0.0.0", "::") else listen.host
        self._metrics_url = f"http://{Endpoint(host, server.port)}/metrics"
        return server

    def _on_drained(self) -> None:
        """A Drain with `exit` has waited as long as its caller wanted."""
        self._drain_seconds = 0.0
        self._stop.set()

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        if self._signals > 1:
            log.warning("%s again: exits now", signal.Signals(number).name)
            logging.shutdown()
            os._exit(EXIT_NOW)
        log.info("%s: drains for at most %.0f s", signal.Signals(number).name, self._drain_seconds)
        self._stop.set()

    # -- the endpoint file -----------------------------------------------------------------------

    def _write_endpoint(self, path: Path) -> None:
        endpoint = {
            "address": self._identity.address,
            "tasks_address": self._tasks_address,
            "metrics_url": self._metrics_url,
            "pid": os.getpid(),
            "incarnation": self.incarnation,
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(endpoint))
        temporary.replace(path)

    def _remove_endpoint(self, path: Path) -> None:
        """Only if it is still ours: a successor may have written its own."""
        try:
            if json.loads(path.read_text()).get("incarnation") == self.incarnation:
                path.unlink()
        except (OSError, ValueError) as error:
            log.debug("endpoint file: %s", error)


def _bind(server: grpc.aio.Server, listen: Endpoint, tls: Tls | None) -> int:
    """Raises OSError."""
    try:
        port = add_port(server, str(listen), tls)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {listen}: {error}") from error
    if port == 0:
        raise OSError(f"cannot listen on {listen}")
    return port


def remove_dead_sockets(folder: Path) -> int:
    """Removes the pool sockets (kvtransfer.shm) that killed processes left; returns how many.

    Nobody listens at a dead one. One that is younger than a minute may be about to be listened at.
    """
    removed = 0
    for path in itertools.islice(folder.glob("kv-*.sock"), MAX_SOCKETS_LOOKED_AT):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            if time.time() - path.stat().st_mtime < SOCKET_GRACE_SECONDS:
                continue
            probe.settimeout(0.2)
            try:
                probe.connect(os.fspath(path))
            except ConnectionRefusedError:
                path.unlink()
                removed += 1
    metrics.STALE_SOCKETS.inc(removed)
    return removed


def main(settings: Settings) -> NoReturn:
    """Runs the process to its end."""
    import uvloop

    async def run() -> None:
        try:
            code = await TaskExecutorProcess(settings).run()
        except OSError as error:
            log.critical("cannot start: %s", error)
            code = EXIT_CANNOT_START
        except BaseExceptionGroup as group:
            if (reason := group.subgroup(CannotStart)) is not None:
                log.critical("cannot start: %s", reason.exceptions[0])
                code = EXIT_CANNOT_START
            else:
                log.exception("a part of the process failed")
                code = EXIT_FAILED
        _leave(code)

    uvloop.run(run())
    raise AssertionError("left above")


def _leave(code: int) -> NoReturn:
    """Ends the process without the teardown of loop and interpreter: everything that needs an order was
    ended in order, and a step, load or copy that hangs on a thread must not keep the process alive."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
