"""`deepflow calibrate`: measures an engine on this machine and writes its cost profile for the twin."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from controlplane.cli.output import CliError, note, progress_bar, table

if TYPE_CHECKING:
    from controlplane.twin.costs import CostProfile
    from controlplane.twin.measure import StepPlan
    from flowserve.executor.interface import SequenceSlice
    from flowserve.executor.local import LocalExecutor

ROUNDS = 5
KV_TOKENS = 36_000  # holds 64 decodes over 512 tokens, 16 over 2,048, and a chunk at 4,096
OVERHEAD_STEPS = 40
COPY_ROUNDS = 5


def calibrate(  # noqa: PLR0917  # options of a command
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the profile.")] = Path(
        "profile.json"
    ),
    model: Annotated[
        str | None,
        typer.Option("--model", help="Model URI.  [default: the default model]", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or npu.")] = "cpu",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bfloat16 or float32.")] = "auto",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the executor.")] = 1,
    core: Annotated[int | None, typer.Option("--core", help="Pin to this core while measuring.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Repetitions; medians are fitted.")] = ROUNDS,
    kv_tokens: Annotated[
        int, typer.Option("--kv-tokens", min=1024, help="Pool of the profile's executors.")
    ] = 65_536,
    transfer_ms: Annotated[
        float,
        typer.Option(
            "--transfer-ms", min=0, help="Fixed time of a hand-over, placement and handshake included."
        ),
    ] = 10.0,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", help="Take this profile instead of measuring.", show_default=False),
    ] = None,
    heat_map: Annotated[
        Path | None,
        typer.Option("--heat-map", help="Also fill a heat map and write it here.", show_default=False),
    ] = None,
    request_ms: Annotated[
        float, typer.Option("--request-ms", min=0, help="What gateway and stream add before the first step.")
    ] = 5.0,
) -> None:
    """Measure prefill and decode steps over batch, context and chunk, KV copies and model load.

    The machine should be otherwise idle. The profile feeds `deepflow simulate --profile`; the heat map says
    for which prompts and answers disaggregating pays on such executors.
    """
    from controlplane.twin.costs import ProfileError, load_profile

    try:
        if profile is not None:
            made = load_profile(profile)
        else:
            made = _measure(
                out, model, device, dtype, threads, core, rounds, kv_tokens, transfer_ms, request_ms
            )
        if heat_map is not None:
            _heat_map(made, heat_map)
    except (ProfileError, OSError) as problem:
        raise CliError(str(problem)) from None


def _measure(  # noqa: PLR0917  # the command's options
    out: Path,
    model: str | None,
    device: str,
    dtype: str,
    threads: int,
    core: int | None,
    rounds: int,
    kv_tokens: int,
    transfer_ms: float,
    request_ms: float,
) -> CostProfile:
    """Measures, writes and prints a profile. Raises ProfileError, CliError."""
    import os

    from controlplane.cli.models import fetch_with_bar
    from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
    from controlplane.twin.measure import Measured, plan_steps, profile_of
    from flowserve.engine.config import EngineConfig
    from flowserve.executor.local import open_executor

    if core is not None:
        if core not in os.sched_getaffinity(0):
            raise CliError(
                f"core {core} is not among those of this process: {sorted(os.sched_getaffinity(0))}"
            )
        os.sched_setaffinity(0, {core})
    config = EngineConfig()
    path = fetch_with_bar(model or DEFAULT_MODEL_URI).path
    started = time.perf_counter()
    try:
        executor = open_executor(
            path,
            revision="calibrate",
            device=device,
            dtype=dtype,
            threads=threads,
            kv_cache_bytes=_kv_bytes(path, dtype),
        )
    except ValueError as problem:
        raise CliError(str(problem)) from None
    try:
        load_seconds = time.perf_counter() - started
        info, layout = executor.info, executor.store.layout
        pool = executor.store.num_blocks * layout.block_tokens
        plans = plan_steps(pool, config.max_batch_tokens, config.max_running, info.max_model_len)
        times = _time_steps(executor, plans, rounds)
        measured = Measured(
            name=f"{Path(path).stem}-{device}-{threads}t",
            source=f"measured by `deepflow calibrate`, {info.dtype}, {threads} thread(s), {rounds} rounds",
            times=times,
            step_overhead=_overhead(executor),
            kv_bytes_per_token=layout.block_bytes // layout.block_tokens,
            copy_bytes_per_second=_copy_rate(executor),
            load_seconds=load_seconds,
            kv_tokens=kv_tokens,
            block_tokens=layout.block_tokens,
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            chunk_seconds=config.chunk_seconds,
            max_model_len=info.max_model_len,
        )
    finally:
        executor.close()
    profile, error = profile_of(measured, transfer_ms / 1e3, request_ms / 1e3)
    profile.save(out)
    table(
        ("STEP", "MEASURED", "FITTED"),
        [
            (
                _words(plan),
                f"{1e3 * sorted(taken)[len(taken) // 2]:.1f} ms",
                f"{1e3 * _fitted(profile, plan):.1f} ms",
            )
            for plan, taken in times.items()
        ],
    )
    note(f"mean error of the fit {100 * error:.1f} %; {len(times)} steps; written to {out}")
    return profile


def _heat_map(profile: CostProfile, path: Path) -> None:
    from math import isnan

    from controlplane.twin.heatmap import fill, save

    with progress_bar("cells of the heat map") as step:
        filled = fill(profile, progress=step)
    save(filled, profile, path)
    table(
        ("PROMPT \\ ANSWER:PROMPT", *(f"{ratio:.3g}" for ratio in filled.ratios)),
        [
            (prefill, *("-" if isnan(cell) else f"{cell:+.2f}" for cell in row))
            for prefill, row in zip(filled.prefills, filled.summed, strict=True)
        ],
    )
    steady = f"{filled.steady:.0%} of cells have one sign at every load"
    note(f"above 0 disaggregating pays; {steady}; written to {path}")


def _fitted(profile: CostProfile, plan: StepPlan) -> float:
    shape = plan.shape(0.0)
    return profile.step(shape.tokens, shape.sampled, shape.pairs, shape.context)


def _words(plan: StepPlan) -> str:
    parts = []
    if plan.decodes:
        parts.append(f"{plan.decodes} decodes over {plan.context}")
    if plan.chunk:
        parts.append(f"chunk of {plan.chunk} at {plan.start}")
    return " + ".join(parts)


def _kv_bytes(path: Path, dtype: str) -> int:
    """Bytes of a pool of KV_TOKENS tokens, at most 4 bytes a number."""
    from flowserve.models.loader import open_model

    model = open_model(path).config
    size = 4 if dtype == "float32" else 2
    return KV_TOKENS * 2 * model.layers * model.kv_heads * model.head_dim * size


def _slices(plan: StepPlan, block_tokens: int, vocabulary: int) -> list[SequenceSlice]:
    from flowserve.engine.types import SamplingParams
    from flowserve.executor.interface import SampleSpec, SequenceSlice

    greedy = SamplingParams(temperature=0.0)
    slices: list[SequenceSlice] = []
    block = 0
    wanted = [(1, plan.context)] * plan.decodes + ([(plan.chunk, plan.start)] if plan.chunk else [])
    for number, (count, start) in enumerate(wanted):
        blocks = -(-(start + count) // block_tokens)
        tokens = [(7 * i + 13 * number + 500) % vocabulary for i in range(count)]
        spec = SampleSpec(greedy, prompt=[1], output=[], index=0)
        slices.append(SequenceSlice(tokens, start, range(block, block + blocks), spec))
        block += blocks
    return slices


def _time_steps(executor: LocalExecutor, plans: list[StepPlan], rounds: int) -> dict[StepPlan, list[float]]:
    """Seconds of every step, round by round."""
    block_tokens = executor.store.layout.block_tokens
    plans = [
        p
        for p in plans
        if sum(len(s.block_table) for s in _slices(p, block_tokens, 2)) <= executor.store.num_blocks
    ]
    times: dict[StepPlan, list[float]] = {plan: [] for plan in plans}
    total = rounds * len(plans)
    with progress_bar("steps") as step:
        executor.execute(_slices(plans[0], block_tokens, executor.info.vocab_size))  # warms up
        for turn in range(rounds):
            for number, plan in enumerate(plans, 1):
                slices = _slices(plan, block_tokens, executor.info.vocab_size)
                started = time.perf_counter()
                executor.execute(slices)
                times[plan].append(time.perf_counter() - started)
                step(turn * len(plans) + number, total)
    return times


def _overhead(executor: LocalExecutor) -> float:
    """Median seconds that a turn of the real engine takes beyond the executor's step."""
    from statistics import median

    from flowserve.engine.config import EngineConfig
    from flowserve.engine.engine import Engine
    from flowserve.engine.types import EngineTask, SamplingParams, TaskKind
    from flowserve.executor.interface import SliceResult
    from flowserve.rtc import RTC

    class Timed:
        spent = 0.0
        info = executor.info

        def execute(self, batch: list[SequenceSlice]) -> list[SliceResult]:
            started = time.perf_counter()
            try:
                return executor.execute(batch)
            finally:
                self.spent = time.perf_counter() - started

        def close(self) -> None: ...

    timed = Timed()
    engine = Engine(timed, RTC(executor.store), EngineConfig(), handover=None, on_event=lambda _: None)  # type: ignore[arg-type]  # a list is a sequence
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    for number in range(8):
        prompt = [(7 * i + 31 * number + 500) % executor.info.vocab_size for i in range(48)]
        engine.submit(EngineTask(f"o{number}", 1, TaskKind.UNIFIED, prompt, sampling, OVERHEAD_STEPS + 10))
    extra: list[float] = []
    for _ in range(OVERHEAD_STEPS + 20):
        started = time.perf_counter()
        if not engine.step_once():
            break
        extra.append(time.perf_counter() - started - timed.spent)
    engine.stop()
    return max(0.0, median(extra))


def _copy_rate(executor: LocalExecutor) -> float:
    """Bytes per second of copying KV blocks within this memory: what two pools on one host can reach."""
    store = executor.store
    blocks = max(1, min(store.num_blocks // 2, (32 << 20) // store.layout.block_bytes))
    best = float("inf")
    for _ in range(COPY_ROUNDS):
        started = time.perf_counter()
        data = store.load(0, blocks)
        store.store(blocks, data)
        best = min(best, time.perf_counter() - started)
    return blocks * store.layout.block_bytes / best
