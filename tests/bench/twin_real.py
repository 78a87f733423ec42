"""How far the twin can be trusted: the same requests on real executors and on simulated ones.

    python -m tests.bench.twin_real --profile PATH [--topology 1C|2C|1P1D] [--quick] [--json PATH]

Executors are processes as the supervisor starts them, one thread each, each pinned to a core of its own,
running the default model; the client speaks the worker protocol and gives the requests to them in turn. The
twin gets the moments at which they were really sent, and the profile that `deepflow calibrate` measured on this
machine. Loads are shares of the capacity the twin tells for the topology; all of a run's requests count.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from controlplane.twin.costs import CostProfile, load_profile
from controlplane.twin.results import tpot, ttft
from controlplane.twin.scenario import capacity, simulate
from controlplane.twin.workload import Workload, build, poisson
from tests.bench import common
from tests.support.te import TaskExecutor, executor
from tests.support.worker_client import WorkerClient, generate_disaggregated, greedy

TOPOLOGIES = {"1C": ("colocated",), "2C": ("colocated", "colocated"), "1P1D": ("prefill", "decode")}
LOADS = (0.25, 0.45, 0.7)
PROMPT, OUTPUT, SPREAD = 96, 32, 0.4
RUN_SECONDS = 40.0
QUICK_SECONDS = 20.0
REVISION = "bench@1"
KV_BYTES = 256 << 20
VOCABULARY = (1000, 40_000)
MEAN_WITHIN, TAIL_WITHIN = 0.15, 0.25


@dataclass
class Seen:
    """One request on the real executors, in seconds from the run's start."""

    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0


def pin(pid: int, core: int) -> None:
    """Every thread of the process; those it makes later inherit."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), {core})


async def replay(clients: list[WorkerClient], split: bool, load: Workload, seed: int) -> list[Seen]:
    """Sends every request at its time; waits for all."""
    rng = random.Random(seed)
    seen = [Seen() for _ in range(len(load))]
    start = time.perf_counter()

    async def one(number: int) -> None:
        prompt = [rng.randrange(*VOCABULARY) for _ in range(int(load.prompt[number]))]
        await asyncio.sleep(max(0.0, float(load.arrival[number]) - (time.perf_counter() - start)))
        most = {
            "revision": REVISION,
            "max_tokens": int(load.output[number]),
            "sampling": greedy(ignore_eos=True),
        }
        seen[number].sent = time.perf_counter() - start
        if split:
            run = await generate_disaggregated(clients[0], clients[1], prompt, timeout=300, **most)
        else:
            run = await clients[number % len(clients)].generate(prompt, timeout=300, **most)
        assert len(run.tokens) == load.output[number], run.error
        seen[number].first = run.arrivals[0][0] - start
        seen[number].last = run.arrivals[-1][0] - start

    await asyncio.gather(*(one(number) for number in range(len(load))))
    return seen


def compare(
    report: common.Report, topology: str, share: float, load: Workload, seen: list[Seen], profile: CostProfile
) -> None:
    """The same requests in the twin, and a row with both."""
    sent = build(load.name, [s.sent for s in seen], load.prompt, load.output)
    # In turn, as the client did; a split has one executor a side, so any split policy is the same.
    policy = "static-split" if topology == "1P1D" else "round-robin"
    twin = simulate(sent, profile, policy, len(TOPOLOGIES[topology]), prefill_share=0.5)
    real_first = np.array([s.first - s.sent for s in seen])
    real_each = np.array([(s.last - s.first) for s in seen]) / np.maximum(load.output - 1, 1)
    order = np.argsort([s.sent for s in seen], kind="stable")
    real_first, real_each = real_first[order], real_each[order]
    twin_first, twin_each = ttft(twin), np.nan_to_num(tpot(twin))
    pairs = {
        "mean TTFT": (real_first.mean(), twin_first.mean(), MEAN_WITHIN),
        "mean TPOT": (real_each.mean(), twin_each.mean(), MEAN_WITHIN),
        "P90 TTFT": (np.percentile(real_first, 90), np.percentile(twin_first, 90), TAIL_WITHIN),
    }
    row: dict[str, object] = {"topology": topology, "load": share, "requests": len(load)}
    for name, (real, made, _) in pairs.items():
        row |= {f"{name} real ms": 1e3 * float(real), f"{name} twin ms": 1e3 * float(made)}
    report.add(**row)
    for name, (real, made, within) in pairs.items():
        off = float(made / real - 1)
        report.check(
            f"{topology} at {share}: twin's {name}",
            100 * off,
            "% off",
            f"within {within:.0%}",
            abs(off) <= within,
        )


async def measure(
    topology: str, report: common.Report, profile: CostProfile, seconds: float, quick: bool
) -> None:
    roles = TOPOLOGIES[topology]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < len(roles):
        raise SystemExit(f"{topology} needs {len(roles)} cores")
    path = fetch(DEFAULT_MODEL_URI).path
    base = poisson(PROMPT, OUTPUT, 1.0, 400, 0, spread=SPREAD)
    # Both sides of a split do half of the work at most: 1P1D is loaded as the pair it is.
    whole = capacity(base, profile, len(roles))
    if topology == "1P1D":
        whole = min(whole, 1.0 / profile.prefill_seconds(PROMPT))
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clients: list[WorkerClient] = []
        for number, role in enumerate(roles):
            te: TaskExecutor = await stack.enter_async_context(
                executor(f"te-{number}", folder, role=role, shm_dir=folder)
            )
            pin(te.pid, cores[number])
            await te.load(path, REVISION, dtype="bfloat16", kv_cache_bytes=KV_BYTES)
            pin(te.pid, cores[number])
            clients.append(await stack.enter_async_context(te.connect()))
        await replay(clients, topology == "1P1D", poisson(PROMPT, OUTPUT, 2.0, 6, 1), 0)  # warms up
        for share in LOADS[1:2] if quick else LOADS:
            count = max(10, int(seconds * share * whole))
            load = poisson(PROMPT, OUTPUT, share * whole, count, seed=int(100 * share), spread=SPREAD)
            compare(
                report, topology, share, load, await replay(clients, topology == "1P1D", load, 2), profile
            )


async def main() -> int:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--profile", type=Path, required=True, help="of `deepflow calibrate`, on this machine"
    )
    parser.add_argument("--topology", choices=TOPOLOGIES, action="append")
    parser.add_argument("--seconds", type=float, default=RUN_SECONDS, help="of each load")
    args = parser.parse_args()
    report = common.Report("twin against real executors")
    for topology in args.topology or (["1C"] if args.quick else list(TOPOLOGIES)):
        seconds = QUICK_SECONDS if args.quick else args.seconds
        await measure(topology, report, load_profile(args.profile), seconds, args.quick)
    return report.finish(args.json)


if __name__ == "__main__":
    common.run(main())
