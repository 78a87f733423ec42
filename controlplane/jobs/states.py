"""Which state a job or a task may enter from which: transitions as data, nothing else.

A task is one placement: a replay is a new task with the next attempt number, so no state is ever left
backwards. `HANDED_OVER` is a prefill task whose KV lies on offer until the decode task has it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class JobState(enum.StrEnum):
    PENDING = "pending"  # admitted, nothing placed yet
    RUNNING = "running"  # at least one task was placed
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class TaskState(enum.StrEnum):
    PENDING = "pending"  # waits for an executor
    ASSIGNED = "assigned"  # sent to an executor, which has not said anything of it
    RUNNING = "running"
    HANDED_OVER = "handed_over"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class TaskEvent(enum.StrEnum):
    ASSIGN = "assign"
    START = "start"  # the first word of the executor
    HAND_OVER = "hand_over"
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"


class JobEvent(enum.StrEnum):
    START = "start"
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"


TASK_TRANSITIONS: Mapping[tuple[TaskState, TaskEvent], TaskState] = {
    (TaskState.PENDING, TaskEvent.ASSIGN): TaskState.ASSIGNED,
    (TaskState.PENDING, TaskEvent.FAIL): TaskState.FAILED,
    (TaskState.PENDING, TaskEvent.CANCEL): TaskState.CANCELLED,
    (TaskState.ASSIGNED, TaskEvent.START): TaskState.RUNNING,
    (TaskState.ASSIGNED, TaskEvent.FAIL): TaskState.FAILED,
    (TaskState.ASSIGNED, TaskEvent.CANCEL): TaskState.CANCELLED,
    (TaskState.RUNNING, TaskEvent.HAND_OVER): TaskState.HANDED_OVER,
    (TaskState.RUNNING, TaskEvent.FINISH): TaskState.DONE,
    (TaskState.RUNNING, TaskEvent.FAIL): TaskState.FAILED,
    (TaskState.RUNNING, TaskEvent.CANCEL): TaskState.CANCELLED,
    (TaskState.HANDED_OVER, TaskEvent.FINISH): TaskState.DONE,
    (TaskState.HANDED_OVER, TaskEvent.FAIL): TaskState.FAILED,
    (TaskState.HANDED_OVER, TaskEvent.CANCEL): TaskState.CANCELLED,
}
JOB_TRANSITIONS: Mapping[tuple[JobState, JobEvent], JobState] = {
    (JobState.PENDING, JobEvent.START): JobState.RUNNING,
    (JobState.PENDING, JobEvent.FAIL): JobState.FAILED,
    (JobState.PENDING, JobEvent.CANCEL): JobState.CANCELLED,
    (JobState.RUNNING, JobEvent.FINISH): JobState.DONE,
    (JobState.RUNNING, JobEvent.FAIL): JobState.FAILED,
    (JobState.RUNNING, JobEvent.CANCEL): JobState.CANCELLED,
}
TERMINAL_TASK_STATES = frozenset({TaskState.DONE, TaskState.FAILED, TaskState.CANCELLED})
TERMINAL_JOB_STATES = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})


class IllegalTransition(Exception):
    """A programmer's error: this event cannot happen in this state."""

    def __init__(self, state: enum.StrEnum, event: enum.StrEnum) -> None:
        super().__init__(f"{event} cannot follow in state {state}")
        self.state = state
        self.event = event


def next_task_state(state: TaskState, event: TaskEvent) -> TaskState:
    """Raises IllegalTransition."""
    try:
        return TASK_TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(state, event) from None


def next_job_state(state: JobState, event: JobEvent) -> JobState:
    """Raises IllegalTransition."""
    try:
        return JOB_TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(state, event) from None
