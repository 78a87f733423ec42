"""A gateway whose catalogue is what ModelServings say, against the emulated Kubernetes API. Needs Valkey."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from kubernetes.aio import client as kubernetes_client

from controlplane.fleet.cards import publish_card
from controlplane.fleet.demand import DemandReader
from controlplane.gateway.modelcard import build_card, encode_card
from controlplane.kube.client import KubeApi
from controlplane.kube.resources import MODEL_SERVINGS, Json
from tests.integration.gateway.conftest import Stack, StartStack
from tests.integration.gateway.test_gateway_streams import until as until_within
from tests.support.kube_api import KubeApiServer, kube_api

NAME = "tiny"
MANAGER = "test"


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[KubeApiServer]:
    async with kube_api() as running:
        entry = {"name": "c", "cluster": {"server": str(running.url).rstrip("/")}}
        context = {"name": "c", "context": {"cluster": "c", "user": "c", "namespace": "ns"}}
        users = [{"name": "c", "user": {}}]
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "c"}
        config |= {"clusters": [entry], "contexts": [context], "users": users}  # type: ignore[dict-item]  # JSON
        path = tmp_path / "kubeconfig"
        path.write_bytes(orjson.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(path))
        yield running


@pytest.fixture
async def api(server: KubeApiServer) -> AsyncIterator[KubeApi]:
    async with KubeApi(kubernetes_client.Configuration(host=str(server.url).rstrip("/"))) as connected:
        yield connected


async def until(condition: object) -> None:
    """Cards, watches and polls take seconds on a machine that does other things too."""
    await until_within(condition, 20)


def serving(uri: str = "hf://a/b", **spec: Any) -> Json:
    fields = {"model": {"uri": uri, "aliases": ["t"]}, "roles": {"colocated": {"min": 0, "max": 1}}}
    return {
        "apiVersion": MODEL_SERVINGS.api_version,
        "kind": "ModelServing",
        "metadata": {"namespace": "ns", "name": NAME},
        "spec": fields | spec,
    }


async def resolved(api: KubeApi, path: Path) -> str:
    """The operator's part: the revision. Returns the file's digest."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    status = {"metadata": {"namespace": "ns", "name": NAME}, "status": {"revision": f"{NAME}@{digest[:12]}"}}
    await api.apply(MODEL_SERVINGS, status, manager=MANAGER, subresource="status")
    return digest


# `start` comes after `api` everywhere: gateways end, and with them their watches, before the server does.


async def in_cluster(start: StartStack) -> Stack:
    stack = await start(kubernetes=True, catalogue_path="", peek_seconds=0.02)
    stack.executor.serving = False
    await until(lambda: stack.gateway.catalogue.loaded)
    return stack


async def listed(stack: Stack) -> list[tuple[str, bool]]:
    async with stack.http() as http:
        data = (await http.get("/v1/models")).json()["data"]
    return [(model["id"], model["ready"]) for model in data]


async def test_a_serving_at_zero_is_listed_from_the_moment_its_card_is_there(
    api: KubeApi, start: StartStack, small_model_path: Path
) -> None:
    stack = await in_cluster(start)
    body = {"model": NAME, "prompt": "one two three"}
    async with stack.http() as http:
        assert (await http.get("/readyz")).status_code == 200
        assert (await http.post("/v1/completions", json=body)).status_code == 404
        await api.create(MODEL_SERVINGS, serving(), manager=MANAGER)
        await until(lambda: NAME in stack.gateway.catalogue._pending)
        assert await listed(stack) == [(NAME, False)]
        assert (await http.get("/v1/models/t")).json()["max_model_len"] == 0
        early = await http.post("/v1/tokenize", json=body)
        assert early.status_code == 503 and early.json()["error"]["code"] == "model_not_ready"
        first = asyncio.create_task(http.post("/v1/completions", json=body))
        async with asyncio.timeout(20):
            while (await DemandReader(stack.redis).read()).held("ns/tiny") != 1:
                await asyncio.sleep(0.02)
        digest = await resolved(api, small_model_path)
        await publish_card(stack.redis, digest, encode_card(build_card(small_model_path)))
        await until(lambda: bool(stack.gateway.catalogue.models()))
        assert await listed(stack) == [(NAME, False)]
        assert stack.gateway.catalogue.resolve("t").id == NAME
        stack.executor.serving = True
        assert (await first).status_code == 200, "the first request ever was held for the tokenizer, too"
        demand = await DemandReader(stack.redis).read()
        assert not [r for r in demand.gateways.values() if r.ttft], "which is no sign of a slow model"
        await api.delete(MODEL_SERVINGS, "ns", NAME)
        await until(lambda: not stack.gateway.catalogue.models())
        assert (await http.post("/v1/completions", json=body)).status_code == 404


