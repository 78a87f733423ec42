"""A light streaming HTTP client for load: one connection a request, timestamps per SSE event.

On two cores the client competes with what it measures, so it does as little as possible: no JSON
parsing while the stream runs, no dependency.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import orjson


@dataclass
class StreamRun:
    """One streamed answer: status, times (perf_counter seconds) of each data event, raw events."""

    started: float = 0.0
    status: int = 0
    arrivals: list[float] = field(default_factory=list)
    events: list[bytes] = field(default_factory=list)
    comments: int = 0
    done: bool = False
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def parsed(self) -> list[dict[str, object]]:
        return [orjson.loads(event) for event in self.events]

    def text(self) -> str:
        """The text of choice 0, chat or completion."""
        parts: list[str] = []
        for event in self.parsed():
            for choice in event.get("choices", []):  # type: ignore[attr-defined]  # parsed JSON
                if choice["index"] == 0:
                    parts.append(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
        return "".join(parts)

    def error(self) -> dict[str, object] | None:
        """The error of the answer, in-band or not."""
        if self.status != 200:
            return orjson.loads(self.body) if self.body.startswith(b"{") else {"error": repr(self.body)}
        for event in self.events:
            if event.startswith(b'{"error"'):
                parsed: dict[str, object] = orjson.loads(event)
                return parsed
        return None


async def stream(
    host: str,
    port: int,
    path: str,
    payload: dict[str, object],
    *,
    headers: dict[str, str] | None = None,
    timeout: float = 300,
    stop_after: int | None = None,
    run: StreamRun | None = None,
) -> StreamRun:
    """POSTs `payload` and reads the answer to its end, or drops the connection after `stop_after` events.

    Pass `run` to look at a stream while it goes on.
    """
    run = run or StreamRun()
    run.started = time.perf_counter()
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            body = orjson.dumps(payload)
            lines = [f"POST {path} HTTP/1.1", f"Host: {host}:{port}", "Content-Type: application/json"]
            lines += [f"{k}: {v}" for k, v in (headers or {}).items()]
            lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
            writer.write("\r\n".join(lines).encode() + body)
            await writer.drain()
            run.status = int((await reader.readline()).split()[1])
            while (line := (await reader.readline()).strip()) != b"":
                name, _, value = line.decode("latin-1").partition(":")
                run.headers[name.lower()] = value.strip()
            if run.status != 200 or "text/event-stream" not in run.headers.get("content-type", ""):
                run.body = _dechunk(await reader.read(), run.headers)
                return run
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    data = line[6:].strip()
                    if data == b"[DONE]":
                        run.done = True
                        break
                    run.arrivals.append(time.perf_counter())
                    run.events.append(data)
                    if stop_after is not None and len(run.events) >= stop_after:
                        break
                elif line.startswith(b":"):
                    run.comments += 1
            return run
        finally:
            writer.close()


def _dechunk(data: bytes, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return data
    out = bytearray()
    while data:
        size, _, rest = data.partition(b"\r\n")
        count = int(size or b"0", 16)
        if count == 0:
            break
        out += rest[:count]
        data = rest[count + 2 :]
    return bytes(out)
