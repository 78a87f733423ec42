"""From a decision to the first token of a real request: one executor by each path, and many from zero.

    python -m tests.bench.scale [--quick] [--json PATH] [--part single|forks|live|many|held|twin|peer]
                                [--many N] [--model PATH]

Executors are started, given their model and watched by the supervisor's own parts (`controlplane.local`), on
the small model in bfloat16. A start ends when a request of 32 prompt tokens has had its first token; the
steps of it are the executor's own (flowserve.shell.start), `rest` lies between: polls, calls, request.
Paths of one executor, interleaved:

    cold, evicted   a program, after the system's page cache was dropped (where that is allowed)
    cold            a program; libraries and model in the page cache, no weights in the node's memory
    warm            a forked process waits; weights are converted from the file
    hot             a forked process waits; weights lie in the node's memory
    fork and hot    only the template waits; weights lie in the node's memory

    fork            a warm process whose memory for weights is set aside is fed by a running executor: over
                    shared memory, over TCP; `not set aside` takes the memory as it goes

Feeding: what a fork, at the pace that sources keep while they serve, costs a stream of the source.
Live: half of the executors serve a load of at most half of the machine while as many again start, one after
the other. Many: the template runs, no executor does. Memory is the Pss of all of them, less their KV pools
and what the template took before; weights, libraries and what else they share count once.
Held: what being held adds to a request's first token, for a model at zero, through gateway and operator, by
what there is to start from: `wake` an executor that sleeps; a warm pod, whose node's memory holds the weights
(`hot`), which was given them because they are likely next (`ahead`), or not (`warm`); nothing (`cold`).
Needs the small model and Linux.

Peer: from the command to the first token over HTTP, `deepflow up` and `vllm serve` in turn (installed by
tests.bench.peers.install).
Twin: not measured but computed from stated bandwidths (controlplane.twin.starts): a 70B model on eight
devices of each of 64 nodes, beside the table of DeepServe for one; forks of 1 to 64 nodes by layout.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # else it tells of every program that is started
from controlplane.local.starts import PHASES, Node, node, steps
from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from controlplane.twin import starts
from tests.bench import common, scale_held, scale_peers
from tests.bench.scale_forks import feeding, forks
from tests.bench.scale_live import live

ROUNDS, QUICK_ROUNDS = 5, 2
HELD_ROUNDS = 15
MANY, QUICK_MANY = 64, 8
PROGRAMS = 8  # started as programs, as the baseline of many: more would only wait for each other
KV_BYTES = 256 << 20
MANY_KV_BYTES = 16 << 20
LIVE_SECONDS = 30.0  # before the starts, and at least while they go on
PARTS = ("single", "forks", "live", "many", "held", "twin", "peer")
TWIN_BYTES, TWIN_NODES = 141.2e9, 64  # Llama-3-70B in bfloat16
TWIN_CHUNK = 64e6  # of a rank's part, fed on when it has arrived: kvtransfer.images.WINDOW_BLOCKS
PAPER = {"cold": "", "warm": "24", "hot": "3.2", "fork": "0.91"}
"""TE-Load of DeepServe's Qwen-72B TP8 (a little larger): SSD, memory, fork over RoCE."""
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def drop_page_cache() -> bool:
    """False where this user may not."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n")
    except OSError:
        return False
    return True


async def one(made: Node, path: str) -> tuple[float, dict[str, float]]:
    """Seconds until the first token, and of the steps on the way."""
    if not path.endswith("hot"):
        made.forget_weights()
    if path in ("warm", "hot"):
        executor = made.add(forked=True)
        await made.waits(executor)
        started = time.perf_counter()
    else:
        started = time.perf_counter()
        executor = made.add(forked=path == "fork and hot")
    seconds = await made.first_token(executor, KV_BYTES) - started
    found = steps(executor)
    await made.remove(executor)
    return seconds, found


async def single(made: Node, report: common.Report, rounds: int) -> dict[str, float]:
    """Medians of each path."""
    paths = ["cold", "warm", "hot", "fork and hot"]
    if drop_page_cache():
        paths.insert(0, "cold, evicted")
    else:
        print("cold, evicted: not measured, the page cache can be dropped by root only")
    taken: dict[str, list[tuple[float, dict[str, float]]]] = {path: [] for path in paths}
    for _ in range(rounds):
        for path in paths:
            if path == "cold, evicted":
                drop_page_cache()
            taken[path].append(await one(made, path))
            print(".", end="", flush=True)
    print()
    medians = {}
    for path, runs in taken.items():
        medians[path] = common.median([seconds for seconds, _ in runs])
        row = {name: common.median([found.get(name, 0.0) for _, found in runs]) for name in PHASES}
        if path in ("warm", "hot"):  # the process waited: what lies before the load is no part of it
            row["te_pre_load"] = 0.0
        rest = medians[path] - sum(row.values())
        report.add(path=path, first_token_s=medians[path], **row, rest=rest, rounds=rounds)
    return medians


async def many(made: Node, count: int, *, forked: bool, weights: str) -> dict[str, object]:
    """All at once from zero; how long until each has answered, and the memory they take."""
    before = pss(made.template.pid or 0)
    started = time.perf_counter()
    executors = [made.add(forked=forked) for _ in range(count)]
    times = await asyncio.gather(*(made.first_token(executor, MANY_KV_BYTES) for executor in executors))
    pids = [executor.child.pid or 0 for executor in executors]
    memory = sum(map(pss, [*pids, made.template.pid or 0])) - before - count * MANY_KV_BYTES
    done = sorted(at - started for at in times)
    row: dict[str, object] = {
        "started": "forked" if forked else "as programs",
        "executors": count,
        "weights": weights,
        "first_s": done[0],
        "half_s": done[len(done) // 2],
        "all_s": done[-1],
        "per_second": count / done[-1],
        "memory_mib": memory / 2**20,
        "private_mib": common.median([private(pid) / 2**20 for pid in pids]),
    }
    await asyncio.gather(*(made.remove(executor) for executor in executors))
    return row


def _rollup(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(value.split()[0]) * 1024 for name, value in (line.split(":", 1) for line in lines)}


def pss(pid: int) -> int:
    """Bytes of memory, shared pages by the part that is this process's."""
    return _rollup(pid)["Pss"]


