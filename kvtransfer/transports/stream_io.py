"""Vectored reads and writes of whole buffers on a non-blocking socket, for worker threads.

The socket stays non-blocking because the event loop uses it between two copies. `progress` bounds the
time without a byte, `stop` ends a wait from another thread (which also shuts the socket down).
"""

from __future__ import annotations

import select
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence

IOV = 1000
"""Buffers of one call; Linux takes 1,024 (IOV_MAX)."""
CALL_BYTES = 1 << 20
"""Bytes of one call: the next one fills the buffer while the peer empties it."""


class Stopped(Exception):
    """The copy was cancelled."""


class SocketIO:
    def __init__(self, connection: socket.socket, stop: threading.Event, progress: float) -> None:
        self._socket = connection
        self._stop = stop
        self._progress = progress
        self._poller = select.poll()

    def send(self, buffers: Sequence[memoryview]) -> None:
        """Writes all. Raises OSError (TimeoutError without progress), Stopped."""
        self._all(buffers, self._socket.sendmsg, select.POLLOUT)

    def receive(self, buffers: Sequence[memoryview]) -> None:
        """Fills all. Raises as `send`; ConnectionError for an end before."""
        self._all(buffers, self._read, select.POLLIN)

    def receive_bytes(self, count: int) -> bytes:
        data = bytearray(count)
        self.receive([memoryview(data)])
        return bytes(data)

    def _read(self, some: list[memoryview]) -> int:
        count, _, _, _ = self._socket.recvmsg_into(some)
        if not count:
            raise ConnectionError("the peer closed the connection")
        return count

    def _all(
        self, buffers: Sequence[memoryview], call: Callable[[list[memoryview]], int], event: int
    ) -> None:
        waiting = [buffer for buffer in reversed(buffers) if buffer]
        while waiting:
            if self._stop.is_set():
                raise Stopped
            some: list[memoryview] = []
            room = CALL_BYTES
            for buffer in reversed(waiting):
                some.append(buffer[:room])
                room -= len(some[-1])
                if not room or len(some) == IOV:
                    break
            try:
                done = call(some)
            except BlockingIOError:
                self._wait(event)
                continue
            while done:
                buffer = waiting.pop()
                if done < len(buffer):
                    waiting.append(buffer[done:])
                    break
                done -= len(buffer)

    def _wait(self, event: int) -> None:
        self._poller.register(self._socket, event)
        deadline = time.monotonic() + self._progress
        while not self._stop.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no byte in {self._progress:g} s")
            # `stop` comes with a shutdown of the socket, which wakes this at once.
            if self._poller.poll(left * 1000):
                return
        raise Stopped


def checksum(buffers: Sequence[memoryview]) -> int:
    """CRC-32 over the buffers as if they were one."""
    crc = 0
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    return crc
