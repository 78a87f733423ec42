"""The chart on a real cluster with a kubelet, used as docs/kubernetes.md says. One story, in this order:
install, serve, lose an executor, sleep and wake, upgrade, uninstall. Needs what README.md here names."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from controlplane.api.resources.names import GROUP, LABEL_COMPONENT
from tests.support.release import Release, Reply, example, release, run, streams, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SERVING = "smollm2"
TOKENS = 160
ROLES = ("prefill", "decode")
SETTLE_SECONDS = 5.0
"""Until the cluster has put into a namespace what it puts into each."""
RECORD_SECONDS = 3.0
"""Records of jobs are written beside the answers, at most so much later."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Release]:
    with release() as made:
        time.sleep(SETTLE_SECONDS)
        made.before = made.names_of_everything()
        made.install()
        yield made


def chat(tokens: int = TOKENS, **extra: Any) -> dict[str, Any]:
    question = "Write a long story about a lighthouse keeper, her dog, and the storm that changed the island."
    return {
        "model": SERVING,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }


def complete(reply: Reply, tokens: int = TOKENS) -> None:
    assert reply.status == 200, reply.body
    assert reply.done, "the stream ended without [DONE]"
    assert not any("error" in event for event in reply.events), reply.events[-1]
    assert reply.tokens == tokens


def apply(cluster: Release, **spec: Any) -> None:
    # float32: with tokens that are exact, one answer can be compared with another. One executor a role: a
    # machine that tests share is slow now and then, and the autoscaler would answer that with more of them.
    roles = {role: {"min": 0, "max": 1} for role in ROLES}
    document = example(SERVING, options={"dtype": "float32"}, roles=roles, **spec)
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(document))


def gateways(cluster: Release) -> set[str]:
    """Uids of those that are not on their way out."""
    pods = cluster.get("pods", "-l", f"{LABEL_COMPONENT}=gateway")
    return {pod["metadata"]["uid"] for pod in pods if not pod["metadata"].get("deletionTimestamp")}


async def serves(cluster: Release) -> None:
    def all_ready() -> bool:
        return cluster.ready_reason(SERVING) == "Serving" and all(
            len(cluster.executors(SERVING, role)) == 1 for role in ROLES
        )

    await until(all_ready, f"not served: {cluster.ready_reason(SERVING)}")


async def test_an_example_that_was_never_loaded_is_listed_woken_and_answered_in_two_parts(
    cluster: Release,
) -> None:
    apply(cluster)
    cluster.kubectl("wait", f"msv/{SERVING}", "--for=condition=Ready", "--timeout=60s")
    assert cluster.ready_reason(SERVING) == "ScaledToZero"
    complete(await cluster.ask("/v1/chat/completions", chat()))
    await serves(cluster)
    # Longer than what is computed where it decodes, and in nobody's cache.
    prompt = "Summarise: " + " ".join(
        f"item {number} costs {number * 7 % 101} coins," for number in range(60)
    )
    body = chat(stream=False, stream_options=None, messages=[{"role": "user", "content": prompt}])
    whole = await cluster.ask("/v1/chat/completions", body)
    await asyncio.sleep(RECORD_SECONDS)
    job = json.loads((await cluster.ask(f"/deepflow/v1/jobs/{whole.headers['x-deepflow-job']}")).body)
    attempts = job["tasks"][0]["attempts"]
    assert [attempt["kind"] for attempt in attempts] == list(ROLES), [each["reason"] for each in attempts]
    assert len({attempt["te_id"] for attempt in attempts}) == 2, "prefill and decode in pods of their own"
    models = json.loads((await cluster.ask("/v1/models")).body)["data"]
    assert [(model["id"], model["ready"]) for model in models] == [("smollm2-135m-instruct", True)]
    command = (sys.executable, "-m", "controlplane.cli", "explain", job["id"])
    told = await asyncio.to_thread(run, *command, "--cluster", "--namespace", cluster.namespace)
    assert all(f"{attempt['kind']} on {attempt['te_id']}" in told for attempt in attempts), told
    assert "candidates" in told


