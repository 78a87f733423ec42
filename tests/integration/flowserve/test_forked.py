"""Executors that the template process forked serve like started ones: gRPC, a model, tokens, an end."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import psutil
import pytest

from controlplane.local import metrics
from controlplane.local.children import Child, ChildSpec
from controlplane.local.template import Template, subreaper, supported
from tests.support.te import TOKEN, TaskExecutor, executor

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not supported(), reason="forks need Linux's subreaper and pidfd"),
]
COUNT = 8
PROMPT = list(range(500, 516))
KV_BYTES = 8 << 20
PYTHON = (sys.executable, "-P", "-m")


async def _tokens(te: TaskExecutor, model: Path) -> tuple[int, ...]:
    await te.load(model, "forked@1", dtype="bfloat16", kv_cache_bytes=KV_BYTES)
    async with te.connect() as client:
        run = await client.generate(PROMPT, revision="forked@1", max_tokens=6)
        assert run.error is None
        return tuple(run.tokens)


async def test_eight_at_once_answer_as_a_started_one_does(small_model_path: Path, tmp_path: Path) -> None:
    weights = ("--weights-dir", str(tmp_path / "weights"), "--weights-bytes", str(1 << 30))
    async with executor("started", tmp_path, options=weights) as started:
        expected = await _tokens(started, small_model_path)
    env = {
        **os.environ,
        "DEEPFLOW_CLUSTER_TOKEN": TOKEN,
        "DEEPFLOW_PARENT_DEATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    path = tmp_path / "t.sock"

    def spec(name: str, kind: str, module: str, *arguments: str) -> ChildSpec:
        forked = arguments if kind == "executor" else None
        return ChildSpec(name, kind, (*PYTHON, module, *arguments), env, tmp_path / f"{name}.log", 15.0,
                         template_args=forked)  # fmt: skip

    def idle() -> None:
        return None

    async def serve(child: Child) -> TaskExecutor:
        te = TaskExecutor(child.spec.name, tmp_path)
        endpoint = tmp_path / f"{te.te_id}.json"
        async with asyncio.timeout(60):
            while not endpoint.exists():
                await asyncio.sleep(0.02)
        said = json.loads(endpoint.read_text())
        assert said["pid"] == child.pid
        te.address, te.incarnation = said["address"], said["incarnation"]
        return te

    of_template = Child(spec("template", "template", "flowserve.shell.template", "--socket", str(path)), idle)
    template = Template(of_template, path)
    forks = metrics.CHILD_STARTS.labels("executor", "template")._value.get()
    children = []
    for number in range(COUNT):
        te_id = f"forked-{number}"
        endpoint = str(tmp_path / f"{te_id}.json")
        options = ("--te-id", te_id, "--endpoint-file", endpoint, "--threads", "1", *weights)
        children.append(Child(spec(te_id, "executor", "flowserve.shell", *options), idle, template.start))
    with subreaper():
        runs = [asyncio.create_task(child.run()) for child in (of_template, *children)]
        try:
            executors = await asyncio.gather(*map(serve, children))
            answers = await asyncio.gather(*(_tokens(te, small_model_path) for te in executors))
            assert set(answers) == {expected}
            assert metrics.CHILD_STARTS.labels("executor", "template")._value.get() == forks + COUNT
            assert len({te.incarnation for te in executors}) == COUNT
            pids = [child.pid for child in children]
            await asyncio.gather(*(child.stop() for child in children))
            # Each drained and left in order, and no zombie stays.
            assert all("exits with code 0" in te.log_text() for te in executors)
            assert not any(pid is not None and psutil.pid_exists(pid) for pid in pids)
        finally:
            for child in (*children, of_template):
                await child.stop()
            await asyncio.wait_for(asyncio.gather(*runs), 30)
