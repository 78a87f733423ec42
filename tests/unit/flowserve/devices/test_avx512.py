"""The AVX-512 multiplies, also on a CPU that lacks these units: built with loops in the units' place.

So layouts, corrections and sums are tested everywhere; where the CPU has the units, test_compiled_step.py
runs the real ones.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from flowserve.devices.native import library as native
from flowserve.devices.native.library import NativeLlama
from flowserve.executor.batch import flatten
from flowserve.executor.interface import SequenceSlice
from tests.support.compiled_step import BLOCK, KINDS, SPEC, Pair, Random

SOURCES = Path(native.__file__).parent
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ to build the emulation")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> object:
    file = tmp_path_factory.mktemp("native") / "emulated.so"
    sources = [str(SOURCES / f"{name}.cpp") for name in ("llama_cpu", "llama_avx512")]
    flags = ["-std=c++17", "-mavx2", "-mfma", "-mf16c", "-fPIC", "-pthread", "-shared", "-DDF_EMULATE_AVX512"]
    subprocess.run([str(COMPILER), *flags, *sources, "-o", str(file)], check=True, timeout=240)
    return native.load(file)


@pytest.fixture(autouse=True)
def use_it(emulated: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: emulated)
    monkeypatch.delenv(native.DISABLE_ENV, raising=False)
    assert native.instructions() == 512


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_what_torch_computes(kind: str) -> None:
    """A prompt of many tiles, then single tokens; integer formats exactly, one token at a time."""
    pair = Pair(Random("llama"), kind, 2, blocks=8)
    table = list(range(4))
    pair.step([SequenceSlice(list(range(37)), 0, table, sample=SPEC)])
    for position in range(37, 40):
        pair.step([SequenceSlice([position], position, table, sample=SPEC)])
    pair.close()
    alone = Pair(Random("llama"), kind, 1, blocks=2)
    alone.tolerance = min(alone.tolerance, 0.02)
    for token in range(6):
        alone.step([SequenceSlice([token], 0, [token % 2], sample=SPEC)])
    alone.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokens_numbers_do_not_depend_on_its_batch(kind: str) -> None:
    dtype, quantization = KINDS[kind]
    model = NativeLlama(
        Random("llama"), dtype=dtype, max_len=64, block_tokens=BLOCK, threads=1, quantization=quantization
    )

    def logits(tokens: list[int]) -> torch.Tensor:
        pages = torch.zeros(16, 2, 2, 2, BLOCK, 32, dtype=dtype)
        batch = [SequenceSlice([token], 0, [index], sample=SPEC) for index, token in enumerate(tokens)]
        return model.forward(flatten(batch, block_tokens=BLOCK, num_blocks=16, max_len=64), pages)

    alone = torch.cat([logits([token]) for token in range(13)])
    for count in (2, 3, 4, 5, 6, 7, 13):
        assert torch.equal(logits(list(range(count))), alone[:count])
    model.close()
