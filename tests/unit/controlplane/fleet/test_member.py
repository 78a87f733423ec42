"""One executor's view: the last report, and what it cannot include yet."""

from __future__ import annotations

from types import SimpleNamespace

from deepflow.v1 import common_pb2, worker_pb2

from controlplane.fleet.channel import Link
from controlplane.fleet.member import Member, Unreported
from controlplane.scheduling.types import Role


def member(**fields: object) -> Member:
    values = {
        "te_id": "te",
        "incarnation": "i",
        "address": "h:1",
        "state": worker_pb2.EXECUTOR_STATE_READY,
        "model_revision": "m@1",
        "role": common_pb2.ROLE_PREFILL,
        "role_epoch": 2,
        "kv_blocks": 100,
        "block_tokens": 16,
        "max_tasks": 8,
        **fields,
    }
    channel = SimpleNamespace(usable=True, link=Link.UP, last_heard=0.0, last_error="", open_tasks=0)
    return Member(worker_pb2.ExecutorRecord(**values), channel)  # type: ignore[arg-type]


def report(**fields: object) -> common_pb2.LoadReport:
    return common_pb2.LoadReport(kv_blocks_total=100, **{"kv_blocks_free": 50, **fields})  # type: ignore[arg-type]


def test_before_the_first_report_the_record_counts() -> None:
    view = member().view(0.0)
    assert (view.kv_blocks_total, view.kv_blocks_free, view.max_tasks) == (100, 100, 8)
    assert view.ready and view.link_up and view.role is Role.PREFILL


def test_submits_count_until_the_executor_speaks_of_them() -> None:
    te = member()
    te.reported(report(waiting=1, queued_prefill_tokens=10), 0.0)
    te.submitted(("a", 1), Unreported(1.0, 100, 7))
    te.submitted(("b", 1), Unreported(1.0, 50, 4))
    view = te.view(1.0)
    assert (view.tasks, view.queued_tokens, view.kv_blocks_free) == (3, 160, 39)
    te.heard(("a", 1))
    assert te.view(1.0).tasks == 2


def test_a_later_report_includes_them_and_a_crossing_one_does_not() -> None:
    te = member()
    te.submitted(("a", 1), Unreported(1.0, 100, 7))
    te.reported(report(), 1.1)
    assert te.view(1.1).tasks == 1
    te.reported(report(), 2.5)
    assert te.view(2.5).tasks == 0


def test_free_blocks_never_go_below_zero() -> None:
    te = member()
    te.reported(report(kv_blocks_free=3), 0.0)
    te.submitted(("a", 1), Unreported(0.5, 100, 7))
    assert te.view(0.5).kv_blocks_free == 0


def test_the_newer_epoch_says_the_role() -> None:
    te = member()
    te.reported(report(role=common_pb2.ROLE_DECODE, role_epoch=3), 0.0)
    assert te.role is Role.DECODE
    te.reported(report(role=common_pb2.ROLE_COLOCATED, role_epoch=1), 0.0)
    assert te.role is Role.PREFILL


def test_draining_is_believed_from_either_side() -> None:
    assert member(state=worker_pb2.EXECUTOR_STATE_DRAINING).draining
    te = member()
    te.reported(report(draining=True), 0.0)
    assert te.draining and not te.serves
    assert te.to_json(0.0)["state"] == "draining"


def test_a_lost_link_forgets_load_and_submits() -> None:
    te = member()
    te.reported(report(waiting=5), 0.0)
    te.submitted(("a", 1), Unreported(1.0, 100, 7))
    te.lost()
    assert te.view(1.0).tasks == 0
    assert te.to_json(0.0)["load"] is None


def test_when_it_can_be_sent_to_is_told_once_a_start() -> None:
    te = member(ready_unix_ms=100_000, state=worker_pb2.EXECUTOR_STATE_LOADING, start_path="hot")
    assert te.reached(100.5, since_unix=50.0) is None  # it loads
    te.record.state = worker_pb2.EXECUTOR_STATE_READY
    assert te.reached(100.5, since_unix=150.0) is None  # ready before this gateway was there
    assert te.reached(100.5, since_unix=50.0) == 0.5
    assert te.reached(101.0, since_unix=50.0) is None
    te.record.model_revision, te.record.ready_unix_ms = "n@1", 102_000
    assert te.reached(101.9, since_unix=50.0) == 0.0  # its clock is ahead
    te.record.ready_unix_ms += 60_000  # it slept and woke: another start of the same model
    assert te.reached(163.0, since_unix=50.0) == 1.0


def test_how_it_started_is_shown() -> None:
    phases = [worker_pb2.StartPhase(phase="te_load", seconds=0.12345)]
    assert member(start_path="hot", start_phases=phases).to_json(0.0)["start"] == {
        "path": "hot", "seconds": {"te_load": 0.1235},
    }  # fmt: skip
    assert member().to_json(0.0)["start"] is None
