"""One executor on one device in this process: model, KV pool and sampling behind the `Executor` border."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowserve.devices import Device, Model, Pool, open_device
from flowserve.engine.sampling import sample, token_logprobs
from flowserve.engine.types import SamplingParams, TokenLogprobs
from flowserve.executor.batch import flatten
from flowserve.executor.capacity import pool_bytes
from flowserve.executor.interface import QUANTIZATIONS, ModelInfo, SampleSpec, SequenceSlice, SliceResult
from flowserve.models.config import ModelConfig
from flowserve.models.errors import UnsupportedModel
from flowserve.models.loader import open_model, parse_dtype
from flowserve.models.weight_cache import Feed, Named, WeightCache
from flowserve.models.weights import WeightSource
from kvtransfer.layout import KVLayout
from kvtransfer.pool import BlockStore, PoolError

if TYPE_CHECKING:  # loads torch.distributed
    from flowserve.executor.ranks import WarmRanks

SCORE_BYTES = 16 << 20
"""Logits held at a time while a prompt is scored (ours): enough rows to read the head's weights seldom."""
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True, slots=True)
class Opening:
    """How an executor was opened."""

    weights_seconds: float = 0.0  # until the model could compute
    pool_seconds: float = 0.0  # from there until it had its pool
    weights: str = ""  # "hit": they lay in the node's memory, "forked": another executor fed them
    image: Named | None = None  # what may be fed to others


