"""A gateway under uvicorn in the test's own loop, with real Valkey, a real tokenizer and an echo executor."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI
from redis.asyncio import Redis

from controlplane.gateway.app import create_app
from controlplane.gateway.server import GatewayServer, uvicorn_config
from controlplane.gateway.settings import GatewaySettings
from controlplane.gateway.state import Gateway
from tests.integration.gateway.doubles import EchoExecutor, EchoRuntime

MODEL = "smollm2-135m-instruct"
REVISION = f"{MODEL}@0123456789ab"


@dataclass
class Stack:
    """A running gateway and everything to look into it."""

    app: FastAPI
    server: GatewayServer
    runtime: EchoRuntime
    port: int
    redis: Redis
    task: asyncio.Task[None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def executor(self) -> EchoExecutor:
        return self.runtime.executor

    @property
    def gateway(self) -> Gateway:
        gateway: Gateway = self.app.state.gateway
        return gateway

    def client(self, key: str = "EMPTY", **options: Any) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def sync_client(self, key: str = "EMPTY") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def http(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=20, **options)

    def decode(self, ids: Any) -> str:
        return self.gateway.catalogue.resolve(MODEL).table.decode(ids)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.gateway.catalogue.resolve(MODEL).tokenizer.encode(text).ids
        return ids


StartStack = Callable[..., Awaitable[Stack]]


@pytest.fixture
def catalogue_path(tmp_path: Path, small_model_path: Path) -> Path:
    path = tmp_path / "catalogue.json"
    write_catalogue(path, [catalogue_entry(small_model_path)])
    return path


def catalogue_entry(path: Path, **changes: Any) -> dict[str, Any]:
    entry = {
        "id": MODEL,
        "revision": REVISION,
        "aliases": ["small"],
        "path": str(path),
        "max_model_len": 2048,
    }
    return {**entry, "dtype": "float32", "default": True, **changes}


def write_catalogue(path: Path, entries: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_bytes(orjson.dumps({"models": entries}))
    temporary.replace(path)


@pytest.fixture
async def start(clean_valkey: str, catalogue_path: Path) -> AsyncIterator[StartStack]:
    stacks: list[Stack] = []

    async def make(**settings: Any) -> Stack:
        values = {"redis_url": clean_valkey, "catalogue_path": str(catalogue_path), "drain_seconds": 1}
        made = GatewaySettings.model_validate({**values, **settings})
        runtime = EchoRuntime()
        app = create_app(made, runtime=runtime.open)
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        ready = asyncio.Event()
        server = GatewayServer(uvicorn_config(app, made), made, on_drain=lambda: None, on_started=ready.set)
        task = asyncio.create_task(server.serve(sockets=[listening]))
        stack = Stack(app, server, runtime, listening.getsockname()[1], Redis.from_url(made.redis_url), task)
        stacks.append(stack)
        waiter = asyncio.create_task(ready.wait())
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        assert server.started, "the gateway did not start"
        return stack

    yield make
    for stack in stacks:
        stack.server.begin_drain()
        stack.server.begin_drain()
        await stack.task
        await stack.redis.aclose()


@pytest.fixture
async def stack(start: StartStack) -> Stack:
    return await start()
