"""What is told of a model's start: stages, progress, the seconds that are left."""

from __future__ import annotations

import orjson
from hypothesis import given
from hypothesis import strategies as st

from controlplane.gateway.wake import Stage, Wake, WakeTimes, fleet_stage, seconds_left


def test_the_time_left_is_what_starts_took_less_what_went_by() -> None:
    assert seconds_left(3, typical=10, progress=None) == 7
    assert seconds_left(3, typical=10, progress=0.9) == 7, "what was seen before counts more than a rate"


def test_a_start_slower_than_ever_is_estimated_by_its_progress_or_not_at_all() -> None:
    assert seconds_left(12, typical=10, progress=None) is None
    assert seconds_left(12, typical=10, progress=0.5) == 12
    assert seconds_left(12, typical=None, progress=0.01) is None


@given(st.floats(0, 1e4), st.none() | st.floats(0, 1e4), st.none() | st.floats(0, 1))
def test_the_time_left_is_never_below_zero(
    elapsed: float, typical: float | None, progress: float | None
) -> None:
    left = seconds_left(elapsed, typical=typical, progress=progress)
    assert left is None or left >= 0


def test_the_last_start_counts_as_much_as_all_before() -> None:
    times = WakeTimes()
    assert times.typical("m") is None
    times.observed("m", 30)
    assert times.typical("m") == 30
    times.observed("m", 10)
    assert times.typical("m") == 20


@given(st.lists(st.tuples(st.integers(0, 6000), st.floats(0, 100)), max_size=50))
def test_known_times_are_bounded(seen: list[tuple[int, float]]) -> None:
    times = WakeTimes()
    for key, seconds in seen:
        times.observed(str(key), seconds)
        assert times.typical(str(key)) is not None


def test_a_comment_is_one_event_of_one_line() -> None:
    stage = Stage("Loading", "a detail\nof two lines", 0.25, 40)
    comment = Wake("m", stage, waited=2.04, left=6.0).comment()
    assert comment.startswith(b": waking {") and comment.endswith(b"}\n\n")
    assert comment.count(b"\n") == 2, "a line feed in a detail would end the comment"
    assert orjson.loads(comment.removeprefix(b": waking ")) == {
        "model": "m", "stage": "Loading", "detail": "a detail\nof two lines", "progress": 0.25,
        "waited_seconds": 2.0, "left_seconds": 6.0,
    }  # fmt: skip


def test_the_furthest_executor_of_the_revision_is_told() -> None:
    def one(state: str, revision: str | None = "m@1") -> dict[str, object]:
        return {"state": state, "link": "up", "model_revision": revision}

    assert fleet_stage([], "m@1").name == "waiting_for_executor"
    assert fleet_stage([one("warm", None), one("ready", "m@2")], "m@1").name == "waiting_for_executor"
    assert fleet_stage([one("failed"), one("loading")], "m@1").name == "loading"
    assert fleet_stage([one("loading"), one("ready")], "m@1").name == "connecting"