class LocalExecutor:
    """Runs batches of one model. Use from one thread."""

    def __init__(
        self,
        model: Model,
        pool: Pool,
        info: ModelInfo,
        opening: Opening | None = None,
        *,
        rouse: Callable[[], Pool] | None = None,
    ) -> None:
        """`rouse` wakes a model that sleeps and gives its new pool; without it the executor cannot sleep."""
        self._model = model
        self._pool = pool
        self._info = info
        self._rouse = rouse
        self.opening = opening or Opening()
        self._closed = False

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def store(self) -> BlockStore:
        """The pool as transfers and the cache see it."""
        return self._pool.store

    def execute(self, batch: Sequence[SequenceSlice]) -> list[SliceResult]:
        if not batch:
            return []
        ragged = flatten(
            batch,
            block_tokens=self.store.layout.block_tokens,
            num_blocks=self.store.num_blocks,
            max_len=self._info.max_model_len,
        )
        logits = self._model.forward(ragged, self._pool.pages)
        results = [SliceResult() for _ in batch]
        for index, item in enumerate(batch):
            if item.prompt_logprobs is not None:
                results[index].prompt_logprobs = self._score(item, int(ragged.first[index]))
        drawn = [index for index, item in enumerate(batch) if item.sample is not None]
        specs = [item.sample for item in batch if item.sample is not None]
        for index, draw in zip(drawn, sample(logits, specs), strict=True):
            results[index].token = draw.token
            results[index].logprobs = draw.logprobs
            results[index].error = None if draw.error is None else str(draw.error)
        return results

    def warm_up(self) -> None:
        """A prompt and a decode in one step, answered to nobody: what a first step sets up is set up before
        one that counts. Writes to the first blocks, whose content must be nobody's yet."""
        drawn = SampleSpec(SamplingParams(), [0, 0], [], 0)
        slices = [SequenceSlice([0], 0, [0], sample=drawn)]
        if min(self.store.num_blocks, self.store.layout.block_tokens, self._info.max_model_len) > 1:
            slices.append(SequenceSlice([0, 0], 0, [1], sample=drawn))
        self.execute(slices)

    def _score(self, item: SequenceSlice, first: int) -> list[TokenLogprobs]:
        """Log-probabilities of the tokens after each token of a prompt slice, a few rows at a time."""
        following = [*item.tokens[1:], *([item.next_token] if item.next_token is not None else [])]
        wanted = item.prompt_logprobs or 0
        rows = max(1, SCORE_BYTES // (4 * self._info.vocab_size))
        scored: list[TokenLogprobs] = []
        for start in range(0, len(following), rows):
            tokens = following[start : start + rows]
            numbers = np.arange(first + start, first + start + len(tokens), dtype=np.int32)
            raw = self._model.logits(numbers).log_softmax(dim=-1)
            scored += token_logprobs(raw, tokens, [wanted] * len(tokens))
        return scored

    def sleep(self) -> None:
        """Gives the pool's memory back and keeps the weights in the host's. No step and no transfer may run
        until `wake`. Raises RuntimeError where it cannot sleep."""
        if self._rouse is None:
            raise RuntimeError("this executor cannot sleep")
        self._pool.close()
        self._model.sleep()

    def wake(self) -> None:
        """After `sleep`: with an empty pool, whose `store` is another. Raises PoolError where there is no
        memory for it; the executor can then only be closed."""
        if self._rouse is None:
            raise RuntimeError("this executor cannot sleep")
        self._pool = self._rouse()

    def close(self) -> None:
        """Frees weights and pool; idempotent. Peers that map the pool notice that it is retired."""
        if not self._closed:
            self._closed = True
            self._model.close()
            self._pool.close()


def open_executor(
    path: str | Path,
    *,
    revision: str,
    device: str = "cpu",
    dtype: str = "auto",
    kv_cache_bytes: int = 1 << 30,
    block_tokens: int = 16,
    max_model_len: int | None = None,
    threads: int = 1,
    quantization: str = "",
    tensor_parallel: int = 1,
    max_batch_tokens: int = 512,
    weights: WeightCache | None = None,
    feed: Feed | None = None,
    ranks: WarmRanks | None = None,
) -> LocalExecutor:
    """Loads the model at `path` and allocates its KV pool of about `kv_cache_bytes`; 0: what the device has
    room for beside steps of `max_batch_tokens` (flowserve.executor.capacity).

    `dtype` is that of KV pages and, without `quantization` (interface.QUANTIZATIONS), of the weights.
    With `tensor_parallel` ranks the model, the pool and the threads are shared out over as many processes,
    of which this is the first, on devices counted up from `device`; those that `ranks` has, then new ones.
    With `weights` they are taken from the node's cache, or put there for the next (not where ranks share
    them): from `feed`, where that has them.

    Raises ModelNotFound (a FileNotFoundError), UnsupportedModel and BadWeights (ValueErrors),
    DeviceUnavailable (a ValueError), PoolError where the pool's memory cannot be had.
    """
    _check_quantization(quantization)
    where: Device = open_device(device)
    where.set_threads(threads)
    began = time.perf_counter()
    cached = weights.open(path, feed) if weights is not None and tensor_parallel == 1 else None
    source: WeightSource = cached or open_model(path)
    config = source.config
    kind = parse_dtype(dtype)
    max_len = _context(config, max_model_len)
    layout = KVLayout(
        model_revision=revision,
        dtype=DTYPE_NAMES[kind],
        block_tokens=block_tokens,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
    )
    num_blocks = kv_cache_bytes // layout.block_bytes
    if num_blocks < 1 and (kv_cache_bytes or tensor_parallel > 1):
        many = f" with {tensor_parallel} ranks" if not kv_cache_bytes else ""
        raise PoolError(
            f"kv_cache_bytes {kv_cache_bytes}{many} is less than one block of {layout.block_bytes}"
        )
    model: Model
    pool: Pool
    rouse: Callable[[], Pool]

    def make_pool() -> Pool:
        made = where.make_pool(layout, num_blocks)
        try:
            where.prepare(model, made, max_len)
        except BaseException:
            made.close()
            raise
        return made

    if tensor_parallel == 1:
        model = where.make_model(
            source,
            dtype=kind,
            max_len=max_len,
            block_tokens=block_tokens,
            threads=threads,
            quantization=quantization,
        )
        loaded = time.perf_counter()
        try:
            if not num_blocks:
                room = pool_bytes(where, model, layout, tokens=min(max_batch_tokens, max_len), source=cached)
                num_blocks = room // layout.block_bytes
            pool = make_pool()
        except BaseException:
            model.close()
            raise

        def rouse() -> Pool:
            model.wake()
            return make_pool()
    elif quantization:
        raise UnsupportedModel(f"quantization {quantization} is not implemented with tensor parallel")
    else:
        from flowserve.executor.ranks import open_ranks  # loads torch.distributed

        model, pool, rouse = open_ranks(
            Path(path),
            source,
            where,
            size=tensor_parallel,
            layout=layout,
            num_blocks=num_blocks,
            max_len=max_len,
            threads=threads,
            warm=ranks,
        )
        loaded = time.perf_counter()  # pools come with the ranks
    info = ModelInfo(
        revision=revision,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_model_len=max_len,
        eos_token_ids=config.eos_token_ids,
        dtype=layout.dtype,
        quantization=quantization,
    )
    opening = Opening(
        loaded - began,
        time.perf_counter() - loaded,
        cached.used or "" if cached is not None else "",
        cached.named if cached is not None else None,
    )
    return LocalExecutor(model, pool, info, opening, rouse=rouse)


def preload_weights(
    path: str | Path,
    weights: WeightCache,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    block_tokens: int = 16,
    max_model_len: int | None = None,
    quantization: str = "",
    feed: Feed | None = None,
) -> str:
    """Puts the weights of the model at `path` into the node's cache, in the form in which `open_executor`
    takes them with the same options. Says how they came: "hit", "built", "forked", "waited", or "private"
    where there is no room for them.

    Raises what `open_executor` raises for the model.
    """
    _check_quantization(quantization)
    where = open_device(device)
    source = weights.open(path, feed)
    where.preload(
        source,
        dtype=parse_dtype(dtype),
        max_len=_context(source.config, max_model_len),
        block_tokens=block_tokens,
        quantization=quantization,
    )
    return source.used or "private"


def _check_quantization(quantization: str) -> None:
    if quantization not in QUANTIZATIONS:
        raise UnsupportedModel(
            f"quantization {quantization!r} is none of {', '.join(filter(None, QUANTIZATIONS))}"
        )


def _context(config: ModelConfig, max_model_len: int | None) -> int:
    """Tokens of the longest sequence."""
    if max_model_len is not None and max_model_len > config.max_len:
        raise UnsupportedModel(f"max_model_len {max_model_len} exceeds the model's {config.max_len}")
    return min(max_model_len or config.max_len, config.max_len)
