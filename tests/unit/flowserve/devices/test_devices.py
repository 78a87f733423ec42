"""Devices: what is there opens, what is not says what is missing; pools hold what transfers put there."""

from __future__ import annotations

import ctypes
import sys
import types
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from flowserve.devices import DeviceUnavailable, open_device
from flowserve.devices.accelerator import DevicePool
from flowserve.devices.cpu import CpuDevice, CpuPool
from flowserve.devices.native import library as native
from flowserve.models.config import ModelConfig
from kvtransfer.layout import KVLayout
from kvtransfer.pool import HostPool, PoolError
from tests.support.compiled_step import packed_and_back

LAYOUT = KVLayout(model_revision="m@1", dtype="float32", block_tokens=4, layers=2, kv_heads=3, head_dim=8)


def config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "family": "llama",
        "layers": 1,
        "hidden": 64,
        "intermediate": 64,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 32,
        "vocab_size": 40,
        "max_len": 64,
        "norm_epsilon": 1e-5,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "tied": True,
        "eos_token_ids": (2,),
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


# -- names ------------------------------------------------------------------------------------------


def test_the_cpu_is_always_there() -> None:
    assert isinstance(open_device("cpu"), CpuDevice)


@pytest.mark.parametrize("name", ["", "tpu", "cuda:x", "cuda:-1", "CPU", "npu:1.5"])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(DeviceUnavailable, match=r"is unknown; known are cpu, cuda, npu"):
        open_device(name)


def test_cuda_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(DeviceUnavailable, match="built without CUDA"):
        open_device("cuda")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="check the driver"):
        open_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceUnavailable, match=r"cuda:1 does not exist: 1 device"):
        open_device("cuda:1")
    assert open_device("cuda:0").name == "cuda:0"


def test_npu_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # importing it fails
    with pytest.raises(DeviceUnavailable, match="install the extra `npu` and Ascend's CANN"):
        open_device("npu")
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    there = types.SimpleNamespace(is_available=lambda: False, device_count=lambda: 1)
    monkeypatch.setattr(torch, "npu", there, raising=False)
    with pytest.raises(DeviceUnavailable, match="sees no NPU"):
        open_device("npu")
    there.is_available = lambda: True
    with pytest.raises(DeviceUnavailable, match="npu:3 does not exist"):
        open_device("npu:3")


# -- pools --------------------------------------------------------------------------------------------


