"""A release of the chart on a real cluster, used as users do: by helm, kubectl and the gateways' Service.

    KUBECONFIG             the cluster
    DEEPFLOW_E2E_VALUES    a values file: images that its nodes can pull, resources that fit
    DEEPFLOW_E2E_MODEL     instead of the example's source, where pods reach no package index
    DEEPFLOW_E2E_KEEP      1: what was made stays, to look at

Requests are made by a pod in the release's namespace, so they take the Service's name and the cluster's
network; `kubectl exec` brings back what it reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from controlplane.api.resources import names

ROOT = Path(__file__).parents[2]
NAME = "deepflow"
COMMAND_SECONDS = 120.0
START_SECONDS = 420.0
"""For pods to start, models to load, rollouts to end on a small busy machine."""
SETTINGS = ("--set", "gateway.settings.DEEPFLOW_JOBS_DISAGGREGATE_MIN_UNCACHED_TOKENS=16")
"""Prompts of tests are short: they shall be handed from prefill to decode nevertheless."""
PERCEIVED = {"events", "events.events.k8s.io", "podmetrics", "pods.metrics.k8s.io"}
"""Kinds that tell of objects and belong to nobody; they pass by themselves."""

# argv: method, URL, key, body. Prints status and headers as JSON, then the body, line by line as it comes.
_CLIENT = """
import json, sys, urllib.error, urllib.request
method, url, key, body = sys.argv[1:5]
headers = {"authorization": "Bearer " + key, "content-type": "application/json"}
request = urllib.request.Request(url, body.encode() or None, headers, method=method)
try:
    answer = urllib.request.urlopen(request, timeout=300)
except urllib.error.HTTPError as error:
    answer = error
print(json.dumps([answer.status, dict((k.lower(), v) for k, v in answer.headers.items())]), flush=True)
while line := answer.readline():
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
print("\\nended", flush=True)
"""


def needed() -> str:
    """What is missing for these tests; "" if nothing is."""
    missing = [name for name in ("helm", "kubectl") if shutil.which(name) is None]
    missing += [name for name in ("KUBECONFIG", "DEEPFLOW_E2E_VALUES") if not os.environ.get(name)]
    return f"no cluster to test on: {', '.join(missing)} missing (tests/e2e/README.md)" if missing else ""


def run(*command: str, stdin: str = "", timeout: float = COMMAND_SECONDS) -> str:
    """Its output. Raises AssertionError with the command's words."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}"
    return done.stdout


