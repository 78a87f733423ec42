"""The executor against this machine's own limits: decode and prefill beside the roofline of the same run.

    python -m tests.bench.engine [--quick] [--json PATH] [--threads N] [--dtype bfloat16|float32]

Ceilings first: how fast these cores read memory (a sum over a block far larger than the caches) and
multiply float32 matrices of the model's shapes (torch's own library). The roofline time of a step is the
larger of its bytes over the read rate and its operations over the multiply rate. `model` is the forward
pass, `rest` what the executor adds around it: flattening the batch, sampling. Ceilings and steps alternate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from flowserve.engine.types import SamplingParams
from flowserve.executor.batch import flatten
from flowserve.executor.interface import SampleSpec, SequenceSlice
from flowserve.executor.local import LocalExecutor, open_executor
from flowserve.models.config import ModelConfig
from tests.bench import common

DECODE_BATCHES = (1, 8, 32)
DECODE_CONTEXT = 256
PREFILL_TOKENS = (128, 512, 2048)
LONG_CONTEXTS = (4096, 8000)
READ_BYTES = 512 << 20
BYTES = {"bfloat16": 2, "float32": 4}
GREEDY = SamplingParams(temperature=0.0)


def best_of(work: Callable[[], object], runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def matmul(config: ModelConfig, rows: int) -> tuple[Callable[[], object], float]:
    """The layer's four matrices applied to `rows` rows in float32 by torch, and their operations."""
    width = config.heads * config.head_dim
    shapes = [
        (width + 2 * config.kv_heads * config.head_dim, config.hidden),
        (config.hidden, width),
        (2 * config.intermediate, config.hidden),
        (config.hidden, config.intermediate),
    ]
    matrices = [torch.randn(shape) for shape in shapes]
    inputs = [torch.randn(rows, columns) for _, columns in shapes]

    def work() -> None:
        for matrix, data in zip(matrices, inputs, strict=True):
            torch.nn.functional.linear(data, matrix)

    return work, sum(2.0 * rows * n * k for n, k in shapes)


def layer_weights(config: ModelConfig) -> int:
    width = config.heads * config.head_dim
    attention = config.hidden * (width + 2 * config.kv_heads * config.head_dim) + width * config.hidden
    return config.layers * (attention + 3 * config.hidden * config.intermediate)


class Step:
    """One kind of step: its slices, and the least it must read and compute."""

    def __init__(self, name: str, slices: Sequence[SequenceSlice], config: ModelConfig, size: int) -> None:
        self.name, self.slices = name, slices
        tokens = sum(len(item.tokens) for item in slices)
        sampled = sum(item.sample is not None for item in slices)
        weights = layer_weights(config) + config.vocab_size * config.hidden
        kv_token = 2 * config.layers * config.kv_heads * config.head_dim
        seen = sum(item.start + len(item.tokens) for item in slices)
        self.bytes = float(weights + kv_token * seen) * size
        pairs = sum(
            len(item.tokens) * item.start + len(item.tokens) * (len(item.tokens) + 1) / 2 for item in slices
        )
        attention = 4.0 * pairs * config.layers * config.heads * config.head_dim
        head = 2.0 * sampled * config.vocab_size * config.hidden
        self.operations = 2.0 * tokens * layer_weights(config) + head + attention