def private(pid: int) -> int:
    """Bytes of memory that no other process maps (a KV pool is mapped by nobody else here), less the pool."""
    found = _rollup(pid)
    return found["Private_Clean"] + found["Private_Dirty"] - MANY_KV_BYTES


async def main(quick: bool, json_path: str | None, model: Path, count: int, parts: list[str]) -> int:
    report = common.Report("scale")
    rounds = QUICK_ROUNDS if quick else ROUNDS
    if "twin" in parts:
        twin(report)
    if "peer" in parts:
        scale_peers.starts(report, rounds, compiled=not quick)
    if not set(parts) - {"twin", "peer"}:
        return report.finish(json_path)
    async with node(model, "bfloat16") as made:
        if "single" in parts:
            check_single(report, await single(made, report, rounds))
        if "forks" in parts:
            made.forget_weights()
            medians, source = await forks(made, report, rounds)
            fork = medians["fork, shm"]
            report.check("fork, memory set aside", fork * 1e3, "ms", "<= 250", fork <= 0.25)
            slower = await feeding(made, report, source, rounds)
            report.check("a stream while its executor feeds", slower, "x", "<= 1.05", slower <= 1.05)
            await made.remove(source)
        if "live" in parts:
            ratio, failed = await live(made, report, count // 2, LIVE_SECONDS / (4 if quick else 1))
            whole = count >= MANY
            report.check(
                "P99 TPOT while as many start", ratio, "x", "<= 1.5", ratio <= 1.5 if whole else None
            )
            report.check("requests failed meanwhile", failed, "requests", "0", failed == 0)
        if "many" in parts:
            made.forget_weights()
            programs = await many(made, PROGRAMS, forked=False, weights="in storage")
            made.forget_weights()
            stored = await many(made, count, forked=True, weights="in storage")
            held = await many(made, count, forked=True, weights="in node memory")
            for row in (programs, stored, held):
                report.add(**row)
            check_many(report, count, float(str(held["all_s"])), float(str(held["memory_mib"])))
        if "held" in parts:
            added = await scale_held.held(made, report, 3 if quick else HELD_ROUNDS, model)
            for path, seconds in added.items():
                report.check(f"added to a held request, {path}", seconds, "s", "stated", None)
    return report.finish(json_path)


def twin(report: common.Report) -> None:
    """Simulated."""
    hardware = starts.Hardware()
    for path in ("cold", "warm", "hot", "fork"):
        for nodes in (1, TWIN_NODES):
            found = starts.waterfall(path, TWIN_BYTES, hardware, nodes)
            load = found.te_load
            if path == "fork" and nodes > 1:
                layout = next(layout for layout in starts.LAYOUTS if layout.name.endswith("(ours)"))
                load = max(starts.fork_seconds(layout, nodes, TWIN_BYTES, hardware, TWIN_CHUNK))
            report.add(
                simulated="70B TP8", path=path, nodes=nodes, scaler_pre=found.scaler_pre,
                te_pre_load=found.te_pre_load, te_load=load, te_post_load=found.te_post_load,
                scaler_post=found.scaler_post, total_s=found.total - found.te_load + load,
                paper_te_load_s=PAPER[path] if nodes == 1 else "",
            )  # fmt: skip
    last = {}
    for layout in starts.LAYOUTS:
        loads = {
            count: max(starts.fork_seconds(layout, count, TWIN_BYTES, hardware, TWIN_CHUNK))
            for count in (1, 2, 4, 8, 16, 32, 64)
        }
        report.add(forks=layout.name, **{f"nodes_{count}_s": value for count, value in loads.items()})
        last[layout.name] = loads[TWIN_NODES]
    star, ours = last["one to one, all from the source"], last["tree of 2 (ours)"]
    report.check("simulated: one to one over our tree, 64 nodes", star / ours, "x", "stated", None)


def check_single(report: common.Report, medians: dict[str, float]) -> None:
    hot, cold = medians["hot"], medians["cold"]
    report.check("hot", hot * 1e3, "ms", "<= 250", hot <= 0.25)
    report.check("hot, faster than cold", cold / hot, "x", ">= 8", cold / hot >= 8)
    if (evicted := medians.get("cold, evicted")) is not None:
        report.check("hot, faster than evicted", evicted / hot, "x", ">= 20", evicted / hot >= 20)


def check_many(report: common.Report, count: int, seconds: float, memory: float) -> None:
    whole = count >= MANY
    report.check(f"{count} from zero", seconds, "s", "<= 8", seconds <= 8 if whole else None)
    report.check("memory beside KV pools", memory, "MiB", "<= 1536", memory <= 1536 if whole else None)


if __name__ == "__main__":
    arguments = common.parser(__doc__ or "")
    arguments.add_argument("--model", type=Path, help="GGUF file or folder (default: the small model)")
    arguments.add_argument("--many", type=int, default=0, help=f"executors from zero (default: {MANY})")
    arguments.add_argument("--part", action="append", choices=PARTS, help="only this (default: all)")
    options = arguments.parse_args()
    wanted = options.many or (QUICK_MANY if options.quick else MANY)
    common.run(
        main(
            options.quick,
            options.json,
            options.model or fetch(DEFAULT_MODEL_URI).path,
            wanted,
            options.part or list(PARTS),
        )
    )
