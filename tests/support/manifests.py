"""Rendered manifests against the API's own schemas, and against Kubernetes' restricted pod profile.

Schemas are those of the package kubernetes-validate, one set per minor version; custom resources of ours
are held to their own definitions.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import jsonschema_rs

from controlplane.api.resources.generate import definitions

Json = dict[str, Any]

VERSIONS = ("1.33.0", "1.34.0", "1.35.0", "1.36.0", "1.37.0")
# Kinds of other projects, whose definitions are not at hand.
FOREIGN = {"monitoring.coreos.com/v1", "cert-manager.io/v1"}


@functools.cache
def _registry(version: str) -> jsonschema_rs.Registry:
    shared = json.loads((_folder(version) / "_definitions.json").read_text())
    return jsonschema_rs.Registry([(shared["$id"], shared)])


def _folder(version: str) -> Any:
    return files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"


@functools.cache
def _validator(version: str, api_version: str, kind: str) -> Any:
    # Files are named role-rbac-v1.json for rbac.authorization.k8s.io/v1.
    file = _folder(version) / f"{kind.lower()}-{re.sub(r'[.][^/]*', '', api_version).replace('/', '-')}.json"
    if not file.is_file():
        raise AssertionError(f"Kubernetes {version} knows no {kind} in {api_version}")
    return jsonschema_rs.Draft202012Validator(json.loads(file.read_text()), registry=_registry(version))


@functools.cache
def _own() -> dict[str, Any]:
    found = {}
    for made in definitions():
        schema = _closed(made["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[made["spec"]["names"]["kind"]] = jsonschema_rs.Draft202012Validator(schema)
    return found


def _closed(schema: Json) -> Json:
    """A structural schema that refuses unknown fields, as `kubectl --validate=strict` does."""
    out = {key: value for key, value in schema.items() if key != "items" and key != "properties"}
    if "properties" in schema:
        out["properties"] = {name: _closed(child) for name, child in schema["properties"].items()}
        out["additionalProperties"] = False
    if "items" in schema:
        out["items"] = _closed(schema["items"])
    return out


def schema_problems(document: Json, version: str) -> list[str]:
    """What the API server of `version` would refuse, in words."""
    api_version, kind = document["apiVersion"], document["kind"]
    if api_version in FOREIGN:
        return []
    validator = _own().get(kind) if api_version.startswith("deepflow.dev/") else None
    validator = validator or _validator(version, api_version, kind)
    where = f"{kind}/{document['metadata']['name']}"
    return [
        f"{where} {'/'.join(str(part) for part in error.instance_path)}: {error.message[:300]}"
        for error in validator.iter_errors(document)
    ]


def pod_specs(document: Json) -> Iterator[tuple[str, Json]]:
    """The pod specs that a document makes, with where they come from."""
    where = f"{document['kind']}/{document['metadata']['name']}"
    spec = document.get("spec") or {}
    if document["kind"] == "Pod":
        yield where, spec
    elif isinstance(spec.get("template"), dict) and "spec" in spec["template"]:
        yield where, spec["template"]["spec"]


_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def restricted_problems(where: str, pod: Json) -> list[str]:
    """What the restricted profile of the Pod Security Standards refuses, and what we ask beyond it."""
    found: list[str] = []

    def need(holds: bool, what: str) -> None:
        if not holds:
            found.append(f"{where}: {what}")

    for name in ("hostNetwork", "hostPID", "hostIPC"):
        need(not pod.get(name), name)
    own = pod.get("securityContext") or {}
    need(not own.get("sysctls"), "sysctls")
    need(not own.get("seLinuxOptions"), "seLinuxOptions")
    for volume in pod.get("volumes") or []:
        kinds = set(volume) - {"name"}
        need(kinds <= _VOLUMES, f"volume {volume['name']} is of {sorted(kinds)}")
        # Ours: nothing that a pod writes into may fill its node.
        empty = volume.get("emptyDir")
        if empty is not None and volume["name"] != "data":
            need("sizeLimit" in empty, f"volume {volume['name']} has no sizeLimit")
    containers = [*(pod.get("initContainers") or []), *(pod.get("containers") or [])]
    for container in containers:
        name = container["name"]
        security = container.get("securityContext") or {}
        both = {**own, **security}
        need(both.get("runAsNonRoot") is True, f"{name}: runAsNonRoot")
        need(both.get("runAsUser", 1) != 0, f"{name}: runAsUser 0")
        need(
            (both.get("seccompProfile") or {}).get("type") in ("RuntimeDefault", "Localhost"),
            f"{name}: seccomp",
        )
        need(security.get("allowPrivilegeEscalation") is False, f"{name}: allowPrivilegeEscalation")
        need(not security.get("privileged"), f"{name}: privileged")
        capabilities = security.get("capabilities") or {}
        need("ALL" in (capabilities.get("drop") or []), f"{name}: capabilities.drop ALL")
        need(set(capabilities.get("add") or []) <= {"NET_BIND_SERVICE"}, f"{name}: capabilities.add")
        need(not any("hostPort" in port for port in container.get("ports") or []), f"{name}: hostPort")
        # Ours, beyond the profile.
        need(security.get("readOnlyRootFilesystem") is True, f"{name}: readOnlyRootFilesystem")
        resources = container.get("resources") or {}
        need("memory" in (resources.get("limits") or {}), f"{name}: no memory limit")
        need({"cpu", "memory"} <= set(resources.get("requests") or {}), f"{name}: no requests")
        need(not re.search(r":latest$", container["image"]), f"{name}: image of no fixed version")
    need("automountServiceAccountToken" in pod, "automountServiceAccountToken is not said")
    return found
