"""Leader election over a coordination.k8s.io Lease: one active operator, others wait.

The holder renews; whoever sees no renewal for the lease's duration *by its own clock* takes over (hosts'
clocks are never compared). A holder that could not renew within the deadline stops before others may begin.
Every write carries the resourceVersion that was read, so two candidates cannot both win. What leaders do is
fenced besides: claims by resourceVersion, roles by epochs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from controlplane.kube.client import Conflict, KubeApi, KubeError, NotFound
from controlplane.kube.resources import LEASES, Json, version_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """client-go's usual values."""

    duration: float = 15.0
    deadline: float = 10.0
    retry: float = 2.0


class LeaderElection:
    """`run(lead)`: waits for the lease, runs `lead` while it is held, and ends when it is lost."""

    def __init__(
        self,
        api: KubeApi,
        namespace: str,
        name: str,
        identity: str,
        *,
        times: LeaseTimes | None = None,
        clock: Callable[[], float] = time.monotonic,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self.identity = identity
        self.leading = False
        self._api = api
        self._namespace, self._name = namespace, name
        self._times = times or LeaseTimes()
        self._clock = clock
        self._rand = rand
        self._seen: tuple[str, float] = ("", 0.0)  # (resourceVersion, when first seen)
        self._renewed = 0.0
        self._lease: Json | None = None

    async def run(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Returns when the lease was lost or `lead` returned. Releases the lease when cancelled."""
        while not await self._try():  # noqa: ASYNC110  # the other side is another process
            await asyncio.sleep(self._times.retry * (0.8 + 0.4 * self._rand()))
        log.info("%s leads", self.identity)
        self.leading = True
        work = asyncio.ensure_future(lead())
        renewal = asyncio.ensure_future(self._renew())
        try:
            done, _ = await asyncio.wait({work, renewal}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (work, renewal):
                task.cancel()
            await asyncio.gather(work, renewal, return_exceptions=True)
            self.leading = False
            with contextlib.suppress(KubeError, TimeoutError):
                async with asyncio.timeout(self._times.retry):
                    await self._release()
            log.info("%s leads no longer", self.identity)

    async def _renew(self) -> None:
        while self._clock() - self._renewed < self._times.deadline:
            await asyncio.sleep(self._times.retry)
            left = self._times.deadline - (self._clock() - self._renewed)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(left, 0.01)):
                    if not await self._try() and self._lost:
                        break
        log.warning("%s could not renew its lease", self.identity)

    @property
    def _lost(self) -> bool:
        holder = ((self._lease or {}).get("spec") or {}).get("holderIdentity")
        return bool(holder) and holder != self.identity

    async def _try(self) -> bool:
        """Takes or renews the lease; False if it is somebody else's or the server does not answer."""
        now = self._clock()
        try:
            lease = await self._api.get(LEASES, self._namespace, self._name)
        except NotFound:
            return await self._create(now)
        except KubeError as error:
            log.debug("the lease cannot be read: %s", error)
            return False
        self._lease = lease
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        if self._seen[0] != version_of(lease):
            self._seen = (version_of(lease), now)
        duration = float(spec.get("leaseDurationSeconds") or self._times.duration)
        if holder and holder != self.identity and now - self._seen[1] < duration:
            return False
        moved = holder != self.identity
        body = {
            **lease,
            "spec": {
                **spec,
                "holderIdentity": self.identity,
                "leaseDurationSeconds": max(1, round(self._times.duration)),
                "renewTime": _micro_now(),
                "acquireTime": _micro_now() if moved else spec.get("acquireTime") or _micro_now(),
                "leaseTransitions": int(spec.get("leaseTransitions") or 0) + moved,
            },
        }
        try:
            self._lease = await self._api.replace(LEASES, body, manager=self.identity)
        except KubeError as error:
            if not isinstance(error, Conflict):
                log.debug("the lease cannot be written: %s", error)
            return False
        self._renewed = now
        return True

    async def _create(self, now: float) -> bool:
        body: Json = {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {"namespace": self._namespace, "name": self._name},
            "spec": {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": max(1, round(self._times.duration)),
                "renewTime": _micro_now(),
                "acquireTime": _micro_now(),
                "leaseTransitions": 0,
            },
        }
        try:
            self._lease = await self._api.create(LEASES, body, manager=self.identity)
        except KubeError as error:
            log.debug("the lease cannot be made: %s", error)
            return False
        self._renewed = now
        return True

    async def _release(self) -> None:
        """Lets others begin at once."""
        lease = await self._api.get(LEASES, self._namespace, self._name)
        spec = lease.get("spec") or {}
        if spec.get("holderIdentity") == self.identity:
            lease["spec"] = {
                **spec,
                "holderIdentity": "",
                "leaseDurationSeconds": 1,
                "renewTime": _micro_now(),
            }
            await self._api.replace(LEASES, lease, manager=self.identity)


def _micro_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
