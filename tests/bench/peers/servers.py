"""Starts an engine as an OpenAI server on loopback, and ends it. Called by `compare.py`.

Each peer gets its own best settings: all cores, threads bound, tcmalloc and compiled steps for vLLM;
flash attention (its default), one slot a stream and KV split by slot for llama.cpp.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench import common
from tests.bench.peers import INSTALL, home
from tests.bench.peers.install import VLLM, XLLAMACPP, tcmalloc
from tests.bench.peers.weights import SAFETENSORS, gguf_path
from tests.support.stack import MODEL, running_stack

START_SECONDS = 400.0  # vLLM compiles at its first start
STOP_SECONDS = 15.0
KV_GIB = 1  # 32 streams of 640 tokens, in float32 too; ours, in bf16, needs half
DTYPES = {"bf16": "bfloat16", "f32": "float32"}
LLAMACPP_CONTEXT_TOKENS = 32_768  # 32 streams of 640 tokens and some room


class Missing(RuntimeError):
    """The peer is not installed; the message says how to."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running engine that answers /v1/completions on loopback."""

    name: str
    version: str
    precision: str  # of the weights
    port: int
    model: str
    start_seconds: float  # from the command to the first healthy answer
    notes: str = ""
    pids: tuple[int, ...] = ()


@contextlib.contextmanager
def deepflow(precision: str, threads: int) -> Iterator[Server]:
    """The whole stack, 1C, as a user starts it: gateway, Valkey and one executor with all cores."""
    size = ("--threads", str(threads), "--kv-cache-bytes", f"{KV_GIB}G")
    started = time.perf_counter()
    with running_stack("1C", *size, *common.PRECISIONS[precision].options) as stack:
        seconds = time.perf_counter() - started
        yield Server("deepflow", "", precision, stack.port, MODEL, seconds, pids=tuple(stack.pids()))


@contextlib.contextmanager
def vllm(precision: str, threads: int, *, compiled: bool = True) -> Iterator[Server]:
    """vLLM's CPU build with the bf16 weights, multiplied in bf16 or widened to float32.

    Where the processor has no bf16 instructions vLLM's bf16 prefill is many times slower than its
    float32 one: its best setting differs from cell to cell, so both are measured.
    """
    root = home()
    venv, weights = root / "vllm", root / SAFETENSORS
    _require("vLLM", venv / "bin" / "vllm", weights / "model.safetensors")
    allocator = tcmalloc(root)
    preloaded = [*([allocator] if allocator else []), *sorted(venv.glob("lib/libiomp5.so"))]
    port = common.free_port()
    command = [
        str(venv / "bin" / "vllm"), "serve", str(weights), "--served-model-name", "m",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", DTYPES[precision], "--max-model-len", "8192",
    ]  # fmt: skip
    environment = {
        "LD_PRELOAD": ":".join(map(str, preloaded)),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CACHE_ROOT": str(root / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
    }
    notes = "compiled" if compiled else "eager"
    notes += "" if allocator else ", no tcmalloc"
    command += [] if compiled else ["--enforce-eager"]
    with _process(command, environment, port) as (seconds, pid):
        yield Server("vllm", VLLM, precision, port, "m", seconds, notes, (pid,))


@contextlib.contextmanager
def llamacpp(precision: str, threads: int, model: Path, slots: int) -> Iterator[Server]:
    """llama.cpp; `precision` is bf16, q8 or q4 (`model`, the file itself, is 4-bit)."""
    root = home()
    python = root / "llamacpp" / "bin" / "python"
    weights = model if precision == "q4" else gguf_path(root, precision)
    _require("llama.cpp", python, weights)
    port = common.free_port()
    script = Path(__file__).with_name("llamacpp_server.py")
    command = [python, script, weights, port, threads, slots, LLAMACPP_CONTEXT_TOKENS]
    with _process(list(map(str, command)), {}, port) as (seconds, pid):
        yield Server("llama.cpp", XLLAMACPP, precision, port, "m", seconds, pids=(pid,))


def _require(peer: str, *paths: Path) -> None:
    for path in paths:
        if not path.exists():
            raise Missing(f"{peer} is not installed ({path} is missing): {INSTALL}")


@contextlib.contextmanager
def _process(command: list[str], environment: dict[str, str], port: int) -> Iterator[tuple[float, int]]:
    """Runs a server until the block ends; yields the seconds until it was healthy, and its pid."""
    # The peers' interpreters must not see this project's packages, nor its settings.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        server = psutil.Popen(
            command, env={**inherited, **environment}, stdout=log, stderr=subprocess.STDOUT, cwd=home()
        )
        try:
            while not _healthy(port):
                if server.poll() is not None or time.perf_counter() - started > START_SECONDS:
                    log.seek(0)
                    tail = b"\n".join(log.read().splitlines()[-40:]).decode(errors="replace")
                    raise RuntimeError(f"{command[0]} did not start:\n{tail}")
                time.sleep(0.2)
            yield time.perf_counter() - started, server.pid
        finally:
            _stop(server)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(server: psutil.Popen) -> None:
    """Ends the server and whatever it started."""
    family = [server, *server.children(recursive=True)] if server.is_running() else [server]
    with contextlib.suppress(psutil.NoSuchProcess):
        server.terminate()
    _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for process in alive:
        print(f"{process.pid} did not end, killed", file=sys.stderr)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
