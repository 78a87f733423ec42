"""Loads the compiled CPU step and gives it a Python face.

The structures mirror `llama_cpu.cpp` field by field; `VERSION` changes with them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import numpy as np
import torch

from flowserve.executor.batch import Ints, RaggedBatch
from flowserve.models.config import ModelConfig
from flowserve.models.weights import WeightSource, checked, layer_weights, rotary

VERSION = 2
COLUMNS = 16  # of a packed panel
MAX_HEAD_DIM = 256
MAX_GROUP = 24  # query heads of one KV head: rows of one attention tile
DISABLE_ENV = "DEEPFLOW_NATIVE"
"""Set to 0 to use plain torch on the CPU (to compare, or where the compiled step misbehaves)."""


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
                "weights_bf16",
                "kv_bf16",
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
    try:
        loaded = ctypes.CDLL(str(files[-1]))
    except OSError as error:
        raise NativeUnavailable(f"{files[-1].name} cannot be loaded: {error}") from error
    if loaded.df_version() != VERSION:
        raise NativeUnavailable(f"{files[-1].name} is of another version: install again")
    if not loaded.df_supported():
        raise NativeUnavailable("this CPU lacks AVX2 or FMA")
    loaded.df_model_new.restype = ctypes.c_void_p
    loaded.df_model_new.argtypes = [ctypes.POINTER(_Model)]
    loaded.df_model_free.argtypes = [ctypes.c_void_p]
    loaded.df_step.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Batch)]
    loaded.df_logits.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p]
    return loaded


def check_supported(config: ModelConfig, dtype: torch.dtype, block_tokens: int) -> None:
    """Raises NativeUnavailable for a model outside what the compiled step covers."""
    library()
    limits = {
        f"dtype {dtype}": dtype in (torch.bfloat16, torch.float32),
        f"block of {block_tokens} tokens": block_tokens % 16 == 0,
        f"head_dim {config.head_dim}": config.head_dim % 32 == 0 and config.head_dim <= MAX_HEAD_DIM,
        f"hidden size {config.hidden}": config.hidden % COLUMNS == 0,
        f"intermediate size {config.intermediate}": config.intermediate % COLUMNS == 0,
        f"{config.heads // config.kv_heads} query heads a KV head": config.heads // config.kv_heads
        <= MAX_GROUP,
    }
    refused = [what for what, fits in limits.items() if not fits]
    if refused:
        raise NativeUnavailable(f"the compiled step does not cover {', '.join(refused)}")


def pack(matrix: torch.Tensor) -> torch.Tensor:
    """`[n, k]` to panels `[ceil(n / 16), k, 16]`; missing columns are zero."""
    rows, width = matrix.shape
    padded = -(-rows // COLUMNS) * COLUMNS
    if padded != rows:
        matrix = torch.cat([matrix, matrix.new_zeros(padded - rows, width)])
    return matrix.view(-1, COLUMNS, width).transpose(1, 2).contiguous()


class NativeLlama:
    """A model whose weights are packed for the compiled step. `forward` is called from one thread."""

    def __init__(
        self, source: WeightSource, *, dtype: torch.dtype, max_len: int, block_tokens: int, threads: int
    ) -> None:
        """Raises NativeUnavailable before any weight is read, BadWeights while reading."""
        config = source.config
        check_supported(config, dtype, block_tokens)
        self._library = library()
        self._handle: int | None = None
        self._kept: list[torch.Tensor] = []
        self._tokens = 0  # of the last step
        self.config = config
        self._vocab = -(-config.vocab_size // COLUMNS) * COLUMNS
        layers = (_Layer * config.layers)()
        for index in range(config.layers):
            weights = layer_weights(source, index, dtype)
            gate, up = weights["gate_up"].view(2, -1, COLUMNS, config.hidden)
            weights["gate_up"] = torch.stack([gate, up], dim=1).view(-1, config.hidden)  # panels alternate
            for name, tensor in weights.items():
                setattr(layers[index], name, self._keep(pack(tensor) if tensor.ndim == 2 else tensor))
        shape = (config.vocab_size, config.hidden)
        embedding = checked(source, "embedding", shape).to(dtype)
        head = embedding if config.tied else checked(source, "lm_head", shape).to(dtype)
        cosines, sines = rotary(source, max_len)
        bf16 = int(dtype == torch.bfloat16)
        description = _Model(
            config.layers,
            config.hidden,
            config.intermediate,
            config.heads,
            config.kv_heads,
            config.head_dim,
            self._vocab,
            block_tokens,
            bf16,
            bf16,
            threads,
            int(config.tied),
            config.norm_epsilon,
            self._keep(checked(source, "final_norm", (config.hidden,)).float()),
            self._keep(cosines),
            self._keep(sines),
            None if config.tied else self._keep(embedding),
            self._keep(pack(head)),
            layers,
        )
        self._layers = layers
        self._handle = self._library.df_model_new(ctypes.byref(description))

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

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

    def close(self) -> None:
        """Ends the threads and frees the weights; idempotent. No step may run."""
        if self._handle is not None:
            self._library.df_model_free(self._handle)
            self._handle = None
            self._kept.clear()
