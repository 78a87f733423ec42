"""Does a model really answer? `/readyz?model=ID` asks for one token; the answer vouches for some seconds.

One probe per model at a time: whoever asks while it runs waits for the same one.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from controlplane.gateway import metrics
from controlplane.gateway.catalogue import ServedModel
from controlplane.gateway.settings import GatewaySettings
from controlplane.jobs.serving import Sampling, ServingError, ServingExecutor, ServingRequest

PROBE_TENANT = "deepflow-probe"


@dataclass(frozen=True, slots=True)
class ProbeResult:
    ready: bool
    reason: str
    at: float  # on the prober's clock
    seconds: float = 0.0


class Prober:
    """Keeps the latest result per revision; bounded by the catalogue's size."""

    def __init__(
        self,
        executor: ServingExecutor,
        settings: GatewaySettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._settings = settings
        self._clock = clock
        self._results: dict[str, ProbeResult] = {}
        self._running: dict[str, asyncio.Task[ProbeResult]] = {}

    async def check(self, model: ServedModel) -> ProbeResult:
        """The answer of a recent probe, or of a new one."""
        revision = model.revision
        if not self._executor.can_serve(revision):
            return ProbeResult(False, "no ready executor holds this model", self._clock())
        known = self._results.get(revision)
        if known is not None:
            lasts = self._settings.probe_seconds if known.ready else self._settings.probe_failed_seconds
            if self._clock() - known.at < lasts:
                return known
        task = self._running.get(revision)
        if task is None:
            task = asyncio.create_task(self._probe(model))
            self._running[revision] = task
            task.add_done_callback(lambda _: self._running.pop(revision, None))
        return await asyncio.shield(task)

    async def close(self) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _probe(self, model: ServedModel) -> ProbeResult:
        started = self._clock()
        reason = await self._ask(model)
        result = ProbeResult(not reason, reason or "answered", self._clock(), self._clock() - started)
        metrics.PROBES.labels("ok" if result.ready else "failed").inc()
        self._results[model.revision] = result
        return result

    async def _ask(self, model: ServedModel) -> str:
        """Why it did not answer; "" if it did."""
        first = model.card.bos_id if model.card.bos_id is not None else 0
        request = ServingRequest(
            request_id=f"probe_{secrets.token_hex(8)}",
            tenant=PROBE_TENANT,
            model_id=model.id,
            model_revision=model.revision,
            kind="completion",
            prompt=(first,),
            sampling=Sampling(temperature=0.0, ignore_eos=True),
            max_output_tokens=1,
            cache_salt=PROBE_TENANT.encode(),
            timeout_seconds=self._settings.probe_timeout_seconds,
        )
        try:
            job = self._executor.submit(request)
        except ServingError as error:
            # A full queue is a model that answers, only not at once.
            return "" if error.status == 429 else str(error)
        try:
            async with asyncio.timeout(self._settings.probe_timeout_seconds + 1):
                async for delta in job.deltas():
                    if delta.error is not None:
                        return str(delta.error)
                    if delta.tokens:
                        return ""
            return "the probe ended without a token"
        except TimeoutError:
            return "the probe was not answered in time"
        finally:
            job.cancel("probe over")
