"""A command in a pod over the API server's WebSocket, against a server that speaks its protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp.web
import orjson
import pytest
from kubernetes.aio import client as kubernetes_client

from controlplane.kube.client import Forbidden, KubeApi, KubeError
from controlplane.kube.execute import PROTOCOL, execute

Handler = Callable[[aiohttp.web.Request], Awaitable[aiohttp.web.StreamResponse]]
Serve = Callable[[Handler], Awaitable[KubeApi]]
COMMAND = ("deepflow", "jobs", "show", "job-1")


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    runners: list[aiohttp.web.AppRunner] = []
    apis: list[KubeApi] = []

    async def start(handler: Handler) -> KubeApi:
        app = aiohttp.web.Application()
        app.router.add_get("/api/v1/namespaces/n/pods/gateway-1/exec", handler)
        runner = aiohttp.web.AppRunner(app)
        await runner.setup()
        runners.append(runner)
        await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
        host = f"http://127.0.0.1:{runner.addresses[0][1]}"
        apis.append(KubeApi(kubernetes_client.Configuration(host=host)))
        return apis[-1]

    yield start
    for api in apis:
        await api.close()
    for runner in runners:
        await runner.cleanup()


def saying(*messages: bytes) -> Handler:
    async def handler(request: aiohttp.web.Request) -> aiohttp.web.StreamResponse:
        assert tuple(request.query.getall("command")) == COMMAND and request.query["container"] == "gateway"
        socket = aiohttp.web.WebSocketResponse(protocols=(PROTOCOL,))
        await socket.prepare(request)
        assert socket.ws_protocol == PROTOCOL
        for message in messages:
            await socket.send_bytes(message)
        await socket.close()
        return socket

    return handler


async def test_output_and_errors_are_told_apart_and_put_together(serve: Serve) -> None:
    api = await serve(
        saying(b"\x01", b'\x01{"id":', b"\x02a remark\n", b'\x01 "j"}', b'\x03{"status":"Success"}')
    )
    done = await execute(api, "n", "gateway-1", "gateway", COMMAND)
    assert (done.code, done.output, done.errors) == (0, b'{"id": "j"}', "a remark\n")


async def test_a_command_that_fails_has_its_code_and_words(serve: Serve) -> None:
    status = {
        "status": "Failure", "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": "3"}]},
    }  # fmt: skip
    api = await serve(saying(b"\x02error: No such job.", b"\x03" + orjson.dumps(status)))
    done = await execute(api, "n", "gateway-1", "gateway", COMMAND)
    assert (done.code, done.errors) == (3, "error: No such job.")


async def test_what_cannot_be_run_says_why(serve: Serve) -> None:
    status = {"status": "Failure", "reason": "InternalError", "message": "no such container", "code": 500}
    with pytest.raises(KubeError, match="no such container"):
        await execute(
            await serve(saying(b"\x03" + orjson.dumps(status))), "n", "gateway-1", "gateway", COMMAND
        )
    with pytest.raises(KubeError, match="ended before"):
        await execute(await serve(saying(b"\x01{")), "n", "gateway-1", "gateway", COMMAND)


async def test_who_may_not_hears_it(serve: Serve) -> None:
    async def refuse(_: aiohttp.web.Request) -> aiohttp.web.StreamResponse:
        return aiohttp.web.json_response({"message": "no"}, status=403)

    with pytest.raises(Forbidden):
        await execute(await serve(refuse), "n", "gateway-1", "gateway", COMMAND)
