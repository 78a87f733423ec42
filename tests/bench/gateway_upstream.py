"""An upstream that answers every request with the same stream: what pass-through routers are measured on."""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop

_EVENTS = b"".join(
    b'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"bench","choices":[{"index":0,'
    b'"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
    for _ in range(8)
)
_USAGE = (
    b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":200,"completion_tokens":8}}\n\ndata: [DONE]\n\n'
)
_BODY = _EVENTS + _USAGE
ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY)
)
HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class Upstream(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        lower = head.lower()
        length = 0
        if b"content-length:" in lower:
            length = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
        if len(body) < length:
            return
        self._data = b""
        self._transport.write(ANSWER if head.startswith(b"POST") else HEALTHY)
        if b" HTTP/1.0" in head.split(b"\r\n")[0]:
            self._transport.close()


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
