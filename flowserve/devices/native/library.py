"""Loads the compiled CPU step and gives it a Python face.

The structures mirror `api.h` field by field; `VERSION` changes with them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from flowserve.executor.batch import Ints, RaggedBatch
from flowserve.models.config import ModelConfig
from flowserve.models.layout import LINE, Layout, copy_to
from flowserve.models.weight_cache import CachedSource, Image
from flowserve.models.weights import WeightSource, checked, layer_weights, rotary

VERSION = 4
CONVERSIONS = 4
"""Layers converted at once (ours): each holds its layer in float32, and storage is read by all."""
COLUMNS = 16  # of a packed panel
BLOCK = 32  # columns of a matrix that are read, and quantized, together
MAX_HEAD_DIM = 256
MAX_GROUP = 24  # query heads of one KV head: rows of one attention tile
DISABLE_ENV = "DEEPFLOW_NATIVE"
"""Set to 0 to use plain torch on the CPU, to avx2 for the step without AVX-512 (to compare, or where the
compiled step misbehaves)."""


_F32, _BF16, _INT8, _INT4 = range(4)
_FORMATS = {"int8": (_INT8, _INT8), "int4": (_INT4, _INT8)}
"""Formats of layers and head by quantization: blocks of 32 weights with a scale (8 bits) or with a scale
and a minimum (4 bits; the head stays at 8). Activations are rounded to 8 bits, block by block."""


class NativeUnavailable(Exception):
    """The compiled step cannot be used here; the message says why."""


class _Layer(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            "attention_norm",
            "ffn_norm",
            "qkv_bias",
            "q_norm",
            "k_norm",
            "qkv",
            "output",
            "gate_up",
            "down",
        )
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "layers",
                "hidden",
                "intermediate",
                "heads",
                "kv_heads",
                "head_dim",
                "vocab",
                "block_tokens",
                "weights",
                "head",
                "kv_bf16",
                "embedding_bf16",
                "threads",
                "tied",
            )
        ),
        ("norm_epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("final_norm", "cosines", "sines", "embedding", "lm_head")),
        ("layer", ctypes.POINTER(_Layer)),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("tokens", "sequences", "rows", "table_width")),
        *(
            (name, ctypes.c_void_p)
            for name in ("ids", "positions", "first", "count", "tables", "row_tokens", "pages", "logits")
        ),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The shared library. Raises NativeUnavailable: not built, another version, or a CPU without AVX2."""
    if os.environ.get(DISABLE_ENV) == "0":
        raise NativeUnavailable(f"switched off by {DISABLE_ENV}=0")
    files = sorted(Path(__file__).parent.glob("_llama_cpu*.so"))
    if not files:
        raise NativeUnavailable("not built (installing with a C++ compiler at hand builds it)")
    return load(files[-1])


def load(file: Path) -> ctypes.CDLL:
    """The shared library in `file`, its functions declared. Raises NativeUnavailable."""
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        raise NativeUnavailable(f"{file.name} cannot be loaded: {error}") from error
    if loaded.df_version() != VERSION:
        raise NativeUnavailable(f"{file.name} is of another version: install again")
    if not loaded.df_supported():
        raise NativeUnavailable("this CPU lacks AVX2 or FMA")
    loaded.df_allocate.restype = ctypes.c_void_p
    loaded.df_allocate.argtypes = [ctypes.c_uint64]
    loaded.df_release.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    loaded.df_packed_bytes.restype = ctypes.c_uint64
    loaded.df_packed_bytes.argtypes = [ctypes.c_int32] * 3
    loaded.df_pack.argtypes = [ctypes.c_int32, ctypes.c_void_p, *[ctypes.c_int32] * 5, ctypes.c_void_p]
    loaded.df_unpack.argtypes = [
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_void_p,
    ]
    loaded.df_model_new.restype = ctypes.c_void_p
    loaded.df_model_new.argtypes = [ctypes.POINTER(_Model), ctypes.c_int32]
    loaded.df_model_free.argtypes = [ctypes.c_void_p]
    loaded.df_step.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Batch)]
    loaded.df_logits.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p]
    return loaded


def instructions() -> int:
    """The step's instruction set: 512 (AVX-512 with BF16 and VNNI) where the CPU has it, else 2 (AVX2)."""
    return 2 if os.environ.get(DISABLE_ENV) == "avx2" else int(library().df_widest())


def check_supported(config: ModelConfig, dtype: torch.dtype, block_tokens: int) -> None:
    """Raises NativeUnavailable for a model outside what the compiled step covers."""
    library()
    heads_per_kv = config.heads // config.kv_heads
    limits = {
        f"dtype {dtype}": dtype in (torch.bfloat16, torch.float32),
        f"block of {block_tokens} tokens": block_tokens % 16 == 0,
        f"head_dim {config.head_dim}": config.head_dim % BLOCK == 0 and config.head_dim <= MAX_HEAD_DIM,
        f"hidden size {config.hidden}": config.hidden % BLOCK == 0,
        f"intermediate size {config.intermediate}": config.intermediate % BLOCK == 0,
        f"{heads_per_kv} query heads a KV head": heads_per_kv <= MAX_GROUP,
    }
    refused = [what for what, fits in limits.items() if not fits]
    if refused:
        raise NativeUnavailable(f"the compiled step does not cover {', '.join(refused)}")


