"""Everything `flowserve/devices/npu.py` asks of torch-npu, against the published wheel.

The wheel cannot be imported without Ascend's runtime, so it is read: the operator's schema is given to
torch's own dispatcher, the wheel's meta function runs on what we pass, signatures come from its sources'
syntax trees. A reference of the operator's documented meaning shows that the tables address the right pages.
"""

from __future__ import annotations

import ast
import inspect
import math
import os
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flowserve.devices import npu as ours
from flowserve.devices import open_device
from flowserve.devices.accelerator import MEMORY_CALLS
from flowserve.models.llama import Spans, gathered_attention

VERSION = "2.14.0"
OPERATOR = "npu_fused_infer_attention_score"
SCHEMAS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
META = "torch_npu/op_plugin/meta/_meta_registrations.py"
GRAPHS = "torch_npu/npu/graphs.py"
HANDLER = "torch_npu/npu/_npugraph_handlers/ifa_handler.py"
BACKENDS = "torch_npu/_init/registry/distributed.py"
NPU = "torch_npu/npu/__init__.py"
MEMORY = "torch_npu/npu/memory.py"


@pytest.fixture(scope="module")
def wheel() -> zipfile.ZipFile:
    """The published wheel, from the user's cache or the package index."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deepflow" / "wheels"
    pattern = f"torch_npu-{VERSION}-*.whl"
    if not list(cache.glob(pattern)):
        command = ["pip", "download", f"torch-npu=={VERSION}", "--no-deps", "--dest", str(cache)]
        try:
            ran = subprocess.run(
                [sys.executable, "-m", *command], capture_output=True, text=True, timeout=120, check=False
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"the torch-npu {VERSION} wheel cannot be fetched within 120 s")
        if ran.returncode:
            lines = ran.stderr.strip().splitlines()
            pytest.skip(
                f"the torch-npu {VERSION} wheel cannot be fetched: {lines[-1] if lines else 'pip failed'}"
            )
    return zipfile.ZipFile(next(cache.glob(pattern)))


def tree(wheel: zipfile.ZipFile, name: str) -> ast.Module:
    return ast.parse(wheel.read(name))


def find(body: list[ast.stmt], name: str) -> Any:
    """The class or function of that name."""
    [node] = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name]
    return node


def signature(node: ast.FunctionDef) -> inspect.Signature:
    """Of a function's source, without its types and with whatever defaults."""
    bare = ast.parse(f"def {node.name}(): pass").body[0]
    assert isinstance(bare, ast.FunctionDef)
    bare.args = node.args
    for argument in ast.walk(bare):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    space: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(ast.Module([bare], [])), node.name, "exec"), space)
    return inspect.signature(space[node.name])


def names_used(module: str) -> set[str]:
    """`torch_npu.x` and `npu.x` in our source."""
    found = ast.walk(ast.parse(Path(str(ours.__file__)).read_text()))
    return {
        f"{node.value.id}.{node.attr}"
        for node in found
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module
    }


