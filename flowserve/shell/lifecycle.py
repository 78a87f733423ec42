"""The states of one executor, its role under an epoch, and what may happen when.

    WARM --load--> LOADING --ok--> READY --drain--> DRAINING
      ^             ^ |             | \\
      +----failed---|-+             |  +--watchdog--> FAILED        (any state can drain or fail)
              load  |               | sleep
                    +-- SLEEPING <--+

One process serves one model at a time. A model that sleeps has given the memory of its KV back and keeps its
weights in the host's: loading it again wakes it, and another may be loaded meanwhile (sleepers.py).
On the event loop's thread; loading, falling asleep and waking run on a worker thread.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from flowserve.engine.types import ErrorCode, LoadReport, Role, TaskError
from flowserve.shell import metrics
from flowserve.shell.loading import Asleep, LoadFailed, LoadReason, LoadSpec
from flowserve.shell.served import ServedModel
from flowserve.shell.settings import DEFAULT_MAX_ASLEEP
from flowserve.shell.sleepers import Sleepers

log = logging.getLogger(__name__)

DRAIN_POLL_SECONDS = 0.02
DEFAULT_DRAIN_SECONDS = 30.0
"""Of a Drain call that names no timeout (Kubernetes' default grace)."""


MAX_PRELOADED = 8
"""Revisions that are told to have been put into the node's memory (ours)."""


class State(enum.Enum):
    WARM = "warm"
    LOADING = "loading"
    READY = "ready"
    SLEEPING = "sleeping"
    DRAINING = "draining"
    FAILED = "failed"


_NEXT = {
    State.WARM: {State.LOADING, State.DRAINING, State.FAILED},
    State.LOADING: {State.READY, State.WARM, State.SLEEPING, State.DRAINING, State.FAILED},
    State.READY: {State.SLEEPING, State.DRAINING, State.FAILED},
    State.SLEEPING: {State.READY, State.LOADING, State.DRAINING, State.FAILED},
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


@dataclass(frozen=True, slots=True)
class Slept:
    """What a Sleep came to."""

    revision: str = ""  # "" where no model was awake
    seconds: float = 0.0  # from the last task's end until the memory was given back


class ModelLoader(Protocol):
    """What is asked of `flowserve.shell.loading.Loader`: all block, and run on a worker thread."""

    def __call__(self, spec: LoadSpec, role: Role) -> ServedModel: ...

    def wake(self, asleep: Asleep, spec: LoadSpec, role: Role) -> ServedModel: ...

    def preload_weights(self, spec: LoadSpec) -> str: ...


class Lifecycle:
    """State, model and role of this process."""

    def __init__(
        self,
        load: ModelLoader,
        *,
        role: Role,
        on_model: Callable[[ServedModel], None],
        on_sleep: Callable[[], Awaitable[None]],
        on_change: Callable[[], None],
        transfers_left: Callable[[], int],
        max_asleep: int = DEFAULT_MAX_ASLEEP,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_model` makes a loaded model reachable, `on_sleep` undoes that before it sleeps; they are
        called, as `on_change` is after every change, on the loop. `transfers_left` counts offers."""
        self._load = load
        self._on_model = on_model
        self._on_sleep = on_sleep
        self._on_change = on_change
        self._transfers_left = transfers_left
        self._clock = clock
        self.state = State.WARM
        self.message = ""
        self.role = role
        self.role_epoch = 0
        self.model: ServedModel | None = None
        self._loading: asyncio.Task[ServedModel] | None = None
        self._loading_spec: LoadSpec | None = None
        self.sleepers = Sleepers(max_asleep)
        self._falling: asyncio.Task[Slept] | None = None
        self.preloaded: deque[str] = deque(maxlen=MAX_PRELOADED)  # revisions
        self._preloading = ""  # revision
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

    @property
    def revision(self) -> str:
        """Of the model that is awake; "" without one."""
        return self.model.spec.revision if self.model is not None else ""

    def load_report(self) -> LoadReport:
        """The engine's, with what only the shell knows."""
        report = self.model.engine.load() if self.model is not None else LoadReport()
        return replace(
            report,
            role=self.role,
            role_epoch=self.role_epoch,
            draining=self.state in (State.DRAINING, State.SLEEPING),  # no new tasks, says the protocol
        )

    # -- loading ---------------------------------------------------------------------------------

    async def load_model(self, spec: LoadSpec) -> ServedModel:
        """Loads or wakes, joins a load of the same model under way, or returns what is loaded already.

        Raises LoadFailed (the executor is as before), Refused for another model or a wrong state.
        A caller that goes away does not stop the load. Waits for a model that is falling asleep.
        """
        while self._falling is not None:
            await asyncio.wait((self._falling,))
        if self.state is State.READY and self.model is not None:
            if self.model.spec.revision != spec.revision:
                raise Refused(
                    Refusal.STALE,
                    f"{self.model.spec.revision!r} is loaded: an executor serves one model, until it sleeps",
                )
            return self.model
        if self.state is State.LOADING and self._loading is not None:
            if self._loading_spec != spec:
                raise Refused(Refusal.BUSY, "another model is being loaded")
            return await asyncio.shield(self._loading)
        if self.state not in (State.WARM, State.SLEEPING):
            raise Refused(Refusal.STALE, f"this executor is {self.state.value}: it loads no model")
        self._loading_spec = spec
        self._loading = asyncio.create_task(self._run_load(spec), name="load-model")
        self._loading.add_done_callback(_seen)
        self._to(State.LOADING)
        return await asyncio.shield(self._loading)

    async def _run_load(self, spec: LoadSpec) -> ServedModel:
        started = self._clock()
        log.info("loading %s from %s", spec.revision, spec.path)
        try:
            model = await asyncio.to_thread(self._open, spec)
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

    async def preload(self, spec: LoadSpec) -> tuple[str, float]:
        """Puts the weights of a model that may be loaded next into the node's memory: how they came there,
        and in how many seconds. A caller that goes away does not stop it.

        Raises LoadFailed, Refused while a model is loaded or another is put there.
        """
        if self.state not in (State.WARM, State.SLEEPING):
            raise Refused(Refusal.BUSY, f"this executor is {self.state.value}: it has its model")
        if self._preloading:
            raise Refused(Refusal.BUSY, f"{self._preloading} is put into the node's memory")
        self._preloading = spec.revision
        return await asyncio.shield(asyncio.ensure_future(self._preload(spec)))

    async def _preload(self, spec: LoadSpec) -> tuple[str, float]:
        started = self._clock()
        try:
            came = await asyncio.to_thread(self._load.preload_weights, spec)
        except LoadFailed as failure:
            log.warning("%s is not put into the node's memory: %s", spec.revision, failure)
            metrics.PRELOADS.labels(failure.reason.value).inc()
            raise
        except Exception as error:  # a task boundary: whatever a loader raises, the executor stays warm
            log.exception("%s is not put into the node's memory", spec.revision)
            metrics.PRELOADS.labels(LoadReason.INTERNAL.value).inc()
            raise LoadFailed(LoadReason.INTERNAL, f"{type(error).__name__}: {error}") from error
        finally:
            self._preloading = ""
        if spec.revision in self.preloaded:
            self.preloaded.remove(spec.revision)
        self.preloaded.append(spec.revision)
        metrics.PRELOADS.labels("ok").inc()
        seconds = self._clock() - started
        log.info("%s lies in the node's memory (%s), %.2f s", spec.revision, came, seconds)
        self._on_change()
        return came, seconds

    def _open(self, spec: LoadSpec) -> ServedModel:
        """Wakes or loads; for memory that lacks, models that sleep are given up. On a worker thread."""
        asleep = self.sleepers.take(spec)
        while True:
            try:
                if asleep is not None:
                    return self._load.wake(asleep, spec, self.role)
                return self._load(spec, self.role)
            except LoadFailed as failure:
                asleep = None  # its weights are gone too
                if failure.reason is not LoadReason.NO_MEMORY or not self.sleepers.give_up(str(failure)):
                    raise

    def _load_failed(self, spec: LoadSpec, failure: LoadFailed) -> None:
        log.error("loading %s failed: %s", spec.revision, failure)
        metrics.LOADS.labels(failure.reason.value).inc()
        if self.state is State.LOADING:
            before = State.SLEEPING if len(self.sleepers) else State.WARM
            self._to(before, f"loading {spec.revision} failed: {failure}")

    # -- sleep -----------------------------------------------------------------------------------

    async def sleep(self, timeout: float) -> Slept:
        """No new tasks from now on; when running tasks and offers have ended, within `timeout` seconds, the
        model sleeps. Joins a sleep under way; a caller that goes away does not stop it.

        Raises Refused: BUSY where tasks were left (the model then serves on) or one is being loaded, INVALID
        where the engine's models do not sleep.
        """
        if self._falling is not None:
            return await asyncio.shield(self._falling)
        if self.state in (State.SLEEPING, State.WARM):
            return Slept()
        if self.state is State.LOADING:
            raise Refused(Refusal.BUSY, "a model is being loaded")
        model = self.model
        if self.state is not State.READY or model is None:
            raise Refused(Refusal.STALE, f"this executor is {self.state.value}: nothing sleeps here")
        if not model.can_sleep:
            raise Refused(Refusal.INVALID, "this engine's models do not sleep")
        self._falling = asyncio.create_task(self._fall_asleep(model, timeout), name="sleep")
        self._falling.add_done_callback(_seen)
        self._to(State.SLEEPING)
        return await asyncio.shield(self._falling)

    async def _fall_asleep(self, model: ServedModel, timeout: float) -> Slept:
        try:
            left = await self._rest(timeout, State.SLEEPING)
            if self.state is not State.SLEEPING:
                raise Refused(Refusal.STALE, f"this executor is {self.state.value} now")
            if not left.drained:
                metrics.SLEEPS.labels("busy").inc()
                self._to(State.READY)
                what = f"{left.tasks_left} tasks and {left.transfers_left} transfers"
                raise Refused(Refusal.BUSY, f"{what} were left after {timeout:g} s: it serves on")
            return await self._put_to_sleep(model)
        finally:
            self._falling = None

    async def _put_to_sleep(self, model: ServedModel) -> Slept:
        began, revision = self._clock(), model.spec.revision
        self.model = None
        try:
            await self._on_sleep()
            await asyncio.to_thread(lambda: self.sleepers.add(model.sleep()))
        except Exception as error:  # a task boundary: nobody knows what is left of it
            log.exception("%s could not be put to sleep", revision)
            metrics.SLEEPS.labels("failed").inc()
            self.model = model  # its engine stands still: the watchdog ends the process
            self.fail(f"{revision} could not be put to sleep: {error}")
            raise Refused(Refusal.STALE, self.message) from error
        seconds = self._clock() - began
        metrics.SLEEPS.labels("ok").inc()
        metrics.SLEEP_SECONDS.set(seconds)
        log.info("%s sleeps: %.3f s until its KV memory was given back", revision, seconds)
        self._on_change()
        return Slept(revision, seconds)

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
        result = await self._rest(timeout, self.state)
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

    async def _rest(self, timeout: float, state: State) -> DrainResult:
        """What is left of tasks and offers once none is, or after `timeout` seconds, or in another state."""
        started = self._clock()
        result = self._left()
        while not result.drained and self._clock() - started < timeout and self.state is state:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
            result = self._left()
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


def _seen(task: asyncio.Task[ServedModel] | asyncio.Task[Slept]) -> None:
    """Every caller may have gone away: a failed load is logged already."""
    if not task.cancelled():
        task.exception()