def slices(sequences: int, tokens: int, start: int, block_tokens: int = 16) -> list[SequenceSlice]:
    blocks = -(-(start + tokens) // block_tokens)
    spec = SampleSpec(GREEDY, prompt=[1], output=[], index=0)
    return [
        SequenceSlice(
            tokens=[(7 * i + 13 * s) % 40_000 + 500 for i in range(tokens)],
            start=start,
            block_table=range(s * blocks, (s + 1) * blocks),
            sample=spec,
        )
        for s in range(sequences)
    ]


def steps(config: ModelConfig, size: int, quick: bool) -> list[Step]:
    made = [
        Step(f"decode, batch {n}, context {DECODE_CONTEXT}", slices(n, 1, DECODE_CONTEXT), config, size)
        for n in DECODE_BATCHES
    ]
    made += [
        Step(f"decode, batch 1, context {n}", slices(1, 1, n), config, size)
        for n in (LONG_CONTEXTS[:1] if quick else LONG_CONTEXTS)
    ]
    made += [
        Step(f"prefill, {n} tokens", slices(1, n, 0), config, size)
        for n in (PREFILL_TOKENS[:2] if quick else PREFILL_TOKENS)
    ]
    return made


def forward_only(executor: LocalExecutor, step: Step) -> None:
    layout = executor.store.layout
    ragged = flatten(
        step.slices,
        block_tokens=layout.block_tokens,
        num_blocks=executor.store.num_blocks,
        max_len=executor.info.max_model_len,
    )
    executor._model.forward(ragged, executor._pool.pages)


def main() -> int:
    parser = common.parser(str(__doc__).splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=sorted(BYTES), default="bfloat16")
    args = parser.parse_args()
    report = common.Report(f"engine, {args.dtype}, {args.threads} threads")
    size = BYTES[args.dtype]
    executor = open_executor(
        fetch(DEFAULT_MODEL_URI).path,
        revision="bench",
        dtype=args.dtype,
        kv_cache_bytes=1 << 30,
        threads=args.threads,
    )
    own_threads = torch.get_num_threads()
    config = executor._model.config
    block = torch.ones(READ_BYTES // 4)
    multiply, operations = matmul(config, 512)
    rounds = 3 if args.quick else 9
    plan = steps(config, size, args.quick)
    read: list[float] = []
    rate: list[float] = []
    whole: dict[str, list[float]] = {step.name: [] for step in plan}
    model: dict[str, list[float]] = {step.name: [] for step in plan}
    for step in plan:
        executor.execute(step.slices)
    for _ in range(rounds):
        torch.set_num_threads(args.threads)  # the compiled step leaves torch one
        read += [READ_BYTES / t for t in best_of(block.sum, 3)]
        rate += [operations / t for t in best_of(multiply, 5)]
        torch.set_num_threads(own_threads)
        for step in plan:
            repeat = 5 if step.name.startswith("decode") else 1
            whole[step.name] += best_of(lambda s=step: executor.execute(s.slices), repeat)  # type: ignore[misc]
            model[step.name] += best_of(lambda s=step: forward_only(executor, s), repeat)  # type: ignore[misc]
    bandwidth, multiply_rate = common.median(read), common.median(rate)
    report.add(step="ceiling: reads", gb_per_s=bandwidth / 1e9)
    report.add(step="ceiling: float32 multiply (torch)", gflop_per_s=multiply_rate / 1e9)
    shares = {}
    for step in plan:
        ours, forward = common.median(whole[step.name]), common.median(model[step.name])
        roofline = max(step.bytes / bandwidth, step.operations / multiply_rate)
        shares[step.name] = (step.bytes / forward / bandwidth, step.operations / forward / multiply_rate)
        report.add(
            step=step.name,
            ms=1e3 * ours,
            model_ms=1e3 * forward,
            rest_ms=1e3 * (ours - forward),
            roofline_ms=1e3 * roofline,
            of_roofline=roofline / ours,
            gb_per_s=step.bytes / forward / 1e9,
            gflop_per_s=step.operations / forward / 1e9,
        )
    share = shares[f"decode, batch 1, context {DECODE_CONTEXT}"][0]
    report.check("decode at batch 1 reads at", 100 * share, "% of the measured rate", ">= 75", share >= 0.75)
    share = shares["prefill, 512 tokens"][1]
    report.check(
        "prefill of 512 multiplies at", 100 * share, "% of torch's float32 rate", ">= 85", share >= 0.85
    )
    executor.close()
    return report.finish(args.json)


if __name__ == "__main__":
    raise SystemExit(main())