@dataclass(slots=True)
class Reply:
    """An answer as it was read; of a stream, while it is read."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False  # [DONE] was read
    ended: bool = False  # the body was read to its end
    body: str = ""

    @property
    def text(self) -> str:
        choices = [choice for event in self.events for choice in event.get("choices") or []]
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    @property
    def tokens(self) -> int | None:
        """That the usage at its end counts."""
        usage = self.events[-1].get("usage") if self.events else None
        return usage["completion_tokens"] if usage else None

    def take(self, line: str) -> None:
        if self.status == 0:
            self.status, self.headers = json.loads(line)
        elif line == "ended":
            self.ended = True
        elif line.startswith(":"):
            self.comments.append(line)
        elif line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            self.events.append(json.loads(line.removeprefix("data: ")))
        else:
            self.body += line


class Release:
    """In a namespace of its own."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.values = Path(os.environ["DEEPFLOW_E2E_VALUES"])
        self.key = ""
        self.installed = False
        self.before: set[str] = set()  # what the namespace held before the install

    def kubectl(self, *arguments: str, stdin: str = "", timeout: float = COMMAND_SECONDS) -> str:
        return run("kubectl", "-n", self.namespace, *arguments, stdin=stdin, timeout=timeout)

    def get(self, *arguments: str) -> list[dict[str, Any]]:
        """Objects of a kind."""
        items: list[dict[str, Any]] = json.loads(self.kubectl("get", *arguments, "-o", "json"))["items"]
        return items

    def serving(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kubectl("get", "msv", name, "-o", "json"))
        return found

    def ready_reason(self, name: str) -> str:
        """As `kubectl get msv` shows it, with False in front where it is not ready."""
        for condition in self.serving(name).get("status", {}).get("conditions") or []:
            if condition["type"] == names.ConditionType.READY:
                reason: str = condition["reason"]
                return reason if condition["status"] == "True" else f"False {reason}"
        return ""

    def executors(self, serving: str, role: str = "") -> list[dict[str, Any]]:
        """Pods of a ModelServing that are not on their way out."""
        selector = f"{names.LABEL_SERVING}={serving}" + (f",{names.LABEL_ROLE}={role}" if role else "")
        pods = self.get("pods", "-l", selector)
        return [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]

    def names_of_everything(self) -> set[str]:
        """All objects of the namespace, as kind/name."""
        kinds = run("kubectl", "api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
        kinds = sorted(set(kinds) - PERCEIVED)
        listed = self.kubectl("get", ",".join(kinds), "--ignore-not-found", "-o", "name")
        return set(listed.split())

    # -- helm ----------------------------------------------------------------------------------------------

    def install(self) -> None:
        chart = str(ROOT / "charts/deepflow")
        timeout = f"{START_SECONDS:.0f}s"
        command = ["helm", "install", NAME, chart, "-n", self.namespace, "-f", str(self.values), *SETTINGS]
        self.installed = True
        run(*command, "--wait", "--timeout", timeout, timeout=START_SECONDS + 60)
        run("helm", "test", NAME, "-n", self.namespace, timeout=START_SECONDS)
        # The key's line is the one on standard output; what it means is said beside it.
        self.key = self._keys_create()
        self._client_pod()

    def upgrade(self, *sets: str) -> None:
        """With the values of the install, and further ones; until the rollouts have ended."""
        command = ["helm", "upgrade", NAME, str(ROOT / "charts/deepflow"), "-n", self.namespace]
        command += ["-f", str(self.values), *SETTINGS, "--wait", "--timeout", f"{START_SECONDS:.0f}s"]
        run(*command, *(f"--set-string={one}" for one in sets), timeout=START_SECONDS + 60)

    def uninstall(self) -> None:
        run("helm", "uninstall", NAME, "-n", self.namespace, "--wait", timeout=START_SECONDS)
        self.installed = False

    def _keys_create(self) -> str:
        made = self.kubectl("exec", f"deploy/{NAME}-gateway", "--", "deepflow", "keys", "create", "e2e")
        return next(line for line in made.splitlines() if line.startswith("sk-df-"))

    # -- requests ------------------------------------------------------------------------------------------

    def _client_pod(self) -> None:
        gateway = json.loads(self.kubectl("get", "deploy", f"{NAME}-gateway", "-o", "json"))
        spec = gateway["spec"]["template"]["spec"]
        container = spec["containers"][0]
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "client"},
            "spec": {
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 1,
                "securityContext": spec["securityContext"],
                "imagePullSecrets": spec.get("imagePullSecrets") or [],
                "containers": [
                    {
                        "name": "client",
                        "image": container["image"],
                        "imagePullPolicy": container["imagePullPolicy"],
                        "securityContext": container["securityContext"],
                        "command": ["python", "-c", "import time; time.sleep(86400)"],
                    }
                ],
            },
        }
        self.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
        self.kubectl("wait", "pod/client", "--for=condition=Ready", "--timeout=120s", timeout=150)

    async def ask(
        self, path: str, body: dict[str, Any] | None = None, *, reply: Reply | None = None
    ) -> Reply:
        """By POST with a body, else by GET. Pass `reply` to look at a stream while it runs."""
        reply = reply or Reply()
        method, text = ("GET", "") if body is None else ("POST", json.dumps(body))
        command = ["kubectl", "-n", self.namespace, "exec", "client", "--", "python", "-c", _CLIENT, method]
        command += [f"http://{NAME}-gateway{path}", self.key, text]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, limit=1 << 20
        )
        assert process.stdout is not None and process.stderr is not None
        try:
            async for line in process.stdout:
                if stripped := line.decode().strip():
                    reply.take(stripped)
            words = (await process.stderr.read()).decode()
            assert await process.wait() == 0 and reply.ended, f"{path}: {words[-1000:] or 'cut off'}"
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return reply


def example(serving: str, **spec: Any) -> dict[str, Any]:
    """A document of examples/, with the source that these tests are given, and further fields of its spec."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "examples" / f"{serving}.yaml").read_text())
    if source := os.environ.get("DEEPFLOW_E2E_MODEL"):
        document["spec"]["model"]["uri"] = source
    for name, fields in spec.items():
        document["spec"].setdefault(name, {}).update(fields)
    return document


async def until(
    condition: Callable[[], bool], what: str, *, seconds: float = START_SECONDS, every: float = 2.0
) -> None:
    """Raises AssertionError with `what` when it does not come about."""
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {what}"
        await asyncio.sleep(every)


@contextlib.contextmanager
def release() -> Iterator[Release]:
    """A namespace for one, under the restricted profile; both are taken away at the end."""
    if missing := needed():
        pytest.skip(missing)
    namespace = f"deepflow-e2e-{secrets.token_hex(3)}"
    run("kubectl", "create", "namespace", namespace)
    run("kubectl", "label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    made = Release(namespace)
    try:
        yield made
    finally:
        if os.environ.get("DEEPFLOW_E2E_KEEP") != "1":
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                if made.installed:
                    made.uninstall()
            run("kubectl", "delete", "namespace", namespace, "--timeout=180s", timeout=240)


@contextlib.asynccontextmanager
async def streams(
    release: Release, body: dict[str, Any], count: int, *, events: int
) -> AsyncIterator[list[Reply]]:
    """Streams of one question, each with some events read; leaving waits for their ends."""
    replies = [Reply() for _ in range(count)]
    async with asyncio.TaskGroup() as group:
        for reply in replies:
            group.create_task(release.ask("/v1/chat/completions", body, reply=reply))
        await until(
            lambda: all(len(reply.events) >= events for reply in replies), "streams do not flow", every=0.1
        )
        yield replies
