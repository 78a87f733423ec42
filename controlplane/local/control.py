"""The supervisor's control socket: one JSON object a line, one answer each.

Commands: `{"command": "status"}`, `{"command": "role", "te": ID, "role": ROLE}`,
`{"command": "stop"}`. Answers: `{"ok": true, ...}` or `{"ok": false, "error": TEXT}`. The socket lies in a
folder that only its user can enter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from controlplane.local.errors import NotRunning

MAX_LINE = 65536  # bytes of one command
READ_SECONDS = 30.0
ANSWER_BYTES = 4 << 20  # bound of one answer

Handler = Callable[[dict[str, Any]], dict[str, Any]]


async def serve(path: Path, handler: Handler) -> asyncio.Server:
    """Listens on `path`. The handler is quick and does no I/O; its ValueError becomes the answer's error."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Cancelled when the loop ends: swallowed, since asyncio's own callback would log it as an error.
        ends = (TimeoutError, OSError, ValueError, asyncio.LimitOverrunError, asyncio.CancelledError)
        with contextlib.suppress(*ends):
            while line := await asyncio.wait_for(reader.readline(), READ_SECONDS):
                writer.write(json.dumps(_handle(handler, line)).encode() + b"\n")
                await asyncio.wait_for(writer.drain(), READ_SECONDS)
        writer.close()

    return await asyncio.start_unix_server(answer, sock=_listen(path), limit=MAX_LINE)


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # the state folder's lock is held: nobody else listens here
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o600)
    return listener


def _handle(handler: Handler, line: bytes) -> dict[str, Any]:
    try:
        command = json.loads(line)
        if not isinstance(command, dict):
            raise ValueError("a command is a JSON object")
        return {"ok": True, **handler(command)}
    except ValueError as error:
        return {"ok": False, "error": str(error)}


def ask(path: Path, command: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
    """Sends one command (blocking). Raises NotRunning, or ValueError with the answer's error."""
    received = b""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(timeout)
            client.connect(str(path))
            client.sendall(json.dumps(command).encode() + b"\n")
            while not received.endswith(b"\n"):
                part = client.recv(65536)
                if not part or len(received) > ANSWER_BYTES:
                    break
                received += part
    except OSError as error:
        raise NotRunning(str(error)) from None
    try:
        answer = json.loads(received)
    except ValueError:
        raise NotRunning("the supervisor ended while it answered") from None
    if not answer.pop("ok", False):
        raise ValueError(str(answer.get("error")))
    return dict(answer)
