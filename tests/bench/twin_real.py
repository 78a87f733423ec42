"""How far the twin can be trusted: the same requests on real executors and on simulated ones.

    python -m tests.bench.twin_real --profile PATH [--topology 1C|2C|1P1D] [--paced 8C|2P2D] [--json PATH]

Executors are processes as the supervisor starts them, one thread each, each pinned to a core of its own,
running the default model; the client speaks the worker protocol and gives the requests to them in turn. The
twin gets the moments at which they were really sent, and the profile that `deepflow calibrate` measured on
this machine. Loads are shares of the capacity the twin tells for the topology; all of a run's requests
count. `others` is the share of all cores that went to processes that are no part of the run.

`--paced`: more executors than there are cores, each a real one but for its model, whose steps take the
profile's time (`tests/fakes/paced_executor.py`), under the real control plane: registry, streams, job
executor, placement policy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from controlplane.jobs.runtime import RuntimeSettings, ServingRuntime
from controlplane.jobs.serving import Sampling, ServingRequest
from controlplane.local.valkey import ValkeyServer
from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from controlplane.scheduling.types import Role
from controlplane.twin.cluster import Cluster
from controlplane.twin.costs import CostProfile, load_profile
from controlplane.twin.ours import Ours
from controlplane.twin.results import tpot, ttft
from controlplane.twin.scenario import capacity, simulate
from controlplane.twin.workload import Workload, build, poisson
from tests.bench import common
from tests.fakes.paced_executor import PROFILE_ENV
from tests.support.te import TOKEN, TaskExecutor, executor
from tests.support.worker_client import WorkerClient, generate_disaggregated, greedy

TOPOLOGIES = {"1C": ("colocated",), "2C": ("colocated", "colocated"), "1P1D": ("prefill", "decode")}
LOADS = (0.25, 0.45, 0.7)
PROMPT, OUTPUT, SPREAD = 96, 32, 0.4
RUN_SECONDS = 40.0
QUICK_SECONDS = 20.0
REVISION = "bench@1"
KV_BYTES = 256 << 20
PACED_KV_BYTES = 64 << 20
VOCABULARY = (1000, 40_000)
MEAN_WITHIN, TAIL_WITHIN = 0.15, 0.25


@dataclass
class Seen:
    """One request on the real executors, in seconds from the run's start."""

    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0


class Bystanders:
    """CPU time that others took on this machine meanwhile: what no twin can know of."""

    def __init__(self) -> None:
        self._busy, self._own, self._at = self._read()

    def share(self) -> float:
        """Of all cores, since it was made."""
        busy, own, at = self._read()
        cores = psutil.cpu_count() or 1
        return max(0.0, (busy - self._busy) - (own - self._own)) / ((at - self._at) * cores)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        me = psutil.Process()
        own = sum(sum(p.cpu_times()[:2]) for p in (me, *me.children(recursive=True)))
        return sum(times) - times.idle - times.iowait, own, time.perf_counter()


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


def sent_load(load: Workload, seen: list[Seen]) -> Workload:
    """The requests at the moments they were really sent."""
    return build(load.name, [s.sent for s in seen], load.prompt, load.output)


def in_turn(topology: str, sent: Workload, profile: CostProfile) -> Cluster:
    """As the client gives them out; a split has one executor a side, so any split policy is the same."""
    policy = "static-split" if topology == "1P1D" else "round-robin"
    return simulate(sent, profile, policy, len(TOPOLOGIES[topology]), prefill_share=0.5)


def compare(
    report: common.Report,
    topology: str,
    share: float,
    load: Workload,
    seen: list[Seen],
    twin: Cluster,
    others: float,
) -> None:
    """A row with both, and the twin's errors."""
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
    row: dict[str, object] = {
        "topology": topology,
        "load": share,
        "requests": len(load),
        "others": f"{others:.0%}",
    }
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
            bystanders = Bystanders()
            seen = await replay(clients, topology == "1P1D", load, 2)
            others = bystanders.share()
            twin = in_turn(topology, sent_load(load, seen), profile)
            compare(report, topology, share, load, seen, twin, others)


def parse_roles(topology: str) -> list[Role]:
    """`8C`, `2P2D`, `1P2D4C`."""
    letters = {"C": Role.COLOCATED, "P": Role.PREFILL, "D": Role.DECODE}
    parts = re.findall(r"(\d+)([CPD])", topology)
    if "".join(count + letter for count, letter in parts) != topology or not parts:
        raise SystemExit(f"--paced {topology}: write 8C or 2P2D")
    return [letters[letter] for count, letter in parts for _ in range(int(count))]