def documented(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator on the CPU for one query a sequence, as its documentation has it for paged keys in
    (blocks, KV heads, block size, dim)."""
    lengths, table = options["actual_seq_lengths_kv"], options["block_table"]
    n, heads, one, _ = query.shape
    blocks, kv_heads, size, _ = key.shape
    assert key.shape == value.shape and key.is_contiguous() and value.is_contiguous()
    assert query.dtype == key.dtype == value.dtype and table.dtype == torch.int32 and one == 1
    assert options["input_layout"] == "BNSD" and options["num_heads"] == heads
    assert options["num_key_value_heads"] == kv_heads and options["block_size"] == size and size % 16 == 0
    assert len(lengths) == n == len(table) and blocks >= sum(-(-length // size) for length in lengths)
    assert table.shape[1] >= max(-(-length // size) for length in lengths)
    out = torch.empty_like(query)
    for row, length in enumerate(lengths):
        pages = table[row, : -(-length // size)].long()
        k, v = (part[pages].transpose(0, 1).flatten(1, 2)[:, :length] for part in (key, value))
        k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
        out[row] = ((query[row] @ k.mT) * options["scale"]).softmax(-1) @ v
    return out, torch.empty(0)


@pytest.fixture
def operator(wheel: zipfile.ZipFile, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """The operator under its published schema: the wheel's meta function, the documented meaning on the CPU;
    `import torch_npu` finds it."""
    text = wheel.read(SCHEMAS).decode()
    schemas = set(re.findall(rf"^- func: ({OPERATOR}\(.*)$", text, re.MULTILINE))
    assert schemas, "the wheel no longer declares the operator"
    functions = {n.name: n for n in tree(wheel, META).body if isinstance(n, ast.FunctionDef)}
    for node in functions.values():
        node.decorator_list = []
    body: list[ast.stmt] = list(functions.values())
    error = types.SimpleNamespace(VALUE="", PARAM="", TYPE="", NOT_SUPPORT="")
    space: dict[str, Any] = {"torch": torch, "math": math, "ErrCode": error, "ops_error": lambda code: ""}
    exec(compile(ast.Module(body, []), META, "exec", flags=annotations.compiler_flag), space)
    with torch.library._scoped_library("npu", "FRAGMENT") as library:
        library.define(min(schemas))
        library.impl(OPERATOR, space[f"{OPERATOR}_forward"], "Meta")
        library.impl(OPERATOR, documented, "CPU")
        op = getattr(torch.ops.npu, OPERATOR)
        monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace(**{OPERATOR: op}))
        yield op


def case(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, Spans]:
    torch.manual_seed(4)
    ends = [1, 16, 40]
    tables = torch.randperm(9).view(3, 3).int()
    pages = torch.randn(9, 2, 2, 3, 16, 64).to(dtype).to(device)
    q = torch.randn(3, 9, 64).to(dtype).to(device)
    return q, pages, Spans(tables.to(device), torch.tensor(ends, dtype=torch.int32).to(device), ends)


def test_the_operator_takes_our_arguments_and_gives_our_shape(operator: Callable[..., Any]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        out = ours.paged_attention(*_with_layer(case(dtype, "meta"), 1))
        assert out.shape == (3, 9, 64) and out.dtype == dtype and out.device.type == "meta"


def test_the_schema_is_what_refuses(operator: Callable[..., Any]) -> None:
    """The check above has teeth: torch's dispatcher refuses a name or a type that the schema lacks."""
    q, pages, _ = case(torch.bfloat16, "meta")
    with pytest.raises(RuntimeError, match="num_query_heads"):
        operator(q, pages, pages, num_query_heads=9)
    with pytest.raises(RuntimeError, match="block_table"):
        operator(q, pages, pages, block_table=[1])


def test_the_tables_address_the_planes_of_the_layer(operator: Callable[..., Any]) -> None:
    for layer in (0, 1):
        inputs = _with_layer(case(torch.float32, "cpu"), layer)
        torch.testing.assert_close(ours.paged_attention(*inputs), gathered_attention(*inputs))


def _with_layer(
    inputs: tuple[torch.Tensor, torch.Tensor, Spans], layer: int
) -> tuple[torch.Tensor, torch.Tensor, int, Spans]:
    q, pages, spans = inputs
    return q, pages, layer, spans


def test_graphs_are_recorded_and_replayed_as_the_wheel_declares(
    wheel: zipfile.ZipFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our graph class runs against stand-ins that take exactly what the wheel's sources take."""
    source = tree(wheel, GRAPHS).body
    graph, context = find(source, "NPUGraph"), find(source, "graph")
    calls: list[str] = []

    def method(owner: ast.ClassDef, name: str) -> Callable[..., None]:
        declared = signature(find(owner.body, name))

        def call(*args: Any, **kwargs: Any) -> None:
            bound = declared.bind(*args, **kwargs).arguments
            calls.append(f"{owner.name}.{name} {sorted(set(bound) - {'self', 'npu_graph'})}")

        return call

    names = ("__init__", "update", "replay")
    recorded = type("NPUGraph", (), {name: method(graph, name) for name in names})
    recording = type("graph", (), {"__init__": method(context, "__init__")})
    for name in ("__enter__", "__exit__"):
        setattr(recording, name, method(context, name))
    stand_in = types.SimpleNamespace(
        NPUGraph=recorded, graph=recording, synchronize=lambda: calls.append("synchronize")
    )
    monkeypatch.setattr(torch, "npu", stand_in, raising=False)
    logits = torch.zeros(2, 3)
    runs: list[int] = []
    made = ours.NpuGraph(lambda: runs.append(1) or logits, "pool")  # type: ignore[func-returns-value]  # counts
    assert len(runs) == ours.WARM_UPS + 1 and made.logits is logits
    made.replay((5, 6))
    assert calls == [
        "synchronize",
        "NPUGraph.__init__ []",
        "graph.__init__ ['auto_dispatch_capture', 'capture_error_mode', 'pool']",
        "graph.__enter__ []",
        "graph.__exit__ ['exc_type', 'exc_value', 'traceback']",
        "NPUGraph.update ['cpu_update_input']",
        "NPUGraph.replay []",
    ]


def test_a_recordings_lengths_can_be_updated(wheel: zipfile.ZipFile) -> None:
    """The wheel's handler of the operator renews the very argument that our replay gives."""
    [entry] = [
        pair
        for node in ast.walk(tree(wheel, HANDLER))
        if isinstance(node, ast.Dict)
        for pair in zip(node.keys, node.values, strict=True)
        if isinstance(pair[0], ast.Constant) and pair[0].value == f"{OPERATOR}.default"
    ]
    assert "'actual_seq_lengths_kv'" in ast.unparse(entry[1])


def test_hccl_is_registered_for_npu(wheel: zipfile.ZipFile) -> None:
    calls = [
        node
        for node in ast.walk(tree(wheel, BACKENDS))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("register_backend")
    ]
    devices = {
        ast.literal_eval(call.args[0]): ast.literal_eval(keyword.value)
        for call in calls
        for keyword in call.keywords
        if keyword.arg == "devices"
    }
    assert devices["hccl"] == ["npu"]


def test_nothing_else_is_asked_of_torch_npu(
    wheel: zipfile.ZipFile, operator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names_used("torch_npu") == {f"torch_npu.{OPERATOR}"}
    graphs = {"npu.NPUGraph", "npu.graph"}  # above
    plain = {"npu.is_available", "npu.device_count", "npu.set_device", "npu.synchronize"}
    plain |= {"npu.graph_pool_handle"}
    assert names_used("npu") == graphs | plain
    there = {
        alias.asname or alias.name
        for node in ast.walk(tree(wheel, NPU))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    } | {node.name for node in ast.walk(tree(wheel, NPU)) if isinstance(node, ast.FunctionDef)}
    assert {name.removeprefix("npu.") for name in plain | graphs} <= there
    [every] = [  # of `from .memory import *`
        ast.literal_eval(node.value)
        for node in tree(wheel, MEMORY).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert "*" in there and set(MEMORY_CALLS) <= there | set(every)
    takes_device = {"mem_get_info", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"}
    for name in takes_device:  # each is called with the device alone
        [node] = [
            node
            for file in (NPU, MEMORY)
            for node in ast.walk(tree(wheel, file))
            if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        signature(node).bind(0)
    fake = types.SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, set_device=lambda index: None
    )
    monkeypatch.setattr(torch, "npu", fake, raising=False)
    monkeypatch.setattr(torch, "device", lambda kind, index: f"{kind}:{index}")  # no such type is registered
    device = open_device("npu:1")
    assert device.name == "npu:1"
    assert isinstance(device, ours.NpuDevice)
    assert device.attention(torch.bfloat16, 16) is ours.paged_attention
    assert device.attention(torch.float32, 16) is None and device.attention(torch.bfloat16, 8) is None
