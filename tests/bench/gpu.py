"""Decode on a GPU: tokens/s and share of the bandwidth roofline, graphs on and off, beside transformers.

    python -m tests.bench.gpu [--quick] [--json PATH] [--model 1B|8B|tiny] [--device cuda|npu|cpu]

A Llama of the named shape with random bfloat16 weights (speed does not depend on their values), decoding
for batches of 1, 32 and 128 sequences that have CONTEXT tokens each. The ceiling is how fast the device
reads memory in the same run (a sum over a block far larger than its caches); a step's roofline time is
its bytes, weights once and each sequence's KV, over that rate. `transformers` is its own `generate` on the
same device, weights, batch and context: the time of NEW tokens less that of one, over the difference.
Ceilings, ours and theirs alternate; medians.

Where the device is not there the run says so, measures nothing, and no aim is told. `--device cpu --model
tiny` runs the same code without a GPU, to try the bench itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flowserve.devices import DeviceUnavailable, Model, open_device
from flowserve.devices.graphs import GraphedLlama
from flowserve.engine.types import SamplingParams
from flowserve.executor.interface import ModelInfo, SampleSpec, SequenceSlice
from flowserve.executor.local import LocalExecutor
from flowserve.models.config import ModelConfig
from flowserve.models.weights import parts
from kvtransfer.layout import KVLayout
from tests.bench import common

BATCHES = (1, 32, 128)
CONTEXT = 256
NEW = 33
BLOCK_TOKENS = 16
READ_BYTES = {"cuda": 8 << 30, "npu": 8 << 30, "cpu": 256 << 20}
GREEDY = SamplingParams(temperature=0.0)


def shape(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        max_len=2048,
        norm_epsilon=1e-5,
        rope_theta=500000.0,
        rope_scaling=None,
        tied=False,
        eos_token_ids=(),
    )


SHAPES = {
    "tiny": shape(2, 128, 256, 4, 2, 512),
    "1B": shape(16, 2048, 8192, 32, 8, 128_256),  # Llama 3.2 1B, its head apart
    "8B": shape(32, 4096, 14_336, 32, 8, 128_256),  # Llama 3 8B
}


class RandomSource:
    """Weights of a shape without a file, made on the device that will hold them."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.config, self._device = config, device

    def tensor(self, name: str) -> torch.Tensor:
        config = self.config
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        hidden, wide = config.hidden, config.intermediate
        part = name.rpartition(".")[2]
        sizes = {"embedding": (config.vocab_size, hidden), "lm_head": (config.vocab_size, hidden)}
        sizes |= {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "output": (hidden, q)}
        sizes |= {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}
        if part not in sizes:
            return torch.ones(hidden, device=self._device)
        return torch.randn(sizes[part], dtype=torch.bfloat16, device=self._device) * 0.02


def weight_bytes(config: ModelConfig) -> int:
    """What a step reads of the weights: all but the embedding, of which it reads a row a token."""
    source = RandomSource(config, torch.device("meta"))
    layer = sum(source.tensor(f"layers.0.{part}").numel() for part in parts(config))
    return 2 * (config.layers * layer + config.vocab_size * config.hidden)


