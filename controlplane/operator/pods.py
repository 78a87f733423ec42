"""Executors' pods: made from a WarmPool, and read back as values.

One template per pool: an executor, and beside it a fetcher that brings models into the volume they share.
Both run under the restricted profile, without a token of the API server. Everything a claim changes is in
labels, annotations and owner references, so a claimed pod is the same pod.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime

from controlplane.api.resources.base import parse_quantity
from controlplane.api.resources.modelserving import ModelServing, Role
from controlplane.api.resources.names import (
    ANNOTATION_ASLEEP_SINCE,
    ANNOTATION_CLAIMED_AT,
    ANNOTATION_DRAIN_SINCE,
    ANNOTATION_LOAD_HASH,
    ANNOTATION_ROLE_EPOCH,
    ANNOTATION_SERVING_UID,
    ANNOTATION_START_PATH,
    ANNOTATION_TEMPLATE_HASH,
    CACHE_PATH,
    COMPONENT_EXECUTOR,
    CONTAINER_EXECUTOR,
    CONTAINER_FETCHER,
    LABEL_ACCELERATOR,
    LABEL_COMPONENT,
    LABEL_MANAGED_BY,
    LABEL_PART_OF,
    LABEL_POOL,
    LABEL_ROLE,
    LABEL_SERVING,
    LABEL_STATE,
    MANAGED_BY,
    PART_OF,
    PORT_FETCH,
    PORT_GRPC,
    PORT_HEALTH,
    PORT_KV,
    PORT_METRICS,
    PORT_TASKS,
    SHARED_PATH,
    TLS_PATH,
    WEIGHTS_PATH,
    PodState,
    Reason,
)
from controlplane.api.resources.warmpool import WarmPool
from controlplane.kube.resources import WARM_POOLS, Json, key_of, owner_reference, uid_of, version_of
from controlplane.operator.plan.values import Pod, Te
from controlplane.operator.settings import OperatorSettings
from kvtransfer.tls import TLS_DIR_ENV

EXECUTOR_SELECTOR = f"{LABEL_COMPONENT}={COMPONENT_EXECUTOR},{LABEL_MANAGED_BY}={MANAGED_BY}"
TLS_FILE_MODE = 0o440  # the pods' group reads them
USER = 65532  # "nonroot" of the images
DRAIN_MARGIN_SECONDS = 10
"""Below the pod's grace: who is told to end finishes what he can and says so before he is killed."""
_IMAGE_PROBLEMS = {
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError",
}  # fmt: skip


UNBOUNDED_WEIGHTS = 1 << 50
"""Of a pod whose memory nothing bounds but its node's."""


def te_id(namespace: str, name: str) -> str:
    """The executor's name in the registry: unique in the cluster."""
    return f"{namespace}.{name}"


def profile(accelerator: str, engine: str) -> str:
    """What executors must offer to serve a ModelServing, as one name: the accelerator profile, and the engine
    where it is not FlowServe."""
    return accelerator if engine == "flowserve" else f"{accelerator}+{engine}"


