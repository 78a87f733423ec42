"""Which gateways are connected, and who is to be told what. On the event loop's thread only.

A stream owns the tasks that came in over it: its `owner` is unique to the stream (not only to the
gateway's incarnation), so what a replaced stream left behind can neither reach its successor nor be
confused with it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import grpc

from flowserve.engine.types import EngineTask, StepEvent
from flowserve.shell import metrics
from flowserve.shell.outbox import Outbox

log = logging.getLogger(__name__)

# Gateway processes of one cluster that may talk to one executor at once (ours).
MAX_STREAMS = 256


class TooManyStreams(Exception):
    """The bound of open streams is reached."""


class GatewayStream:
    """One open Tasks stream."""

    def __init__(self, gateway_id: str, incarnation: str, number: int) -> None:
        self.gateway_id = gateway_id
        self.incarnation = incarnation
        self.owner = f"{gateway_id}/{incarnation}#{number}"
        self.outbox = Outbox()
        self.ending: tuple[grpc.StatusCode, str] | None = None

    @property
    def key(self) -> tuple[str, str]:
        return (self.gateway_id, self.incarnation)

    def end(self, code: grpc.StatusCode, message: str) -> None:
        """Asks the writer to send what waits and to end the call with `code`."""
        if self.ending is None:
            self.ending = (code, message)
        self.outbox.poke()


class Streams:
    """All open streams of this executor."""

    def __init__(self, max_streams: int = MAX_STREAMS) -> None:
        self._by_key: dict[tuple[str, str], GatewayStream] = {}
        self._by_owner: dict[str, GatewayStream] = {}
        self._kinds: dict[tuple[str, int], str] = {}  # of tasks that the engine holds, so bounded by it
        self._numbers = itertools.count(1)
        self._max_streams = max_streams

    def __len__(self) -> int:
        return len(self._by_owner)

    def __iter__(self) -> Iterator[GatewayStream]:
        return iter(tuple(self._by_owner.values()))

    def open(self, gateway_id: str, incarnation: str) -> tuple[GatewayStream, GatewayStream | None]:
        """A new stream, and the one of the same gateway process that it replaces. Raises TooManyStreams."""
        replaced = self._by_key.get((gateway_id, incarnation))
        if replaced is None and len(self) >= self._max_streams:
            raise TooManyStreams(f"{self._max_streams} gateway streams are open here")
        stream = GatewayStream(gateway_id, incarnation, next(self._numbers))
        if replaced is not None:
            self.remove(replaced)
            replaced.end(grpc.StatusCode.ABORTED, "replaced by a newer stream of the same gateway")
        self._by_key[stream.key] = stream
        self._by_owner[stream.owner] = stream
        metrics.STREAMS.set(len(self))
        return stream, replaced

    def remove(self, stream: GatewayStream) -> bool:
        """Nothing is delivered to it any more. False if that was so before."""
        if self._by_owner.pop(stream.owner, None) is None:
            return False
        if self._by_key.get(stream.key) is stream:
            del self._by_key[stream.key]
        stream.outbox.close()
        metrics.STREAMS.set(len(self))
        return True

    def accepted(self, task: EngineTask) -> None:
        """The engine took it."""
        self._kinds[task.key] = task.kind.value

    def dispatch(self, event: StepEvent) -> None:
        """Puts one step's event into the outboxes it concerns; each writer is woken once."""
        for delta in event.deltas:
            if delta.finish is not None:
                outcome = delta.error.code.value if delta.error is not None else delta.finish.value
                kind = self._kinds.pop((delta.task_id, delta.attempt), "unknown")
                metrics.TASKS.labels(kind, outcome).inc()
            stream = self._by_owner.get(delta.owner)
            if stream is not None:  # else its stream is gone: the abort of its tasks is under way
                stream.outbox.add_delta(delta)
        if event.kv_events is not None:
            for stream in self._by_owner.values():
                stream.outbox.add_kv(event.kv_events)

    def poke(self) -> None:
        """State or role changed: every gateway gets a load report now."""
        for stream in self._by_owner.values():
            stream.outbox.poke()

    def restart_kv(self, reason: str) -> None:
        for stream in self._by_owner.values():
            stream.outbox.restart_kv(reason)

    def end_all(self, code: grpc.StatusCode, message: str) -> None:
        for stream in self._by_owner.values():
            stream.end(code, message)