class PrivateMemory:
    """Weights of this process alone: `size` zeroed bytes, in large pages where the system gives them."""

    def __init__(self, size: int) -> None:
        """Raises MemoryError."""
        self._library = library()
        self.size = size
        base: int | None = self._library.df_allocate(size)
        if base is None:
            raise MemoryError(f"no memory for {size} bytes of weights")
        self.base = base

    def close(self) -> None:
        """Gives the memory back; idempotent."""
        if self.base:
            self._library.df_release(self.base, self.size)
            self.base = 0


def packed_bytes(form: int, rows: int, width: int) -> int:
    """Bytes of a packed matrix (`panels.h`), rounded up to whole cache lines."""
    return -(-int(library().df_packed_bytes(form, rows, width)) // LINE) * LINE


def pack(form: int, address: int, *matrices: torch.Tensor) -> None:
    """Packs equally shaped `[rows, width]` matrices, panels alternating, to zeroed memory at `address`."""
    rows, width = matrices[0].shape
    for index, matrix in enumerate(matrices):
        data = matrix.contiguous()
        is_bf16 = int(data.dtype == torch.bfloat16)
        library().df_pack(
            form, data.data_ptr(), is_bf16, rows, width, index, len(matrices), ctypes.c_void_p(address)
        )


def unpack(form: int, address: int, rows: int, width: int) -> torch.Tensor:
    """What the step multiplies with, float32 `[rows, width]`."""
    out = torch.empty(rows, width)
    for row in range(rows):
        library().df_unpack(form, ctypes.c_void_p(address), width, row, out[row].data_ptr())
    return out


class PackedLayout(Layout):
    """The compiled step's weights, packed. `fill` writes what `_Layer` and `_Model` point to."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, max_len: int, formats: tuple[int, int]
    ) -> None:
        """`formats` of layers and head."""
        super().__init__()
        self.config, self.dtype, self.max_len = config, dtype, max_len
        self.layers_format, self.head_format = formats
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        hidden, wide = config.hidden, config.intermediate
        for index in range(config.layers):
            layer = f"layers.{index}."
            self.add(layer + "qkv", packed_bytes(formats[0], q + 2 * kv, hidden))
            self.add(layer + "output", packed_bytes(formats[0], hidden, q))
            self.add(layer + "gate_up", 2 * packed_bytes(formats[0], wide, hidden))
            self.add(layer + "down", packed_bytes(formats[0], hidden, wide))
            for name in ("attention_norm", "ffn_norm"):
                self.add(layer + name, 4 * hidden)
            if config.qkv_bias:
                self.add(layer + "qkv_bias", 4 * (q + 2 * kv))
            for name in ("q_norm", "k_norm") if config.qk_norm else ():
                self.add(layer + name, 4 * config.head_dim)
        self.add("final_norm", 4 * hidden)
        for name in ("cosines", "sines"):
            self.add(name, 4 * max_len * (config.head_dim // 2))
        if not config.tied:
            self.add("embedding", dtype.itemsize * config.vocab_size * hidden)
        self.add("lm_head", packed_bytes(formats[1], config.vocab_size, hidden))

    @property
    def form(self) -> str:
        """Names the bytes: two layouts of a model with the same name are the same."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"cpu{VERSION}-{self.layers_format}-{self.head_format}-{kind}-{self.max_len}"

    def fill(self, base: int, source: WeightSource) -> None:
        """Writes every weight to zeroed memory at `base`. Raises BadWeights."""
        read_as = torch.float32 if self.layers_format in (_INT8, _INT4) else self.dtype
        with ThreadPoolExecutor(min(CONVERSIONS, os.cpu_count() or 1)) as workers:
            parts = [workers.submit(self._fill_ends, base, source, read_as)]
            for index in range(self.config.layers):
                parts.append(workers.submit(self._fill_layer, base, source, read_as, index))
            try:
                for part in parts:
                    part.result()
            except BaseException:
                workers.shutdown(cancel_futures=True)
                raise

    def _fill_layer(self, base: int, source: WeightSource, read_as: torch.dtype, index: int) -> None:
        for name, tensor in layer_weights(source, index, read_as).items():
            address = base + self.offsets[f"layers.{index}.{name}"]
            if tensor.ndim == 1:
                copy_to(address, tensor)
            else:
                pack(self.layers_format, address, *(tensor.chunk(2) if name == "gate_up" else (tensor,)))

    def _fill_ends(self, base: int, source: WeightSource, read_as: torch.dtype) -> None:
        config = self.config
        copy_to(base + self.offsets["final_norm"], checked(source, "final_norm", (config.hidden,)).float())
        for name, table in zip(("cosines", "sines"), rotary(source, self.max_len), strict=True):
            copy_to(base + self.offsets[name], table)
        shape = (config.vocab_size, config.hidden)
        head = embedding = checked(source, "embedding", shape)
        if not config.tied:
            copy_to(base + self.offsets["embedding"], embedding.to(self.dtype))
            head = checked(source, "lm_head", shape)
        pack(self.head_format, base + self.offsets["lm_head"], head.to(read_as))


class NativeLlama:
    """A model whose weights are packed for the compiled step. `forward` is called from one thread."""

    def __init__(
        self,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        max_len: int,
        block_tokens: int,
        threads: int,
        quantization: str = "",
    ) -> None:
        """Raises NativeUnavailable before any weight is read, BadWeights while reading."""
        config = source.config
        check_supported(config, dtype, block_tokens)
        self._library = library()
        self._handle: int | None = None
        self._tokens = 0  # of the last step
        self.config = config
        self._vocab = -(-config.vocab_size // COLUMNS) * COLUMNS
        bf16 = int(dtype == torch.bfloat16)
        formats = _FORMATS[quantization] if quantization else (bf16, bf16)
        self.layout = layout = PackedLayout(config, dtype, max_len, formats)
        self._weights = weights = self._held(source)
        try:

            def at(name: str) -> int | None:
                offset = layout.offsets.get(name)
                return None if offset is None else weights.base + offset

            layers = (_Layer * config.layers)()
            for index in range(config.layers):
                for name, *_ in _Layer._fields_:
                    setattr(layers[index], name, at(f"layers.{index}.{name}"))
            description = _Model(
                config.layers,
                config.hidden,
                config.intermediate,
                config.heads,
                config.kv_heads,
                config.head_dim,
                self._vocab,
                block_tokens,
                *formats,
                bf16,
                bf16,
                threads,
                int(config.tied),
                config.norm_epsilon,
                *(at(name) for name in ("final_norm", "cosines", "sines", "embedding", "lm_head")),
                layers,
            )
            self._layers = layers
            self._handle = self._library.df_model_new(ctypes.byref(description), instructions())
        except BaseException:
            weights.close()
            raise

    def _held(self, source: WeightSource) -> PrivateMemory | Image:
        """The weights: the node's copy of them where the source knows a cache, else our own."""
        if isinstance(source, CachedSource):
            image = source.image(
                self.layout.form, self.layout.size, lambda base: self.layout.fill(base, source)
            )
            if image is not None:
                return image
        memory = PrivateMemory(self.layout.size)
        try:
            self.layout.fill(memory.base, source)
        except BaseException:
            memory.close()
            raise
        return memory

    def forward(self, batch: RaggedBatch, pages: torch.Tensor) -> torch.Tensor:
        """Float32 logits [rows, vocab]; KV goes into `pages`, which have the dtype given at construction.

        The interpreter lock is free meanwhile.
        """
        if self._handle is None:
            raise RuntimeError("the model is closed")
        if int(batch.ids.min()) < 0 or int(batch.ids.max()) >= self.config.vocab_size:
            raise ValueError("token id outside the vocabulary")
        logits = torch.empty(len(batch.rows), self._vocab)
        pointers = [
            np.ascontiguousarray(part, np.int32)
            for part in (batch.ids, batch.positions, batch.first, batch.count, batch.tables, batch.rows)
        ]
        native = _Batch(
            len(batch.ids),
            len(batch.first),
            len(batch.rows),
            batch.tables.shape[1],
            *(part.ctypes.data for part in pointers),
            pages.data_ptr(),
            logits.data_ptr(),
        )
        self._library.df_step(self._handle, ctypes.byref(native))
        self._tokens = len(batch.ids)
        return logits[:, : self.config.vocab_size]

    def logits(self, rows: Ints) -> torch.Tensor:
        """Float32 logits [len(rows), vocab] of tokens of the last `forward`."""
        if self._handle is None:
            raise RuntimeError("the model is closed")
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= self._tokens):
            raise ValueError(f"rows beyond the {self._tokens} tokens of the last step")
        wanted = np.ascontiguousarray(rows, np.int32)
        logits = torch.empty(len(wanted), self._vocab)
        for start in range(0, len(wanted), self._tokens or 1):  # a call has room for a step's rows
            part = wanted[start : start + self._tokens]
            self._library.df_logits(self._handle, len(part), part.ctypes.data, logits[start:].data_ptr())
        return logits[:, : self.config.vocab_size]

    def sleep(self) -> None:
        """Nothing: weights lie in host memory, the node's copy of them where there is a cache."""

    def wake(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Ends the threads and frees the weights; idempotent. No step may run."""
        if self._handle is not None:
            self._library.df_model_free(self._handle)
            self._handle = None
            self._weights.close()
