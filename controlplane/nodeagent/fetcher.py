"""The fetcher of an executor's pod: brings a model's files into the volume that both containers share.

The operator asks it, again and again, until the files are there; asking starts a fetch or joins the one under
way, so a lost answer or a new leader costs nothing. Every call carries the cluster token.

    POST /v1/models {"uri": …} -> {"state": "fetching" | "ready" | "failed", "path", "sha256", "done", …}

Once the files are there it publishes the model's card (`controlplane.fleet.cards`) in the Redis of
$REDIS_URL, for gateways tokenize and have no model files.

Run as `python -m controlplane.nodeagent.fetcher --listen HOST:PORT`; imports no torch.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import logging
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from redis.asyncio import Redis
from redis.exceptions import RedisError

from controlplane.fleet.cards import publish_card
from controlplane.nodeagent.errors import SourceError, SourceFault
from controlplane.nodeagent.sources import FetchedModel, Progress, fetch
from kvtransfer.tls import Tls, TlsError, from_environment

MAX_MODELS = 64
"""Fetches that are remembered; those that ended longest ago go first (their files stay)."""
MAX_RUNNING = 2
MAX_BODY_BYTES = 16 << 10
CARD_TRIES = 12
CARD_WAIT_SECONDS = 0.5
CARD_WAIT_MAX_SECONDS = 30.0
"""Between tries while Redis is away: about five minutes in all, then at the next fetch (ours)."""
HOPELESS = {
    SourceFault.BAD_URI, SourceFault.NOT_FOUND, SourceFault.MISSING_MEMBER, SourceFault.WRONG_CHECKSUM,
}  # fmt: skip

log = logging.getLogger("deepflow.fetcher")


class Fetcher:
    """Fetches by URI. On one event loop; fetching itself blocks, in threads."""

    def __init__(
        self, cache: Path | None = None, publish: Callable[[FetchedModel], Awaitable[None]] | None = None
    ) -> None:
        """`publish` is called with every fetched model; it may raise RedisError, OSError, ValueError."""
        self._cache = cache
        self._publish = publish
        self._running: dict[str, asyncio.Task[None]] = {}
        self._state: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._slots = asyncio.Semaphore(MAX_RUNNING)

    def ask(self, uri: str) -> dict[str, Any]:
        """Its state; starts a fetch unless one runs or has succeeded. A failure is told once, and the call
        after that begins anew."""
        state = self._state.get(uri)
        if state is not None and state["state"] == "failed":
            return self._state.pop(uri)
        if state is None:
            if len(self._running) >= MAX_MODELS:
                return {"state": "failed", "message": "too many fetches at once", "hopeless": False}
            state = self._state[uri] = {"state": "fetching", "phase": "waiting", "done": 0, "total": None}
            self._running[uri] = asyncio.create_task(self._fetch(uri), name=f"fetch-{uri[:60]}")
        self._state.move_to_end(uri)
        return state

    async def close(self) -> None:
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _fetch(self, uri: str) -> None:
        loop = asyncio.get_running_loop()

        def report(progress: Progress) -> None:
            loop.call_soon_threadsafe(self._progress, uri, progress)

        try:
            async with self._slots:
                model = await asyncio.to_thread(fetch, uri, self._cache, report)
            self._state[uri] = _ready(model)
            log.info("fetched %s: %s", uri, model.path)
            await self._tell(model)
        except SourceError as error:
            log.error("cannot fetch %s", error)
            self._state[uri] = {
                "state": "failed", "message": str(error)[:1000], "hopeless": error.fault in HOPELESS,
            }  # fmt: skip
        except Exception as error:  # a task boundary: reported to whoever asks
            log.exception("fetching %s failed", uri)
            self._state[uri] = {"state": "failed", "message": f"{type(error).__name__}: {error}"[:1000],
                                "hopeless": False}  # fmt: skip
        finally:
            del self._running[uri]
            while len(self._state) > MAX_MODELS:
                ended = next((known for known in self._state if known not in self._running), None)
                if ended is None:
                    break
                del self._state[ended]

    async def _tell(self, model: FetchedModel) -> None:
        """Its card. The files are ready all the same: a model without one serves whoever has it."""
        wait = CARD_WAIT_SECONDS
        for left in reversed(range(CARD_TRIES if self._publish is not None else 0)):
            try:
                assert self._publish is not None
                await self._publish(model)
                log.info("published the card of %s", model.uri)
                return
            except ValueError as error:
                log.error("no card can be made of %s: %s", model.uri, error)
                return
            except (RedisError, OSError, TimeoutError) as error:
                log.warning("the card of %s is not published (%d tries left): %s", model.uri, left, error)
            if left:
                await asyncio.sleep(wait)
                wait = min(2 * wait, CARD_WAIT_MAX_SECONDS)

    def _progress(self, uri: str, progress: Progress) -> None:
        state = self._state.get(uri)
        if state is not None and state["state"] == "fetching":
            state.update(phase=progress.phase, done=progress.done, total=progress.total)


def _ready(model: FetchedModel) -> dict[str, Any]:
    return {
        "state": "ready",
        "path": str(model.path),
        "sha256": model.sha256,
        "bytes": model.bytes,
        "done": model.bytes,
        "total": model.bytes,
    }


def application(fetcher: Fetcher, token: str) -> web.Application:
    """The HTTP face. Without a token it must listen on loopback only."""

    async def models(request: web.Request) -> web.Response:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), token.encode()):
            return web.json_response({"message": "the cluster token is wrong"}, status=401)
        try:
            uri = (await request.json())["uri"]
        except (ValueError, KeyError, TypeError):
            uri = None
        if not isinstance(uri, str) or not 0 < len(uri) <= 1024:
            return web.json_response({"message": "uri must be a string of 1 to 1024 characters"}, status=400)
        return web.json_response(fetcher.ask(uri))

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/v1/models", models)
    app.router.add_get("/healthz", health)

    async def close(_: web.Application) -> None:
        await fetcher.close()

    app.on_cleanup.append(close)
    return app


def publisher(redis: Redis) -> Callable[[FetchedModel], Awaitable[None]]:
    """Makes and publishes cards."""

    async def publish(model: FetchedModel) -> None:
        from controlplane.gateway.modelcard import build_card, encode_card

        card = await asyncio.to_thread(build_card, model.path, sha256=model.sha256)
        await publish_card(redis, model.sha256, encode_card(card), uri=model.uri)

    return publish


async def serve(host: str, port: int, token: str, redis_url: str = "", tls: Tls | None = None) -> None:
    """Until SIGTERM or SIGINT."""
    redis = Redis.from_url(redis_url) if redis_url else None
    fetcher = Fetcher(publish=publisher(redis) if redis is not None else None)
    runner = web.AppRunner(application(fetcher, token), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port, ssl_context=None if tls is None else tls.server_context()).start()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    log.info("serves %s:%d", host, port)
    await stop.wait()
    await runner.cleanup()
    if redis is not None:
        await redis.aclose()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m controlplane.nodeagent.fetcher")
    parser.add_argument("--listen", default="127.0.0.1:7403", help="HOST:PORT")
    host, _, port = parser.parse_args(argv).listen.rpartition(":")
    token = os.environ.get("DEEPFLOW_CLUSTER_TOKEN", "")
    if not token and not host.startswith("127."):
        sys.exit(f"--listen {host} can be reached from other hosts: set DEEPFLOW_CLUSTER_TOKEN")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        tls = from_environment(os.environ)
    except TlsError as error:
        sys.exit(f"the fetcher cannot start: {error}")
    asyncio.run(serve(host, int(port), token, os.environ.get("REDIS_URL", ""), tls))


if __name__ == "__main__":
    main()
