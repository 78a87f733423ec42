"""A real API server with etcd for tests, where its binaries are at hand; no kubelet, no controllers.

    KUBECONFIG                                   a cluster of yours: used as it is, in namespaces of its own
    KUBEBUILDER_ASSETS, /usr/local/kubebuilder/bin   etcd and kube-apiserver: started on loopback, and ended

`found()` says which, or why there is none, for the run's report.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ASSETS = ("KUBEBUILDER_ASSETS", "/usr/local/kubebuilder/bin")
START_SECONDS = 90.0
WANTED = ("etcd", "kube-apiserver")
NONE = (
    "no real API server: set KUBECONFIG to a cluster's, or KUBEBUILDER_ASSETS to a folder with etcd and "
    "kube-apiserver"
)
ACCOUNTS = ("operator", "gateway", "uninstall", "definitions")
NAMESPACE = "models"
"""Where the chart's accounts live: each has a context of its own in the kubeconfig, named like it."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a real API server comes from; `kubeconfig` or `assets`."""

    kubeconfig: Path | None
    assets: Path | None

    def __str__(self) -> str:
        return f"cluster of {self.kubeconfig}" if self.kubeconfig else f"kube-apiserver in {self.assets}"


def found() -> Source | None:
    """None where there is neither."""
    if given := os.environ.get("KUBECONFIG"):
        return Source(Path(given), None)
    for place in (os.environ.get(ASSETS[0]), ASSETS[1]):
        if place and all(os.access(Path(place) / name, os.X_OK) for name in WANTED):
            return Source(None, Path(place))
    return None


@contextlib.contextmanager
def serving(source: Source) -> Iterator[Path]:
    """Path of a kubeconfig with all rights."""
    if source.kubeconfig is not None:
        yield source.kubeconfig
        return
    assert source.assets is not None
    folder = Path(tempfile.mkdtemp(prefix="dfk-"))
    children: list[subprocess.Popen[bytes]] = []
    try:
        yield _start(source.assets, folder, children)
    finally:
        for child in reversed(children):
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start(assets: Path, folder: Path, children: list[subprocess.Popen[bytes]]) -> Path:
    client, peer, secure = (_free_port() for _ in range(3))

    def run(name: str, *options: str) -> None:
        log = (folder / f"{name}.log").open("wb")
        command = [str(assets / name), *options]
        children.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        log.close()

    run(
        "etcd", f"--data-dir={folder}/etcd", f"--listen-client-urls=http://127.0.0.1:{client}",
        f"--advertise-client-urls=http://127.0.0.1:{client}", f"--listen-peer-urls=http://127.0.0.1:{peer}",
        "--unsafe-no-fsync", "--log-level=warn",
    )  # fmt: skip
    key = folder / "sa.key"
    subprocess.run(
        ["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True, timeout=60
    )
    (folder / "tokens.csv").write_text(
        "test,admin,0,system:masters\n"
        + "".join(
            f"{name},system:serviceaccount:{NAMESPACE}:deepflow-{name},{number}\n"
            for number, name in enumerate(ACCOUNTS, 1)
        )
    )
    run(
        "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{client}", f"--secure-port={secure}",
        "--bind-address=127.0.0.1", f"--cert-dir={folder}/certs", f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}", "--service-account-issuer=https://deepflow.test",
        f"--token-auth-file={folder}/tokens.csv", "--authorization-mode=RBAC",
        "--disable-admission-plugins=ServiceAccount",  # nobody makes accounts: there are no controllers
        "--service-cluster-ip-range=10.0.0.0/24",
    )  # fmt: skip
    config = folder / "kubeconfig"
    config.write_text(_config(secure))
    request = urllib.request.Request(
        f"https://127.0.0.1:{secure}/readyz", headers={"Authorization": "Bearer test"}
    )
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5, context=_unverified()) as answer:
                if answer.status == 200:
                    return config
        except (urllib.error.URLError, OSError) as error:
            ended = [child for child in children if child.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "".join((folder / f"{name}.log").read_text()[-1500:] for name in WANTED)
                raise RuntimeError(f"the API server does not start ({error}):\n{logs}") from error
        time.sleep(0.2)


def _unverified() -> object:
    import ssl

    return ssl._create_unverified_context()  # its certificate was made a moment ago, on this machine


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _config(port: int) -> str:
    names = ("test", *ACCOUNTS)
    cluster = {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": {"token": name}} for name in names],
            "contexts": [
                {"name": name, "context": {"cluster": "test", "user": name, "namespace": NAMESPACE}}
                for name in names
            ],
        }
    )
