"""A real API server with its etcd for tests, where the binaries are found: $KUBEBUILDER_ASSETS, else
/usr/local/kubebuilder/bin; or the cluster of $DEEPFLOW_TEST_KUBECONFIG.

No kubelet, no scheduler, no controller manager: pods stay where they are put, owners' children are not
collected. It checks schemas and CEL rules, which the emulator does not.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

START_SECONDS = 60.0
TOKEN = "api-server-of-tests"


def assets() -> Path | None:
    """The folder with kube-apiserver and etcd."""
    for text in (os.environ.get("KUBEBUILDER_ASSETS", ""), "/usr/local/kubebuilder/bin"):
        folder = Path(text) if text else None
        if folder is not None and (folder / "kube-apiserver").exists() and (folder / "etcd").exists():
            return folder
    return None


class RealApi:
    """etcd and kube-apiserver on loopback; everybody may do everything."""

    def __init__(self, folder: Path) -> None:
        self._assets = folder
        self._state = Path(tempfile.mkdtemp(prefix="dfk-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self.url = ""
        self.defined = False  # our kinds
        self.last = ""

    def start(self) -> RealApi:
        ports = _free_ports(3)
        key = self._state / "sa.key"
        subprocess.run(
            ["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True, timeout=60
        )
        etcd = f"http://127.0.0.1:{ports[0]}"
        peers = f"http://127.0.0.1:{ports[1]}"
        tokens = self._state / "tokens.csv"
        tokens.write_text(f"{TOKEN},tests,tests,system:masters\n")
        self._run(
            "etcd", f"--data-dir={self._state / 'etcd'}", f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}", f"--listen-peer-urls={peers}", "--unsafe-no-fsync",
            f"--initial-advertise-peer-urls={peers}", f"--initial-cluster=default={peers}",
        )  # fmt: skip
        self._run(
            "kube-apiserver", f"--etcd-servers={etcd}", f"--secure-port={ports[2]}",
            "--bind-address=127.0.0.1", f"--cert-dir={self._state / 'certs'}",
            "--authorization-mode=AlwaysAllow",
            "--service-account-issuer=https://localhost", f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}", "--service-cluster-ip-range=10.96.0.0/24",
            "--disable-admission-plugins=ServiceAccount", f"--token-auth-file={tokens}",
        )  # fmt: skip
        self.url = f"https://127.0.0.1:{ports[2]}"
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            for process in self._processes:
                assert process.poll() is None, f"{process.args} ended:\n{self.log_text()}"
            assert time.monotonic() < deadline, f"no answer ({self.last}):\n{self.log_text()}"
            time.sleep(0.2)

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(15)
        shutil.rmtree(self._state, ignore_errors=True)

    def log_text(self) -> str:
        return "\n".join(
            f"--- {path.name}\n" + path.read_text(errors="replace")[-3000:]
            for path in self._state.glob("*.log")
        )

    def _run(self, name: str, *options: str) -> None:
        with (self._state / f"{name}.log").open("wb") as log:
            command = [str(self._assets / name), *options]
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=self._state))

    def _answers(self) -> bool:
        import ssl

        context = ssl._create_unverified_context()  # its certificate was made a moment ago
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        opener.addheaders = [("Authorization", f"Bearer {TOKEN}")]
        try:
            with opener.open(f"{self.url}/api/v1/namespaces/default", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError) as error:
            self.last = repr(error)
            return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
