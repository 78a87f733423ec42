"""`deepflow uninstall`: what the chart's pre-delete hook runs."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import Annotated

import typer

from controlplane.cli.crds import Kubeconfig
from controlplane.cli.output import CliError, note


def uninstall(
    *,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the release.")],
    operator: Annotated[str, typer.Option("--operator", help="Deployment of the operator.")],
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", min=0, help="How long executors may finish their tasks.")
    ] = 120.0,
    kubeconfig: Kubeconfig = "",
) -> None:
    """Stop the operator, drain executors and delete their pods. Custom resources stay.

    `helm uninstall` runs this; afterwards nothing of DeepFlow runs in the namespace but what the release
    itself removes.
    """
    from controlplane.kube.client import KubeError, connect
    from controlplane.operator.uninstall import Outcome, drainer
    from controlplane.operator.uninstall import uninstall as run
    from kvtransfer.tls import TlsError, from_environment

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)

    try:
        tls = from_environment(os.environ)
    except TlsError as error:
        raise CliError(f"certificates cannot be used: {error}") from None

    async def act() -> Outcome:
        async with await connect(kubeconfig=kubeconfig, user_agent="deepflow-uninstall") as api:
            return await run(
                api, namespace, operator=operator, drain_seconds=drain_seconds,
                drain=drainer(os.environ.get("DEEPFLOW_CLUSTER_TOKEN", ""), tls),
            )  # fmt: skip

    try:
        outcome = asyncio.run(act())
    except KubeError as error:
        raise CliError(f"cannot take the executors away: {error}") from None
    note(f"{outcome.executors} executors removed; {len(outcome.undrained)} of them had tasks left")
    if outcome.left:
        raise CliError(f"pods that do not go: {', '.join(outcome.left)}")