async def through_jobs(runtime: ServingRuntime, load: Workload, seed: int) -> list[Seen]:
    """Sends every request to the job executor at its time; waits for all."""
    rng = random.Random(seed)
    seen = [Seen() for _ in range(len(load))]
    start = time.perf_counter()

    async def one(number: int) -> None:
        prompt = tuple(rng.randrange(*VOCABULARY) for _ in range(int(load.prompt[number])))
        await asyncio.sleep(max(0.0, float(load.arrival[number]) - (time.perf_counter() - start)))
        request = ServingRequest(
            f"r{seed}-{number}", "bench", "bench", REVISION, "chat", prompt,
            Sampling(seed=1, ignore_eos=True), int(load.output[number]), timeout_seconds=300.0,
        )  # fmt: skip
        mine = seen[number]
        mine.sent = time.perf_counter() - start
        tokens = 0
        async for delta in runtime.executor.submit(request).deltas():
            assert delta.error is None, delta.error
            if delta.tokens:
                mine.last = time.perf_counter() - start
                mine.first = mine.first or mine.last
                tokens += len(delta.tokens)
        assert tokens == load.output[number]

    await asyncio.gather(*(one(number) for number in range(len(load))))
    return seen


async def paced(topology: str, report: common.Report, args: argparse.Namespace, seconds: float) -> None:
    profile = load_profile(args.profile)
    roles = parse_roles(topology)
    path = fetch(DEFAULT_MODEL_URI).path
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        valkey = ValkeyServer(folder)
        valkey.start()
        stack.callback(valkey.stop)
        settings = RuntimeSettings(redis_url=valkey.url, cluster_token=TOKEN)
        tes = [
            await stack.enter_async_context(
                executor(
                    f"te-{number}", folder, role=str(role), shm_dir=folder, redis_url=valkey.url,
                    program=("-m", "tests.fakes.paced_executor"), env={PROFILE_ENV: str(args.profile)},
                )
            )
            for number, role in enumerate(roles)
        ]  # fmt: skip
        for te in tes:
            await te.load(path, REVISION, dtype="bfloat16", kv_cache_bytes=PACED_KV_BYTES)
        runtime = await stack.enter_async_context(ServingRuntime(settings))
        async with asyncio.timeout(60):
            while sum(item["link"] == "up" for item in runtime.fleet.executors()) < len(tes):
                await asyncio.sleep(0.05)
        await through_jobs(runtime, poisson(PROMPT, OUTPUT, 4.0, 2 * len(tes), 1), 0)  # warms up
        whole = capacity(
            poisson(PROMPT, OUTPUT, 1.0, 100 * len(roles), 0, spread=SPREAD), profile, len(roles)
        )
        prefills = roles.count(Role.PREFILL)
        if prefills:
            whole = min(whole, prefills / profile.prefill_seconds(PROMPT))
        pool = replace(profile, kv_tokens=PACED_KV_BYTES // profile.kv_bytes_per_token)
        for share in LOADS[1:2] if args.quick else LOADS:
            count = max(20, int(seconds * share * whole))
            load = poisson(PROMPT, OUTPUT, share * whole, count, seed=int(100 * share), spread=SPREAD)
            bystanders = Bystanders()
            seen = await through_jobs(runtime, load, 2 + int(100 * share))
            others = bystanders.share()
            twin = Cluster(sent_load(load, seen), roles, pool, Ours())
            twin.run()
            compare(report, f"{topology} paced", share, load, seen, twin, others)


async def main() -> int:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--profile", type=Path, required=True, help="of `deepflow calibrate`, on this machine"
    )
    parser.add_argument("--topology", choices=TOPOLOGIES, action="append")
    parser.add_argument("--paced", action="append", default=[], help="a topology over the real control plane")
    parser.add_argument("--seconds", type=float, default=RUN_SECONDS, help="of each load")
    args = parser.parse_args()
    report = common.Report("twin against real executors")
    seconds = QUICK_SECONDS if args.quick else args.seconds
    for topology in args.paced:
        await paced(topology, report, args, seconds)
    for topology in args.topology or ([] if args.paced else ["1C"] if args.quick else list(TOPOLOGIES)):
        await measure(topology, report, load_profile(args.profile), seconds, args.quick)
    return report.finish(args.json)


if __name__ == "__main__":
    common.run(main())
