"""A claimed executor on its way: model, role, ready."""

from __future__ import annotations

from controlplane.api.resources.names import PodState, Reason
from controlplane.operator.plan.roles import push_role
from controlplane.operator.plan.values import Action, Load, Mark, Pod, TeState


def start(pod: Pod) -> list[Action]:
    """The next missing things of one pod that is good and stays."""
    te = pod.te
    if te is None or te.state in (TeState.UNREACHABLE, TeState.DRAINING, TeState.FAILED):
        return []
    actions: list[Action] = []
    role = push_role(pod)
    if role is not None:
        actions.append(role)
    if te.state in (TeState.WARM, TeState.SLEEPING):
        if pod.state is PodState.SERVING:  # its process started again, or others put it to sleep
            actions.append(Mark(pod, PodState.CLAIMED, Reason.STARTING))
        actions.append(Load(pod))
    elif te.state is TeState.LOADING:
        actions.append(Load(pod))  # joins the load under way, to learn how it ends
    elif te.state is TeState.READY and role is None and pod.state is PodState.CLAIMED:
        actions.append(Mark(pod, PodState.SERVING, Reason.LOADED, revision=te.revision))
    return actions
