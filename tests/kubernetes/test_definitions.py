"""The definitions in a real API server: accepted, defaults filled in, nonsense refused in our words.

Needs one (tests/support/kube_server.py says which are found); without it these are skipped, and say so.
"""

from __future__ import annotations

import asyncio
import copy
import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from controlplane.api.resources import ModelServing
from controlplane.cli import crds
from controlplane.kube.client import Invalid, KubeApi, NotFound, connect
from controlplane.kube.resources import (
    MODEL_CACHES,
    MODEL_SERVINGS,
    ROLE_SCALERS,
    WARM_POOLS,
    Json,
    ResourceType,
)
from tests.support import kube_server

NAMESPACES = ResourceType("", "v1", "Namespace", "namespaces", namespaced=False)
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def kubeconfig() -> Iterator[str]:
    source = kube_server.found()
    if source is None:
        pytest.skip(kube_server.NONE)
    with kube_server.serving(source) as path:
        asyncio.run(crds._apply(str(path)))
        yield str(path)


@pytest.fixture
async def api(kubeconfig: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # urllib3 on a certificate made a moment ago
        async with await connect(kubeconfig=kubeconfig) as connected:
            connected.namespace = f"df-{secrets.token_hex(4)}"
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": connected.namespace}}
            await connected.create(NAMESPACES, body, manager="tests")
            yield connected
            await connected.delete(NAMESPACES, "", connected.namespace)


def serving(**spec: Any) -> Json:
    return {"model": {"uri": "hf://a/b"}, "roles": {"colocated": {"min": 0}}, **spec}


def schedule(**roles: int) -> Json:
    one = {"name": "a", "cron": "0 8 * * 1-5", "durationSeconds": 3600, "minReplicas": roles}
    return {"schedules": [one]}


POOL: Json = {"accelerator": "cpu", "image": "a:1"}
REFUSED: list[tuple[ResourceType, Json, str]] = [
    (
        MODEL_SERVINGS,
        serving(model={"uri": "s3://bucket/a"}),
        "uri must start with hf://, pypi:// or file:///",
    ),
    (MODEL_SERVINGS, serving(roles={}), "roles must name colocated, or prefill and decode"),
    (MODEL_SERVINGS, serving(roles={"prefill": {}}), "prefill and decode go together"),
    (
        MODEL_SERVINGS,
        serving(roles={"prefill": {"min": 1}, "decode": {"min": 0}}),
        "the roles reach zero together",
    ),
    (MODEL_SERVINGS, serving(roles={"colocated": {"min": 3, "max": 2}}), "min must not exceed max"),
    (MODEL_SERVINGS, serving(slo={}), "slo must have ttftMilliseconds or tpotMilliseconds"),
    (
        MODEL_SERVINGS,
        serving(scaling={"panicWindowSeconds": 90}),
        "panicWindowSeconds must not exceed stableWindowSeconds",
    ),
    (
        MODEL_SERVINGS,
        serving(scaling={"ratio": {"min": 9, "max": 8}}),
        "ratio.min must not exceed ratio.max",
    ),
    (
        MODEL_SERVINGS,
        serving(scaling={"scaleToZeroAfterSeconds": 60}, roles={"colocated": {"min": 1}}),
        "scaleToZeroAfterSeconds needs min 0 in every role",
    ),
    (
        MODEL_SERVINGS,
        serving(engine="vllm", roles={"prefill": {}, "decode": {}}),
        "engine vllm serves colocated only",
    ),
    (
        MODEL_SERVINGS,
        serving(scaling=schedule(encode=1)),
        "minReplicas takes the roles colocated, prefill and decode",
    ),
    (MODEL_SERVINGS, serving(priority=101), "less than or equal to 100"),
    (MODEL_SERVINGS, serving(engine="other"), 'supported values: "flowserve", "vllm"'),
    (MODEL_SERVINGS, serving(options={"kvCacheBytes": "1 Gi"}), "should match"),
    (WARM_POOLS, {**POOL, "size": 5, "maxPods": 4}, "size must not exceed maxPods"),
    (
        WARM_POOLS,
        {**POOL, "cache": {"claimName": "a", "sizeLimit": "1Gi"}},
        "cache takes a claimName or the sizeLimit of an emptyDir, not both",
    ),
    (MODEL_CACHES, {"models": [{"uri": "ftp://aaaa"}]}, "uri must start with hf://"),
    (MODEL_CACHES, {"models": [{"uri": "hf://a/b"}, {"uri": "hf://a/b"}]}, "Duplicate value"),
]


def named(kind: ResourceType, api: KubeApi, name: str, spec: Json) -> Json:
    metadata = {"name": name, "namespace": api.namespace}
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, "spec": spec}


