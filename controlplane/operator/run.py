"""One operator process: waits for the lease, then runs watches, controllers and scaling.

Followers hold no watches: taking over lists everything afresh, so a leader never acts on what it remembers
from before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections import Counter
from collections.abc import AsyncIterator

from aiohttp import web
from prometheus_client import start_http_server
from redis.asyncio import Redis

from controlplane.api.resources.names import LEASE_OPERATOR
from controlplane.fleet.demand import CALL_SECONDS, DemandReader
from controlplane.kube.client import KubeApi
from controlplane.kube.lease import LeaderElection, LeaseTimes
from controlplane.kube.resources import Key, key_of
from controlplane.operator import metrics
from controlplane.operator.caches import CacheLoop
from controlplane.operator.cluster import Cluster
from controlplane.operator.pools import PoolController
from controlplane.operator.queue import Controller
from controlplane.operator.scaling import ScalingLoop
from controlplane.operator.servings import ServingController
from controlplane.operator.settings import OperatorSettings

SYNC_SECONDS = 300.0
"""Without a first list after this the process ends, and says so by its restart."""
SILENT_SECONDS = 600.0
"""Watches that were silent for so long make the process unready (each is renewed within 5 minutes)."""
GATHER_SECONDS = 0.02
"""Answers of a model's executors come together after a start: they are one look, not one each."""
POOL_GATHER_SECONDS = 0.1
"""A pool of thousands changes with each of its pods: a look at all of them is made at most so often."""
MEASURE_SECONDS = 5.0

log = logging.getLogger("deepflow.operator")


class Operator:
    """The controllers of one leader. `run` until cancelled."""

    def __init__(self, api: KubeApi, settings: OperatorSettings, redis: Redis | None) -> None:
        self.settings = settings
        self.cluster = Cluster(api, settings)
        self.ready = False
        servings, pools = ServingController(self.cluster), PoolController(self.cluster)
        self.servings: Controller[Key] = Controller(
            "modelserving", servings.reconcile, workers=settings.workers
        )
        self.pools: Controller[Key] = Controller("warmpool", pools.reconcile, workers=2)
        self.caches = CacheLoop(self.cluster)
        self.scaling = ScalingLoop(self.cluster, DemandReader(redis) if redis is not None else None)

    async def run(self) -> None:
        cluster = self.cluster
        async with asyncio.TaskGroup() as group:
            group.create_task(cluster.run(), name="cluster")
            async with asyncio.timeout(SYNC_SECONDS):
                await cluster.synced()
            cluster.on_serving = self.servings.queue.add
            cluster.on_executor = lambda key: self.servings.queue.add_after(key, GATHER_SECONDS)
            cluster.on_pool = lambda key: self.pools.queue.add_after(key, POOL_GATHER_SECONDS)
            for obj in cluster.servings:
                self.servings.queue.add(key_of(obj))
            for obj in cluster.pools:
                self.pools.queue.add(key_of(obj))
            for obj in cluster.pods:  # of ModelServings that are gone
                cluster.tell(obj)
            self.ready = True
            log.info("%d ModelServings, %d pools, %d pods", len(cluster.servings), len(cluster.pools),
                     len(cluster.pods))  # fmt: skip
            group.create_task(self.servings.run(), name="servings")
            group.create_task(self.pools.run(), name="pools")
            group.create_task(self.scaling.run(), name="scaling")
            group.create_task(self.caches.run(), name="caches")
            group.create_task(self._measure(), name="measure")

    @property
    def silent(self) -> bool:
        return any(reflector.silence > SILENT_SECONDS for reflector in self.cluster.reflectors)

    async def _measure(self) -> None:
        while True:
            for controller in (self.servings, self.pools):
                controller.queue.measure()
            states = Counter(
                pod.state for obj in self.cluster.pods if (pod := self.cluster.pod(obj)) is not None
            )
            for state, count in states.items():
                metrics.PODS.labels(state.value).set(count)
            await asyncio.sleep(MEASURE_SECONDS)


class Process:
    """Lease, probes and signals around an Operator."""

    def __init__(self, api: KubeApi, settings: OperatorSettings, *, times: LeaseTimes | None = None) -> None:
        self.settings = settings
        self.operator: Operator | None = None
        self._api = api
        self._election = LeaderElection(
            api, settings.lease_namespace, LEASE_OPERATOR, settings.identity or "operator", times=times
        )

    async def run(self) -> None:
        """Until cancelled, or until the lease was lost (then the process should end and start anew)."""
        redis = (
            Redis.from_url(self.settings.redis_url, socket_connect_timeout=CALL_SECONDS)
            if self.settings.redis_url
            else None
        )
        if redis is None:
            log.warning("no REDIS_URL: models are not woken and not scaled by demand")
        try:
            async with _probes(self, self.settings):

                async def lead() -> None:
                    metrics.LEADING.set(1)
                    self.operator = Operator(self._api, self.settings, redis)
                    try:
                        await self.operator.run()
                    finally:
                        self.operator = None
                        metrics.LEADING.set(0)

                if self.settings.leader_elect:
                    await self._election.run(lead)
                else:
                    await lead()
        finally:
            if redis is not None:
                await redis.aclose()

    @property
    def ready(self) -> bool:
        """A follower is ready: it waits as it should."""
        operator = self.operator
        if operator is None:
            return self.settings.leader_elect
        return operator.ready and not operator.silent


@contextlib.asynccontextmanager
async def _probes(process: Process, settings: OperatorSettings) -> AsyncIterator[None]:
    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")  # answering at all shows that the loop turns

    async def readiness(_: web.Request) -> web.Response:
        return web.Response(
            text="ok\n" if process.ready else "not ready\n", status=200 if process.ready else 503
        )

    app = web.Application()
    app.router.add_get("/healthz", health)
    app.router.add_get("/readyz", readiness)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.health_port).start()
        yield
    finally:
        await runner.cleanup()


async def serve(api: KubeApi, settings: OperatorSettings) -> None:
    """The command's body: until SIGTERM or SIGINT. Raises SystemExit when the lease was lost."""
    with contextlib.ExitStack() as stack:
        if settings.metrics_port:
            server, thread = start_http_server(settings.metrics_port, settings.host)
            stack.callback(thread.join)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
        work = asyncio.ensure_future(Process(api, settings).run())
        loop = asyncio.get_running_loop()
        stopping = False

        def stop() -> None:
            nonlocal stopping
            stopping = True
            work.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        try:
            await work
        except asyncio.CancelledError:
            if not stopping:
                raise
            return
    raise SystemExit("the lease was lost: starting anew is safest")
