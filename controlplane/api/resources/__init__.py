"""Custom resources of `deepflow.dev/v1alpha1`: their types, and the names that their writers share.

Read by the operator, by gateways in a cluster and by the command line; `generate` makes the
CustomResourceDefinitions of the chart out of the same types, so that what the API server accepts and what
the code reads cannot drift apart. Conventions follow the Kubernetes API conventions: spec is intent, status
is what was observed, conditions are a map by type with machine-readable reasons.
"""

from controlplane.api.resources.base import Condition, ObjectMeta, Resource, parse_quantity
from controlplane.api.resources.modelcache import ModelCache
from controlplane.api.resources.modelserving import ModelServing
from controlplane.api.resources.rolescaler import RoleScaler
from controlplane.api.resources.warmpool import WarmPool

KINDS: tuple[type[Resource], ...] = (ModelServing, RoleScaler, WarmPool, ModelCache)

__all__ = [
    "KINDS",
    "Condition",
    "ModelCache",
    "ModelServing",
    "ObjectMeta",
    "Resource",
    "RoleScaler",
    "WarmPool",
    "parse_quantity",
]
