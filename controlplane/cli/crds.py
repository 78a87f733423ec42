"""`deepflow crds`: the definitions of the custom resources, printed or brought up to date in a cluster."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer

from controlplane.cli.output import CliError, note

app = typer.Typer(help="Definitions of the custom resources.", no_args_is_help=True)

AGENT = "deepflow-crds"
MANAGER = "helm"
"""As Helm 4 itself, which installs definitions by server-side apply and refuses where somebody else owns what
it would change: under a name of our own the next install of another version would fail."""
POLL_SECONDS = 0.5
ESTABLISHED_POLLS = 120  # a minute (ours): an idle API server takes under a second

Kubeconfig = Annotated[
    str,
    typer.Option("--kubeconfig", show_default=False, help="Cluster to talk to.  [default: as kubectl's]"),
]


@app.command()
def show() -> None:
    """Print the definitions, as `kubectl apply --server-side -f -` takes them."""
    from controlplane.api.resources.generate import files

    sys.stdout.write("---\n".join(files().values()))


@app.command()
def apply(*, kubeconfig: Kubeconfig = "") -> None:
    """Bring the cluster's definitions up to date by server-side apply. Objects are left as they are."""
    from controlplane.kube.client import KubeError

    try:
        asyncio.run(_apply(kubeconfig))
    except (KubeError, TimeoutError) as error:
        raise CliError(f"cannot apply the definitions: {error}") from None


async def _apply(kubeconfig: str) -> None:
    """Raises KubeError, TimeoutError."""
    from controlplane.api.resources.generate import definitions
    from controlplane.kube.client import connect
    from controlplane.kube.resources import ResourceType

    kind = ResourceType(
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        namespaced=False,
    )
    async with await connect(kubeconfig=kubeconfig, user_agent=AGENT) as api:
        for made in definitions():
            name = made["metadata"]["name"]
            # Whoever else wrote them gives them up: nobody else may own a field of a definition.
            await api.apply(kind, made, manager=MANAGER, force=True)
            for _ in range(ESTABLISHED_POLLS):
                if _established(await api.get(kind, "", name)):
                    break
                await asyncio.sleep(POLL_SECONDS)
            else:
                raise TimeoutError(f"the API server does not establish {name}")
            note(f"{name}: up to date")


def _established(found: dict[str, object]) -> bool:
    status = found.get("status")
    conditions = status.get("conditions") if isinstance(status, dict) else None
    return any(c.get("type") == "Established" and c.get("status") == "True" for c in conditions or ())