async def test_a_stream_completes_though_its_decode_pod_is_deleted(cluster: Release) -> None:
    expected = await cluster.ask("/v1/chat/completions", chat())
    complete(expected)
    async with streams(cluster, chat(), 1, events=10) as replies:
        (pod,) = cluster.executors(SERVING, "decode")
        cluster.kubectl("delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force")
        assert not replies[0].done, "it ended before its pod was gone"
    complete(replies[0])
    assert replies[0].text == expected.text
    await serves(cluster)
    assert cluster.executors(SERVING, "decode")[0]["metadata"]["uid"] != pod["metadata"]["uid"]


async def test_a_model_at_zero_stays_listed_holds_a_request_and_answers_it(cluster: Release) -> None:
    apply(cluster, scaling={"scaleToZeroAfterSeconds": 10})
    await until(lambda: not cluster.executors(SERVING), "it does not go to zero")
    await until(lambda: cluster.ready_reason(SERVING) == "ScaledToZero", "its status does not say so")
    models = json.loads((await cluster.ask("/v1/models")).body)["data"]
    assert [(model["id"], model["ready"]) for model in models] == [("smollm2-135m-instruct", False)]
    apply(cluster, scaling={"scaleToZeroAfterSeconds": 600})
    held, whole = await asyncio.gather(
        cluster.ask("/v1/chat/completions", chat(16)),
        cluster.ask("/v1/chat/completions", chat(16, stream=False, stream_options=None)),
    )
    complete(held, 16)
    told = [json.loads(comment.removeprefix(": waking ")) for comment in held.comments if "waking" in comment]
    assert told and told[-1]["waited_seconds"] > 0
    assert whole.status == 200 and float(whole.headers["x-deepflow-held-seconds"]) > 0
    history = cluster.serving(SERVING)["status"]["scalingHistory"]
    woken = [(entry["role"], entry["to"]) for entry in history if entry["by"] == "activator"]
    assert woken[:2] in ([(r, 1) for r in ROLES], [(r, 1) for r in reversed(ROLES)]), "woken once"


async def test_an_upgrade_drops_no_stream(cluster: Release) -> None:
    apply(cluster, scaling={"scaleToZeroAfterSeconds": 600})
    expected = await cluster.ask("/v1/chat/completions", chat(600))
    await serves(cluster)
    complete(expected, 600)
    old = gateways(cluster)
    async with streams(cluster, chat(600), 4, events=5) as replies:
        await asyncio.to_thread(
            cluster.upgrade,
            *(f"{component}.podAnnotations.e2e=upgraded" for component in ("gateway", "operator")),
        )
    for reply in replies:
        complete(reply, 600)
        assert reply.text == expected.text
    assert gateways(cluster) and not gateways(cluster) & old, "they are new ones"
    complete(await cluster.ask("/v1/chat/completions", chat(16)), 16)


async def test_an_uninstall_leaves_what_users_made_and_nothing_else(cluster: Release) -> None:
    cluster.kubectl("delete", "pod", "client", "--wait")
    await asyncio.to_thread(cluster.uninstall)
    await until(
        lambda: not {name for name in cluster.names_of_everything() if name.startswith("pod/")},
        "pods are left", seconds=180,
    )  # fmt: skip
    left = cluster.names_of_everything() - cluster.before
    custom = {name for name in left if name.split("/")[0].endswith(GROUP)}
    assert left == custom
    assert f"modelserving.{GROUP}/{SERVING}" in custom
    assert cluster.ready_reason(SERVING) == "False Uninstalled"
    assert not cluster.serving(SERVING)["metadata"].get("finalizers")
    cluster.kubectl("delete", f"msv/{SERVING}", "--timeout=60s")
