"""What stands between a layer's matrices, one Triton kernel each: norm, rotation, gate.

In plain torch they are some forty launches a layer, each of which reads and writes everything again: at
small batches that is as long as reading the weights. Tested as `paged_attention` is,
and annotated for the same reason.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flowserve.models.llama import Elementwise

GATE_COLUMNS = 1024
"""Of one program (ours)."""


@triton.jit  # type: ignore[untyped-decorator]  # triton
def _norm(  # noqa: PLR0917  a kernel's arguments are positional
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    epsilon: tl.tensor,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Root mean square norm of one row."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    there = columns < WIDTH
    values = tl.load(x + row * WIDTH + columns, mask=there, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + epsilon)
    scaled = values * scale * tl.load(weight + columns, mask=there, other=0.0)
    tl.store(out + row * WIDTH + columns, scaled.to(out.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]  # triton
def _rotate(  # noqa: PLR0917
    x: tl.tensor, cosines: tl.tensor, sines: tl.tensor, out: tl.tensor,
    stride_token: tl.tensor, stride_head: tl.tensor,
    HALF: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """Rotary embedding of one head of one token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    there = columns < HALF
    place = x + token * stride_token + head * stride_head + columns
    left = tl.load(place, mask=there, other=0.0).to(tl.float32)
    right = tl.load(place + HALF, mask=there, other=0.0).to(tl.float32)
    cosine = tl.load(cosines + token * HALF + columns, mask=there, other=0.0)
    sine = tl.load(sines + token * HALF + columns, mask=there, other=0.0)
    target = out + (token * tl.num_programs(1) + head) * 2 * HALF + columns
    tl.store(target, (left * cosine - right * sine).to(out.dtype.element_ty), mask=there)
    tl.store(target + HALF, (right * cosine + left * sine).to(out.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]  # triton
def _gate(gate_up: tl.tensor, out: tl.tensor, width: tl.tensor, COLUMNS: tl.constexpr) -> None:
    """silu(gate) * up over some columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + columns, mask=there, other=0.0).to(tl.float32)
    mixed = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + columns, mixed.to(out.dtype.element_ty), mask=there)


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x, dtype=dtype)
    # A launch goes to the device of the thread, which need not be the tensor's (so below).
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # torch
        _norm[(x.numel() // width,)](
            x, weight, out, epsilon, WIDTH=width, COLUMNS=triton.next_power_of_2(width)
        )
    return out


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    tokens, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns = triton.next_power_of_2(dim // 2)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # torch
        _rotate[(tokens, heads)](
            x, cosines, sines, out, x.stride(0), x.stride(1), HALF=dim // 2, COLUMNS=columns
        )
    return out


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # torch
        _gate[(rows, triton.cdiv(width, GATE_COLUMNS))](
            gate_up.contiguous(), out, width, COLUMNS=GATE_COLUMNS
        )
    return out


FUSED = Elementwise(norm, rotate, gate)
