"""The engine against this machine's own limits, and against vLLM and llama.cpp on the same cores.

    python -m tests.bench.engine [--quick] [--json PATH] [--threads N] [--precision f32|bf16|int8|int4]
    python -m tests.bench.engine --peers [--quick] [--json PATH] [--cells 128/64@8 …] [--rounds N] …

The first form measures ceilings (`ceilings.py`) and, in turn with them, the executor's steps: decode of
1, 8 and 32 sequences, decode at long contexts, prefill. The roofline time of a step is the larger of its
bytes over the read rate and its operations over the multiply rate. The rest of a step's time is told
apart by runs that differ in one thing: almost no context (what is left is matrices), sampling alone,
the engine's loop around the executor, gRPC around the engine, the gateway around that (`breakdown.py`).

The second form is `peers/compare.py`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from flowserve.engine.sampling import sample
from flowserve.engine.types import SamplingParams
from flowserve.executor.batch import flatten
from flowserve.executor.interface import SampleSpec, SequenceSlice
from flowserve.executor.local import LocalExecutor, open_executor
from flowserve.models.config import ModelConfig
from tests.bench import breakdown, common
from tests.bench.ceilings import Ceilings, shapes, timed
from tests.bench.peers import compare
from tests.support.stack import running_stack

DECODE_BATCHES = (1, 8, 32)
DECODE_CONTEXT = 256
PREFILL_TOKENS = (128, 512, 2048)
PREFILL_PIECE = 16  # tokens of a piece where a prefill is run almost without attention
LONG_CONTEXTS = (4096, 8000)
KV_BYTES = {"bfloat16": 2, "float32": 4}
ROUNDS = 7
KV_GAP = 0.15  # what long contexts may cost beyond the bytes of their KV
GREEDY = SamplingParams(temperature=0.0)


def layer_weights(config: ModelConfig) -> int:
    """Weights of all layers' matrices."""
    return config.layers * sum(out * width for out, width in shapes(config))


class Step:
    """One kind of step: its slices, and the least it must read and compute."""

    def __init__(
        self, kind: str, slices: Sequence[SequenceSlice], config: ModelConfig, how: common.Precision
    ) -> None:
        self.kind, self.slices = kind, slices
        self.sequences = len(slices)
        self.tokens = sum(len(item.tokens) for item in slices)
        self.context = slices[0].start
        sampled = sum(item.sample is not None for item in slices)
        head = config.vocab_size * config.hidden
        self.weight_bytes = layer_weights(config) * how.weight_bytes + head * how.head_bytes
        seen = sum(item.start + len(item.tokens) for item in slices)
        self.kv_bytes = 2.0 * config.layers * config.kv_heads * config.head_dim * seen * KV_BYTES[how.dtype]
        pairs = sum(
            len(item.tokens) * item.start + len(item.tokens) * (len(item.tokens) + 1) / 2 for item in slices
        )
        self.matrix_operations = 2.0 * (self.tokens * layer_weights(config) + sampled * head)
        self.attention_operations = 4.0 * pairs * config.layers * config.heads * config.head_dim

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill, {self.tokens} tokens"
        return f"decode, batch {self.sequences}, context {self.context}"


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


def steps(config: ModelConfig, how: common.Precision, quick: bool) -> list[Step]:
    long = LONG_CONTEXTS[:1] if quick else LONG_CONTEXTS
    decodes = [*((n, DECODE_CONTEXT) for n in DECODE_BATCHES), *((1, n) for n in long)]
    made = [Step("decode", slices(n, 1, context), config, how) for n, context in decodes]
    prompts = PREFILL_TOKENS[:2] if quick else PREFILL_TOKENS
    return made + [Step("prefill", slices(1, n, 0), config, how) for n in prompts]


