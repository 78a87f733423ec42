"""The states of one executor, its role under an epoch, and what may happen when.

    WARM --load--> LOADING --ok--> READY --drain--> DRAINING
      ^               |               \\
      +----failed-----+                +--watchdog--> FAILED        (any state can drain or fail)

One process holds one model for its life: another model is another process, from the warm pool.
On the event loop's thread; loading runs on a worker thread.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from flowserve.engine.types import ErrorCode, LoadReport, Role, TaskError
from flowserve.shell import metrics
from flowserve.shell.loading import LoadFailed, LoadReason, LoadSpec, Model

log = logging.getLogger(__name__)

DRAIN_POLL_SECONDS = 0.02
DEFAULT_DRAIN_SECONDS = 30.0
"""Of a Drain call that names no timeout (Kubernetes' default grace)."""


class State(enum.Enum):
    WARM = "warm"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


_NEXT = {
    State.WARM: {State.LOADING, State.DRAINING, State.FAILED},
    State.LOADING: {State.READY, State.WARM, State.DRAINING, State.FAILED},
    State.READY: {State.DRAINING, State.FAILED},
    State.DRAINING: {State.FAILED},
    State.FAILED: set(),
}


class Refusal(enum.Enum):
    INVALID = "invalid"
    STALE = "stale"  # an older epoch, or a request that the state does not allow
    BUSY = "busy"


class Refused(Exception):
    """A call that the state, the epoch or its own content forbids. Nothing was changed."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class DrainResult:
    tasks_left: int
    transfers_left: int

    @property
    def drained(self) -> bool:
        return self.tasks_left == 0 and self.transfers_left == 0


class Lifecycle:
    """State, model and role of this process."""

    def __init__(
        self,
        load: Callable[[LoadSpec, Role], Model],
        *,
        role: Role,
        on_model: Callable[[Model], None],
        on_change: Callable[[], None],
        transfers_left: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`load` blocks and runs on a worker thread; `on_model` makes a loaded model reachable and is
        called, as `on_change` is after every change, on the loop. `transfers_left` counts offers."""
        self._load = load
        self._on_model = on_model
        self._on_change = on_change
        self._transfers_left = transfers_left
        self._clock = clock
        self.state = State.WARM
        self.message = ""
        self.role = role
        self.role_epoch = 0
        self.model: Model | None = None
        self._loading: asyncio.Task[Model] | None = None
        self._loading_spec: LoadSpec | None = None
        metrics.STATE.state(self.state.value)
        metrics.ROLE.state(role.value)

    # -- what the rest asks ----------------------------------------------------------------------

    def accepts(self, model_revision: str) -> TaskError | None:
        """Why no task for `model_revision` is taken now; None if one may be submitted."""
        if self.state is State.DRAINING:
            return TaskError(ErrorCode.DRAINING, "this executor takes no new tasks", retryable=True)
        if self.state is State.FAILED:
            return TaskError(ErrorCode.INTERNAL, f"this executor failed: {self.message}", retryable=True)
        if self.state is not State.READY or self.model is None:
            message = f"this executor is {self.state.value}: no model is loaded"
            return TaskError(ErrorCode.MODEL_NOT_LOADED, message, retryable=True)
        if model_revision != self.model.spec.revision:
            message = f"{self.model.spec.revision!r} is loaded here, not {model_revision!r}"
            return TaskError(ErrorCode.MODEL_NOT_LOADED, message, retryable=True)
        return None

    def load_report(self) -> LoadReport:
        """The engine's, with what only the shell knows."""
        report = self.model.engine.load() if self.model is not None else LoadReport()
        return replace(
            report,
            role=self.role,
            role_epoch=self.role_epoch,
            draining=self.state is State.DRAINING,
        )

    # -- loading ---------------------------------------------------------------------------------

    async def load_model(self, spec: LoadSpec) -> Model:
        """Loads, joins a load of the same model under way, or returns what is loaded already.

        Raises LoadFailed (the executor is warm again), Refused for another model or a wrong state.
        A caller that goes away does not stop the load.
        """
        if self.state is State.READY and self.model is not None:
            if self.model.spec.revision != spec.revision:
                raise Refused(
                    Refusal.STALE,
                    f"{self.model.spec.revision!r} is loaded: an executor holds one model for its life",
                )
            return self.model
        if self.state is State.LOADING and self._loading is not None:
            if self._loading_spec != spec:
                raise Refused(Refusal.BUSY, "another model is being loaded")
            return await asyncio.shield(self._loading)
        if self.state is not State.WARM:
            raise Refused(Refusal.STALE, f"this executor is {self.state.value}: it loads no model")
        self._loading_spec = spec
        self._loading = asyncio.create_task(self._run_load(spec), name="load-model")
        self._loading.add_done_callback(_seen)
        self._to(State.LOADING)
        return await asyncio.shield(self._loading)

    async def _run_load(self, spec: LoadSpec) -> Model:
        started = self._clock()
        log.info("loading %s from %s", spec.revision, spec.path)
        try:
            model = await asyncio.to_thread(self._load, spec, self.role)
        except LoadFailed as failure:
            self._load_failed(spec, failure)
            raise
        except Exception as error:  # a task boundary: whatever a loader raises, the executor is warm again
            log.exception("loading %s failed", spec.revision)
            internal = LoadFailed(LoadReason.INTERNAL, f"{type(error).__name__}: {error}")
            self._load_failed(spec, internal)
            raise internal from error
        seconds = self._clock() - started
        if self.state is not State.LOADING:  # drained or failed meanwhile
            await asyncio.to_thread(model.close)
            raise LoadFailed(LoadReason.STOPPED, f"this executor is {self.state.value} now")
        model.load_seconds = seconds
        self.model = model
        model.engine.set_role(self.role)
        self._on_model(model)
        metrics.LOADS.labels("ok").inc()
        metrics.LOAD_SECONDS.set(seconds)
        model.start.observe()
        log.info("loaded %s in %.2f s: %d blocks (%s)", spec.revision, seconds, model.num_blocks, model.start)
        self._to(State.READY)
        return model

    def _load_failed(self, spec: LoadSpec, failure: LoadFailed) -> None:
        log.error("loading %s failed: %s", spec.revision, failure)
        metrics.LOADS.labels(failure.reason.value).inc()
        if self.state is State.LOADING:
            self._to(State.WARM, f"loading {spec.revision} failed: {failure}")

    # -- role ------------------------------------------------------------------------------------

    def set_role(self, role: Role, epoch: int) -> None:
        """Raises Refused for an epoch that is not above the current one (repeating it is fine)."""
        if (role, epoch) == (self.role, self.role_epoch):
            return
        if epoch <= self.role_epoch:
            metrics.ROLE_REFUSED.inc()
            raise Refused(
                Refusal.STALE,
                f"role {role.value} of epoch {epoch} is stale: {self.role.value} of epoch {self.role_epoch}",
            )
        log.info("role %s, epoch %d (was %s, %d)", role.value, epoch, self.role.value, self.role_epoch)
        self.role, self.role_epoch = role, epoch
        if self.model is not None:
            self.model.engine.set_role(role)
        metrics.ROLE.state(role.value)
        metrics.ROLE_EPOCH.set(epoch)
        self._on_change()

    # -- the end ---------------------------------------------------------------------------------

    async def drain(self, timeout: float) -> DrainResult:
        """No new tasks from now on; waits at most `timeout` seconds for running tasks and offers."""
        started = self._clock()
        if self.state is not State.FAILED and self.state is not State.DRAINING:
            self._to(State.DRAINING)
        result = self._left()
        while not result.drained and self._clock() - started < timeout:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
            result = self._left()
        metrics.DRAIN_SECONDS.set(self._clock() - started)
        metrics.DRAIN_LEFT.labels("tasks").set(result.tasks_left)
        metrics.DRAIN_LEFT.labels("transfers").set(result.transfers_left)
        log.info(
            "drained for %.2f s: %d tasks, %d transfers left",
            self._clock() - started,
            result.tasks_left,
            result.transfers_left,
        )
        return result

    def _left(self) -> DrainResult:
        tasks = self.model.engine.active_tasks if self.model is not None else 0
        return DrainResult(tasks, self._transfers_left())

    def fail(self, message: str) -> None:
        """Ends all hope; the process is about to exit."""
        if self.state is not State.FAILED:
            log.critical("failed: %s", message)
            self._to(State.FAILED, message)

    def _to(self, state: State, message: str = "") -> None:
        if state not in _NEXT[self.state]:
            raise AssertionError(f"{self.state.value} -> {state.value}")
        self.state, self.message = state, message
        metrics.STATE.state(state.value)
        self._on_change()


def _seen(task: asyncio.Task[Model]) -> None:
    """Every caller may have gone away: a failed load is logged already."""
    if not task.cancelled():
        task.exception()
