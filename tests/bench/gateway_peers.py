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
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from controlplane.gateway.modelcard import build_card
from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from tests.bench import common
from tests.bench.gateway_rig import MODEL, Answer, Process, closed_loop, get, rig, wait_for

STREAMS = 64
PROMPT_WORDS = 130  # of running text; with the template around them about 200 tokens


@contextlib.contextmanager
def dynamo(venv: Path) -> Iterator[int]:
    """Dynamo's frontend with one mock worker; its port. The model is called "bench" there too."""
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
        yield port
    finally:
        for process in reversed(started):
            process.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def vllm_router(venv: Path) -> Iterator[tuple[int, int]]:
    """vllm-router before an upstream that answers the same bytes: (the upstream's port, the router's)."""
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
        yield upstream_port, port
    finally:
        for process in reversed(started):
            process.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _percentiles(answers: list[Answer]) -> tuple[float, float]:
    took = [1e3 * (answer.ended - answer.started) for answer in answers]
    return common.median(took), common.percentile(took, 99)


async def peers(report: common.Report, folder: str, *, quick: bool) -> None:
    """Chat of about 200 prompt tokens and 8 streamed tokens: template, tokenizer, stream, detokenizer."""
    rounds, seed = (1 if quick else 5), 0
    with ExitStack() as stack:
        one = stack.enter_context(rig(token_seconds=0))
        two = stack.enter_context(rig(token_seconds=0, gateways=2))
        ports = {"deepflow": one.port, "deepflow, 2 processes": two.port}
        if folder and (Path(folder) / "dynamo" / "bin" / "python").exists():
            ports["dynamo"] = stack.enter_context(dynamo(Path(folder) / "dynamo"))
        else:
            print("SKIPPED: Dynamo's frontend (no FOLDER/dynamo)")
        found: dict[tuple[str, int], list[tuple[float, ...]]] = {}
        for port in ports.values():
            await closed_loop(port, 16, 200, words=PROMPT_WORDS, max_tokens=8)
        for turn in range(rounds):
            order = list(ports.items()) if turn % 2 else list(reversed(ports.items()))
            for clients, requests in ((1, 300), (STREAMS, 2000)):
                for name, port in order:
                    seed += 10_000
                    answers, wall = await closed_loop(
                        port, clients, requests, words=PROMPT_WORDS, max_tokens=8, first_seed=seed
                    )
                    bad = sum(not answer.ok or answer.tokens != 8 for answer in answers)
                    if bad:
                        report.check(f"{name}: answers lost", float(bad), "answers", "0", False)
                    # Tokens that were ready together travel together: how many events an answer had.
                    events = sum(answer.events for answer in answers) / requests
                    found.setdefault((name, clients), []).append(
                        (*_percentiles(answers), requests / wall, events)
                    )
        best = {}
        for (name, clients), runs in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
            p50, p99, rate, events = (common.median([run[i] for run in runs]) for i in range(4))
            best[name, clients] = p50, rate
            report.add(what="full work, 8 tokens", way=name, concurrency=clients, p50_ms=p50, p99_ms=p99,
                       requests_per_s=rate, events_per_answer=events)  # fmt: skip
    p50 = best["deepflow", 1][0]
    rate = max(best[name, STREAMS][1] for name in ("deepflow", "deepflow, 2 processes"))
    report.check("p50 of a whole answer, alone", p50, "ms", "<= 2", p50 <= 2)
    report.check(f"requests/s at {STREAMS}", rate, "req/s", ">= 1000", rate >= 1000)
    if ("dynamo", 1) in best:
        for clients, position, what in ((1, 0, "p50 alone"), (STREAMS, 1, f"req/s at {STREAMS}")):
            ours = p50 if position == 0 else rate
            ratio = ours / best["dynamo", clients][position]
            holds = ratio <= 1 if position == 0 else ratio >= 1
            report.check(f"ours / Dynamo's, {what}", ratio, "x", "<= 1" if position == 0 else ">= 1", holds)
    await _pass_through(report, folder, rounds)


async def _pass_through(report: common.Report, folder: str, rounds: int) -> None:
    if not folder or not (Path(folder) / "vllm-router" / "bin" / "vllm-router").exists():
        print("SKIPPED: vllm-router (no FOLDER/vllm-router)")
        return
    with vllm_router(Path(folder) / "vllm-router") as (upstream, router):
        found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
        for turn in range(rounds):
            ways = [("upstream itself", upstream), ("vllm-router", router)]
            for clients, requests in ((1, 500), (STREAMS, 5000)):
                for name, port in ways if turn % 2 else reversed(ways):
                    answers, wall = await closed_loop(
                        port, clients, requests, words=PROMPT_WORDS, max_tokens=8
                    )
                    found.setdefault((name, clients), []).append((*_percentiles(answers), requests / wall))
        for (name, clients), runs in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
            p50, p99, rate = (common.median([run[i] for run in runs]) for i in range(3))
            report.add(what="pass-through", way=name, concurrency=clients, p50_ms=p50, p99_ms=p99,
                       requests_per_s=rate)  # fmt: skip
