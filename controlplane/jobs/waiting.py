"""What waits for executors: one fair queue per model, and the finished prefills whose KV is held.

The job executor's own: it asks who goes next, and tells what was placed. The order and the bounds are
`controlplane.scheduling.admission`'s; this file knows choices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from controlplane.jobs import metrics
from controlplane.jobs.choice import Choice
from controlplane.jobs.serving import ServingRequest
from controlplane.jobs.states import TaskState
from controlplane.scheduling.admission import DropReason, FairQueue, Waiting

BYTES_PER_TOKEN = 12
"""Of a held prompt: its four bytes for the wire and a reference of eight in the request's tuple."""
MAX_IDLE_QUEUES = 256
"""Models whose shares are remembered while nothing waits for them (ours)."""


class WaitingRoom:
    """Choices in HELD and HANDOVER. Bounds on requests count over all models; room is made within one."""

    def __init__(self, max_requests: int, max_bytes: int, weights: Mapping[str, float] | None = None) -> None:
        """`weights` of tenants; 1 where none is given."""
        self._weights = weights
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._queues: dict[str, FairQueue] = {}
        self._held: dict[str, Choice] = {}
        self._handovers: dict[str, Choice] = {}

    def __len__(self) -> int:
        return len(self._held) + len(self._handovers)

    @property
    def full(self) -> bool:
        return len(self) >= self._max_requests

    @property
    def revisions(self) -> list[str]:
        """Models that somebody waits for in a queue."""
        return [revision for revision, queue in self._queues.items() if len(queue)]

    def __contains__(self, choice: Choice) -> bool:
        return choice.task_id in self._held or choice.task_id in self._handovers

    # -- in ----------------------------------------------------------------------------------------------

    def behind(self, choice: Choice, number: int) -> bool:
        """Something before it waits for the same executors."""
        queue = self._queues.get(choice.job.request.model_revision)
        return bool(queue) and queue.before(_item(choice, 0.0, number))  # type: ignore[union-attr]  # not None: true

    def let_in(
        self, choice: Choice, cost: float, number: int
    ) -> tuple[DropReason | None, list[tuple[Choice, DropReason]]]:
        """A newcomer waits, if it may: why not, and who has to go for it (they are out already)."""
        queue = self._queue(choice)
        if self.full and not len(queue):
            return DropReason.REJECTED_QUEUE_FULL, []  # other models' requests fill it
        pushed = queue.push(_item(choice, cost, number))
        if pushed.refused is not None:
            return pushed.refused, []
        evicted = [(self._held.pop(item.key), reason) for item, reason in pushed.evicted]
        self._held[choice.task_id] = choice
        metrics.HELD.inc(1 - len(evicted))
        return None, evicted

    def below(self, request: ServingRequest) -> int:
        """How many wait for the same model in lower bands."""
        queue = self._queues.get(request.model_revision)
        return queue.below(request.priority) if queue is not None else 0

    def drop_lowest(self, revision: str, count: int) -> list[Choice]:
        """Those of the lowest bands that have to go for a newcomer; they are out already."""
        if count < 1:
            return []
        gone = [self._held.pop(item.key) for item in self._queues[revision].drop_lowest(count)]
        metrics.HELD.dec(len(gone))
        return gone

    def put_back(self, choice: Choice, cost: float, number: int) -> None:
        """One that was admitted before, a finished prefill among them: it waits whatever the bounds say."""
        if choice in self:
            return
        if choice.state is TaskState.HANDOVER:
            self._handovers[choice.task_id] = choice
        else:
            self._queue(choice).put_back(_item(choice, cost, number))
            self._held[choice.task_id] = choice
        metrics.HELD.inc()

    # -- out ---------------------------------------------------------------------------------------------

    def handovers(self, revision: str | None = None) -> list[Choice]:
        """Finished prefills without a decode executor, the longest waiting first; of one model or all."""
        waiting = self._handovers.values()
        return [c for c in waiting if revision is None or c.job.request.model_revision == revision]

    def next(self, revision: str, passed: Collection[str]) -> Choice | None:
        """Who goes next, but for those `passed` over (task ids)."""
        queue: Iterable[Waiting] = self._queues.get(revision, ())
        return next((self._held[item.key] for item in queue if item.key not in passed), None)

    def leave(self, choice: Choice) -> None:
        """It waits no longer, for whatever reason."""
        if self._handovers.pop(choice.task_id, None) is None:
            if self._held.pop(choice.task_id, None) is None:
                return
            self._queues[choice.job.request.model_revision].remove(choice.task_id)
        metrics.HELD.dec()

    def charge(self, choice: Choice, cost: float) -> None:
        """It was placed, having waited or not: its tenant has had so much."""
        request = choice.job.request
        self._queue(choice).charge(request.tenant, request.priority, cost)

    # -- inside ------------------------------------------------------------------------------------------

    def _queue(self, choice: Choice) -> FairQueue:
        revision = choice.job.request.model_revision
        queue = self._queues.get(revision)
        if queue is None:
            if len(self._queues) >= MAX_IDLE_QUEUES:
                for idle in [name for name, other in self._queues.items() if not len(other)]:
                    del self._queues[idle]
            queue = self._queues[revision] = FairQueue(self._max_requests, self._max_bytes, self._weights)
        return queue


def _item(choice: Choice, cost: float, number: int) -> Waiting:
    request = choice.job.request
    size = BYTES_PER_TOKEN * len(request.prompt)
    return Waiting(
        choice.task_id,
        request.tenant,
        request.priority,
        cost,
        size,
        choice.job.deadline,
        number + choice.index,
    )
