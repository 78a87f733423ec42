"""What one executor's channel does with its tasks' listeners. Its streams: tests/integration/jobs."""

from __future__ import annotations

import asyncio

from deepflow.v1 import common_pb2, worker_pb2

from controlplane.fleet.channel import ChannelSettings, ExecutorChannel, Link


class Listener:
    def __init__(self, *, faulty: bool = False) -> None:
        self.faulty = faulty
        self.deltas: list[int] = []
        self.lost: list[int] = []

    def on_delta(self, te_id: str, delta: worker_pb2.TaskDelta) -> None:
        if self.faulty:
            raise RuntimeError("scripted")
        self.deltas.extend(delta.tokens)

    def on_lost(self, te_id: str, attempt: int, reason: str) -> None:
        self.lost.append(attempt)
        if self.faulty:
            raise RuntimeError("scripted")


def channel_with(**listeners: Listener) -> ExecutorChannel:
    channel = ExecutorChannel(
        worker_pb2.ExecutorRecord(te_id="te", incarnation="i", address="127.0.0.1:1"),
        ChannelSettings("gw", "inc"),
        on_welcome=lambda _: None,
        on_step=lambda _: None,
        on_link=lambda _: None,
    )
    channel.link = Link.UP
    for task_id, listener in listeners.items():
        channel.submit(worker_pb2.SubmitTask(task_id=task_id, attempt=1), listener)
    return channel


def take(channel: ExecutorChannel, *deltas: worker_pb2.TaskDelta) -> None:
    channel._take(worker_pb2.StepEvent(deltas=deltas))


async def test_a_delta_that_cannot_be_taken_in_costs_its_task_alone() -> None:
    bad, good = Listener(faulty=True), Listener()
    channel = channel_with(bad=bad, good=good)
    tokens = [worker_pb2.TaskDelta(task_id=task, attempt=1, tokens=[7]) for task in ("bad", "good")]
    take(channel, *tokens)
    assert (bad.lost, good.deltas, channel.open_tasks) == ([1], [7], 1)
    assert channel._queue[-1].abort.task_id == "bad", "its executor is told"


async def test_every_task_hears_of_the_streams_end() -> None:
    listeners = [Listener(faulty=True), Listener(), Listener()]
    channel = channel_with(**{f"t{index}": listener for index, listener in enumerate(listeners)})
    channel._lose(Link.DOWN, "scripted")
    assert [listener.lost for listener in listeners] == [[1], [1], [1]]
    assert channel.open_tasks == 0


async def test_after_its_finish_a_task_is_forgotten() -> None:
    listener = Listener()
    channel = channel_with(t=listener)
    end = worker_pb2.TaskDelta(task_id="t", attempt=1, finish=common_pb2.FINISH_REASON_STOP)
    take(channel, end)
    channel._lose(Link.DOWN, "scripted")
    assert listener.lost == []


async def test_first_tokens_of_a_step_go_before_those_that_follow_others() -> None:
    heard: list[str] = []

    class Named(Listener):
        def on_delta(self, te_id: str, delta: worker_pb2.TaskDelta) -> None:
            heard.append(delta.task_id)

    channel = channel_with(a=Named(), b=Named(), c=Named())
    starts = {"a": 9, "b": 0, "c": 3}
    take(
        channel,
        *(
            worker_pb2.TaskDelta(task_id=task, attempt=1, start_index=start, tokens=[1])
            for task, start in starts.items()
        ),
    )
    assert heard == ["b"], "a turn of the loop lies in between"
    await asyncio.sleep(0)
    assert heard == ["b", "a", "c"]
    take(
        channel,
        *(worker_pb2.TaskDelta(task_id=t, attempt=1, start_index=n) for t, n in (("a", 10), ("b", 0))),
    )
    take(channel, worker_pb2.TaskDelta(task_id="c", attempt=1, start_index=4))
    assert heard[3:] == ["b", "a", "c"], "steps keep their order"
