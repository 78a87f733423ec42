"""Values that planners see and return. Times are seconds since the epoch."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from controlplane.api.resources.modelserving import Role
from controlplane.api.resources.names import PodState, Reason

Key = tuple[str, str]


class TeState(enum.StrEnum):
    """What an executor last said of itself."""

    UNREACHABLE = "unreachable"  # no answer, or somebody else's at its address
    WARM = "warm"
    LOADING = "loading"
    READY = "ready"
    SLEEPING = "sleeping"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Te:
    """An executor as it last answered."""

    state: TeState
    role: Role | None = None
    epoch: int = 0
    revision: str = ""
    tasks: int = 0
    transfers: int = 0
    start_path: str = ""  # of the model it serves: cold, warm, hot, fork, wake
    hung: bool = False  # its step loop stands still with work to do
    silent_since: float | None = None  # first call without an answer since the last with one
    message: str = ""


@dataclass(frozen=True, slots=True)
class Pod:
    """One executor's pod: what its labels say, what its kubelet says, what its executor says."""

    key: Key
    uid: str
    version: str
    state: PodState
    pool: str = ""
    serving_uid: str = ""
    role: Role | None = None
    epoch: int = 0
    load_hash: str = ""  # of the source and options that it was claimed for
    template_hash: str = ""
    created: float = 0.0
    claimed_at: float = 0.0
    start_path: str = ""  # what there was to start from when it was claimed or woken
    drain_since: float | None = None
    asleep_since: float | None = None
    deleting: bool = False
    gone_by: float | None = None  # deleted: when its kubelet's grace for it ends
    ended: bool = False  # phase Failed or Succeeded
    ready: bool = False  # its kubelet's word
    restarts: int = 0
    scheduled: bool = True
    problem: Reason | None = None  # image, scheduling
    problem_text: str = ""
    te: Te | None = None  # None: never asked
    load_error: str = ""

    @property
    def silent(self) -> bool:
        """It gave no answer to the last call; nobody tells when that becomes too long."""
        return self.te is not None and self.te.state is TeState.UNREACHABLE

    @property
    def serves(self) -> bool:
        """Takes tasks, as far as anyone knows. One that is silent to us alone may well serve others."""
        if self.deleting or self.ended or self.state is not PodState.SERVING:
            return False
        return self.te is None or self.te.state in (TeState.READY, TeState.UNREACHABLE)


@dataclass(frozen=True, slots=True)
class Serving:
    """What a ModelServing wants now."""

    key: Key
    uid: str
    want: Mapping[Role, int]  # replicas by role, within the bounds
    load_hash: str
    accelerator: str = "cpu"
    priority: int = 0
    drain_seconds: float = 120.0
    sleep_seconds: float = 0.0  # that surplus executors sleep before their pods are given back
    crowded: bool = False  # others lack executors of the profile
    deleting: bool = False


@dataclass(frozen=True, slots=True)
class Pool:
    """What a WarmPool wants now."""

    key: Key
    uid: str
    size: int
    max_pods: int
    template_hash: str
    accelerator: str = "cpu"
    missing: int = 0  # executors that ModelServings want and no warm pod is there for
    hold_until: float = 0.0  # no new pods before: the last ones failed
    deleting: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the world may take. All "ours" but where said."""

    silent_seconds: float = 30.0
    """An executor that does not answer for so long is replaced; it keeps serving until another does."""
    start_seconds: float = 180.0
    """From claim to first answer: a busy node's interpreter start (as the local supervisor's bound)."""
    drain_silent_seconds: float = 10.0
    """A draining executor that does not answer is gone after this."""
    surge: int = 1
    """Executors of a role above its count while outdated ones are replaced."""
    max_actions: int = 64
    """Per plan: a mistake has a bound, and the queue turns."""


# -- actions: each is one write or one call, safe to do twice -----------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """Re-labels and re-owns a warm pod, if it is still that very one."""

    pod: Pod
    role: Role
    epoch: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Writes role and epoch into labels, before the executor is told."""

    pod: Pod
    role: Role
    epoch: int


@dataclass(frozen=True, slots=True)
class PushRole:
    """Tells the executor."""

    pod: Pod
    role: Role
    epoch: int


@dataclass(frozen=True, slots=True)
class Load:
    """Fetches the model and loads it, unless that is under way."""

    pod: Pod


@dataclass(frozen=True, slots=True)
class Mark:
    """Writes another state into the labels."""

    pod: Pod
    state: PodState
    reason: Reason
    revision: str = ""


@dataclass(frozen=True, slots=True)
class SleepTe:
    """Tells the executor to put its model to sleep once its tasks have ended."""

    pod: Pod


@dataclass(frozen=True, slots=True)
class WakePod:
    """A sleeper is wanted again: role and epoch into its labels, its model is loaded next."""

    pod: Pod
    role: Role
    epoch: int


@dataclass(frozen=True, slots=True)
class DrainTe:
    """Tells the executor to take no more tasks; asks how many are left."""

    pod: Pod


@dataclass(frozen=True, slots=True)
class Delete:
    """Deletes that very pod. `unchanged`: only if nobody wrote to it since."""

    pod: Pod
    reason: Reason
    unchanged: bool = False


@dataclass(frozen=True, slots=True)
class Create:
    """Makes `count` warm pods."""

    count: int


Action = Claim | Assign | PushRole | Load | Mark | SleepTe | WakePod | DrainTe | Delete | Create


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions in order, what could not be met, and when to look again (None: when something changes)."""

    actions: tuple[Action, ...] = ()
    missing: int = 0
    again_after: float | None = None
    outdated: int = 0
    counts: Mapping[Role, tuple[int, int, int]] = field(default_factory=dict)  # serving, starting, draining
    asleep: Mapping[Role, int] = field(default_factory=dict)
