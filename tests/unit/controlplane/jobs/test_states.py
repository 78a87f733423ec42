"""The state machines as data: total, with ends that are ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.jobs.states import (
    JOB_TRANSITIONS,
    TASK_TRANSITIONS,
    IllegalTransition,
    JobEvent,
    JobState,
    TaskEvent,
    TaskState,
    job_end,
    next_job_state,
    next_task_state,
)

ENDS = {TaskEvent.COMPLETE, TaskEvent.FAIL, TaskEvent.CANCEL}


def test_every_state_is_in_the_tables() -> None:
    assert set(TASK_TRANSITIONS) == set(TaskState)
    assert set(JOB_TRANSITIONS) == set(JobState)


@pytest.mark.parametrize("state", TaskState)
def test_a_task_can_end_from_every_live_state_and_never_leaves_an_end(state: TaskState) -> None:
    if state.terminal:
        assert not TASK_TRANSITIONS[state]
    else:
        assert set(TASK_TRANSITIONS[state]) >= ENDS


@given(events=st.lists(st.sampled_from(TaskEvent), max_size=30))
def test_any_events_either_follow_the_table_or_raise_and_change_nothing(events: list[TaskEvent]) -> None:
    state = TaskState.HELD
    for event in events:
        if event in TASK_TRANSITIONS[state]:
            state = next_task_state(state, event)
            assert not (state.terminal and event not in ENDS)
        else:
            with pytest.raises(IllegalTransition):
                next_task_state(state, event)


@given(events=st.lists(st.sampled_from(JobEvent), max_size=10))
def test_a_job_ends_once(events: list[JobEvent]) -> None:
    state, ended = JobState.QUEUED, 0
    for event in events:
        try:
            state = next_job_state(state, event)
        except IllegalTransition:
            continue
        ended += state.terminal
    assert ended <= 1


@given(states=st.lists(st.sampled_from(TaskState), min_size=1, max_size=5))
def test_a_job_ends_with_its_last_task_and_as_the_worst_of_them(states: list[TaskState]) -> None:
    end = job_end(states)
    assert (end is None) == any(not state.terminal for state in states)
    if end is JobEvent.COMPLETE:
        assert set(states) == {TaskState.COMPLETED}
    if end is not None and TaskState.FAILED in states:
        assert end is JobEvent.FAIL
