"""The Llama family in plain torch over the paged pool: every device, every dtype.

The CPU has a compiled step for the common case (`flowserve.devices.native`); this is the reference it
is tested against, the fallback where it cannot be built, and the code path of cuda, npu and of ranks.

A batch is ragged: tokens of all sequences in one row dimension. Attention runs per group of
sequences: all one-token slices (decodes) of similar length in one padded batch, longer slices
(prefill chunks) one by one, causal from their start position. `decode` is the same arithmetic for
one-token slices alone, with shapes and memory that a device graph can replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing
import torch
from torch.nn import functional

from flowserve.executor.batch import Ints, RaggedBatch
from flowserve.models.config import ModelConfig
from flowserve.models.layout import TorchLayout
from flowserve.models.shard import Collective, ShardedSource, shard_head
from flowserve.models.weights import WeightSource

PADDING_WASTE = 1.5
"""Decodes share one padded attention call while the longest has at most so many times the shortest's keys."""


@dataclass(slots=True)
class Spans:
    """Which keys the one query of each sequence sees: the first `ends` tokens of the blocks of its table."""

    tables: torch.Tensor  # [n, width] int32 block ids; entries beyond a sequence's end are not read
    ends: torch.Tensor  # [n] int32
    lengths: Sequence[int]  # `ends` on the host, for kernels that take them by value


DecodeAttention = Callable[[torch.Tensor, torch.Tensor, int, Spans], torch.Tensor]
"""q [n, heads, dim], the whole pool's pages, layer, spans -> [n, heads, dim]: `gathered_attention`, or a
device's kernel."""


@dataclass(frozen=True, slots=True)
class Elementwise:
    """What stands between the matrices: `PLAIN` torch, or a device's kernels."""

    norm: Callable[[torch.Tensor, torch.Tensor, float, torch.dtype], torch.Tensor]
    """Root mean square norm of x [..., n] by weight [n] float32, epsilon; in the given dtype."""
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """Rotary embedding of x [tokens, heads, dim] by cosines and sines [tokens, 1, dim / 2] float32."""
    gate: Callable[[torch.Tensor], torch.Tensor]
    """silu(gate) * up of [tokens, 2 n], gate first: [tokens, n]."""


@dataclass(slots=True)
class _Layer:
    attention_norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    ffn_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    qkv_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


@dataclass(slots=True)
class _Plan:
    """Index tensors of one batch, shared by all layers."""

    slots: tuple[torch.Tensor, torch.Tensor]  # block and offset of each token, [tokens]
    decodes: list[tuple[torch.Tensor, Spans]]  # token rows, what they see
    prefills: list[
        tuple[int, int, torch.Tensor, torch.Tensor | None]
    ]  # first, count, blocks, mask [count, end]


