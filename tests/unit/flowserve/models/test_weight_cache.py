"""The node's weight cache: one copy that all map, made once, bounded, and never a torn one."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flowserve.devices.native.library import NativeLlama
from flowserve.executor.batch import flatten
from flowserve.executor.interface import SequenceSlice
from flowserve.models import weight_cache
from flowserve.models.errors import BadWeights
from flowserve.models.llama import TorchLlama
from flowserve.models.weight_cache import FeedLost, Named, WeightCache, config_bytes
from tests.support.compiled_step import BLOCK, SPEC, Random

SIZE = 1 << 20
Clock = list[float]


class Opened(Random):
    """Counts what is read of the file."""

    reads = 0

    def tensor(self, name: str) -> torch.Tensor:
        Opened.reads += 1
        return super().tensor(name)


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file is a small model whose weights come from their names."""
    monkeypatch.setattr(weight_cache, "open_model", lambda path: Opened("qwen2"))
    Opened.reads = 0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"a model")
    return path


def cache(tmp_path: Path, max_bytes: int = 1 << 30, now: Clock | None = None) -> WeightCache:
    clock = now or [0.0]
    return WeightCache(tmp_path / "weights", max_bytes, clock=lambda: clock[0])


def writes(text: bytes) -> Callable[[int], None]:
    return lambda base: ctypes.memmove(base, text, len(text)) and None


def never(base: int) -> None:
    raise AssertionError("converted again")


def logits(made: NativeLlama | TorchLlama) -> torch.Tensor:
    pages = torch.zeros(8, 2, 2, 2, BLOCK, 32)
    batch = [SequenceSlice([3, 1, 4, 1, 5], 0, [2], sample=SPEC)]
    return made.forward(flatten(batch, block_tokens=BLOCK, num_blocks=8, max_len=64), pages).clone()


def native(source: object) -> NativeLlama:
    return NativeLlama(source, dtype=torch.float32, max_len=64, block_tokens=BLOCK, threads=1)  # type: ignore[arg-type]


def plain(source: object) -> TorchLlama:
    return TorchLlama(source, dtype=torch.float32, device=torch.device("cpu"), max_len=64)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [native, plain])
def test_a_model_out_of_node_memory_is_the_model_and_reads_no_file(
    make: Callable[[object], NativeLlama | TorchLlama], tmp_path: Path, model: Path
) -> None:
    alone = make(Opened("qwen2"))
    expected = logits(alone)
    alone.close()
    first = make(cache(tmp_path).open(model))
    assert torch.equal(logits(first), expected)
    Opened.reads = 0
    source = cache(tmp_path).open(model)
    second = make(source)
    assert torch.equal(logits(second), expected)
    assert (Opened.reads, source.used) == (0, "hit")
    first.close()
    assert torch.equal(logits(second), expected)  # the other's end is not ours
    second.close()


def test_forms_and_contents_have_images_of_their_own(tmp_path: Path, model: Path) -> None:
    held = cache(tmp_path)
    texts = {}
    for form in ("a", "b"):
        image = held.open(model).image(form, SIZE, writes(form.encode()))
        assert image is not None
        texts[form] = ctypes.string_at(image.base, 1)
        image.close()
    assert texts == {"a": b"a", "b": b"b"}
    model.write_bytes(b"another model")
    changed = held.open(model).image("a", SIZE, writes(b"c"))
    assert changed is not None
    assert ctypes.string_at(changed.base, 1) == b"c"
    changed.close()


def test_the_same_content_elsewhere_is_the_same_image(tmp_path: Path, model: Path) -> None:
    held = cache(tmp_path)
    first = held.open(model).image("a", SIZE, writes(b"x"))
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    second = held.open(copy).image("a", SIZE, writes(b"x"))  # its content is not known before it is read
    assert first is not None
    assert second is not None
    assert os.fstat(first.fd).st_ino == os.fstat(second.fd).st_ino
    third = held.open(copy).image("a", SIZE, never)
    for image in (first, second, third):
        assert image is not None
        image.close()


