"""Real certificates for tests: an authority, and folders of what it signed, as a Secret is mounted."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvtransfer.tls import SERVER_NAME


def _openssl(*words: str, cwd: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    command = ("openssl", *words)
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


class Authority:
    """Signs certificates in `folder`."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._serial = 0
        _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "ca.key", cwd=folder)
        _openssl(
            "req", "-x509", "-new", "-key", "ca.key", "-days", "2", "-subj", f"/CN={name}", "-out", "ca.crt",
            "-addext", "keyUsage=critical,digitalSignature,keyCertSign,cRLSign", cwd=folder,
        )  # fmt: skip

    def write(self, folder: Path, *names: str) -> Path:
        """tls.crt, tls.key and ca.crt with these DNS names ("localhost" and ours without any); overwrites."""
        folder.mkdir(parents=True, exist_ok=True)
        self._serial += 1
        alternatives = ",".join(f"DNS:{name}" for name in names or (SERVER_NAME, "localhost"))
        made = self._folder / str(self._serial)
        made.mkdir()
        (made / "ext").write_text(
            f"subjectAltName={alternatives}\nextendedKeyUsage=serverAuth,clientAuth\nbasicConstraints=CA:FALSE\n"
        )
        _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "tls.key", cwd=made)
        _openssl("req", "-new", "-key", "tls.key", "-subj", "/CN=part", "-out", "csr", cwd=made)
        _openssl(
            "x509", "-req", "-in", "csr", "-CA", "../ca.crt", "-CAkey", "../ca.key", "-days", "2",
            "-set_serial", str(self._serial), "-extfile", "ext", "-out", "tls.crt", cwd=made,
        )  # fmt: skip
        shutil.copy(self._folder / "ca.crt", folder / "ca.crt")
        for name in ("tls.key", "tls.crt"):
            shutil.copy(made / name, folder / name)
        return folder
