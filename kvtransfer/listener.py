"""A bounded asyncio listener: sockets in, one owned task for each connection.

The pool socket (`kvtransfer.shm`) and the data sockets (`kvtransfer.transports.stream_server`) are
served by it. Sockets are non-blocking and close with their task.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path

logger = logging.getLogger(__name__)

MAX_PATH_BYTES = 107
"""sockaddr_un.sun_path less its final zero."""
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Listener:
    """Calls `answer(connection)` for each connection, at most `limit` at once; more are closed at once."""

    def __init__(self, answer: Callable[[socket.socket], Awaitable[None]], limit: int) -> None:
        self._answer = answer
        self._limit = limit
        self._sockets: list[socket.socket] = []
        self._unix: list[Path] = []
        self._accepting: set[asyncio.Task[None]] = set()
        self._serving: set[asyncio.Task[None]] = set()

    def listen_unix(self, path: Path) -> None:
        """Raises OSError where the socket cannot be made (folder missing, path too long)."""
        if len(os.fsencode(path)) > MAX_PATH_BYTES:
            raise OSError(f"socket path is longer than {MAX_PATH_BYTES} bytes: {path}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            path.unlink(missing_ok=True)
            listener.bind(os.fspath(path))
            path.chmod(0o600)
            listener.listen(self._limit)
        except OSError:
            listener.close()
            raise
        self._unix.append(path)
        self._accept_on(listener)

    def listen_tcp(self, host: str, port: int) -> int:
        """Returns the port. Raises OSError where it cannot be bound."""
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(self._limit)
        except OSError:
            listener.close()
            raise
        self._accept_on(listener)
        bound: int = listener.getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Closes the sockets and cancels what is served; returns when all tasks have ended."""
        tasks = [*self._accepting, *self._serving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self._sockets:
            listener.close()
        for path in self._unix:
            path.unlink(missing_ok=True)
        self._sockets, self._unix = [], []

    def _accept_on(self, listener: socket.socket) -> None:
        self._sockets.append(listener)
        self._own(self._accepting, self._accept(listener))

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # descriptors ran out: wait for some to be closed
                logger.warning("%s: accept failed: %s", listener.getsockname(), error)
                await asyncio.sleep(0.1)
                continue
            if len(self._serving) >= self._limit:
                connection.close()
                continue
            connection.setblocking(False)
            self._own(self._serving, self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        with connection:
            await self._answer(connection)

    def _own(self, tasks: set[asyncio.Task[None]], work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def peer_uid(connection: socket.socket) -> int:
    """User of the process at the other end of a unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid
