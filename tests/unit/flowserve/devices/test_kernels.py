"""The Triton kernels against plain torch. Without a GPU it runs in Triton's interpreter, in a process of its
own: the interpreter is chosen when Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (it comes with torch's CUDA build)",
)

COMPARE = """
import torch
from flowserve.devices.paged_attention import paged_attention
from flowserve.models.llama import Spans, gathered_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(3)
for heads, kv_heads, dim, tokens, width, ends in (
    (9, 3, 64, 16, 6, [1, 16, 17, 96]),       # the small model's heads; block edges
    (4, 4, 32, 16, 2, [5]),                   # one query head a KV head
    (32, 2, 128, 16, 9, [129, 3]),            # sixteen
    (6, 1, 80, 32, 40, [1280, 1, 700]),       # no power of two; parts with nothing to do
):
    n = len(ends)
    pages = torch.randn(n * width + 1, 2, 2, kv_heads, tokens, dim, device=device)
    tables = torch.randperm(n * width, device=device).view(n, width)
    for row, end in enumerate(ends):  # what lies beyond the end is never read: it may be anything
        tables[row, -(-end // tokens):] = n * width
    pages[-1] = float("nan")
    q = torch.randn(n, heads, dim, device=device)
    spans = Spans(tables.int(), torch.tensor(ends, dtype=torch.int32, device=device), ends)
    ours = paged_attention(q, pages, 1, spans)
    pages[-1] = 0.0
    for row, end in enumerate(ends):
        if end % tokens:
            pages[tables[row, end // tokens], :, :, :, end % tokens:] = 0.0
    expected = gathered_attention(q, pages, 1, spans)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
"""
BETWEEN = """
import torch
from flowserve.devices.fused import FUSED
from flowserve.models.llama import PLAIN

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(3)
for dtype in (torch.float32, torch.bfloat16):
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for tokens, heads, dim in ((1, 9, 64), (5, 2, 80)):
        qkv = torch.randn(tokens, (heads + 4) * dim, dtype=dtype, device=device)
        q = qkv[:, : heads * dim].view(tokens, heads, dim)  # rows apart, as a split leaves them
        angles = torch.randn(tokens, 1, dim // 2, device=device)
        turns = (angles.cos(), angles.sin())
        torch.testing.assert_close(FUSED.rotate(q, *turns), PLAIN.rotate(q, *turns), **near)
        weight = torch.rand(dim, device=device)
        for x in (q, 100 * q):
            ours = FUSED.norm(x, weight, 1e-5, dtype)
            torch.testing.assert_close(ours, PLAIN.norm(x, weight, 1e-5, dtype), **near)
    wide = torch.randn(3, 2 * 1500, dtype=dtype, device=device)
    torch.testing.assert_close(FUSED.gate(wide), PLAIN.gate(wide), **near)
"""


@pytest.mark.parametrize("program", [COMPARE, BETWEEN], ids=["attention", "between matrices"])
def test_kernels_give_what_plain_torch_gives(program: str) -> None:
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    ran = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert ran.returncode == 0, ran.stderr