def seconds(work: Callable[[], object]) -> float:
    """`work` must end with its result on the host: then nothing is left running."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def decode(batch: int) -> list[SequenceSlice]:
    blocks = -(-CONTEXT // BLOCK_TOKENS)
    spec = SampleSpec(GREEDY, prompt=[1], output=[], index=0)
    return [
        SequenceSlice([3 + row], CONTEXT - 1, range(row * blocks, (row + 1) * blocks), sample=spec)
        for row in range(batch)
    ]


def ours(config: ModelConfig, device_name: str, torch_device: torch.device) -> dict[str, LocalExecutor]:
    """Executors over one model and one pool: with graphs where the device has them, and without."""
    device = open_device(device_name)
    max_len = 2 * CONTEXT
    layout = KVLayout("bench", "bfloat16", BLOCK_TOKENS, config.layers, config.kv_heads, config.head_dim)
    model: Model = device.make_model(
        RandomSource(config, torch_device),
        dtype=torch.bfloat16,
        max_len=max_len,
        block_tokens=BLOCK_TOKENS,
        threads=torch.get_num_threads(),
    )
    pool = device.make_pool(layout, BATCHES[-1] * (CONTEXT // BLOCK_TOKENS) + 1)
    started = time.perf_counter()
    device.prepare(model, pool, max_len)
    print(f"recording graphs took {time.perf_counter() - started:.1f} s")
    info = ModelInfo(
        "bench", config.layers, config.kv_heads, config.head_dim, config.vocab_size, max_len, (), "bfloat16"
    )
    made = {"without graphs": LocalExecutor(model, pool, info)}
    if isinstance(model, GraphedLlama):
        made = {
            "with graphs": LocalExecutor(model, pool, info),
            "without graphs": LocalExecutor(model._model, pool, info),
        }
    return made


def theirs(config: ModelConfig, device: torch.device) -> Callable[[int, int], float]:
    """Seconds of transformers' `generate` for (batch, new tokens)."""
    import transformers

    made = transformers.LlamaConfig(
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_len,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with device:
        model: Any = transformers.LlamaForCausalLM(made).to(torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def run(batch: int, new: int) -> float:
        ids = torch.ones(batch, CONTEXT - new // 2, dtype=torch.int64, device=device)
        mask = torch.ones_like(ids)
        return seconds(
            lambda: model.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
            ).cpu()
        )

    return run


def measure(
    report: common.Report, config: ModelConfig, name: str, rounds: int
) -> dict[tuple[int, str], float]:
    """Share of the roofline by (batch, way), and rows in the report."""
    kind = name.partition(":")[0]
    device = torch.device(name)
    block = torch.ones(READ_BYTES[kind] // 2, dtype=torch.bfloat16, device=device)
    executors = ours(config, name, device)
    generate = theirs(config, device)
    reads: list[float] = []
    steps: dict[tuple[int, str], list[float]] = {}
    for executor in executors.values():
        for batch in BATCHES:
            executor.execute(decode(batch))
    for batch in BATCHES:
        generate(batch, 2)
    for _ in range(rounds):
        block.sum().item()
        reads += [READ_BYTES[kind] / seconds(lambda: block.sum().item()) for _ in range(3)]
        for batch in BATCHES:
            for way, executor in executors.items():
                slices: Sequence[SequenceSlice] = decode(batch)
                times = [seconds(lambda e=executor, s=slices: e.execute(s)) for _ in range(10)]  # type: ignore[misc]
                steps.setdefault((batch, way), []).append(common.median(times))
            step = (generate(batch, NEW) - generate(batch, 1)) / (NEW - 1)
            steps.setdefault((batch, "transformers"), []).append(step)
    bandwidth = common.median(reads)
    report.add(batch="ceiling: reads", gb_per_s=bandwidth / 1e9)
    kv_token = 2 * config.layers * config.kv_heads * config.head_dim * 2
    shares = {}
    for (batch, way), times in sorted(steps.items()):
        step = common.median(times)
        roofline = (weight_bytes(config) + batch * CONTEXT * kv_token) / bandwidth
        shares[batch, way] = roofline / step
        report.add(
            batch=batch,
            way=way,
            ms=1e3 * step,
            tokens_per_s=batch / step,
            roofline_ms=1e3 * roofline,
            of_roofline=roofline / step,
        )
    next(iter(executors.values())).close()
    return shares


def main() -> int:
    parser = common.parser(str(__doc__).splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    model = args.model or ("1B" if args.quick else "8B")
    report = common.Report(f"decode on {args.device}, Llama {model} shape, bfloat16, context {CONTEXT}")
    shares: dict[tuple[int, str], float] = {}
    try:
        open_device(args.device)
    except DeviceUnavailable as reason:
        print(f"NOTHING WAS MEASURED: {reason}")
        report.add(batch="not measured", way=str(reason))
    else:
        shares = measure(report, SHAPES[model], args.device, 3 if args.quick else 7)
    for batch in BATCHES:
        mine, other = shares.get((batch, "with graphs")), shares.get((batch, "transformers"))
        share = None if mine is None else 100 * mine
        report.check(f"share of the roofline at batch {batch}", share, "%", "reported", None)
        ratio = None if mine is None or other is None else mine / other
        holds = None if ratio is None else ratio > 1
        report.check(f"speed over transformers at batch {batch}", ratio, "x", "> 1", holds)
    return report.finish(args.json)


if __name__ == "__main__":
    raise SystemExit(main())
