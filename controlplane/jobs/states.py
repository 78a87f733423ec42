"""State machines of jobs and tasks, as data. Pure; an illegal event raises.

A task here is one choice of a request over all its attempts: prefill and decode are phases of it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class TaskState(enum.StrEnum):
    WAITING = "waiting"  # for its leading sibling's prefill, whose cache it shares
    HELD = "held"  # for an executor
    RUNNING = "running"  # unified, on one executor
    PREFILLING = "prefilling"
    HANDOVER = "handover"  # prefilled; its KV waits for a decode executor
    DECODING = "decoding"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in (TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED)

    @property
    def on_executor(self) -> bool:
        """An attempt is open on an executor and may send deltas."""
        return self in (TaskState.RUNNING, TaskState.PREFILLING, TaskState.DECODING)


class TaskEvent(enum.StrEnum):
    RELEASE = "release"
    PLACE_UNIFIED = "place_unified"
    PLACE_PREFILL = "place_prefill"
    HAND_OVER = "hand_over"
    PLACE_DECODE = "place_decode"
    DECODE_REFUSED = "decode_refused"  # the KV is still on offer
    RETRY = "retry"
    COMPLETE = "complete"
    FAIL = "fail"
    CANCEL = "cancel"


class JobState(enum.StrEnum):
    QUEUED = "queued"  # no task was placed yet
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


class JobEvent(enum.StrEnum):
    START = "start"
    COMPLETE = "complete"
    FAIL = "fail"
    CANCEL = "cancel"


class IllegalTransition(Exception):
    """A programmer's error: the event has no meaning in this state."""


_END = {
    TaskEvent.COMPLETE: TaskState.COMPLETED,
    TaskEvent.FAIL: TaskState.FAILED,
    TaskEvent.CANCEL: TaskState.CANCELLED,
}

TASK_TRANSITIONS: Mapping[TaskState, Mapping[TaskEvent, TaskState]] = {
    TaskState.WAITING: {TaskEvent.RELEASE: TaskState.HELD, **_END},
    TaskState.HELD: {
        TaskEvent.PLACE_UNIFIED: TaskState.RUNNING,
        TaskEvent.PLACE_PREFILL: TaskState.PREFILLING,
        **_END,
    },
    TaskState.RUNNING: {TaskEvent.RETRY: TaskState.HELD, **_END},
    TaskState.PREFILLING: {
        TaskEvent.HAND_OVER: TaskState.HANDOVER,
        TaskEvent.RETRY: TaskState.HELD,
        **_END,
    },
    TaskState.HANDOVER: {
        TaskEvent.PLACE_DECODE: TaskState.DECODING,
        TaskEvent.RETRY: TaskState.HELD,
        **_END,
    },
    TaskState.DECODING: {
        TaskEvent.DECODE_REFUSED: TaskState.HANDOVER,
        TaskEvent.RETRY: TaskState.HELD,
        **_END,
    },
    TaskState.COMPLETED: {},
    TaskState.FAILED: {},
    TaskState.CANCELLED: {},
}

JOB_TRANSITIONS: Mapping[JobState, Mapping[JobEvent, JobState]] = {
    JobState.QUEUED: {
        JobEvent.START: JobState.RUNNING,
        JobEvent.COMPLETE: JobState.COMPLETED,
        JobEvent.FAIL: JobState.FAILED,
        JobEvent.CANCEL: JobState.CANCELLED,
    },
    JobState.RUNNING: {
        JobEvent.START: JobState.RUNNING,
        JobEvent.COMPLETE: JobState.COMPLETED,
        JobEvent.FAIL: JobState.FAILED,
        JobEvent.CANCEL: JobState.CANCELLED,
    },
    JobState.COMPLETED: {},
    JobState.FAILED: {},
    JobState.CANCELLED: {},
}


def next_task_state(state: TaskState, event: TaskEvent) -> TaskState:
    """Raises IllegalTransition."""
    try:
        return TASK_TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"task: {event} in state {state}") from None


def next_job_state(state: JobState, event: JobEvent) -> JobState:
    """Raises IllegalTransition."""
    try:
        return JOB_TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"job: {event} in state {state}") from None


def job_end(states: list[TaskState]) -> JobEvent | None:
    """How a job ends once all of its tasks did: failed before cancelled before completed; None = not yet."""
    if not all(state.terminal for state in states):
        return None
    if TaskState.FAILED in states:
        return JobEvent.FAIL
    return JobEvent.CANCEL if TaskState.CANCELLED in states else JobEvent.COMPLETE
