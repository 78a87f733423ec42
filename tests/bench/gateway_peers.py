"""Rust front ends beside the gateway: Dynamo's frontend with its mocker, and vllm-router for pass-through.

Called by `tests.bench.gateway --peers FOLDER`; a peer that is not installed there is reported as skipped.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from controlplane.gateway.modelcard import build_card
from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from tests.bench import common
from tests.bench.gateway_rig import MODEL, Process, closed_loop, get, rig, wait_for

STREAMS = 64
PROMPT_WORDS = 130  # of running text; with the template around them about 200 tokens


@dataclass(frozen=True, slots=True)
class Way:
    """A front end that is asked, and the processes whose time is read: its own, and the workers behind it."""

    port: int
    front: Sequence[Process]
    workers: Sequence[Process] = ()

    def cpu(self) -> tuple[float, float]:
        """Seconds of processor time so far: front end, workers."""
        return sum(p.cpu() for p in self.front), sum(p.cpu() for p in self.workers)


@contextlib.contextmanager
def dynamo(venv: Path) -> Iterator[Way]:
    """Dynamo's frontend with one mock worker. The model is called "bench" there too."""
    folder = Path(tempfile.mkdtemp(prefix="dfb-"))
    model = folder / "model"
    model.mkdir()
    card = build_card(fetch(DEFAULT_MODEL_URI).path)
    (model / "tokenizer.json").write_bytes(card.tokenizer_json)
    tokenizer = {"chat_template": card.chat_template, "bos_token": card.bos_token,
                 "eos_token": card.eos_token, "tokenizer_class": "PreTrainedTokenizerFast"}  # fmt: skip
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": card.vocab_size,
              "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
              "intermediate_size": 1536, "max_position_embeddings": card.context_length,
              "bos_token_id": card.bos_id, "eos_token_id": card.eos_ids[0],
              "torch_dtype": "bfloat16"}  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    (folder / "kv").mkdir()
    env = {"DYN_FILE_KV": str(folder / "kv"), "DYN_TCP_RPC_HOST": "127.0.0.1", "HF_HUB_OFFLINE": "1",
           "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1", "DYN_EVENT_PLANE_HOST": "127.0.0.1",
           "PYTHONPATH": ""}  # fmt: skip
    port = common.free_port()
    planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
    python = str(venv / "bin" / "python")
    started: list[Process] = []
    try:
        frontend = [python, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
        started.append(
            Process("frontend", [*frontend, *planes, "--router-mode", "round-robin"], folder, env=env)
        )
        mocker = [python, "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", MODEL]
        mocker += ["--speedup-ratio", "100000", "--num-workers", "1"]
        started.append(Process("mocker", [*mocker, *planes], folder, env=env))

        def listed() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as connection:
                connection.settimeout(5)
                connection.sendall(b"GET /v1/models HTTP/1.0\r\nHost: localhost\r\n\r\n")
                data = b""
                while part := connection.recv(65536):
                    data += part
                return b'"bench"' in data
            return False

        wait_for(listed, started[1], "Dynamo's model is not listed")
        yield Way(port, started[:1], started[1:])
    finally:
        for process in reversed(started):
            process.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def vllm_router(venv: Path) -> Iterator[tuple[Way, Way]]:
    """vllm-router before an upstream that answers the same bytes: (the upstream, the router)."""
    folder = Path(tempfile.mkdtemp(prefix="dfb-"))
    upstream_port, port = common.free_port(), common.free_port()
    started: list[Process] = []
    try:
        upstream = Process(
            "upstream", [sys.executable, "-m", "tests.bench.gateway_upstream", str(upstream_port)], folder
        )
        started.append(upstream)
        wait_for(lambda: get(upstream_port, "/health") == 200, upstream, "no upstream")
        command = [str(venv / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(port),
                   "--worker-urls", f"http://127.0.0.1:{upstream_port}", "--policy", "round_robin",
                   "--log-level", "warning", "--prometheus-port", str(common.free_port())]  # fmt: skip
        router = Process("vllm-router", command, folder, env={"PYTHONPATH": ""})
        started.append(router)
        wait_for(lambda: get(port, "/health") == 200, router, "no vllm-router")
        yield Way(upstream_port, [upstream]), Way(port, [router], [upstream])
    finally:
        for process in reversed(started):
            process.stop()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Run:
    """One closed loop. Milliseconds, requests a second, microseconds of processor time a request."""

    p50_ms: float
    p99_ms: float
    requests_per_s: float
    events_per_answer: float
    """Tokens that were ready together travel together."""
    front_us: float
    workers_us: float
    client_us: float


async def _run(way: Way, clients: int, requests: int, first_seed: int) -> tuple[Run, int]:
    """A run, and how many answers were lost."""
    (front, workers), client = way.cpu(), time.process_time()
    answers, wall = await closed_loop(
        way.port, clients, requests, words=PROMPT_WORDS, max_tokens=8, first_seed=first_seed
    )
    front_after, workers_after = way.cpu()
    took = [1e3 * (answer.ended - answer.started) for answer in answers]
    run = Run(
        common.median(took),
        common.percentile(took, 99),
        requests / wall,
        sum(answer.events for answer in answers) / requests,
        1e6 * (front_after - front) / requests,
        1e6 * (workers_after - workers) / requests,
        1e6 * (time.process_time() - client) / requests,
    )
    return run, sum(not answer.ok or answer.tokens != 8 for answer in answers)


def _tell(
    report: common.Report, what: str, found: dict[tuple[str, int], list[Run]]
) -> dict[tuple[str, int], Run]:
    """A row of medians a way and a number of clients."""
    middle = {}
    for (name, clients), runs in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        medians = {key: common.median([getattr(run, key) for run in runs]) for key in Run.__slots__}
        middle[name, clients] = Run(**medians)
        report.add(what=what, way=name, concurrency=clients, **medians)
    return middle


async def peers(report: common.Report, folder: str, *, quick: bool) -> None:
    """Chat of about 200 prompt tokens and 8 streamed tokens: template, tokenizer, stream, detokenizer."""
    rounds, seed = (1 if quick else 5), 0
    with ExitStack() as stack:
        ways = {}
        for name, gateways in (("deepflow", 1), ("deepflow, 2 processes", 2)):
            opened = stack.enter_context(rig(token_seconds=0, gateways=gateways))
            ways[name] = Way(opened.port, opened.gateways, [opened.source])
        if folder and (Path(folder) / "dynamo" / "bin" / "python").exists():
            ways["dynamo"] = stack.enter_context(dynamo(Path(folder) / "dynamo"))
        else:
            print("SKIPPED: Dynamo's frontend (no FOLDER/dynamo)")
        found: dict[tuple[str, int], list[Run]] = {}
        for way in ways.values():
            await closed_loop(way.port, 16, 200, words=PROMPT_WORDS, max_tokens=8)
        for turn in range(rounds):
            order = list(ways.items()) if turn % 2 else list(reversed(ways.items()))
            for clients, requests in ((1, 300), (STREAMS, 2000)):
                for name, way in order:
                    seed += 10_000
                    run, lost = await _run(way, clients, requests, seed)
                    found.setdefault((name, clients), []).append(run)
                    if lost:
                        report.check(f"{name}: answers lost", float(lost), "answers", "0", False)
        middle = _tell(report, "full work, 8 tokens", found)
    p50 = middle["deepflow", 1].p50_ms
    rate = max(middle[name, STREAMS].requests_per_s for name in ("deepflow", "deepflow, 2 processes"))
    report.check("p50 of a whole answer, alone", p50, "ms", "<= 2", p50 <= 2)
    report.check(f"requests/s at {STREAMS}", rate, "req/s", ">= 1000", rate >= 1000)
    if ("dynamo", 1) in middle:
        ratio = p50 / middle["dynamo", 1].p50_ms
        report.check("ours / Dynamo's, p50 alone", ratio, "x", "<= 1", ratio <= 1)
        ratio = rate / middle["dynamo", STREAMS].requests_per_s
        report.check(f"ours / Dynamo's, req/s at {STREAMS}", ratio, "x", ">= 1", ratio >= 1)
    await _pass_through(report, folder, rounds)


async def _pass_through(report: common.Report, folder: str, rounds: int) -> None:
    if not folder or not (Path(folder) / "vllm-router" / "bin" / "vllm-router").exists():
        print("SKIPPED: vllm-router (no FOLDER/vllm-router)")
        return
    with vllm_router(Path(folder) / "vllm-router") as (upstream, router):
        found: dict[tuple[str, int], list[Run]] = {}
        for turn in range(rounds):
            ways = [("upstream itself", upstream), ("vllm-router", router)]
            for clients, requests in ((1, 500), (STREAMS, 5000)):
                for name, way in ways if turn % 2 else reversed(ways):
                    run, _ = await _run(way, clients, requests, 0)
                    found.setdefault((name, clients), []).append(run)
        _tell(report, "pass-through", found)
