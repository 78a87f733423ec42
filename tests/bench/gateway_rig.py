"""What the gateway's bench starts and drives: processes of the stack, peers, and a client that costs little.

The load generator shares the cores with what it measures, so a stream is an `asyncio.Protocol` that counts
events in the bytes as they come and parses nothing until the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import orjson

from controlplane.local.valkey import ValkeyServer
from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from tests.bench import common

MODEL = "bench"
REVISION = "bench@1"
START_SECONDS = 30.0
TICK = os.sysconf("SC_CLK_TCK")
_USAGE = re.compile(rb'"completion_tokens":(\d+)')
_EVENT = b"data: {"
_TAIL = 1024  # bytes kept of a stream's end: usage event, [DONE], last chunk


class Process:
    """A child in its own session, its log beside it; stopped with its group."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, *, env: dict[str, str] | None = None,
        fds: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                pass_fds=fds, env={**os.environ, **(env or {})}, cwd=common.ROOT,
            )  # fmt: skip
        self.pid = self._child.pid

    def signal(self, number: int) -> None:
        self._child.send_signal(number)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._child.wait(10)

    def check(self) -> None:
        if self._child.poll() is not None:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self.name} ended with {self._child.returncode}:\n{tail}")

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def rss(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def wait_for(condition: object, process: Process, what: str) -> None:
    assert callable(condition)
    ends = time.perf_counter() + START_SECONDS
    while not condition():
        process.check()
        if time.perf_counter() > ends:
            raise TimeoutError(f"{what} within {START_SECONDS:g} s")
        time.sleep(0.05)


def get(port: int, path: str) -> int:
    """The status of a GET; 0 if nobody answers."""
    try:
        with socket.create_connection(("127.0.0.1", port), 2) as connection:
            connection.settimeout(5)
            connection.sendall(b"GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n" % path.encode())
            return int((connection.recv(64).split() or [b"", b"0"])[1])
    except (OSError, ValueError, IndexError):
        return 0


@dataclass
class Rig:
    """One Valkey, one token source and `gateways` processes that share a port."""

    folder: Path
    url: str
    port: int
    source: Process
    source_address: str
    source_tasks_address: str  # of the stream without gRPC, which the gateway uses
    gateways: list[Process]

    def cpu(self) -> float:
        return sum(gateway.cpu() for gateway in self.gateways)

    def rss(self) -> int:
        return sum(gateway.rss() for gateway in self.gateways)


@contextlib.contextmanager
def rig(
    *, token_seconds: float, gateways: int = 1, module: str = "controlplane.gateway",
    env: dict[str, str] | None = None,
) -> Iterator[Rig]:  # fmt: skip
    """`token_seconds` 0: tokens as fast as the source makes them and the streams take them."""
    folder = Path(tempfile.mkdtemp(prefix="dfb-"))
    started: list[Process] = []
    valkey = ValkeyServer(folder / "v")
    listening = socket.socket()
    try:
        valkey.start()
        endpoint = folder / "source.json"
        source = Process(
            "source",
            [sys.executable, "-m", "tests.fakes.token_source", "--revision", REVISION,
             "--redis-url", valkey.url, "--token-seconds", str(token_seconds),
             "--max-tasks", "8192", "--kv-blocks", "4000000",
             "--prefill-rate", "1e9", "--no-kv-events", "--endpoint-file", str(endpoint)],
            folder,
        )  # fmt: skip
        started.append(source)
        wait_for(endpoint.exists, source, "no token source")
        catalogue = folder / "catalogue.json"
        path = fetch(DEFAULT_MODEL_URI).path
        entry = {"id": MODEL, "revision": REVISION, "aliases": [], "path": str(path), "max_model_len": 8192,
                 "dtype": "float32", "default": True}  # fmt: skip
        catalogue.write_bytes(orjson.dumps({"models": [entry]}))
        listening.bind(("127.0.0.1", 0))
        listening.listen(2048)
        port = listening.getsockname()[1]
        made = []
        for number in range(gateways):
            ready = folder / f"gw-{number}.json"
            gateway = Process(
                f"gw-{number}",
                [sys.executable, "-m", module, "--fd", str(listening.fileno()), "--redis-url", valkey.url,
                 "--catalogue", str(catalogue), "--gateway-id", f"gw-{number}", "--endpoint-file", str(ready),
                 "--log-level", "WARNING"],
                folder, fds=[listening.fileno()],
                env={"DEEPFLOW_CLUSTER_TOKEN": "secret", "DEEPFLOW_GATEWAY_MAX_IN_FLIGHT": "4096",
                     "DEEPFLOW_JOBS_SEND_QUEUE": "4096", "DEEPFLOW_JOBS_MAX_HELD": "4096", **(env or {})},
            )  # fmt: skip
            started.append(gateway)
            made.append(gateway)
            wait_for(ready.exists, gateway, "no gateway")
        wait_for(lambda: get(port, "/readyz") == 200, made[0], "not ready")
        said = json.loads(endpoint.read_text())
        yield Rig(folder, valkey.url, port, source, said["address"], said["tasks_address"], made)
        for process in started:
            process.check()
    finally:
        listening.close()
        for process in reversed(started):
            process.stop()
        valkey.kill()
        shutil.rmtree(folder, ignore_errors=True)


# -- the client ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Answer:
    """One streamed answer. Times on perf_counter; `tokens` as the server counted them, 0: it was cut."""

    started: float
    first: float = 0.0
    last: float = 0.0
    ended: float = 0.0
    events: int = 0
    tokens: int = 0
    ok: bool = False
    longest_gap: float = 0.0
    body: bytearray = field(default_factory=bytearray)


class Stream(asyncio.Protocol):
    """A keep-alive connection that asks one request after the other."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._socket: Any = None
        self._done: asyncio.Future[None] | None = None
        self._answer: Answer | None = None
        self._tail = b""
        self._keep = False
        self._stop_after = 0

    async def ask(
        self, port: int, request: bytes, *, keep: bool = False, stop_after: int = 0, slow: float = 0.0
    ) -> Answer:
        """`stop_after` events the connection is dropped. `slow`: seconds between short spells of reading."""
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            await loop.create_connection(lambda: self, "127.0.0.1", port)
        assert self._transport is not None
        self._done = loop.create_future()
        self._tail, self._keep, self._stop_after = b"", keep, stop_after
        self._answer = answer = Answer(time.perf_counter())
        self._transport.write(request)
        if slow:
            while not self._done.done():
                self._transport.pause_reading()
                await asyncio.sleep(slow)
                if self._transport.is_closing():
                    break
                self._transport.resume_reading()
                await asyncio.wait([self._done], timeout=0.02)
        await self._done
        answer.ended = time.perf_counter()
        found = _USAGE.search(self._tail)
        answer.tokens = int(found[1]) if found else 0
        answer.ok = found is not None and b"data: [DONE]" in self._tail
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._socket = self._transport.get_extra_info("socket")

    def data_received(self, data: bytes) -> None:
        # A front end that leaves Nagle on (Dynamo's does) would else stand still until our delayed
        # acknowledgement, 40 ms: that is the pair of defaults, not its work. The kernel forgets it each time.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        answer = self._answer
        if answer is None or self._done is None or self._done.done():
            return
        joined = self._tail + data
        # What the tail holds was counted before, but for an event that it holds the beginning of.
        new = joined.count(_EVENT, max(0, len(self._tail) - len(_EVENT) + 1))
        if new:
            now = time.perf_counter()
            answer.events += new
            if not answer.first:
                answer.first = now
            else:
                answer.longest_gap = max(answer.longest_gap, now - answer.last)
            answer.last = now
        if self._keep:
            answer.body += data
        self._tail = joined[-_TAIL:]
        if self._tail.endswith(b"0\r\n\r\n"):
            self._done.set_result(None)
        elif self._stop_after and answer.events >= self._stop_after:
            assert self._transport is not None
            self._transport.abort()
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


def chat_request(
    *, words: int, max_tokens: int, model: str = MODEL, seed: int = 0, stream: bool = True
) -> bytes:
    """A whole HTTP request: a chat of `words` words of running text, distinct by `seed`."""
    begin = seed * 37 % (len(_WORDS) - words)
    text = f"Question {seed}. " + " ".join(_WORDS[begin : begin + words])
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens,
            "temperature": 0, "seed": seed, "ignore_eos": True, "stream": stream}  # fmt: skip
    if stream:
        body["stream_options"] = {"include_usage": True}
    data = orjson.dumps(body)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


_WORDS = (common.ROOT / "tests" / "data" / "moby_dick_chapter_1.txt").read_text().split()


async def closed_loop(
    port: int,
    clients: int,
    requests: int,
    *,
    words: int,
    max_tokens: int,
    model: str = MODEL,
    first_seed: int = 0,
) -> tuple[list[Answer], float]:
    """`requests` requests, `clients` at a time: their answers and the wall seconds of all."""
    left = iter(range(requests))
    answers: list[Answer] = []

    async def one() -> None:
        connection = Stream()
        for number in left:
            request = chat_request(words=words, max_tokens=max_tokens, model=model, seed=first_seed + number)
            answers.append(await connection.ask(port, request))
        connection.close()

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return answers, time.perf_counter() - started