def without_context(step: Step) -> list[SequenceSlice]:
    """The same rows through the same matrices with almost nothing to attend to, as many logits."""
    if step.kind == "decode":
        return slices(step.sequences, 1, 0)
    pieces = slices(step.tokens // PREFILL_PIECE, PREFILL_PIECE, 0)
    return [SequenceSlice(p.tokens, p.start, p.block_table) for p in pieces[:-1]] + pieces[-1:]


@dataclass
class Times:
    """Seconds of every run of a step."""

    whole: list[float] = field(default_factory=list)  # the executor's call
    model: list[float] = field(default_factory=list)  # the forward pass in it
    matrices: list[float] = field(default_factory=list)  # a forward pass almost without context
    sampling: list[float] = field(default_factory=list)


def forward(executor: LocalExecutor, batch: Sequence[SequenceSlice]) -> Callable[[], torch.Tensor]:
    """The forward pass alone, its arrays made before."""
    layout = executor.store.layout
    ragged = flatten(
        batch,
        block_tokens=layout.block_tokens,
        num_blocks=executor.store.num_blocks,
        max_len=executor.info.max_model_len,
    )
    return lambda: executor._model.forward(ragged, executor._pool.pages)


def measure_step(executor: LocalExecutor, step: Step, times: Times) -> None:
    runs = 5 if step.kind == "decode" else 1
    run, bare = forward(executor, step.slices), forward(executor, without_context(step))
    times.whole += timed(lambda: executor.execute(step.slices), runs)
    times.model += timed(run, runs)
    times.matrices += timed(bare, runs)
    logits = run()
    specs = [item.sample for item in step.slices if item.sample is not None]
    times.sampling += timed(lambda: sample(logits, specs), runs)


def add_step(report: common.Report, step: Step, times: Times, bandwidth: float, rate: float) -> None:
    """A row: the step beside its roofline, and where the rest goes (ms)."""
    whole, model, matrices, sampling = map(
        common.median, (times.whole, times.model, times.matrices, times.sampling)
    )
    least_matrices = max(step.weight_bytes / bandwidth, step.matrix_operations / rate)
    least_attention = max(step.kv_bytes / bandwidth, step.attention_operations / rate)
    roofline = max(
        (step.weight_bytes + step.kv_bytes) / bandwidth,
        (step.matrix_operations + step.attention_operations) / rate,
    )
    report.add(
        step=step.name,
        ms=1e3 * whole,
        roofline_ms=1e3 * roofline,
        share=roofline / whole,
        weights=1e3 * least_matrices,
        matrices_over=1e3 * (matrices - least_matrices),
        kv=1e3 * least_attention,
        attention_over=1e3 * (model - matrices - least_attention),
        sampling=1e3 * sampling,
        python=1e3 * (whole - model - sampling),
        gb_per_s=(step.weight_bytes + step.kv_bytes) / model / 1e9,
        gflop_per_s=(step.matrix_operations + step.attention_operations) / model / 1e9,
    )


def check(
    report: common.Report, plan: Sequence[Step], found: dict[str, Times], ceilings: Ceilings, kind: str
) -> None:
    """The aims of the engine work."""
    first = plan[0]
    reached = (first.weight_bytes + first.kv_bytes) / common.median(found[first.name].model)
    share = reached / ceilings.bandwidth
    report.check("decode at batch 1 reads at", 100 * share, "% of the measured rate", ">= 75", share >= 0.75)
    way, rate = ceilings.multiply(kind)
    for step in plan:
        if step.kind == "prefill" and step.tokens >= 512:
            operations = step.matrix_operations + step.attention_operations
            share = operations / common.median(found[step.name].model) / rate
            unit = f"% of torch's {way} rate"
            report.check(f"{step.name}, multiplies at", 100 * share, unit, ">= 85", share >= 0.85)
    for step in plan:
        if step.kind == "decode" and step.context > DECODE_CONTEXT:
            extra = common.median(found[step.name].model) - common.median(found[first.name].model)
            bytes_explain = (step.kv_bytes - first.kv_bytes) / ceilings.bandwidth
            over = extra / bytes_explain - 1
            report.check(
                f"{step.name}, costs beyond its KV's bytes", 100 * over, "%", "<= 15", over <= KV_GAP
            )


def add_around(
    report: common.Report,
    executor: LocalExecutor,
    found: dict[str, Times],
    quick: bool,
    threads: int,
    how: common.Precision,
) -> None:
    """What the engine's loop, gRPC and the gateway add to a decode step."""
    batches = DECODE_BATCHES[:2] if quick else DECODE_BATCHES
    inside = {n: breakdown.in_engine(executor, n, DECODE_CONTEXT) for n in batches}
    loops = {n: whole for n, (whole, _) in inside.items()}
    with running_stack("1C", "--threads", str(threads), "--kv-cache-bytes", "512M", *how.options) as stack:
        for n in batches:
            direct, gateway = asyncio.run(breakdown.served(stack, n, DECODE_CONTEXT))
            step = common.median(found[f"decode, batch {n}, context {DECODE_CONTEXT}"].whole)
            report.add(
                around=f"decode, batch {n}",
                executor_ms=1e3 * step,
                in_engine_ms=1e3 * loops[n],
                over_grpc_ms=1e3 * direct,
                through_gateway_ms=1e3 * gateway,
                engine=1e3 * (loops[n] - step),
                between_steps=1e3 * inside[n][1],
                grpc=1e3 * (direct - loops[n]),
                gateway=1e3 * (gateway - direct),
            )


def main() -> int:
    parser = common.parser(str(__doc__).splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=list(common.PRECISIONS), default="bf16")
    parser.add_argument("--rounds", type=int, help="how often each thing is measured")
    parser.add_argument(
        "--part", choices=("steps", "around"), help="this alone: steps, or what is around one"
    )
    compare.add_options(parser)
    args = parser.parse_args()
    if args.peers:
        return compare.main(args)
    how = common.PRECISIONS[args.precision]
    multiplied = "int8" if how.quantization else how.dtype  # activations meet quantized weights in 8 bits
    report = common.Report(f"engine, {args.precision}, {args.threads} threads")
    executor = open_executor(
        fetch(DEFAULT_MODEL_URI).path,
        revision="bench",
        dtype=how.dtype,
        quantization=how.quantization,
        kv_cache_bytes=1 << 30,
        threads=args.threads,
    )
    config = executor._model.config
    ceilings = Ceilings(config, args.threads)
    plan = steps(config, how, args.quick)
    if args.part == "around":
        plan = [step for step in plan if step.kind == "decode" and step.context == DECODE_CONTEXT]
    found = {step.name: Times() for step in plan}
    for step in plan:
        executor.execute(step.slices)
    other = common.OtherWork(())
    for _ in range(args.rounds or (2 if args.quick else ROUNDS)):
        ceilings.measure(3)
        for step in plan:
            measure_step(executor, step, found[step.name])
    elsewhere = other.share()
    ceilings.report(report)
    _, rate = ceilings.multiply(multiplied)
    for step in plan:
        add_step(report, step, found[step.name], ceilings.bandwidth, rate)
    if args.part != "around":
        check(report, plan, found, ceilings, multiplied)
    if elsewhere > common.MOST_OTHER_WORK:
        for aim in report.checks:
            aim.holds = None
    quiet = elsewhere <= common.MOST_OTHER_WORK
    report.check("work of others meanwhile", 100 * elsewhere, "% of the machine", "<= 10", quiet or None)
    if args.part != "steps":
        add_around(report, executor, found, args.quick, args.threads, how)
    executor.close()
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
