"""What is known of one HTTP request while it runs: ids, stage times, outcome. Made by `middleware.py`."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import Send

SCOPE_KEY = "deepflow.context"

_REQUEST_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}\Z")
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")


@dataclass(slots=True)
class RequestContext:
    """Times are on the monotonic clock."""

    request_id: str
    traceparent: str
    parent_span: str = ""  # of the client
    started: float = field(default_factory=time.perf_counter)
    mark: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)  # name -> seconds
    route: str = "unknown"
    tenant: str = ""
    key_id: str = ""
    model: str = ""
    job_id: str = ""
    body_bytes: int = 0
    held_seconds: float = 0.0  # waited for its model to wake
    status: int = 0  # as sent; 499 where the client left before its answer ended
    first_token: float | None = None  # seconds after `started`
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    answering: bool = False  # the answer's start was sent
    error: str = ""  # code of the error, in-band or not
    response_headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    send: Send | None = None
    """The server's own `send`. The layers between it and a route change an answer's start alone, so the
    thousands of body messages of a stream go past them."""

    def start(self, status: int) -> list[tuple[bytes, bytes]]:
        """The answer starts with this status: the headers that every answer has."""
        self.answering = True
        self.status = self.status or status
        return [
            (b"x-request-id", self.request_id.encode()),
            (b"traceparent", self.traceparent.encode()),
            *self.response_headers,
        ]

    def stage(self, name: str) -> None:
        """The stage `name` ends now; it began where the last one ended."""
        now = time.perf_counter()
        self.stages[name] = self.stages.get(name, 0.0) + now - (self.mark or self.started)
        self.mark = now


def context_of(request: Request) -> RequestContext:
    context: RequestContext = request.scope[SCOPE_KEY]
    return context


def request_id_from(value: bytes | None) -> str:
    """The client's id where it is a plain one, else a new one."""
    if value is not None and _REQUEST_ID.match(value):
        return value.decode("ascii")
    return f"req_{secrets.token_hex(12)}"


def traceparent_from(value: bytes | None) -> tuple[str, str]:
    """W3C trace context: this server's span in the client's trace and the client's span, or a new trace's."""
    match = _TRACEPARENT.match(value) if value is not None else None
    span = secrets.token_hex(8)
    if match is not None:
        version, trace, parent, flags, rest = match.groups()
        known = (version == b"00" and rest is None) or version not in (b"00", b"ff")
        if known and trace.strip(b"0") and parent.strip(b"0"):
            return f"00-{trace.decode()}-{span}-{flags.decode()}", parent.decode()
    return f"00-{secrets.token_hex(16)}-{span}-01", ""