def test_pages_and_store_of_a_cpu_pool_are_the_same_memory() -> None:
    pool = CpuPool(LAYOUT, 5)
    try:
        assert isinstance(pool.store, HostPool)
        assert pool.pages.shape == (5, 2, 2, 3, 4, 8)
        pool.pages[3] = torch.arange(LAYOUT.block_bytes // 4, dtype=torch.float32).view(2, 2, 3, 4, 8)
        seen = np.frombuffer(bytes(pool.store.load(3, 1)), np.float32)
        assert seen.tolist() == list(range(len(seen)))
        pool.store.store(1, bytes(pool.store.load(3, 1)))
        assert torch.equal(pool.pages[1], pool.pages[3])
    finally:
        pool.close()


def test_a_device_pool_copies_whole_blocks_both_ways() -> None:
    """The staging code of cuda and npu; torch's own CPU stands in for the device."""
    pool = DevicePool(LAYOUT, 5, torch.device("cpu"))
    store = pool.store
    assert store.layout is LAYOUT and store.num_blocks == 5 and store.view(0, 1) is None
    pool.pages[2:4] = torch.randn(2, *LAYOUT.shape)
    data = bytes(store.load(2, 2))
    assert len(data) == 2 * LAYOUT.block_bytes
    store.store(0, data)
    assert torch.equal(pool.pages[:2], pool.pages[2:4])
    assert store.generation(1) == 0
    store.bump(1)
    assert store.generation(1) == 1 and store.generation(0) == 0
    for start, piece in ((4, data), (-1, data), (0, data[:-1])):
        with pytest.raises(ValueError, match="not whole blocks"):
            store.store(start, piece)
    pool.close()


def test_device_memory_that_is_not_there_is_a_pool_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("2 GiB free")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(PoolError, match=r"5 blocks on cpu: 2 GiB free"):
        DevicePool(LAYOUT, 5, torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_pool_holds_what_is_stored() -> None:
    device = open_device("cuda")
    pool = device.make_pool(LAYOUT, 4)
    data = np.random.default_rng(0).bytes(2 * LAYOUT.block_bytes)
    pool.store.store(1, data)
    assert bytes(pool.store.load(1, 2)) == data
    pool.close()


# -- the compiled step ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "dtype", "block_tokens", "words"),
    [
        ({}, torch.float16, 16, "float16"),
        ({}, torch.float32, 8, "block of 8 tokens"),
        ({"head_dim": 48}, torch.float32, 16, "head_dim 48"),
        ({"head_dim": 288}, torch.float32, 16, "head_dim 288"),
        ({"hidden": 72}, torch.float32, 16, "hidden size 72"),
        ({"intermediate": 40}, torch.float32, 16, "intermediate size 40"),
        ({"heads": 25}, torch.float32, 16, "25 query heads a KV head"),
    ],
)
def test_shapes_that_the_compiled_step_does_not_cover_are_named(
    changes: dict[str, object], dtype: torch.dtype, block_tokens: int, words: str
) -> None:
    with pytest.raises(native.NativeUnavailable, match=words):
        native.check_supported(config(**changes), dtype, block_tokens)


@pytest.fixture
def fresh_library() -> object:
    native.library.cache_clear()
    yield None
    native.library.cache_clear()


def test_a_library_that_is_missing_torn_or_of_another_version_is_told_apart(
    fresh_library: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    with pytest.raises(native.NativeUnavailable, match="of another version"):
        native.library()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(native.NativeUnavailable, match="not built"):
        native.library()
    (tmp_path / "_llama_cpu.so").write_bytes(b"torn")
    with pytest.raises(native.NativeUnavailable, match="cannot be loaded"):
        native.library()
    monkeypatch.setenv(native.DISABLE_ENV, "0")
    with pytest.raises(native.NativeUnavailable, match="switched off"):
        native.library()


def test_structures_mirror_the_source() -> None:
    """Fields in the order of llama_cpp's structs: a drift would read weights from the wrong place."""
    source = (Path(native.__file__).parent / "api.h").read_text()
    for struct, mirror in (
        ("DfLayer", native._Layer),
        ("DfModel", native._Model),
        ("DfBatch", native._Batch),
    ):
        body = source[source.index(f"struct {struct} {{") :]
        body = body[body.index("\n") : body.index("\n};")]
        names: list[str] = []
        for line in body.splitlines():
            statement = line.split("//")[0].strip().rstrip(";")
            if statement:
                first, *others = statement.split(",")
                names += [part.split()[-1].lstrip("*") for part in (first, *others)]
        assert names == [field[0] for field in mirror._fields_], struct
    assert ctypes.sizeof(native._Batch) == 4 * 4 + 8 * 8


@pytest.mark.parametrize(
    ("form", "width", "error"),
    [
        (native._F32, 40, 0.0),
        (native._BF16, 40, 2**-8),
        (native._INT8, 64, 1 / 250),
        (native._INT4, 64, 1 / 14),
    ],
)
def test_a_packed_matrix_is_the_matrix(form: int, width: int, error: float) -> None:
    """Rows that fill no panel, and two matrices whose panels alternate."""
    generator = torch.Generator().manual_seed(3)
    single, left, right = (torch.rand(20, width, generator=generator) * 2 - 1 for _ in range(3))
    memory = native.PrivateMemory(3 * native.packed_bytes(form, 20, width))
    native.pack(form, memory.base, single)
    assert (native.unpack(form, memory.base, 20, width) - single).abs().max() <= error
    pair = memory.base + native.packed_bytes(form, 20, width)
    native.pack(form, pair, left, right)
    both = native.unpack(form, pair, 64, width).view(2, 2, 16, width)
    for index, matrix in enumerate((left, right)):
        found = both[:, index].reshape(32, width)
        assert (found[:20] - matrix).abs().max() <= error
        assert not found[20:].any()
    memory.close()
    memory.close()


@pytest.mark.parametrize(("kind", "form"), [("Q8_0", native._INT8), ("Q4_1", native._INT4)])
def test_a_gguf_files_own_blocks_are_kept_exactly(kind: str, form: int) -> None:
    generator = np.random.default_rng(5)
    matrix = generator.standard_normal((32, 256)).astype(np.float32)
    quantized = gguf.quantize(matrix, gguf.GGMLQuantizationType[kind])
    values = torch.from_numpy(gguf.dequantize(quantized, gguf.GGMLQuantizationType[kind]))
    kept = packed_and_back(values, form)
    # The stored numbers are the same; q * scale + minimum may be rounded once or twice.
    assert torch.allclose(kept, values, rtol=0, atol=1e-6)
