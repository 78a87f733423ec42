"""Names that several writers of the cluster share: group, labels, annotations, owners, conditions, reasons.

Operator, gateway, node agent and chart agree on these and on nothing else. A name that is in use is never
given another meaning; a new meaning takes a new name.
"""

from __future__ import annotations

from enum import StrEnum

GROUP = "deepflow.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

# -- labels: what selectors use -----------------------------------------------------------------------

LABEL_SERVING = f"{GROUP}/model-serving"  # pods, RoleScalers: name of their ModelServing
LABEL_ROLE = f"{GROUP}/role"  # pods: colocated | prefill | decode, mirrors what the executor was told
LABEL_POOL = f"{GROUP}/warm-pool"  # pods: the WarmPool they came from, kept after the claim
LABEL_ACCELERATOR = f"{GROUP}/accelerator"  # pods, pools: accelerator profile
LABEL_STATE = f"{GROUP}/state"  # pods: a PodState
LABEL_COMPONENT = "app.kubernetes.io/component"  # operator | gateway | executor | node-agent | valkey
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_PART_OF = "app.kubernetes.io/part-of"
MANAGED_BY = "deepflow-operator"
PART_OF = "deepflow"
COMPONENT_EXECUTOR = "executor"


class PodState(StrEnum):
    """Where an executor's pod is in its life (label `deepflow.dev/state`)."""

    WARM = "warm"  # started, no model, free to be claimed
    CLAIMED = "claimed"  # belongs to a ModelServing, model on its way
    SERVING = "serving"  # model loaded, takes tasks
    ASLEEP = "asleep"  # not needed now: weights in host memory, no KV memory, takes no tasks
    DRAINING = "draining"  # takes no new tasks; deleted once it is empty or its time is over


# -- annotations: what a writer remembers -------------------------------------------------------------

ANNOTATION_CLAIMED_AT = f"{GROUP}/claimed-at"  # pods: RFC 3339
ANNOTATION_SERVING_UID = f"{GROUP}/model-serving-uid"  # pods: uid of the claimant, since names come again
ANNOTATION_LOAD_HASH = f"{GROUP}/load-hash"  # pods: hash of the source and options it was claimed for
ANNOTATION_REVISION = f"{GROUP}/model-revision"  # pods: revision that was loaded
ANNOTATION_ROLE_EPOCH = f"{GROUP}/role-epoch"  # pods: epoch of the role last set
ANNOTATION_DRAIN_SINCE = f"{GROUP}/drain-since"  # pods: RFC 3339
ANNOTATION_ASLEEP_SINCE = f"{GROUP}/asleep-since"  # pods: RFC 3339
ANNOTATION_TEMPLATE_HASH = f"{GROUP}/template-hash"  # pods: hash of the pool's pod template
ANNOTATION_START_PATH = f"{GROUP}/start-path"  # pods: cold | warm | hot | fork | wake
# RoleScaler, set by a person: any value gives a count set by hand back to the autoscaler.
ANNOTATION_RESUME = f"{GROUP}/resume-autoscaling"
# ModelServing, RoleScaler, WarmPool: "true" stops all actions of the operator on the object but its status.
ANNOTATION_PAUSED = f"{GROUP}/paused"

FINALIZER_DRAIN = f"{GROUP}/drain"  # ModelServing, serving pods: tasks and KV leases end before deletion

# -- field owners of server-side apply: one per writer --------------------------------------------------

OWNER_OPERATOR = "deepflow-operator"  # objects the operator creates, and statuses
OWNER_ACTIVATOR = "deepflow-activator"  # RoleScaler.spec.replicas, 0 -> 1 only
OWNER_AUTOSCALER = "deepflow-autoscaler"  # RoleScaler.spec.replicas otherwise; scalingHistory
OWNER_GATEWAY = "deepflow-gateway"
LEASE_OPERATOR = "deepflow-operator"  # coordination.k8s.io Lease of the leader election


class ConditionType(StrEnum):
    """`status.conditions[].type`. Ready sums the others up; True is good for all of them."""

    READY = "Ready"
    ACCEPTED = "Accepted"  # the spec can be served at all: source, engine, profile
    CAPACITY = "CapacityAvailable"  # warm pods (or room for them) for the wanted replicas
    ROLES_READY = "RolesReady"  # every role has its wanted replicas, loaded
    SCALING_ACTIVE = "ScalingActive"  # the autoscaler has signals and may act


