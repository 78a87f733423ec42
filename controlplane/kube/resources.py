"""Which path of the API a kind has, and what an object's key is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

Json = dict[str, Any]
Key = tuple[str, str]
"""Namespace ("" for objects of the cluster) and name."""


@dataclass(frozen=True, slots=True)
class ResourceType:
    """A kind of one API group."""

    group: str  # "" = core
    version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """URL path; without `namespace` that of all namespaces, without `name` that of the collection."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root]
        if self.namespaced and namespace:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        if name:
            parts.append(quote(name, safe=""))
        if subresource:
            parts.append(subresource)
        return "/".join(parts)


PODS = ResourceType("", "v1", "Pod", "pods")
EVENTS = ResourceType("events.k8s.io", "v1", "Event", "events")
LEASES = ResourceType("coordination.k8s.io", "v1", "Lease", "leases")
MODEL_SERVINGS = ResourceType("deepflow.dev", "v1alpha1", "ModelServing", "modelservings")
ROLE_SCALERS = ResourceType("deepflow.dev", "v1alpha1", "RoleScaler", "rolescalers")
WARM_POOLS = ResourceType("deepflow.dev", "v1alpha1", "WarmPool", "warmpools")
MODEL_CACHES = ResourceType("deepflow.dev", "v1alpha1", "ModelCache", "modelcaches")


def key_of(obj: Json) -> Key:
    meta = obj.get("metadata") or {}
    return str(meta.get("namespace") or ""), str(meta.get("name") or "")


def uid_of(obj: Json) -> str:
    return str((obj.get("metadata") or {}).get("uid") or "")


def version_of(obj: Json) -> str:
    return str((obj.get("metadata") or {}).get("resourceVersion") or "")


def newer(version: str, than: str) -> bool:
    """Whether one resourceVersion of a resource is later than another. They are ordered decimals (KEP-5504);
    a server that has others gets what comes last."""
    if version.isdecimal() and than.isdecimal():
        return int(version) > int(than)
    return version != than


def owner_reference(owner: Json, resource: ResourceType, *, controller: bool = True) -> Json:
    """Reference for the garbage collector: the owned object goes when the owner is gone."""
    return {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": controller,
        "blockOwnerDeletion": False,
    }