@pytest.mark.parametrize("harm", ["truncated", "written", "unsealed", "replaced"])
def test_what_is_not_as_it_was_published_is_made_again(tmp_path: Path, model: Path, harm: str) -> None:
    held = cache(tmp_path)
    image = held.open(model).image("a", SIZE, writes(b"good"))
    assert image is not None
    image.close()
    (folder,) = (tmp_path / "weights").glob("*-a")
    file = folder / "weights"
    file.chmod(0o600)
    if harm == "truncated":
        os.truncate(file, 100)
    elif harm == "written":
        with file.open("r+b") as opened:
            opened.write(b"evil")
    elif harm == "unsealed":
        (folder / "seal.json").unlink()
    else:
        file.unlink()
        file.write_bytes(b"evil" * (SIZE // 4))
    before = weight_cache.TORN._value.get()
    again = held.open(model).image("a", SIZE, writes(b"good"))
    assert again is not None
    assert ctypes.string_at(again.base, 4) == b"good"
    assert weight_cache.TORN._value.get() == before + 1
    again.close()


def test_the_least_needed_goes_first_and_what_is_mapped_stays(tmp_path: Path, model: Path) -> None:
    now = [0.0]
    held = cache(tmp_path, 2 * SIZE, now)

    def take(form: str, fill: Callable[[int], None]) -> weight_cache.Image | None:
        return held.open(model).image(form, SIZE, fill)

    often = take("often", writes(b"o"))
    assert often is not None
    often.close()
    for _ in range(3):
        found = take("often", never)
        assert found is not None
        found.close()
    now[0] += weight_cache.HALF_LIFE_SECONDS
    seldom = take("seldom", writes(b"s"))
    assert seldom is not None
    seldom.close()
    third = take("third", writes(b"t"))
    assert third is not None  # used twice as much an hour ago counts more than once now
    again = take("often", never)
    assert again is not None
    assert take("seldom", writes(b"s")) is None  # both others are mapped: it keeps its weights to itself
    assert held.open(model).used is None
    third.close()
    seldom = take("seldom", writes(b"s"))
    assert seldom is not None
    for image in (again, seldom):
        image.close()
    names = {path.name.rpartition("-")[2] for path in (tmp_path / "weights").iterdir() if path.is_dir()}
    assert names == {"sources", "often", "seldom"}


def test_what_can_never_fit_is_private_and_leaves_nothing(tmp_path: Path, model: Path) -> None:
    held = cache(tmp_path, SIZE)
    source = held.open(model)
    assert source.image("a", 2 * SIZE, never) is None
    assert source.used == "private"
    assert not list((tmp_path / "weights").glob(".draft-*"))


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, model: Path) -> None:
    held = cache(tmp_path)

    def fails(base: int) -> None:
        raise BadWeights("torn")

    with pytest.raises(BadWeights):
        held.open(model).image("a", SIZE, fails)
    assert not list((tmp_path / "weights").glob(".draft-*"))
    image = held.open(model).image("a", SIZE, writes(b"x"))
    assert image is not None
    image.close()


def test_many_at_once_convert_once(tmp_path: Path, model: Path) -> None:
    held = cache(tmp_path)
    conversions: list[int] = []
    results: list[str] = []

    def fill(base: int) -> None:
        conversions.append(base)

    def start() -> None:
        image = held.open(model).image("a", SIZE, fill)
        assert image is not None
        results.append(image.result)
        image.close()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert sorted(set(results) - {"hit"}) in (["built"], ["built", "waited"])


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path, model: Path) -> None:
    held = cache(tmp_path, 2 * SIZE)
    program = (
        "import os, pathlib, sys\n"
        "from flowserve.models import weight_cache as w\n"
        "from tests.support.compiled_step import Random\n"
        "w.open_model = lambda path: Random('llama')\n"
        "cache = w.WeightCache(pathlib.Path(sys.argv[1]), 1 << 20)\n"
        f"cache.open(sys.argv[2]).image('a', {SIZE}, lambda base: os._exit(9))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "weights"), str(model)], timeout=60, check=False
    )
    assert ended.returncode == 9
    assert list((tmp_path / "weights").glob(".draft-*"))
    image = held.open(model).image("b", 2 * SIZE, writes(b"x"))  # all of the bound
    assert image is not None
    image.close()
    assert not list((tmp_path / "weights").glob(".draft-*"))


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir(mode=0o777)
    (tmp_path / "weights").chmod(0o777)
    with pytest.raises(PermissionError):
        cache(tmp_path)


