"""The Triton kernels against plain torch, and before Triton's compiler. Without a GPU they run in Triton's
interpreter, in a process of its own: the interpreter is chosen when Triton is imported. The compiler, which
takes less than the interpreter does, needs no GPU to compile for one."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flowserve import devices

FILES = [Path(devices.__file__).with_name(name) for name in ("fused.py", "paged_attention.py")]
needs_triton = pytest.mark.skipif(
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
COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from flowserve.devices.fused import FUSED
from flowserve.devices.paged_attention import paged_attention
from flowserve.models.llama import Spans

class Absent:
    "A GPU that is not there: enough of Triton's driver to compile for it."
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

compiled = []
run = JITFunction.run

def compile_only(self, *args, grid, warmup, **options):
    compiled.append(run(self, *args, grid=grid, warmup=True, **options))

JITFunction.run = compile_only
driver.set_active(Absent())
for dtype, heads, kv_heads, dim, tokens, width in (
    (torch.bfloat16, 32, 8, 128, 16, 512),    # Llama 3 8B
    (torch.bfloat16, 9, 3, 64, 16, 6),        # the small model
    (torch.float32, 6, 1, 80, 32, 40),        # no power of two
    (torch.float16, 32, 32, 96, 64, 9),       # the largest block
):
    q = torch.zeros(2, heads, dim, dtype=dtype)
    pages = torch.zeros(4, 2, 2, kv_heads, tokens, dim, dtype=dtype)
    ends = torch.ones(2, dtype=torch.int32)
    paged_attention(q, pages, 1, Spans(torch.zeros(2, width, dtype=torch.int32), ends, [1, 1]))
    FUSED.norm(q, torch.zeros(dim), 1e-5, dtype)
    FUSED.rotate(q, torch.zeros(2, 1, dim // 2), torch.zeros(2, 1, dim // 2))
    FUSED.gate(torch.zeros(3, 2 * 1500, dtype=dtype))
assert len(compiled) == 4 * 5 and all(kernel.asm["cubin"] for kernel in compiled)
assert max(kernel.metadata.shared for kernel in compiled) <= 99 << 10  # of a block, on 8.6 and 8.9 too
"""


def run(program: str, *arguments: str, **variables: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


@needs_triton
@pytest.mark.parametrize("program", [COMPARE, BETWEEN], ids=["attention", "between matrices"])
def test_kernels_give_what_plain_torch_gives(program: str) -> None:
    run(program, **({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}))


@needs_triton
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for_gpus_that_are_not_there(capability: str, tmp_path: Path) -> None:
    run(COMPILE, capability, TRITON_CACHE_DIR=str(tmp_path))


def kernels() -> Iterator[ast.FunctionDef]:
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                yield node


@pytest.mark.parametrize("kernel", list(kernels()), ids=lambda kernel: kernel.name)
def test_kernels_name_no_global_but_the_language(kernel: ast.FunctionDef) -> None:
    """The compiler refuses others, in annotations of arguments too. It is not everywhere: this is."""
    inside = [node for part in (kernel.args, *kernel.body) for node in ast.walk(part)]
    own = {node.arg for node in inside if isinstance(node, ast.arg)}
    own |= {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    read = {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert read - own - set(dir(builtins)) == {"tl"}
