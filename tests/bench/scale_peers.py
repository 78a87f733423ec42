"""Part of tests.bench.scale: from the command to the first token, ours and vLLM's, same machine and model."""

from __future__ import annotations

import http.client
import json
import time
from contextlib import AbstractContextManager
from functools import partial

from tests.bench import common
from tests.bench.peers import servers

THREADS = 2
PROMPT = "Eight hundred years ago, in a valley between two mountains, there lived a miller who "


def first_token(port: int, model: str) -> None:
    """Waits for one token of a completion."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {text[:200]!r}")
    finally:
        connection.close()


def starts(report: common.Report, rounds: int, *, compiled: bool) -> None:
    """Medians of interleaved starts; page cache warm. What is not installed is said and left out."""
    ways: dict[str, partial[AbstractContextManager[servers.Server]]] = {
        "deepflow up, 1C": partial(servers.deepflow, "bf16", THREADS),
        "vllm serve --enforce-eager": partial(servers.vllm, "bf16", THREADS, compiled=False),
    }
    if compiled:
        ways["vllm serve"] = partial(servers.vllm, "bf16", THREADS)
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, start in ways.items():
            began = time.perf_counter()
            try:
                with start() as server:
                    healthy = time.perf_counter() - began
                    first_token(server.port, server.model)
                    taken[way].append((healthy, time.perf_counter() - began))
            except servers.Missing as error:
                print(f"{way}: not measured, {error}")
    for way, found in taken.items():
        if found:
            report.add(
                command=way,
                healthy_s=common.median([healthy for healthy, _ in found]),
                first_token_s=common.median([first for _, first in found]),
                rounds=len(found),
            )
