"""What a request may ask of the connection it came on, below plain ASGI.

ASGI has no word for "is the client's buffer full", "tell me when it leaves" or "the whole body is here", and
answers each with an awaited message. `server.py` puts a `Connection` into the scope of every request; under
another server there is none, and those who would use it fall back on ASGI's messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

from starlette.types import Scope

EXTENSION = "deepflow.connection"


class Connection(Protocol):
    """One request's side of its connection. Nothing here waits."""

    def body(self) -> bytes | None:
        """The whole body, taken; None while more of it is to come."""
        ...

    def full(self) -> bool:
        """The write buffer is at its bound: a send would wait for the client."""
        ...

    def begin(self, headers: Sequence[tuple[bytes, bytes]], data: bytes) -> None:
        """The start of a 200 without a length, and the first part of its body (which may be empty), in one
        write. Names and values of headers go out as they are."""
        ...

    def write(self, data: bytes) -> None:
        """Part of the body of an answer that was started, neither its first message nor its last."""
        ...

    def on_lost(self, callback: Callable[[], None]) -> None:
        """`callback` when the client leaves, at once if it has left, unless its answer has ended."""
        ...

    def abort(self) -> None:
        """Resets the connection: what the client did not read is dropped."""
        ...


def connection_of(scope: Scope) -> Connection | None:
    return cast("Connection | None", (scope.get("extensions") or {}).get(EXTENSION))
