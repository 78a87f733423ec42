"""Decode attention over the paged pool in Triton: reads each key and value once, where it lies.

One query per sequence (flash decoding, Dao et al. 2023): the keys of a sequence are split over programs,
each keeps a running softmax over its part, a second kernel joins the parts. A program holds all query
heads of one KV head, so that no key is read twice. Lengths and tables stay on the device: shapes alone
decide what is launched, as a graph needs. Triton comes with torch's CUDA build; with TRITON_INTERPRET=1
the same kernels run on the CPU, which is how they are tested. The compiler is stricter than that
interpreter: it looks up annotations too, and knows no global but `tl`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flowserve.models.llama import Spans

PROGRAMS = 1024
"""About eight for each core of a large GPU (ours): fewer sequences are split more."""
MAX_SPLITS = 64
"""Of one sequence: what the second kernel joins in one tile (ours)."""
MIN_SPLIT_BLOCKS = 8
"""KV blocks a program is worth (ours)."""
MIN_ROWS = 16
"""Rows of the smallest tile tl.dot takes."""


@triton.jit  # type: ignore[untyped-decorator]  # triton
def _part(  # noqa: PLR0917  a kernel's arguments are positional
    q: tl.tensor, pages: tl.tensor, tables: tl.tensor, ends: tl.tensor, parts: tl.tensor, sums: tl.tensor,
    scale: tl.tensor, stride_block: tl.tensor, stride_value: tl.tensor, stride_head: tl.tensor,
    stride_table: tl.tensor,
    GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """One KV head of one sequence over its part of the blocks: unnormalised sum, peak and mass."""
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, splits = tl.num_programs(1), tl.num_programs(2)
    end = tl.load(ends + sequence)
    blocks = tl.cdiv(end, TOKENS)
    share = tl.cdiv(blocks, splits)
    first = split * share
    last = tl.minimum(first + share, blocks)
    rows, columns, slots = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, TOKENS)
    inside = (rows < GROUP)[:, None] & (columns < DIM)[None, :]
    row = (sequence * heads + head) * GROUP + rows
    queries = tl.load(q + row[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
    peak = tl.full([ROWS], -1e30, tl.float32)  # finite: an empty part must not give NaN
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    wide = (columns < DIM)[None, :]
    for index in range(first, last):
        block = tl.load(tables + sequence * stride_table + index).to(tl.int64)
        place = pages + block * stride_block + head * stride_head
        place += slots[:, None] * DIM + columns[None, :]
        seen = (index * TOKENS + slots) < end
        keys = tl.load(place, mask=seen[:, None] & wide, other=0.0)
        values = tl.load(place + stride_value, mask=seen[:, None] & wide, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -1e30)
        higher = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp(peak - higher)
        weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        mass = mass * shrink + tl.sum(weights, 1)
        total = total * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        peak = higher
    place = row * splits + split
    tl.store(parts + place[:, None] * DIM + columns[None, :], total, mask=inside)
    tl.store(sums + place * 2, peak, mask=rows < GROUP)
    tl.store(sums + place * 2 + 1, mass, mask=rows < GROUP)


@triton.jit  # type: ignore[untyped-decorator]  # triton
def _join(  # noqa: PLR0917
    parts: tl.tensor, sums: tl.tensor, out: tl.tensor, splits: tl.tensor,
    DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    """The parts of one query head, weighed by their mass under the common peak."""
    row = tl.program_id(0)
    index, columns = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    there = index < splits
    peaks = tl.load(sums + (row * splits + index) * 2, mask=there, other=-1e30)
    masses = tl.load(sums + (row * splits + index) * 2 + 1, mask=there, other=0.0)
    weights = tl.exp(peaks - tl.max(peaks, 0))
    place = (row * splits + index)[:, None] * DIM + columns[None, :]
    values = tl.load(parts + place, mask=there[:, None] & (columns < DIM)[None, :], other=0.0)
    mixed = tl.sum(values * weights[:, None], 0) / tl.sum(masses * weights, 0)
    tl.store(out + row * DIM + columns, mixed.to(out.dtype.element_ty), mask=columns < DIM)


def paged_attention(q: torch.Tensor, pages: torch.Tensor, layer: int, spans: Spans) -> torch.Tensor:
    """A `flowserve.models.llama.DecodeAttention`. `block_tokens` must be a power of two from 16 on."""
    n, heads, dim = q.shape
    kv_heads, block_tokens = pages.shape[3], pages.shape[4]
    group = heads // kv_heads
    width = spans.tables.shape[1]
    # Of shapes alone, never of lengths: a graph captured now serves every later length.
    splits = min(-(-PROGRAMS // (n * kv_heads)), -(-width // MIN_SPLIT_BLOCKS), MAX_SPLITS)
    parts = q.new_empty(n * heads, splits, dim, dtype=torch.float32)
    sums = q.new_empty(n * heads, splits, 2, dtype=torch.float32)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    plane = pages[:, layer]  # [blocks, 2, kv_heads, block_tokens, dim]
    columns = triton.next_power_of_2(dim)
    # A launch goes to the device of the thread, which need not be the one of q.
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]  # torch
        _part[(n, kv_heads, splits)](
            q.contiguous(), plane, spans.tables, spans.ends, parts, sums,
            dim**-0.5, plane.stride(0), plane.stride(1), plane.stride(2), spans.tables.stride(0),
            GROUP=group, ROWS=max(MIN_ROWS, triton.next_power_of_2(group)), TOKENS=block_tokens, DIM=dim,
            WIDTH=columns,
        )  # fmt: skip
        _join[(n * heads,)](
            parts, sums, out, splits, DIM=dim, WIDTH=columns, SPLITS=triton.next_power_of_2(splits)
        )
    return out
