"""`deepflow operator`: the controllers of a cluster, as its Deployment runs them."""

from __future__ import annotations

from typing import Annotated

import typer

from controlplane.cli.output import CliError


def operator(
    *,
    namespace: Annotated[str, typer.Option(help="Namespace to watch; empty: all.")] = "",
    leader_elect: Annotated[
        bool, typer.Option("--leader-elect", help="Act only while holding the Lease; for several replicas.")
    ] = False,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of /metrics; 0: none.")] = 8080,
    health_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of /healthz and /readyz.")] = 8081,
    host: Annotated[str, typer.Option(help="Address of both ports.")] = "0.0.0.0",
    kubeconfig: Annotated[
        str,
        typer.Option(
            help="Configuration of the cluster.  [default: $KUBECONFIG, or the pod's]", show_default=False
        ),
    ] = "",
    context: Annotated[str, typer.Option(help="Context of it.", show_default=False)] = "",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run the operator: warm pools, ModelServings, waking and scaling.

    REDIS_URL and DEEPFLOW_CLUSTER_TOKEN come from the environment.
    """
    import logging
    import os

    import uvloop

    from controlplane.kube.client import KubeError, connect
    from controlplane.operator.run import serve
    from controlplane.operator.settings import from_environment

    if log_level not in ("debug", "info", "warning", "error"):
        raise CliError(f"--log-level {log_level}: choose debug, info, warning or error")
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")

    async def run() -> None:
        try:
            api = await connect(kubeconfig=kubeconfig, context=context, user_agent="deepflow-operator")
        except KubeError as error:
            raise CliError(str(error)) from None
        settings = from_environment(
            os.environ,
            namespace=namespace,
            lease_namespace=namespace or api.namespace,
            leader_elect=leader_elect,
            metrics_port=metrics_port,
            health_port=health_port,
            host=host,
        )
        async with api:
            await serve(api, settings)

    uvloop.run(run())