class Reason(StrEnum):
    """`status.conditions[].reason`, of events, and of refusals: machine-readable, stable."""

    # Ready
    SERVING = "Serving"
    SCALED_TO_ZERO = "ScaledToZero"  # Ready stays True: a request is held and wakes the model
    WAKING = "Waking"
    STARTING = "Starting"
    DEGRADED = "Degraded"  # answers, with fewer executors than wanted
    DRAINING = "Draining"
    DELETING = "Deleting"
    PAUSED = "Paused"
    UNINSTALLED = "Uninstalled"
    # Accepted
    VALID = "Valid"
    INVALID_SOURCE = "InvalidSource"
    ENGINE_UNAVAILABLE = "EngineUnavailable"
    PROFILE_UNKNOWN = "ProfileUnknown"  # no WarmPool offers the accelerator profile
    NAME_CONFLICT = "NameConflict"  # another ModelServing has the model id or alias
    # CapacityAvailable
    SUFFICIENT = "Sufficient"
    POOL_EMPTY = "PoolEmpty"  # pods of the pool are on their way
    INSUFFICIENT_CAPACITY = "InsufficientCapacity"  # pods cannot be scheduled
    IMAGE_PULL_FAILED = "ImagePullFailed"
    POD_FAILED = "PodFailed"  # pods end before they are ready
    # RolesReady
    ALL_READY = "AllReady"
    PODS_NOT_READY = "PodsNotReady"
    LOAD_FAILED = "LoadFailed"
    LOADING = "Loading"
    # ScalingActive
    ACTIVE = "Active"
    ADVISORY = "Advisory"  # decisions are recorded, not acted on
    MANUAL = "Manual"
    OVERRIDDEN = "Overridden"  # somebody else owns the replicas
    NO_SIGNALS = "NoSignals"
    AT_LIMIT = "AtLimit"
    # of single steps: events and scalingHistory
    CLAIMED = "Claimed"
    LOADED = "Loaded"
    ROLE_CHANGED = "RoleChanged"
    FELL_ASLEEP = "FellAsleep"
    WOKEN = "Woken"
    REPLACED = "Replaced"
    CLAIM_LOST = "ClaimLost"
    DRAIN_TIMED_OUT = "DrainTimedOut"
    GARBAGE_COLLECTED = "GarbageCollected"
    SCALED_UP = "ScaledUp"
    SCALED_DOWN = "ScaledDown"
    ACTIVATED = "Activated"
    IDLE = "Idle"
    SLO_VIOLATED = "SLOViolated"
    QUEUE_TIME = "QueueTime"
    PANIC = "Panic"
    RATIO = "Ratio"
    SCHEDULE = "Schedule"
    # ModelCache
    CACHED = "Cached"
    FETCHING = "Fetching"
    FETCH_FAILED = "FetchFailed"
    NO_PODS = "NoPods"


# -- executors' pods: what the operator writes into them, and network policies and monitors count on

CONTAINER_EXECUTOR = "executor"
PORT_GRPC = 7400  # tasks, KV handshakes, health: named "grpc"
PORT_KV = 7401  # KV to other hosts: named "kv"
PORT_METRICS = 7402  # /metrics: named "metrics"
PORT_TASKS = 7404  # the Tasks stream over a plain connection: --tasks-listen (7403 is the fetcher's)
CONTAINER_FETCHER = "fetcher"
PORT_HEALTH = 7405  # health without TLS, for kubelets; only where the rest has TLS
PORT_FETCH = 7403  # the operator asks for a model's files here: named "fetch"
CACHE_PATH = "/var/cache/deepflow"  # $DEEPFLOW_CACHE in every pod: models and model cards
WEIGHTS_PATH = "/run/deepflow-weights"  # memory of the pod, for weights
SHARED_PATH = "/run/deepflow"  # writable folder of sockets and endpoint files
# Environment of the operator: "SECRET/KEY" in the pods' namespace that executors take theirs from.
ENV_TOKEN_SECRET = "DEEPFLOW_TOKEN_SECRET"  # -> DEEPFLOW_CLUSTER_TOKEN
ENV_TLS_SECRET = "DEEPFLOW_TLS_SECRET"  # a secret's name -> DEEPFLOW_TLS_DIR, mounted
TLS_PATH = "/etc/deepflow/tls"
ENV_REDIS_SECRET = "DEEPFLOW_REDIS_SECRET"  # -> REDIS_URL
