"""Passing a pool's descriptor to a peer on the same host: a unix socket with SCM_RIGHTS.

    peer --> {"version":1,"token":…,"incarnation":…[,"image":…]}\\n
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
from dataclasses import dataclass
from pathlib import Path

from kvtransfer.auth import token_matches
from kvtransfer.errors import TransportUnavailable
from kvtransfer.images import ImageStore
from kvtransfer.listener import Listener, peer_uid
from kvtransfer.pool import HostPool
from kvtransfer.sender import Sender

logger = logging.getLogger(__name__)

SOCKET_VERSION = 1
MAX_LINE_BYTES = 4096
EXCHANGE_SECONDS = 2.0
"""Bound of one exchange: local, a few hundred bytes (ours)."""
MAX_CONNECTIONS = 16


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


class PoolServer:
    """Answers peers on one socket in `shm_dir`. `start` and `stop` on the loop that serves it."""

    def __init__(self, sender: Sender, shm_dir: Path, token: str) -> None:
        self._sender = sender
        self._token = token
        name = hashlib.blake2b(f"{sender.te_id}/{sender.incarnation}".encode(), digest_size=12).hexdigest()
        self.path = shm_dir / f"kv-{name}.sock"
        self._listener = Listener(self._answer, MAX_CONNECTIONS)

    def start(self) -> None:
        """Raises OSError where the socket cannot be made (folder missing, path too long)."""
        self._listener.listen_unix(self.path)

    async def stop(self) -> None:
        await self._listener.stop()

    async def _answer(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(EXCHANGE_SECONDS):
                request = json.loads(await _read_line(connection))
                reason = self._refusal(connection, request)
                store, pool_id = (None, "") if reason else self._asked(str(request.get("image", "")))
                if store is None or store.fd < 0:
                    answer = {"ok": False, "reason": reason or "no such memory on this host"}
                    await loop.sock_sendall(connection, _line(answer))
                    return
                answer = {"ok": True, "pool_id": pool_id, "num_blocks": store.num_blocks}
                # A fresh socket's buffer is empty: this line always fits and does not block.
                socket.send_fds(connection, [_line(answer)], [store.fd])
        except (OSError, ValueError, TimeoutError) as error:
            logger.warning("pool socket: a peer's request failed: %s", error)

    def _asked(self, image: str) -> tuple[HostPool | ImageStore | None, str]:
        """The pool, or an image of weights that is being fed; and what it is called."""
        if image:
            images = self._sender.images
            return (None if images is None else images.store_of(image)), image
        store = self._sender.store
        return (store if isinstance(store, HostPool) else None), self._sender.pool_id

    def _refusal(self, connection: socket.socket, request: object) -> str:
        if peer_uid(connection) != os.getuid():
            return "another user"
        if not isinstance(request, dict) or request.get("version") != SOCKET_VERSION:
            return f"version {SOCKET_VERSION} is spoken here"
        if not token_matches(str(request.get("token", "")), self._token):
            return "wrong cluster token"
        if request.get("incarnation") != self._sender.incarnation:
            return "another incarnation"
        return ""


async def request_pool(path: Path, incarnation: str, token: str, image: str = "") -> PassedPool:
    """Asks the peer that listens at `path` for its pool, or for an image of weights that it feeds us. Raises
    TransportUnavailable."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
        try:
            async with asyncio.timeout(EXCHANGE_SECONDS):
                await loop.sock_connect(connection, os.fspath(path))
                if peer_uid(connection) != os.getuid():
                    raise TransportUnavailable("user", "the pool socket belongs to another user")
                request = {"version": SOCKET_VERSION, "token": token, "incarnation": incarnation}
                if image:
                    request["image"] = image
                await loop.sock_sendall(connection, _line(request))
                await _readable(connection)
                data, fds, _, _ = socket.recv_fds(connection, MAX_LINE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except (OSError, TimeoutError) as error:
            raise TransportUnavailable("socket", f"{path}: {error or 'no answer'}") from error
    try:
        answer = json.loads(data or b"{}")
        if answer.get("ok") and fds:
            return PassedPool(fds.pop(0), str(answer["pool_id"]), int(answer["num_blocks"]))
        raise TransportUnavailable("refused", f"{path}: {answer.get('reason', 'closed without an answer')}")
    except (ValueError, KeyError) as error:
        raise TransportUnavailable("protocol", f"{path}: {error}") from error
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
