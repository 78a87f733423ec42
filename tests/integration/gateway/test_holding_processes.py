"""Held and woken with real parts: gateway and executor processes, the small model, real Valkey.

The registry is empty; requests are held; an executor registers and loads the model; they are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from controlplane.fleet.demand import DemandReader
from tests.integration.gateway.conftest import MODEL, REVISION, catalogue_entry, write_catalogue
from tests.support.http_client import StreamRun, stream
from tests.support.te import ROOT, TOKEN, executor

PROMPT = "The capital of France is"
START_SECONDS = 60.0


@contextlib.asynccontextmanager
async def gateway(folder: Path, redis_url: str, name: str) -> AsyncIterator[int]:
    """A gateway process of the folder's catalogue; its port."""
    endpoint = folder / f"{name}.json"
    command = [sys.executable, "-m", "controlplane.gateway", "--port", "0", "--redis-url", redis_url]
    command += ["--catalogue", str(folder / "catalogue.json"), "--gateway-id", name]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "protos"), os.environ.get("PYTHONPATH", "")))
    settings = {"PYTHONPATH": paths, "DEEPFLOW_CLUSTER_TOKEN": TOKEN}
    settings["DEEPFLOW_GATEWAY_HOLD_COMMENT_SECONDS"] = "0.2"
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--endpoint-file", str(endpoint)],
            env={**os.environ, **settings}, cwd=ROOT, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        async with asyncio.timeout(START_SECONDS):
            while not endpoint.exists():
                assert process.poll() is None, (folder / f"{name}.log").read_text()
                await asyncio.sleep(0.05)
        yield int(json.loads(endpoint.read_text())["address"].rpartition(":")[2])
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.timeout(180)
async def test_requests_of_two_replicas_are_held_until_an_executor_has_loaded_the_model(
    tmp_path: Path, clean_valkey: str, small_model_path: Path
) -> None:
    write_catalogue(tmp_path / "catalogue.json", [catalogue_entry(small_model_path, wakes=True)])
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    async with gateway(tmp_path, clean_valkey, "a") as first, gateway(tmp_path, clean_valkey, "b") as second:
        run = StreamRun()
        streamed = asyncio.create_task(
            stream("127.0.0.1", first, "/v1/completions", {**body, "stream": True}, run=run)
        )
        async with httpx.AsyncClient(timeout=120) as http:
            whole = asyncio.create_task(http.post(f"http://127.0.0.1:{second}/v1/completions", json=body))
            async with Redis.from_url(clean_valkey) as redis, asyncio.timeout(30):
                while (await DemandReader(redis).read()).held(MODEL) < 2:
                    await asyncio.sleep(0.05)
            listed = (await http.get(f"http://127.0.0.1:{second}/v1/models")).json()["data"]
            assert [(model["id"], model["ready"]) for model in listed] == [(MODEL, False)]
            assert not streamed.done() and not whole.done()
            async with executor("te-0", tmp_path, redis_url=clean_valkey) as te:
                # Warm: registered, and nothing loaded. That answers nobody.
                await asyncio.sleep(1.5)
                assert not streamed.done() and not whole.done()
                assert (await te.load(small_model_path, REVISION)).model_revision == REVISION
                await asyncio.gather(streamed, whole)
                metrics = (await http.get(f"http://127.0.0.1:{first}/metrics")).text
    assert run.done and run.comments >= 3
    answer = whole.result().json()["choices"][0]["text"]
    assert run.text() == answer and "Paris" in answer
    assert float(whole.result().headers["x-deepflow-held-seconds"]) > 1
    assert 'deepflow_gateway_holds_total{outcome="served"} 1.0' in metrics
    assert "deepflow_gateway_held_requests 0.0" in metrics
