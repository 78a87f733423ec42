"""Pure placement policy: an immutable view of the cluster and a request in, a decision with reasons out.

    types    the values: executors, view, request, policy, decision
    decide   filter -> mode -> pick, for new tasks (`decide`) and for the decode half (`decide_decode`)
    prefix   which executor has which prefix cached, followed from exact KV events

No I/O, no clock, no randomness but what is passed in; imports nothing of ours. Called by
`controlplane.jobs`, and by the digital twin with the same code. DeepServe (arXiv 2501.14417) section 5.
"""

from controlplane.scheduling.decide import decide, decide_decode
from controlplane.scheduling.prefix import PrefixIndex
from controlplane.scheduling.types import (
    ClusterView,
    Decision,
    ExecutorView,
    Kind,
    Link,
    Mode,
    Policy,
    PolicyName,
    RequestView,
    Role,
    Score,
    Unplaceable,
    Why,
)

__all__ = [
    "ClusterView",
    "Decision",
    "ExecutorView",
    "Kind",
    "Link",
    "Mode",
    "Policy",
    "PolicyName",
    "PrefixIndex",
    "RequestView",
    "Role",
    "Score",
    "Unplaceable",
    "Why",
    "decide",
    "decide_decode",
]