class TorchLlama:
    """Weights on one device. `forward` is called from one thread."""

    def __init__(
        self,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_len: int,
        attention: DecodeAttention | None = None,
        elementwise: Elementwise | None = None,
        group: Collective | None = None,
    ) -> None:
        """`dtype` is what matrices are multiplied in; `attention` and `elementwise` are the kernels of the
        device, if it has any; with `group` this is one rank's part of the model.

        Raises BadWeights, UnsupportedModel.
        """
        if group is not None:
            source = ShardedSource(source, group.rank, group.size)
        config = source.config
        self.config: ModelConfig = config
        self.device = device
        self._dtype = dtype
        self._attention = attention
        self._elementwise = elementwise or PLAIN
        self._group = group
        weights, self._image = TorchLayout(config, dtype, max_len).load(source)
        placed = {}
        for name, tensor in weights:
            if name == "lm_head" and group is not None:
                placed[name] = shard_head(tensor, group.rank, group.size).to(device)
            else:
                placed[name] = tensor.to(device)
        self._take(placed)
        if self._image is not None and device.type != "cpu":  # all of it is on the device now
            self._image.close()
        self._hidden = torch.zeros(0, config.hidden, dtype=dtype, device=device)

    def _take(self, placed: dict[str, torch.Tensor]) -> None:
        """Computes with these weights from now on."""
        config, group = self.config, self._group
        self._placed = placed
        self._embedding, self._final_norm = placed["embedding"], placed["final_norm"]
        self._cosines, self._sines = placed["cosines"], placed["sines"]
        if config.tied and group is not None:
            self._lm_head = shard_head(self._embedding, group.rank, group.size)
        else:
            self._lm_head = placed.get("lm_head", self._embedding)
        names = [field.name for field in fields(_Layer)]
        self._layers = [
            _Layer(**{name: placed[key] for name in names if (key := f"layers.{index}.{name}") in placed})
            for index in range(config.layers)
        ]

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch, pages: torch.Tensor) -> torch.Tensor:
        """Writes the batch's KV into `pages` [blocks, layers, 2, kv_heads, block_tokens, head_dim].

        Returns float32 logits [rows, vocab].
        """
        plan = self._plan(batch, pages.shape[4])

        def attend(q: torch.Tensor, layer: int) -> torch.Tensor:
            return self._attend(q, pages, layer, plan)

        ids, positions = self._index(batch.ids), self._index(batch.positions)
        self._hidden = self._run(ids, positions, plan.slots, pages, attend)
        return self.logits(batch.rows)

    @torch.inference_mode()
    def decode(
        self, ids: torch.Tensor, positions: torch.Tensor, spans: Spans, pages: torch.Tensor
    ) -> torch.Tensor:
        """Float32 logits [n, vocab] of one token per sequence, for replay: its shapes depend on those of the
        arguments (`ids` and `positions` int64 [n]) alone, and nothing is read back from the device."""
        attention = self._attention or gathered_attention

        def attend(q: torch.Tensor, layer: int) -> torch.Tensor:
            return attention(q, pages, layer, spans).flatten(1)

        blocks = spans.tables.gather(1, (positions // pages.shape[4]).unsqueeze(1)).squeeze(1).long()
        slots = (blocks, positions % pages.shape[4])
        return self._project(self._run(ids, positions, slots, pages, attend))

    @torch.inference_mode()
    def logits(self, rows: Ints) -> torch.Tensor:
        """Float32 logits [len(rows), vocab] of tokens of the last `forward`."""
        return self._project(self._hidden[self._index(rows)])

    def _run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: tuple[torch.Tensor, torch.Tensor],
        pages: torch.Tensor,
        attend: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> torch.Tensor:
        """All layers: hidden states [tokens, hidden], KV into the blocks and offsets of `slots`."""
        config = self.config
        cosines, sines = self._cosines[positions].unsqueeze(1), self._sines[positions].unsqueeze(1)
        hidden = functional.embedding(ids, self._embedding)
        q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        blocks, offsets = slots
        rotate, gate = self._elementwise.rotate, self._elementwise.gate
        for index, layer in enumerate(self._layers):
            normed = self._norm(hidden, layer.attention_norm)
            qkv = functional.linear(normed, layer.qkv)
            if layer.qkv_bias is not None:
                qkv = qkv + layer.qkv_bias.to(qkv.dtype)
            q, k, v = torch.split(qkv, [q_width, kv_width, kv_width], dim=-1)
            q, k, v = (part.view(len(hidden), -1, config.head_dim) for part in (q, k, v))
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
            q, k = rotate(q, cosines, sines), rotate(k, cosines, sines)
            pages[blocks, index, 0, :, offsets] = k.to(pages.dtype)
            pages[blocks, index, 1, :, offsets] = v.to(pages.dtype)
            hidden = hidden + self._sum(functional.linear(attend(q, index), layer.output))
            mixed = gate(functional.linear(self._norm(hidden, layer.ffn_norm), layer.gate_up))
            hidden = hidden + self._sum(functional.linear(mixed, layer.down))
        return hidden

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        return partial if self._group is None else self._group.sum(partial)

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(self._norm(hidden, self._final_norm), self._lm_head).float()
        if self._group is not None:
            logits = self._group.join_columns(logits)[:, : self.config.vocab_size]
        return logits

    def sleep(self) -> None:
        """Moves the weights to host memory and gives the device's back. No step may run until `wake`."""
        self._hidden = self._hidden[:0].clone()
        if self.device.type != "cpu":
            self._move(torch.device("cpu"))
            torch.get_device_module(self.device).empty_cache()

    def wake(self) -> None:
        if self.device.type != "cpu":
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self._take({name: tensor.to(device) for name, tensor in self._placed.items()})

    def close(self) -> None:
        """Lets the node's copy of the weights go, where they lie there. No step may run."""
        self._layers.clear()
        self._placed.clear()
        if self._image is not None:
            self._image.close()

    def _index(self, values: np.typing.NDArray[np.integer[Any]]) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, torch.int64)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._elementwise.norm(x, weight, self.config.norm_epsilon, self._dtype)

    def _plan(self, batch: RaggedBatch, block_tokens: int) -> _Plan:
        rows = np.repeat(np.arange(len(batch.first)), batch.count)
        blocks = batch.tables[rows, batch.positions // block_tokens]
        plan = _Plan((self._index(blocks), self._index(batch.positions % block_tokens)), [], [])
        ends = batch.positions[batch.first + batch.count - 1] + 1
        decodes = sorted(np.flatnonzero(batch.count == 1), key=lambda s: int(ends[s]))
        group: list[int] = []
        for sequence in [*decodes, None]:
            # A kernel reads no padding: one call takes all. Gathering copies it: similar lengths together.
            if group and (
                sequence is None
                or (
                    self._attention is None and ends[sequence] > PADDING_WASTE * ends[group[0]] + block_tokens
                )
            ):
                used = -(-int(ends[group].max()) // block_tokens)
                spans = Spans(
                    torch.from_numpy(batch.tables[group, :used]).to(self.device),
                    torch.from_numpy(ends[group]).to(self.device),
                    ends[group].tolist(),
                )
                plan.decodes.append((self._index(batch.first[group]), spans))
                group = []
            if sequence is not None:
                group.append(int(sequence))
        for sequence in np.flatnonzero(batch.count > 1):
            first, count, end = int(batch.first[sequence]), int(batch.count[sequence]), int(ends[sequence])
            used = -(-end // block_tokens)
            mask = None  # from the start on it is the plain causal one, which kernels know
            if count < end:
                keys, queries = torch.arange(end), torch.arange(end - count, end)
                mask = (keys[None, :] <= queries[:, None]).to(self.device)
            plan.prefills.append((first, count, self._index(batch.tables[sequence, :used]), mask))
        return plan

    def _attend(self, q: torch.Tensor, pages: torch.Tensor, layer: int, plan: _Plan) -> torch.Tensor:
        """Attention of q [tokens, heads, dim] over one layer of the pool: [tokens, heads * dim]."""
        out = torch.empty_like(q)
        attention = self._attention or gathered_attention
        heads = self.config.kv_heads
        group = self.config.heads // heads
        for rows, spans in plan.decodes:
            out[rows] = attention(q[rows], pages, layer, spans)
        for first, count, blocks, mask in plan.prefills:
            end = count if mask is None else mask.shape[1]
            kv = pages[blocks, layer].to(q.dtype)  # [blocks, 2, kv_heads, block_tokens, dim]
            keys, values = kv.permute(1, 2, 0, 3, 4).reshape(2, heads, -1, q.shape[-1])[:, :, :end]
            keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            chunk = q[first : first + count].transpose(0, 1)
            mixed = functional.scaled_dot_product_attention(
                chunk[None], keys[None], values[None], mask, is_causal=mask is None
            )[0]
            out[first : first + count] = mixed.transpose(0, 1)
        return out.flatten(1)


def gathered_attention(q: torch.Tensor, pages: torch.Tensor, layer: int, spans: Spans) -> torch.Tensor:
    """DecodeAttention in plain torch: copies the keys and values of the tables, padding included."""
    n, heads, dim = q.shape
    kv = pages[spans.tables.long(), layer].to(q.dtype)  # [n, width, 2, kv_heads, block_tokens, dim]
    kv_heads = kv.shape[3]
    keys, values = kv.permute(2, 0, 3, 1, 4, 5).reshape(2, n, kv_heads, -1, dim)
    mask = torch.arange(keys.shape[2], device=q.device)[None, :] < spans.ends[:, None]
    # The query heads of one KV head are its rows: no key is repeated.
    grouped = q.view(n, kv_heads, heads // kv_heads, dim)
    mixed = functional.scaled_dot_product_attention(grouped, keys, values, mask[:, None, None, :])
    return mixed.reshape(n, heads, dim)


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * weight).to(dtype)


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cosines - right * sines, right * cosines + left * sines], dim=-1).to(x.dtype)


def _gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


PLAIN = Elementwise(_norm, _rotate, _gate)
