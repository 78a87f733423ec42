"""Passing a pool's descriptor to a peer on the same host: a unix socket with SCM_RIGHTS.

    peer --> {"version":1,"token":…,"incarnation":…}\\n
    peer <-- {"ok":true,"pool_id":…,"num_blocks":…}\\n  with one descriptor   |  {"ok":false,"reason":…}\\n

Both ends check that the other runs under the same user (SO_PEERCRED), the server also the cluster
token. The memory file is sealed: a peer cannot write to it nor map it writable.

Two executors see one host only if `host_identity` is equal: boot, user and the socket folder itself
(device and inode), so containers on one host that share no folder fall back to gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import socket
import struct
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path

from kvtransfer.auth import token_matches
from kvtransfer.pool import HostPool
from kvtransfer.sender import Sender

logger = logging.getLogger(__name__)

SOCKET_VERSION = 1
MAX_LINE_BYTES = 4096
EXCHANGE_SECONDS = 2.0
"""Bound of one exchange: local, a few hundred bytes (ours)."""
MAX_CONNECTIONS = 16
MAX_PATH_BYTES = 107
"""sockaddr_un.sun_path less its final zero."""
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class ShmUnavailable(Exception):
    """A peer's pool cannot be mapped; `reason` is one word for the metric."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class PassedPool:
    """A descriptor received from a peer; the caller closes `fd`."""

    fd: int
    pool_id: str
    num_blocks: int


def host_identity(shm_dir: Path | None) -> str:
    """Equal for two processes that can share memory through `shm_dir`; "" where none can be shared."""
    if shm_dir is None:
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        folder = os.stat(shm_dir)
    except OSError as error:
        logger.warning("no shared memory: %s", error)
        return ""
    parts = f"{boot}|{os.getuid()}|{folder.st_dev}:{folder.st_ino}"
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


def _peer_uid(sock: socket.socket) -> int:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid


class PoolServer:
    """Answers peers on one socket in `shm_dir`. `start` and `stop` on the loop that serves it."""

    def __init__(self, sender: Sender, shm_dir: Path, token: str) -> None:
        self._sender = sender
        self._token = token
        name = hashlib.blake2b(f"{sender.te_id}/{sender.incarnation}".encode(), digest_size=12).hexdigest()
        self.path = shm_dir / f"kv-{name}.sock"
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Raises OSError where the socket cannot be made (folder missing, path too long)."""
        if len(os.fsencode(self.path)) > MAX_PATH_BYTES:
            raise OSError(f"socket path is longer than {MAX_PATH_BYTES} bytes: {self.path}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self.path.unlink(missing_ok=True)
            listener.bind(os.fspath(self.path))
            self.path.chmod(0o600)
            listener.listen(MAX_CONNECTIONS)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        self._own(self._accept(listener))

    async def stop(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self.path.unlink(missing_ok=True)

    def _own(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # descriptors ran out: wait for some to be closed
                logger.warning("pool socket: accept failed: %s", error)
                await asyncio.sleep(0.1)
                continue
            if len(self._tasks) > MAX_CONNECTIONS:
                connection.close()
                continue
            self._own(self._answer(connection))

    async def _answer(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with connection:
            connection.setblocking(False)
            try:
                async with asyncio.timeout(EXCHANGE_SECONDS):
                    request = json.loads(await _read_line(connection))
                    reason = self._refusal(connection, request)
                    store = self._sender.store
                    if reason or not isinstance(store, HostPool) or store.fd < 0:
                        answer = {"ok": False, "reason": reason or "no pool in host memory"}
                        await loop.sock_sendall(connection, _line(answer))
                        return
                    answer = {"ok": True, "pool_id": self._sender.pool_id, "num_blocks": store.num_blocks}
                    # A fresh socket's buffer is empty: this line always fits and does not block.
                    socket.send_fds(connection, [_line(answer)], [store.fd])
            except (OSError, ValueError, TimeoutError) as error:
                logger.warning("pool socket: a peer's request failed: %s", error)

    def _refusal(self, connection: socket.socket, request: object) -> str:
        if _peer_uid(connection) != os.getuid():
            return "another user"
        if not isinstance(request, dict) or request.get("version") != SOCKET_VERSION:
            return f"version {SOCKET_VERSION} is spoken here"
        if not token_matches(str(request.get("token", "")), self._token):
            return "wrong cluster token"
        if request.get("incarnation") != self._sender.incarnation:
            return "another incarnation"
        return ""


async def request_pool(path: Path, incarnation: str, token: str) -> PassedPool:
    """Asks the peer that listens at `path` for its pool. Raises ShmUnavailable."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
        try:
            async with asyncio.timeout(EXCHANGE_SECONDS):
                await loop.sock_connect(connection, os.fspath(path))
                if _peer_uid(connection) != os.getuid():
                    raise ShmUnavailable("user", "the pool socket belongs to another user")
                request = {"version": SOCKET_VERSION, "token": token, "incarnation": incarnation}
                await loop.sock_sendall(connection, _line(request))
                await _readable(connection)
                data, fds, _, _ = socket.recv_fds(connection, MAX_LINE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except (OSError, TimeoutError) as error:
            raise ShmUnavailable("socket", f"{path}: {error or 'no answer'}") from error
    try:
        answer = json.loads(data or b"{}")
        if answer.get("ok") and fds:
            return PassedPool(fds.pop(0), str(answer["pool_id"]), int(answer["num_blocks"]))
        raise ShmUnavailable("refused", f"{path}: {answer.get('reason', 'closed without an answer')}")
    except (ValueError, KeyError) as error:
        raise ShmUnavailable("protocol", f"{path}: {error}") from error
    finally:
        for fd in fds:
            os.close(fd)


def _line(message: object) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


async def _read_line(connection: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while not data.endswith(b"\n"):
        piece = await loop.sock_recv(connection, MAX_LINE_BYTES)
        data += piece
        if not piece or len(data) > MAX_LINE_BYTES:
            raise ValueError("no line of a bounded length")
    return data


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, wake)
    try:
        await ready
    finally:
        with contextlib.suppress(ValueError):
            loop.remove_reader(connection)