@pytest.mark.parametrize(("kind", "spec", "said"), REFUSED)
async def test_nonsense_is_refused_in_our_words(
    api: KubeApi, kind: ResourceType, spec: Json, said: str
) -> None:
    with pytest.raises(Invalid) as refused:
        await api.create(kind, named(kind, api, "a", copy.deepcopy(spec)), manager="tests")
    assert said in str(refused.value)


async def test_names_that_would_be_too_long_for_what_is_made_of_them_are_refused(api: KubeApi) -> None:
    with pytest.raises(Invalid, match="at most 40 characters"):
        await api.create(MODEL_SERVINGS, named(MODEL_SERVINGS, api, "x" * 41, serving()), manager="tests")


@pytest.mark.parametrize(
    ("kind", "spec", "change", "said"),
    [
        (WARM_POOLS, POOL, {"accelerator": "gpu"}, "accelerator cannot be changed: make another pool"),
        (
            ROLE_SCALERS,
            {"modelServing": "a", "role": "decode"},
            {"role": "prefill"},
            "role cannot be changed",
        ),
        (
            ROLE_SCALERS,
            {"modelServing": "a", "role": "decode"},
            {"modelServing": "b"},
            "modelServing cannot be changed",
        ),
    ],
)
async def test_what_an_object_is_cannot_be_changed(
    api: KubeApi, kind: ResourceType, spec: Json, change: Json, said: str
) -> None:
    await api.create(kind, named(kind, api, "a", dict(spec)), manager="tests")
    with pytest.raises(Invalid, match=said):
        await api.patch(kind, api.namespace, "a", {"spec": change}, manager="tests")


async def test_the_server_fills_in_the_defaults_of_the_type(api: KubeApi) -> None:
    made = await api.create(MODEL_SERVINGS, named(MODEL_SERVINGS, api, "a", serving()), manager="tests")
    assert (
        ModelServing.model_validate(made).spec
        == ModelServing.model_validate(named(MODEL_SERVINGS, api, "a", serving())).spec
    )
    assert made["spec"]["scaling"]["targets"] == {"queueSeconds": 1.0, "kvUtilization": 0.85}
    assert "status" not in made
    assert made["metadata"]["generation"] == 1


async def test_status_is_a_subresource_and_conditions_have_owners(api: KubeApi) -> None:
    made = await api.create(MODEL_SERVINGS, named(MODEL_SERVINGS, api, "a", serving()), manager="tests")

    def said(kind: str) -> Json:
        one = {
            "type": kind,
            "status": "True",
            "reason": "Serving",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
        metadata = {"name": "a", "namespace": api.namespace}
        return {"metadata": metadata, "status": {"conditions": [one]}}

    for kind, owner in (("Ready", "one"), ("ScalingActive", "two")):
        await api.apply(MODEL_SERVINGS, said(kind), manager=owner, subresource="status")
    found = await api.get(MODEL_SERVINGS, api.namespace, "a")
    assert {one["type"] for one in found["status"]["conditions"]} == {"Ready", "ScalingActive"}
    assert found["metadata"]["generation"] == made["metadata"]["generation"]
    again = await api.apply(MODEL_SERVINGS, said("Ready"), manager="one", subresource="status")
    assert again["metadata"]["resourceVersion"] == found["metadata"]["resourceVersion"]  # nothing was written


async def test_a_role_and_a_pool_scale_as_deployments_do(api: KubeApi) -> None:
    await api.create(
        ROLE_SCALERS, named(ROLE_SCALERS, api, "a", {"modelServing": "a", "role": "decode"}), manager="tests"
    )
    await api.create(WARM_POOLS, named(WARM_POOLS, api, "p", dict(POOL)), manager="tests")
    for kind, name, field in ((ROLE_SCALERS, "a", "replicas"), (WARM_POOLS, "p", "size")):
        change = {"spec": {"replicas": 3}}
        await api.patch(kind, api.namespace, name, change, manager="kubectl", subresource="scale")
        assert (await api.get(kind, api.namespace, name))["spec"][field] == 3


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
async def test_examples_are_accepted(api: KubeApi, file: Path) -> None:
    kinds = {kind.kind: kind for kind in (MODEL_SERVINGS, WARM_POOLS, MODEL_CACHES)}
    for document in yaml.safe_load_all(file.read_text()):
        kind = kinds[document["kind"]]
        document["metadata"]["namespace"] = api.namespace
        await api.create(kind, document, manager="tests")


async def test_definitions_can_be_applied_again_and_change_nothing(api: KubeApi, kubeconfig: str) -> None:
    kind = ResourceType(
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        namespaced=False,
    )
    before = [crd["metadata"]["resourceVersion"] for crd in (await api.list(kind))[0]]
    await crds._apply(kubeconfig)
    assert [crd["metadata"]["resourceVersion"] for crd in (await api.list(kind))[0]] == before
    with pytest.raises(NotFound):
        await api.get(kind, "", "finetunejobs.deepflow.dev")
