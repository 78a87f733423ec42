"""Vectored reads and writes of whole buffers on a socket, for worker threads.

The socket blocks while a copy runs: one call moves megabytes, and the kernel waits inside it. Between two
copies it is the event loop's, which needs it non-blocking. `progress` bounds the time without a byte; `stop`
ends a wait from another thread, with a shutdown of the socket.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence

IOV = 1000
"""Buffers of one call; Linux takes 1,024 (IOV_MAX)."""
CALL_BYTES = 4 << 20
"""Bytes of one call: as many as a frame has, see FRAME_BYTES of `stream_wire`."""
_TIMEVAL = struct.Struct("@ll")


class Stopped(Exception):
    """The copy was cancelled."""


class SocketIO:
    """Use within `blocking`."""

    def __init__(self, connection: socket.socket, stop: threading.Event, progress: float) -> None:
        self._socket = connection
        self._stop = stop
        self._progress = progress

    @contextlib.contextmanager
    def blocking(self) -> Iterator[None]:
        """For the time of a copy. Raises OSError for a socket that was closed."""
        bound = _TIMEVAL.pack(int(self._progress), int(self._progress % 1 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bound)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
        self._socket.setblocking(True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # closed meanwhile
                self._socket.setblocking(False)

    def send(self, buffers: Sequence[memoryview]) -> None:
        """Writes all. Raises OSError (TimeoutError without progress), Stopped."""
        self._all(buffers, self._socket.sendmsg)

    def receive(self, buffers: Sequence[memoryview]) -> None:
        """Fills all. Raises as `send`; ConnectionError for an end before."""
        self._all(buffers, self._read)

    def receive_bytes(self, count: int) -> bytes:
        data = bytearray(count)
        self.receive([memoryview(data)])
        return bytes(data)

    def _read(self, some: list[memoryview]) -> int:
        count, _, _, _ = self._socket.recvmsg_into(some, 0, socket.MSG_WAITALL)
        if not count:
            raise ConnectionError("the peer closed the connection")
        return count

    def _all(self, buffers: Sequence[memoryview], call: Callable[[list[memoryview]], int]) -> None:
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
            except BlockingIOError as error:
                raise TimeoutError(f"no byte in {self._progress:g} s") from error
            while done:
                buffer = waiting.pop()
                if done < len(buffer):
                    waiting.append(buffer[done:])
                    break
                done -= len(buffer)


def checksum(buffers: Sequence[memoryview]) -> int:
    """CRC-32 over the buffers as if they were one."""
    crc = 0
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    return crc
