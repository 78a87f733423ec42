"""The real placement policy over the simulated cluster: what a gateway does around `controlplane.scheduling`.

Keeps the view a gateway has: an executor's last load report plus what was submitted to it since, the prefix
index fed by the executors' cache events, and the predictor of answers' lengths, which learns from those that
ended: a gateway never knows a length before. Nothing here decides.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from controlplane.scheduling.columns import Columns
from controlplane.scheduling.decide import decide, decide_decode
from controlplane.scheduling.lengths import Asked, LengthPredictor, Predicted
from controlplane.scheduling.prefix import PrefixIndex
from controlplane.scheduling.roles import RoleController, RolePolicy
from controlplane.scheduling.types import (
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
from controlplane.twin.task import PREFILL, Task

REVISION = "twin"
ENDPOINT = "chat"
MAX_TASKS = 256  # EngineConfig.max_tasks
PREFIX_BLOCKS = 4_000_000
"""Prefix blocks remembered (ours): all that a thousand simulated executors hold."""


class Ours:
    """`controlplane.scheduling` as a gateway runs it."""

    def __init__(
        self,
        policy: Policy | None = None,
        seed: int = 0,
        name: str = "deepflow",
        roles: RolePolicy | None = None,
    ) -> None:
        """`roles`: let the role controller change them; None leaves them as they are."""
        self.name = name
        self._policy = policy or Policy()
        self._controller = RoleController(roles) if roles is not None else None
        self._rng = random.Random(seed)
        self._turn = 0

    def attach(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._columns = Columns(self._policy)
        self._index = PrefixIndex(PREFIX_BLOCKS, slots=self._columns.slots)
        self._sequence = [1] * len(cluster.tes)
        self._numbers = {_te_id(te.number): te.number for te in cluster.tes}
        self._ids = list(self._numbers)
        self._stale: set[int] = set(
            range(len(cluster.tes))
        )  # changed since the columns were brought up to date
        self._bound = int(cluster.workload.output.max())  # what clients ask for at most
        self._lengths = LengthPredictor()
        self._expected: dict[int, tuple[Asked, Predicted | None]] = {}  # of what has not ended

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
        if self._controller is None:
            return ()
        decision = self._controller.step(self._view().views, now)
        return [(self._numbers[change.te_id], change.role) for change in decision.changes]

    # -- what changes the view ---------------------------------------------------------------------------

    def reported(self, te: SimExecutor, now: float) -> None:
        self._stale.add(te.number)

    def submitted(self, te: int, task: Task, now: float) -> None:
        self._stale.add(te)

    def ended(self, te: int, task: Task, now: float) -> None:
        self._stale.add(te)
        if task.kind != PREFILL:
            asked, predicted = self._expected.pop(task.request)
            self._lengths.learn(asked, task.output, predicted)

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
        expected = self._expected.get(request)
        if expected is None:
            asked = Asked(
                cluster.tenant(request), ENDPOINT, prompt, self._bound, beginning=units[0] if units else 0
            )
            expected = self._expected[request] = asked, self._lengths.predict(asked)
        cached: Mapping[str, int] = {}
        if units and len(self._index):
            found = self._index.match([_identity(unit) for unit in units])
            cached = found.tokens(cluster.workload.unit_tokens, prompt - 1)
        return RequestView(
            model_revision=REVISION,
            tokens=prompt + sampled,
            output_left=self._bound,
            cached_tokens=cached,
            never=never,
            predicted_output=None if expected[1] is None else expected[1].tokens - sampled,
        )

    def _view(self) -> Columns:
        for number in self._stale:
            self._columns.put(self._look(number))
        self._stale.clear()
        return self._columns

    def _look(self, number: int) -> ExecutorView:
        te = self._cluster.tes[number]
        return ExecutorView(
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


def _te_id(number: int) -> str:
    return f"te-{number:05}"


def _identity(unit: int) -> bytes:
    return unit.to_bytes(16, "little")
