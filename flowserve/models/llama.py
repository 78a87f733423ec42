"""The Llama family in plain torch over the paged pool: every device, every dtype.

The CPU has a compiled step for the common case (`flowserve.devices.native`); this is the reference it
is tested against, the fallback where it cannot be built, and the code path of cuda and npu.

A batch is ragged: tokens of all sequences in one row dimension. Attention runs per group of
sequences: all one-token slices (decodes) of similar length in one padded batch, longer slices
(prefill chunks) one by one, causal from their start position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing
import torch
from torch.nn import functional

from flowserve.executor.batch import Ints, RaggedBatch
from flowserve.models.config import ModelConfig
from flowserve.models.weights import WeightSource, checked, layer_weights, rotary

PADDING_WASTE = 1.5
"""Decodes share one padded attention call while the longest has at most so many times the shortest's keys."""


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
    decodes: list[
        tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ]  # token rows, tables [n, blocks], mask [n, 1, 1, keys]
    prefills: list[tuple[int, int, torch.Tensor, torch.Tensor]]  # first, count, blocks, mask [count, keys]


class TorchLlama:
    """Weights on one device. `forward` is called from one thread."""

    def __init__(
        self, source: WeightSource, *, dtype: torch.dtype, device: torch.device, max_len: int
    ) -> None:
        """`dtype` is what matrices are multiplied in. Raises BadWeights."""
        config = source.config
        self.config: ModelConfig = config
        self._dtype = dtype
        self._device = device
        shape = (config.vocab_size, config.hidden)
        self._embedding = checked(source, "embedding", shape).to(dtype).to(device)
        self._final_norm = checked(source, "final_norm", (config.hidden,)).float().to(device)
        self._lm_head = (
            self._embedding if config.tied else checked(source, "lm_head", shape).to(dtype).to(device)
        )
        self._layers = [
            _Layer(
                **{name: tensor.to(device) for name, tensor in layer_weights(source, index, dtype).items()}
            )
            for index in range(config.layers)
        ]
        cosines, sines = rotary(source, max_len)
        self._cosines, self._sines = cosines.to(device), sines.to(device)
        self._hidden = torch.zeros(0, config.hidden, dtype=dtype, device=device)

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch, pages: torch.Tensor) -> torch.Tensor:
        """Writes the batch's KV into `pages` [blocks, layers, 2, kv_heads, block_tokens, head_dim].

        Returns float32 logits [rows, vocab].
        """
        config = self.config
        plan = self._plan(batch, pages.shape[4])
        positions = self._index(batch.positions)
        cosines, sines = self._cosines[positions].unsqueeze(1), self._sines[positions].unsqueeze(1)
        hidden = functional.embedding(self._index(batch.ids), self._embedding)
        q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        for index, layer in enumerate(self._layers):
            normed = self._norm(hidden, layer.attention_norm)
            qkv = functional.linear(normed, layer.qkv)
            if layer.qkv_bias is not None:
                qkv = qkv + layer.qkv_bias.to(qkv.dtype)
            q, k, v = torch.split(qkv, [q_width, kv_width, kv_width], dim=-1)
            q, k, v = (part.view(len(hidden), -1, config.head_dim) for part in (q, k, v))
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
            q, k = _rotate(q, cosines, sines), _rotate(k, cosines, sines)
            blocks, offsets = plan.slots
            pages[blocks, index, 0, :, offsets] = k.to(pages.dtype)
            pages[blocks, index, 1, :, offsets] = v.to(pages.dtype)
            hidden = hidden + functional.linear(self._attend(q, pages[:, index], plan), layer.output)
            gate, up = functional.linear(self._norm(hidden, layer.ffn_norm), layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + functional.linear(functional.silu(gate) * up, layer.down)
        self._hidden = hidden
        return self.logits(batch.rows)

    @torch.inference_mode()
    def logits(self, rows: Ints) -> torch.Tensor:
        """Float32 logits [len(rows), vocab] of tokens of the last `forward`."""
        wanted = self._norm(self._hidden[self._index(rows)], self._final_norm)
        return functional.linear(wanted, self._lm_head).float()

    def close(self) -> None:
        """Nothing to end: memory goes with the object."""

    def _index(self, values: np.typing.NDArray[np.integer[Any]]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, torch.int64)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.norm_epsilon)
        return (wide * scale * weight).to(self._dtype)

    def _plan(self, batch: RaggedBatch, block_tokens: int) -> _Plan:
        rows = np.repeat(np.arange(len(batch.first)), batch.count)
        blocks = batch.tables[rows, batch.positions // block_tokens]
        plan = _Plan((self._index(blocks), self._index(batch.positions % block_tokens)), [], [])
        ends = batch.positions[batch.first + batch.count - 1] + 1
        decodes = sorted(np.flatnonzero(batch.count == 1), key=lambda s: int(ends[s]))
        group: list[int] = []
        for sequence in [*decodes, None]:
            if group and (sequence is None or ends[sequence] > PADDING_WASTE * ends[group[0]] + block_tokens):
                lengths = self._index(ends[group])
                used = -(-int(ends[group].max()) // block_tokens)
                keys = torch.arange(used * block_tokens, device=self._device)
                mask = (keys[None, :] < lengths[:, None])[:, None, None, :]
                plan.decodes.append(
                    (self._index(batch.first[group]), self._index(batch.tables[group, :used]), mask)
                )
                group = []
            if sequence is not None:
                group.append(int(sequence))
        for sequence in np.flatnonzero(batch.count > 1):
            first, count, end = int(batch.first[sequence]), int(batch.count[sequence]), int(ends[sequence])
            used = -(-end // block_tokens)
            keys = torch.arange(used * block_tokens, device=self._device)
            queries = torch.arange(end - count, end, device=self._device)
            mask = keys[None, :] <= queries[:, None]
            plan.prefills.append((first, count, self._index(batch.tables[sequence, :used]), mask))
        return plan

    def _attend(self, q: torch.Tensor, pages: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """Attention of q [tokens, heads, dim] over one layer [blocks, 2, kv_heads, block_tokens, dim]."""
        out = torch.empty_like(q)
        heads = self.config.kv_heads
        group = self.config.heads // heads
        for rows, tables, mask in plan.decodes:
            n = len(rows)
            kv = pages[tables].to(q.dtype)  # [n, blocks, 2, kv_heads, block_tokens, dim]
            keys, values = kv.permute(2, 0, 3, 1, 4, 5).reshape(2, n, heads, -1, q.shape[-1])
            # The query heads of one KV head are its rows: no key is repeated.
            grouped = q[rows].view(n, heads, group, -1)
            out[rows] = functional.scaled_dot_product_attention(grouped, keys, values, mask).reshape(
                n, -1, q.shape[-1]
            )
        for first, count, blocks, mask in plan.prefills:
            kv = pages[blocks].to(q.dtype)
            keys, values = kv.permute(1, 2, 0, 3, 4).reshape(2, heads, -1, q.shape[-1])
            keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            chunk = q[first : first + count].transpose(0, 1)
            mixed = functional.scaled_dot_product_attention(chunk[None], keys[None], values[None], mask)[0]
            out[first : first + count] = mixed.transpose(0, 1)
        return out.view(len(q), -1)


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cosines - right * sines, right * cosines + left * sines], dim=-1).to(x.dtype)