def test_notes_of_models_are_bounded(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_cache, "MAX_SOURCES", 3)
    held = cache(tmp_path)
    for number in range(6):
        model.write_bytes(str(number).encode())
        image = held.open(model).image("a", SIZE, writes(b"x"))
        assert image is not None
        image.close()
    assert len(list((tmp_path / "weights" / "sources").iterdir())) == 3


class Fed:
    """Another executor's image of form "a"; `lost` after it wrote half."""

    def __init__(self, content: str = "c0ffee", *, form: str = "a", lost: bool = False) -> None:
        self.content, self.form, self.size = content, form, SIZE
        self.config = config_bytes(Opened("qwen2").config)
        self.lost = lost
        self.fills = 0

    def fill(self, mapping: mmap.mmap, fd: int) -> None:
        self.fills += 1
        assert os.fstat(fd).st_size == SIZE
        half = SIZE // 2 if self.lost else SIZE
        mapping[:half] = b"f" * half
        if self.lost:
            raise FeedLost("the source died")


def ends(image: weight_cache.Image | None) -> bytes:
    assert image is not None
    try:
        return ctypes.string_at(image.base, 1) + ctypes.string_at(image.base + SIZE - 1, 1)
    finally:
        image.close()


def test_what_another_executor_feeds_is_an_image_of_the_node(tmp_path: Path) -> None:
    held, fed = cache(tmp_path), Fed()
    nowhere = tmp_path / "nothing.gguf"  # no file is needed
    source = held.open(nowhere, fed)
    assert source.config == Opened("qwen2").config
    assert ends(source.image("a", SIZE, never)) == b"ff"
    assert (source.used, source.named) == ("forked", Named("c0ffee", "a", SIZE, fed.config))
    again = held.open(nowhere, Fed())
    assert ends(again.image("a", SIZE, never)) == b"ff"
    assert (again.used, fed.fills) == ("hit", 1)
    assert held.open(nowhere).recalled() is None  # what a source said is not remembered of the path
    assert source.named is not None
    fd = held.opened(source.named)
    assert fd is not None
    os.close(fd)
    assert held.opened(Named("f00d", "a", SIZE, b"")) is None


def test_a_lost_feed_and_one_of_another_form_leave_it_to_storage(tmp_path: Path, model: Path) -> None:
    held = cache(tmp_path)
    seen: list[bytes] = []

    def fill(base: int) -> None:
        seen.append(ctypes.string_at(base, 1))  # zeroed, whatever a feed wrote before
        ctypes.memset(base, ord("s"), SIZE)

    source = held.open(model, Fed(lost=True))
    assert ends(source.image("a", SIZE, fill)) == b"ss"
    assert (source.used, seen) == ("built", [b"\0"])
    other = Fed(form="b")
    elsewhere = held.open(model, other)
    assert ends(elsewhere.image("a", SIZE, never)) == b"ss"
    assert other.fills == 0
    assert not list((tmp_path / "weights").glob(".draft-*"))


def test_memory_set_aside_becomes_the_next_image(tmp_path: Path, model: Path) -> None:
    held = cache(tmp_path, 4 * SIZE)
    reserve = tmp_path / "weights" / ".reserve" / "weights"
    held.reserve(2 * SIZE)
    held.reserve(SIZE)  # one is enough
    inode = reserve.stat().st_ino
    assert reserve.stat().st_blocks * 512 == 2 * SIZE
    image = held.open(model).image("a", SIZE, writes(b"r" * SIZE))
    assert image is not None
    found = os.fstat(image.fd)
    assert (found.st_ino, found.st_size, found.st_blocks * 512) == (inode, SIZE, SIZE)
    assert not reserve.exists()
    held.reserve(4 * SIZE)  # more than is left beside the image: nothing is evicted for it
    assert not reserve.exists()
    held.reserve(2 * SIZE)
    big = held.open(model).image("b", 3 * SIZE, writes(b"b"))  # needs more, and the reserve goes first
    assert big is not None
    assert not reserve.exists()
    assert ends(image) == b"rr"
    big.close()
