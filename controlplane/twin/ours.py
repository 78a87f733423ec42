"""The real placement policy over the simulated cluster: what a gateway does around `controlplane.scheduling`.

Keeps the view a gateway has: an executor's last load report plus what was submitted to it since, and the
prefix index fed by the executors' cache events. Nothing here decides.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from controlplane.scheduling.decide import decide, decide_decode
from controlplane.scheduling.prefix import PrefixIndex
from controlplane.scheduling.types import (
    ClusterView,
    Draw,
    ExecutorView,
    Mode,
    Policy,
    RequestView,
    Role,
    Unplaceable,
)
from controlplane.twin.cluster import Cluster, Place
from controlplane.twin.executor import SimExecutor
from controlplane.twin.task import Task

REVISION = "twin"
MAX_TASKS = 256  # EngineConfig.max_tasks
PREFIX_BLOCKS = 4_000_000
"""Prefix blocks remembered (ours): all that a thousand simulated executors hold."""


class Ours:
    """`controlplane.scheduling` as a gateway runs it."""

    def __init__(self, policy: Policy | None = None, seed: int = 0, name: str = "deepflow") -> None:
        self.name = name
        self._policy = policy or Policy()
        self._rng = random.Random(seed)
        self._turn = 0

    def attach(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._index = PrefixIndex(PREFIX_BLOCKS)
        self._sequence = [1] * len(cluster.tes)
        self._numbers = {_te_id(te.number): te.number for te in cluster.tes}
        self._ids = list(self._numbers)
        self._views: list[ExecutorView | None] = [None] * len(cluster.tes)

    # -- decisions ---------------------------------------------------------------------------------------

    def place(self, request: int, now: float) -> Place | None:
        decision = decide(self._view(), self._request(request, 0, frozenset()), self._policy, self._draw())
        if isinstance(decision, Unplaceable):
            return None
        return Place(self._numbers[decision.te_id], decision.mode is Mode.DISAGGREGATED)

    def place_decode(self, request: int, source: int, now: float) -> int | None:
        view = self._request(request, 1, frozenset((self._ids[source],)))
        decision = decide_decode(self._view(), view, self._policy, self._draw())
        return None if isinstance(decision, Unplaceable) else self._numbers[decision.te_id]

    def tick(self, now: float) -> Sequence[tuple[int, Role]]:
        return ()

    # -- what changes the view ---------------------------------------------------------------------------

    def reported(self, te: SimExecutor, now: float) -> None:
        self._views[te.number] = None

    def submitted(self, te: int, task: Task, now: float) -> None:
        self._views[te] = None

    def ended(self, te: int, task: Task, now: float) -> None:
        self._views[te] = None

    def cached(self, te: int, stored: Sequence[int], removed: Sequence[int]) -> None:
        self._index.apply(self._ids[te], self._sequence[te], map(_identity, stored), map(_identity, removed))
        self._sequence[te] += len(stored) + len(removed)

    # -- inside ------------------------------------------------------------------------------------------

    def _draw(self) -> Draw:
        self._turn += 1
        return Draw(self._turn, self._rng.getrandbits(32))

    def _request(self, request: int, sampled: int, never: frozenset[str]) -> RequestView:
        cluster = self._cluster
        prompt = cluster.prompt(request)
        units = cluster.units(request)
        cached: dict[str, int] = {}
        if units and len(self._index):
            size = cluster.workload.unit_tokens
            found = self._index.match([_identity(unit) for unit in units])
            cached = {te_id: min(count * size, prompt - 1) for te_id, count in found.items()}
        return RequestView(
            model_revision=REVISION,
            tokens=prompt + sampled,
            output_left=cluster.output(request) - sampled,
            cached_tokens=cached,
            never=never,
        )

    def _view(self) -> ClusterView:
        views = self._views
        return ClusterView(tuple([view or self._refresh(number) for number, view in enumerate(views)]))

    def _refresh(self, number: int) -> ExecutorView:
        te = self._cluster.tes[number]
        view = self._views[number] = ExecutorView(
            te_id=self._ids[number],
            incarnation="1",
            role=te.role,
            model_revision=REVISION,
            tasks=te.tasks,
            max_tasks=MAX_TASKS,
            queued_tokens=te.queued,
            prefill_tokens_per_second=te.prefill_rate,
            decode_step_seconds=te.step_seconds,
            kv_blocks_total=te.total_blocks,
            kv_blocks_free=te.free_blocks,
            block_tokens=te.profile.block_tokens,
            max_model_len=te.profile.max_model_len,
        )
        return view


def _te_id(number: int) -> str:
    return f"te-{number:05}"


def _identity(unit: int) -> bytes:
    return unit.to_bytes(16, "little")
