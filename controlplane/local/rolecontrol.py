"""Role control on one machine: the supervisor, as the one leader, lets the pure controller look each second.

Roles go out as all roles do, through `Executor.set_role` with an epoch; the executor's next step follows
them. A role that an operator set by hand stays: that executor is counted and left alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping

from controlplane.local import metrics
from controlplane.local.executors import Executor
from controlplane.local.topology import RoleName
from controlplane.scheduling.roles import RoleController, RoleDecision
from controlplane.scheduling.types import ExecutorView, Role

CYCLE_SECONDS = 1.0

log = logging.getLogger("deepflow.local")


class RoleControl:
    """One controller per model over the executors that serve it."""

    def __init__(
        self,
        groups: Mapping[str, Iterable[Executor]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._groups = {model: (list(executors), RoleController()) for model, executors in groups.items()}
        self._clock = clock
        self._pinned: set[str] = set()
        self._last: dict[str, RoleDecision] = {}

    def pin(self, te_id: str) -> None:
        """An operator set its role."""
        self._pinned.add(te_id)

    def cycle(self) -> None:
        """One turn: at most one change per model."""
        for model, (executors, controller) in self._groups.items():
            views = [view for executor in executors if (view := executor_view(executor)) is not None]
            decision = controller.step(views, self._clock(), frozenset(self._pinned))
            self._tell(model, decision)
            by_id = {executor.te_id: executor for executor in executors}
            for change in decision.changes:
                epoch = by_id[change.te_id].set_role(RoleName(change.role.value))
                log.info(
                    "%s helps: %s (prefill %.2f, decode %.2f of capacity; %s, epoch %d)",
                    change.te_id, change.role, decision.prefill, decision.decode, change.reason, epoch,
                )  # fmt: skip

    def _tell(self, model: str, decision: RoleDecision) -> None:
        metrics.ROLE_SCORE.labels(model, "prefill").set(decision.prefill)
        metrics.ROLE_SCORE.labels(model, "decode").set(decision.decode)
        before = self._last.get(model)
        if decision.wants_executors and (before is None or not before.wants_executors):
            log.warning("%s: prefill and decode are both at capacity; no role helps", model)
        metrics.OVERLOADED.labels(model).set(decision.wants_executors)
        self._last[model] = decision

    def describe(self) -> dict[str, object]:
        return {
            model: {
                "balance": str(decision.balance),
                "prefill": round(decision.prefill, 3),
                "decode": round(decision.decode, 3),
            }
            for model, decision in self._last.items()
        }


def executor_view(executor: Executor) -> ExecutorView | None:
    """What the leader knows of it; None before its first status. The role is the one it shall have."""
    if executor.status is None:
        return None
    record, load = executor.status.record, executor.status.load
    return ExecutorView(
        te_id=executor.te_id,
        incarnation=record.incarnation,
        role=Role(executor.role.value),
        model_revision=record.model_revision,
        ready=executor.ready,
        draining=load.draining,
        tasks=load.waiting + load.running,
        max_tasks=record.max_tasks or 256,
        queued_tokens=load.queued_prefill_tokens,
        prefill_tokens_per_second=load.prefill_tokens_per_second,
        decode_step_seconds=load.decode_step_seconds,
        kv_blocks_total=load.kv_blocks_total or record.kv_blocks,
        kv_blocks_free=load.kv_blocks_free,
        block_tokens=record.block_tokens or 16,
    )
