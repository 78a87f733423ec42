"""The `deepflow` command as a user runs it, as a process; shell and gateway are stand-ins."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from controlplane.cli.output import CliError, ago
from controlplane.cli.stack import parse_bytes
from controlplane.local.valkey import ValkeyServer

FAKES = Path(__file__).parents[3] / "fakes" / "stack"
HELP_SECONDS = 0.5  # what `deepflow --help` may take on an idle machine


class Command:
    """Runs `deepflow ...` with a state folder of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = {**os.environ, "DEEPFLOW_HOME": str(home)}
        for name in ("REDIS_URL", "DEEPFLOW_URL", "DEEPFLOW_API_KEY", "DEEPFLOW_CLUSTER_TOKEN"):
            self.env.pop(name, None)

    def __call__(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "controlplane.cli", *arguments],
            env=self.env, input=text, stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done


@pytest.fixture
def deepflow(tmp_path: Path) -> Command:
    return Command(tmp_path / "home")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _runs(pid: int) -> bool:
    """A zombie does not run: who reaps an orphan, and when, is up to the system's first process."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_help_and_version_name_every_command(deepflow: Command) -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        helped = deepflow("--help")
        times.append(time.perf_counter() - started)
    for command in ("up", "down", "status", "chat", "models", "jobs", "keys", "roles"):
        assert command in helped.stdout
        assert deepflow(command, "--help").returncode == 0
    assert deepflow("--version").stdout.startswith("deepflow ")
    assert min(times) < 4 * HELP_SECONDS  # a heavy import (torch, gRPC) costs more, however busy the machine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "-t", "1X"], "unknown role 'X'"),
        (["up", "-m", "nothing"], "neither an existing path nor a URI"),
        (["up", "-m", "hf://org/a=x", "-m", "hf://org/b=x"], "two models are called 'x'"),
        (["up", "--alias", "a=b"], "--alias a=b"),
        (["up", "--dtype", "int3"], "--dtype int3"),
        (["up", "--kv-cache-bytes", "lots"], "is no size"),
        (["up", "-m", "file:///no/such/model.gguf"], "no such file or folder"),
        (["status"], "no stack runs here"),
        (["roles", "set", "te-0", "decode"], "no stack runs here"),
        (["keys", "list"], "no stack runs here"),
        (["keys", "create", "t", "--redis-url", "redis://127.0.0.1:9/0"], "Redis does not answer"),
        (["chat", "hi", "--url", "http://127.0.0.1:9"], "no gateway answers at http://127.0.0.1:9"),
        (["jobs", "list", "--url", "http://127.0.0.1:9"], "no gateway answers"),
        (["models", "pull", "ftp://x"], "unknown scheme"),
    ],
)
def test_mistakes_are_one_clear_line(deepflow: Command, arguments: list[str], message: str) -> None:
    done = deepflow(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_down_without_a_stack_is_no_error(deepflow: Command) -> None:
    done = deepflow("down")
    assert (done.returncode, done.stderr.strip()) == (0, "not running")


def test_sizes_read_as_people_write_them() -> None:
    assert parse_bytes("512M") == parse_bytes("512MiB") == parse_bytes("0.5g") == 512 << 20
    assert parse_bytes("1073741824") == 1 << 30
    for wrong in ("", "1", "-1G", "1X", "G"):
        with pytest.raises(CliError):
            parse_bytes(wrong)
    assert [ago(seconds) for seconds in (0, 59, 61, 3600, 90_000)] == ["0s", "59s", "1m 1s", "1h", "1d 1h"]


@pytest.fixture
def detached(deepflow: Command, small_model_path: Path) -> Iterator[tuple[Command, list[str]]]:
    deepflow.env["PYTHONPATH"] = os.pathsep.join((str(FAKES), os.environ.get("PYTHONPATH", "")))
    port = str(_free_port())
    yield deepflow, ["up", "--detach", "-m", f"file://{small_model_path}=small", "--port", port, "-t", "1P1D"]
    deepflow("down")


@pytest.mark.model
def test_up_detached_status_and_down(detached: tuple[Command, list[str]]) -> None:
    deepflow, up = detached
    done = deepflow(*up)
    assert done.returncode == 0, done.stderr
    assert "te-1 (decode) is ready" in done.stderr
    assert "small answers" in done.stderr
    assert "OpenAI(base_url=" in done.stderr
    again = deepflow(*up)
    assert again.returncode == 0
    assert "already ready at" in again.stderr

    shown = deepflow("status").stdout
    for word in ("valkey", "gw-0", "te-0", "prefill", "te-1", "decode", "1P1D", "small@"):
        assert word in shown
    assert deepflow("roles", "set", "te-1", "prefill").returncode == 0
    assert deepflow("roles", "set", "te-1", "boss").returncode == 1
    assert [row.split()[:2] for row in deepflow("roles", "list").stdout.splitlines()[1:]] == [
        ["te-0", "prefill"],
        ["te-1", "prefill"],
    ]

    key = deepflow("keys", "create", "acme", "--name", "ci").stdout.strip()
    listed = json.loads(deepflow("keys", "list", "--json").stdout)
    assert [record["tenant"] for record in listed] == ["acme"]
    assert key
    assert key not in json.dumps(listed)
    assert deepflow("keys", "revoke", listed[0]["key_id"]).returncode == 0
    assert deepflow("keys", "revoke", "key_none").returncode == 1

    status = json.loads(deepflow("status", "--json").stdout)
    pids = [status["supervisor"][0], *(child["pid"] for child in status["children"])]
    assert deepflow("down").stderr.strip() == "stopped"
    assert not [pid for pid in pids if _runs(pid)]
    assert not (deepflow.home / "run").exists()
    assert deepflow("status").returncode == 1


@pytest.mark.model
def test_down_collects_what_a_killed_supervisor_left(detached: tuple[Command, list[str]]) -> None:
    deepflow, up = detached
    assert deepflow(*up).returncode == 0
    status = json.loads((deepflow.home / "status.json").read_text())
    pids = [child["pid"] for child in status["children"]]
    os.kill(status["supervisor"][0], signal.SIGKILL)
    assert deepflow("status").returncode == 1
    deepflow("down")
    assert not [pid for pid in pids if _runs(pid)]
    assert not (deepflow.home / "run").exists()
    assert deepflow(*up).returncode == 0


@pytest.mark.model
def test_a_start_that_fails_shows_why(detached: tuple[Command, list[str]]) -> None:
    deepflow, up = detached
    deepflow.env["FAKE_SHELL"] = "crash"
    done = deepflow(*up)
    assert done.returncode == 1
    assert "no such device" in done.stderr
    assert not (deepflow.home / "run").exists()


@pytest.mark.model
def test_ctrl_c_ends_a_stack_in_the_foreground(detached: tuple[Command, list[str]]) -> None:
    deepflow, up = detached
    up.remove("--detach")
    process = subprocess.Popen(
        [sys.executable, "-m", "controlplane.cli", *up], env=deepflow.env, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "Ctrl-C stops it" in line:
            break
    process.send_signal(signal.SIGINT)
    assert "stopped" in process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 0
    assert not (deepflow.home / "run").exists()


ATTEMPTS = [
    {
        "attempt": 1,
        "kind": "prefill",
        "te_id": "te-0",
        "outcome": "handover",
        "tokens": 1,
        "compute_seconds": 0.5,
    },
    {"attempt": 2, "kind": "decode", "te_id": "te-1", "outcome": "stop", "tokens": 6},
]
TASK = {"index": 0, "te_id": "te-1", "output_tokens": 7, "attempts": ATTEMPTS}
TIMES = {"created_at": 100.0, "first_token_at": 100.5, "ended_at": 102.0}
JOB = {"id": "job-1", "kind": "serving", "state": "succeeded", "model": "small", "tasks": [TASK], **TIMES}


class _Gateway(BaseHTTPRequestHandler):
    """Answers as a gateway would; what it was asked is kept."""

    asked: ClassVar[list[dict[str, object]]] = []

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, {"data": [{"id": "small"}]})
        elif self.path.startswith("/deepflow/v1/jobs/none"):
            self._send(404, {"error": {"message": "no such job"}})
        elif self.path.startswith("/deepflow/v1/jobs/"):
            self._send(200, JOB)
        else:
            self._send(200, {"data": [JOB]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        if body["messages"][-1]["content"] == "fail":
            self._send(503, {"error": {"message": "nothing can serve"}})
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b": waiting\n\n")
        for word in ("Hé", "llo"):
            event = {"choices": [{"index": 0, "delta": {"content": word}}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[str]:
    _Gateway.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Gateway)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_chat_streams_one_answer(deepflow: Command, gateway: str) -> None:
    done = deepflow(
        "chat", "hi", "--url", gateway, "--system", "be brief", "--temperature", "0", "--max-tokens", "5"
    )
    assert (done.returncode, done.stdout) == (0, "Héllo\n")
    assert _Gateway.asked == [
        {
            "model": "small",
            "stream": True,
            "temperature": 0.0,
            "max_completion_tokens": 5,
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        }
    ]


def test_a_conversation_remembers_what_was_said(deepflow: Command, gateway: str) -> None:
    done = deepflow("chat", "--url", gateway + "/v1", text="one\n\nfail\ntwo\n")
    assert done.returncode == 0
    assert "error: nothing can serve (HTTP 503)" in done.stderr
    roles = [[message["content"] for message in body["messages"]] for body in _Gateway.asked]  # type: ignore[attr-defined]  # parsed JSON
    assert roles == [["one"], ["one", "Héllo", "fail"], ["one", "Héllo", "two"]]


def test_jobs_and_models_are_listed(deepflow: Command, gateway: str) -> None:
    row = deepflow("jobs", "list", "--url", gateway).stdout.splitlines()[1]
    for word in ("job-1", "succeeded", "small", "te-0, te-1", "7", "0.50 s", "2.00 s"):
        assert word in row
    assert json.loads(deepflow("jobs", "list", "--json", "--url", gateway).stdout)["data"] == [JOB]
    assert json.loads(deepflow("jobs", "show", "job-1", "--json", "--url", gateway).stdout) == JOB
    shown = deepflow("jobs", "show", "job-1", "--url", gateway).stdout
    assert [line.split()[2:4] for line in shown.splitlines()[-2:]] == [
        ["prefill", "te-0"],
        ["decode", "te-1"],
    ]
    missing = deepflow("jobs", "show", "none", "--url", gateway)
    assert (missing.returncode, missing.stderr) == (1, "error: no such job (HTTP 404)\n")
    assert "small" in deepflow("models", "list", "--url", gateway).stdout


def test_keys_live_in_any_redis(deepflow: Command, valkey_server: Callable[[], ValkeyServer]) -> None:
    url = valkey_server().url
    assert deepflow("keys", "create", "acme", "--redis-url", url).stdout.startswith("sk-")
    assert deepflow("keys", "create", "not ok!", "--redis-url", url).returncode == 1
    assert "acme" in deepflow("keys", "list", "--redis-url", url).stdout