def secret_env(name: str, reference: str) -> list[Json]:
    """An environment variable out of "SECRET/KEY"; none for ""."""
    secret, _, key = reference.partition("/")
    if not secret:
        return []
    return [{"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key or "value"}}}]


def pod_spec(pool: WarmPool, *, token_secret: str, redis_secret: str, tls_secret: str = "") -> Json:
    """The pod template's spec; with `tls_secret` its containers speak TLS with that secret's certificates."""
    spec = pool.spec
    grace = spec.termination_grace_period_seconds
    security: Json = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    token = secret_env("DEEPFLOW_CLUSTER_TOKEN", token_secret)
    own = [
        {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "DEEPFLOW_CACHE", "value": CACHE_PATH},
        {"name": "HOME", "value": "/tmp"},
    ]
    mounts: list[Json] = [
        {"name": "cache", "mountPath": CACHE_PATH},
        {"name": "run", "mountPath": SHARED_PATH},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if tls_secret:
        own.append({"name": TLS_DIR_ENV, "value": TLS_PATH})
        mounts.append({"name": "tls", "mountPath": TLS_PATH, "readOnly": True})
    weights = weights_bytes(pool)
    probed = PORT_HEALTH if tls_secret else PORT_GRPC  # kubelets' probes speak no TLS
    extra = [env.wire() for env in spec.env]
    # What kernels are compiled to, by source, version and device: a pod on the same volume need not again.
    kernels = {"name": "TRITON_CACHE_DIR", "value": f"{CACHE_PATH}/compiled"}
    compiled = [] if spec.device == "cpu" else [kernels]
    if spec.engine == "vllm":
        compiled.append({"name": "VLLM_CACHE_ROOT", "value": f"{CACHE_PATH}/compiled/vllm"})
    executor: Json = {
        "name": CONTAINER_EXECUTOR,
        "image": spec.image,
        "imagePullPolicy": spec.image_pull_policy,
        "command": ["python", "-m", "flowserve.shell"],
        "args": [
            *("--te-id", "$(POD_NAMESPACE).$(POD_NAME)", "--listen", f"0.0.0.0:{PORT_GRPC}"),
            *("--advertise-host", "$(POD_IP)", "--kv-data-listen", f"0.0.0.0:{PORT_KV}"),
            *("--metrics-listen", f"0.0.0.0:{PORT_METRICS}", "--device", spec.device),
            *("--tasks-listen", f"0.0.0.0:{PORT_TASKS}"),
            *(("--health-listen", f"0.0.0.0:{PORT_HEALTH}") if tls_secret else ()),
            *("--tensor-parallel", str(spec.tensor_parallel), "--threads", str(spec.threads)),
            *(("--engine", spec.engine) if spec.engine != "flowserve" else ()),
            *weights_options(pool, weights),
            *("--drain-seconds", str(max(1, grace - DRAIN_MARGIN_SECONDS)), *spec.args),
        ],
        "env": [*own, *compiled, *token, *secret_env("REDIS_URL", redis_secret), *extra],
        "ports": [
            {"name": "grpc", "containerPort": PORT_GRPC},
            {"name": "kv", "containerPort": PORT_KV},
            {"name": "tasks", "containerPort": PORT_TASKS},
            {"name": "metrics", "containerPort": PORT_METRICS},
        ],
        # Alive and warm, not "has a model": a loading executor must not be restarted, a warm one is ready.
        "startupProbe": {"grpc": {"port": probed}, "periodSeconds": 2, "failureThreshold": 150},
        "readinessProbe": {"grpc": {"port": probed}, "periodSeconds": 5, "timeoutSeconds": 5},
        "livenessProbe": {
            "grpc": {"port": probed}, "periodSeconds": 15, "timeoutSeconds": 10, "failureThreshold": 8,
        },
        "resources": spec.resources.wire(),
        "securityContext": security,
        "volumeMounts": [*mounts, {"name": "weights", "mountPath": WEIGHTS_PATH}] if weights else mounts,
    }  # fmt: skip
    fetcher: Json = {
        "name": CONTAINER_FETCHER,
        "image": spec.image,
        "imagePullPolicy": spec.image_pull_policy,
        "command": ["python", "-m", "controlplane.nodeagent.fetcher", "--listen", f"0.0.0.0:{PORT_FETCH}"],
        "env": [*own, *token, *secret_env("REDIS_URL", redis_secret), *extra],
        "ports": [{"name": "fetch", "containerPort": PORT_FETCH}],
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
        "securityContext": security,
        "volumeMounts": mounts,
    }
    cache: Json = {"name": "cache"}
    if spec.cache.claim_name:
        cache["persistentVolumeClaim"] = {"claimName": spec.cache.claim_name}
    else:
        limits = {"sizeLimit": str(spec.cache.size_limit)} if spec.cache.size_limit else {}
        medium = {"medium": spec.cache.medium} if spec.cache.medium else {}
        cache["emptyDir"] = {**limits, **medium}
    result: Json = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [executor, fetcher],
        "volumes": [cache, {"name": "run", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
    }
    if weights:
        bound = {"sizeLimit": str(spec.weights.size_limit)} if spec.weights.size_limit is not None else {}
        result["volumes"].append({"name": "weights", "emptyDir": {"medium": "Memory", **bound}})
    if tls_secret:
        result["volumes"].append(
            {"name": "tls", "secret": {"secretName": tls_secret, "defaultMode": TLS_FILE_MODE}}
        )
    optional: Json = {
        "nodeSelector": spec.node_selector,
        "tolerations": [toleration.wire() for toleration in spec.tolerations],
        "affinity": spec.affinity,
        "runtimeClassName": spec.runtime_class_name,
        "priorityClassName": spec.priority_class_name,
        "serviceAccountName": spec.service_account_name,
        "imagePullSecrets": [{"name": name} for name in spec.image_pull_secrets],
    }
    return result | {name: value for name, value in optional.items() if value}


def weights_bytes(pool: WarmPool) -> int:
    """Bound of the memory for weights; 0: the pods have none. Ranks of one executor share none."""
    spec = pool.spec
    if spec.tensor_parallel > 1 or spec.engine != "flowserve":
        return 0
    if spec.weights.size_limit is not None:
        return parse_quantity(spec.weights.size_limit)
    if spec.device != "cpu":
        return 0
    limit = spec.resources.limits.get("memory")
    return UNBOUNDED_WEIGHTS if limit is None else parse_quantity(limit)


def weights_options(pool: WarmPool, bound: int) -> list[str]:
    """Of the executor, for memory of `bound` bytes."""
    if not bound:
        return []
    # A folder of its own: the volume's is root's.
    options = ["--weights-dir", f"{WEIGHTS_PATH}/node", "--weights-bytes", str(bound)]
    reserve = min(parse_quantity(pool.spec.weights.reserve), bound)
    return [*options, "--weights-reserve-bytes", str(reserve)] if reserve else options


def template_of(pool: WarmPool, settings: OperatorSettings) -> Json:
    """`pod_spec` with the operator's secrets."""
    return pod_spec(
        pool,
        token_secret=settings.token_secret,
        redis_secret=settings.redis_secret,
        tls_secret=settings.tls_secret,
    )


def hash_of(value: object) -> str:
    """Of what JSON can say; stable over processes and versions of ours."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def warm_pod(pool: WarmPool, owner: Json, spec: Json, suffix: str) -> Json:
    """A new pod of the pool; `owner` is the pool as the API server has it, `spec` from `pod_spec`."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": pool.metadata.namespace,
            "name": f"{pool.metadata.name}-{suffix}",
            "labels": {
                LABEL_COMPONENT: COMPONENT_EXECUTOR,
                LABEL_MANAGED_BY: MANAGED_BY,
                LABEL_PART_OF: PART_OF,
                LABEL_POOL: pool.metadata.name,
                LABEL_ACCELERATOR: pool.spec.accelerator,
                LABEL_STATE: PodState.WARM.value,
            },
            "annotations": {ANNOTATION_TEMPLATE_HASH: hash_of(spec)},
            "ownerReferences": [owner_reference(owner, WARM_POOLS)],
        },
        "spec": spec,
    }


def load_hash(serving: ModelServing) -> str:
    """Of all that decides what an executor loads: another value means another executor."""
    spec = serving.spec
    return hash_of(
        [serving.model_id, spec.model.uri, spec.options.wire(), spec.accelerator, spec.engine.value]
    )


def read_pod(obj: Json, te: Te | None = None, load_error: str = "") -> Pod | None:
    """None for a pod that is none of ours."""
    meta, status = obj["metadata"], obj.get("status") or {}
    labels: Mapping[str, str] = meta.get("labels") or {}
    notes: Mapping[str, str] = meta.get("annotations") or {}
    try:
        state = PodState(labels.get(LABEL_STATE, ""))
    except ValueError:
        return None
    role = labels.get(LABEL_ROLE, "")
    containers = status.get("containerStatuses") or []
    executor: Json = next((c for c in containers if c.get("name") == CONTAINER_EXECUTOR), {})
    conditions = {c.get("type"): c for c in status.get("conditions") or []}
    problem, text = _problem(containers, conditions)
    epoch = notes.get(ANNOTATION_ROLE_EPOCH, "")
    return Pod(
        key=key_of(obj),
        uid=uid_of(obj),
        version=version_of(obj),
        state=state,
        pool=labels.get(LABEL_POOL, ""),
        serving_uid=notes.get(ANNOTATION_SERVING_UID, "") if LABEL_SERVING in labels else "",
        role=Role(role) if role in set(Role) else None,
        epoch=int(epoch) if epoch.isdecimal() else 0,
        load_hash=notes.get(ANNOTATION_LOAD_HASH, ""),
        template_hash=notes.get(ANNOTATION_TEMPLATE_HASH, ""),
        created=parse_time(meta.get("creationTimestamp")) or 0.0,
        claimed_at=parse_time(notes.get(ANNOTATION_CLAIMED_AT)) or 0.0,
        start_path=notes.get(ANNOTATION_START_PATH, ""),
        drain_since=parse_time(notes.get(ANNOTATION_DRAIN_SINCE)),
        asleep_since=parse_time(notes.get(ANNOTATION_ASLEEP_SINCE)),
        deleting=bool(meta.get("deletionTimestamp")),
        gone_by=parse_time(meta.get("deletionTimestamp")),
        ended=status.get("phase") in ("Failed", "Succeeded"),
        ready=(conditions.get("Ready") or {}).get("status") == "True",
        restarts=int(executor.get("restartCount") or 0),
        scheduled=(conditions.get("PodScheduled") or {}).get("status") != "False",
        problem=problem,
        problem_text=text,
        te=te,
        load_error=load_error,
    )


def _problem(containers: list[Json], conditions: Mapping[str, Json]) -> tuple[Reason | None, str]:
    scheduled = conditions.get("PodScheduled") or {}
    if scheduled.get("status") == "False":
        return Reason.INSUFFICIENT_CAPACITY, str(scheduled.get("message") or "cannot be scheduled")
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = str(waiting.get("reason") or "")
        if reason in _IMAGE_PROBLEMS:
            return Reason.IMAGE_PULL_FAILED, f"{reason}: {waiting.get('message') or container.get('image')}"
        if reason == "CrashLoopBackOff":
            return Reason.POD_FAILED, f"{container.get('name')}: {waiting.get('message') or reason}"
    return None, ""


def parse_time(text: object) -> float | None:
    """Seconds since the epoch of RFC 3339; None for anything else."""
    if not isinstance(text, str) or not text:
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
