"""How long an executor takes: warm start, libraries, model load, first token, orderly exit.

    python -m tests.bench.executor_start [--quick] [--model PATH]

The floor of a warm start is an interpreter that imports grpc.aio alone, and of its libraries one that
imports torch alone, both measured in the same run, alternating. Needs the small model.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from tests.bench import common
from tests.support.te import executor

RUNS, QUICK_RUNS = 7, 3
PROMPT = list(range(500, 516))


def bare(module: str) -> float:
    """Seconds of a process that imports `module` and ends."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - started


async def libraries_ready(metrics_url: str) -> float:
    """Seconds from the process's start until its libraries were imported, as it says itself."""
    name = 'deepflow_te_start_seconds{stage="libraries"} '
    async with httpx.AsyncClient() as client:
        while True:
            for line in (await client.get(metrics_url)).text.splitlines():
                if line.startswith(name):
                    return float(line.removeprefix(name))
            await asyncio.sleep(0.05)


async def one(folder: Path, model: Path, dtype: str) -> dict[str, float]:
    started = time.perf_counter()
    async with executor("te-bench", folder) as te:
        serving = time.perf_counter() - started
        libraries = await libraries_ready(te.metrics_url)
        loading = time.perf_counter()
        await te.load(model, "bench@1", dtype=dtype)
        loaded = time.perf_counter() - loading
        async with te.connect() as client:
            asked = time.perf_counter()
            run = await client.generate(PROMPT, revision="bench@1", max_tokens=1)
            if run.error is not None:
                raise RuntimeError(run.error.message)
            first_token = time.perf_counter() - asked
        stopping = time.perf_counter()
        await te.stop()
        return {
            "serving": serving,
            "libraries": libraries,
            "load": loaded,
            "first token": first_token,
            "exit": time.perf_counter() - stopping,
        }


async def main(quick: bool, json_path: str | None, model: Path) -> int:
    report = common.Report("executor start (seconds)")
    runs = QUICK_RUNS if quick else RUNS
    floors: dict[str, list[float]] = {"grpc.aio": [], "torch": []}
    with tempfile.TemporaryDirectory(prefix="dfb-") as folder:
        for dtype in ("bfloat16",) if quick else ("bfloat16", "float32"):
            samples: list[dict[str, float]] = []
            for _ in range(runs):
                for module, seconds in floors.items():
                    seconds.append(await asyncio.to_thread(bare, module))
                samples.append(await one(Path(folder), model, dtype))
            for stage in samples[0]:
                values = [sample[stage] for sample in samples]
                report.add(
                    dtype=dtype, stage=stage, median=common.median(values), worst=max(values), runs=runs
                )
            serving = common.median([sample["serving"] for sample in samples])
    for module, seconds in floors.items():
        report.add(
            dtype="-",
            stage=f"bare import of {module}",
            median=common.median(seconds),
            worst=max(seconds),
            runs=len(seconds),
        )
    floor = common.median(floors["torch"])
    report.check(
        "warm start before torch is imported",
        serving / floor,
        "x",
        "< 1 of a bare torch import",
        serving < floor,
    )
    return report.finish(json_path)


if __name__ == "__main__":
    arguments = common.parser(__doc__ or "")
    arguments.add_argument("--model", type=Path, help="GGUF file or folder (default: the small model)")
    options = arguments.parse_args()
    common.run(main(options.quick, options.json, options.model or fetch(DEFAULT_MODEL_URI).path))