async def test_a_first_start_is_told_as_soon_as_its_files_are_fetched(
    api: KubeApi, start: StartStack, small_model_path: Path
) -> None:
    stack = await in_cluster(start)
    uri = "hf://a/b"
    await api.create(MODEL_SERVINGS, serving(uri, options={"quantization": "int8"}), manager=MANAGER)
    await until(lambda: bool(stack.gateway.catalogue.pendings()))
    body = {"model": NAME, "prompt": "one two three", "stream": True}
    async with stack.http() as http:

        async def lines() -> list[str]:
            async with http.stream("POST", "/v1/completions", json=body) as response:
                return [line async for line in response.aiter_lines() if line]

        asked = asyncio.create_task(lines())
        digest = hashlib.sha256(small_model_path.read_bytes()).hexdigest()
        card = encode_card(await asyncio.to_thread(build_card, small_model_path))
        await publish_card(stack.redis, digest, card, uri=uri)
        await until(lambda: bool(stack.gateway.catalogue.models()))
        assert stack.gateway.catalogue.resolve(NAME).revision == f"{NAME}@{digest[:12]}+int8"
        await until(lambda: bool(stack.gateway.holding._sleeping))
        await asyncio.sleep(0.1)
        stack.executor.serving = True
        told = await asked
    assert told[0].startswith(": waking") and told[-1] == "data: [DONE]"


async def test_a_request_for_a_serving_at_zero_is_held_by_its_own_limits(
    api: KubeApi, start: StartStack, small_model_path: Path
) -> None:
    await api.create(MODEL_SERVINGS, serving(f"file://{small_model_path}"), manager=MANAGER)
    await resolved(api, small_model_path)
    stack = await in_cluster(start)
    await until(lambda: bool(stack.gateway.catalogue.models()))
    body = {"model": NAME, "prompt": "one two three", "stream": True}
    async with stack.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.aiter_lines()
        assert orjson.loads((await anext(lines)).removeprefix(": waking "))["stage"] == "Unknown"
        stack.executor.serving = True
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    stack.executor.serving = False
    changed = serving(f"file://{small_model_path}", limits={"holdSeconds": 1, "heldRequests": 0})
    await api.apply(MODEL_SERVINGS, changed, manager=MANAGER, force=True)
    await until(lambda: stack.gateway.catalogue.resolve(NAME).entry.hold.requests == 0)  # type: ignore[union-attr]
    async with stack.http() as http:
        refused = await http.post("/v1/completions", json={**body, "stream": False})
        assert refused.status_code == 429


async def test_the_last_list_stays_while_the_api_server_is_away(
    server: KubeApiServer, api: KubeApi, start: StartStack, small_model_path: Path
) -> None:
    await api.create(MODEL_SERVINGS, serving(f"file://{small_model_path}"), manager=MANAGER)
    await resolved(api, small_model_path)
    stack = await in_cluster(start)
    await until(lambda: bool(stack.gateway.catalogue.models()))
    before = stack.gateway.catalogue.resolve(NAME)
    server.compact()
    await api.apply(
        MODEL_SERVINGS, serving(f"file://{small_model_path}", priority=1), manager=MANAGER, force=True
    )
    other = serving(f"file://{small_model_path}")
    other["metadata"]["name"] = "second"
    await api.create(MODEL_SERVINGS, other, manager=MANAGER)
    await until(lambda: "second" in stack.gateway.catalogue._pending)
    assert stack.gateway.catalogue.resolve(NAME).tokenizer is before.tokenizer, "opened once"
