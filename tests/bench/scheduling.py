"""How long placement takes: a decision at 100 and at 10,000 executors, a view update, memory of the index.

The decision is what the gateway does for each prompt: match 125 blocks (2,000 tokens) in the prompt index,
score every executor, pick. Half of the prompts have a beginning that many executors share, then their own.
The ceiling is one pass of numpy over the rows; the baseline is the same policy as a loop over the views.
Times are processor time of the thread, which waits of a shared machine do not count for; `wall` is beside.

    python -m tests.bench.scheduling [--quick] [--json PATH]
"""

from __future__ import annotations

import gc
import random
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
from deepflow.v1 import common_pb2, worker_pb2
from deepflow.v1.worker_pb2 import ExecutorRecord

from controlplane.fleet.channel import ExecutorChannel
from controlplane.fleet.member import Member
from controlplane.scheduling.columns import QUEUE, Columns, Slots
from controlplane.scheduling.decide import decide, dropped_for, queue_seconds
from controlplane.scheduling.lengths import BUCKET_TOKENS, Asked, LengthPredictor
from controlplane.scheduling.prefix import PrefixIndex
from controlplane.scheduling.types import Decision, Draw, ExecutorView, Policy, RequestView, Role
from controlplane.twin.workload import read_trace
from tests.bench.common import Report, median, parser, percentile

REVISION = "model@1"
TRACE = Path(__file__).parents[1] / "traces" / "azure_llm_conv_2023.csv.xz"
PROMPT_BLOCKS = 125  # 2,000 tokens
SHARED_BLOCKS = 25  # of a system prompt
POLICY = Policy()
ROUNDS = 5


class Case:
    """A fleet with its index, and prompts to place."""

    def __init__(self, executors: int, blocks: int, prompts: int, seed: int) -> None:
        rng = random.Random(seed)
        self.walls: list[float] = []
        slots = Slots()
        self.table = Columns(POLICY, slots)
        self.index = PrefixIndex(blocks, slots)
        roles = (Role.COLOCATED, Role.COLOCATED, Role.PREFILL, Role.DECODE)
        for number in range(executors):
            self.table.put(
                ExecutorView(
                    f"te-{number:05}", "i", roles[number % 4], REVISION,
                    tasks=rng.randrange(40), queued_tokens=rng.randrange(4000),
                    prefill_tokens_per_second=rng.uniform(1500, 2500),
                    decode_step_seconds=rng.uniform(0.02, 0.06),
                    kv_blocks_total=4096, kv_blocks_free=rng.randrange(500, 4096),
                )
            )  # fmt: skip
        shared = [rng.randbytes(16) for _ in range(SHARED_BLOCKS)]
        next_number = dict.fromkeys(range(executors), 1)
        self.prompts: list[list[bytes]] = []
        while len(self.index) < blocks:
            begin = shared if rng.random() < 0.5 else []
            prompt = begin + [rng.randbytes(16) for _ in range(PROMPT_BLOCKS - len(begin))]
            for holder in rng.sample(range(executors), 1 if rng.random() < 0.9 else 3):
                self.index.apply(f"te-{holder:05}", next_number[holder], prompt)
                next_number[holder] += len(prompt)
            if len(self.prompts) < prompts:
                self.prompts.append(prompt)
        self.prompts += [shared + [rng.randbytes(16) for _ in range(100)] for _ in range(prompts // 2)]

    def request(self, hashes: list[bytes]) -> RequestView:
        tokens = PROMPT_BLOCKS * 16
        return RequestView(
            REVISION,
            tokens,
            256,
            cached_tokens=self.index.match(hashes).tokens(16, tokens - 1),
            affinity=int.from_bytes(hashes[0][:8], "little"),
        )

    def times(self, place: Callable[[RequestView, Draw], object]) -> list[float]:
        """Microseconds of processor time; the wall's go into `walls`."""
        found = []
        for turn, hashes in enumerate(self.prompts):
            wall, started = time.perf_counter_ns(), time.thread_time_ns()
            place(self.request(hashes), Draw(turn, turn))
            found.append((time.thread_time_ns() - started) / 1e3)
            self.walls.append((time.perf_counter_ns() - wall) / 1e3)
        return found


def updates_of(case: Case) -> list[float]:
    """Microseconds from an executor's load report to its row: what the gateway does for each report."""
    members = []
    for view in case.table.views:
        record = ExecutorRecord(
            te_id=view.te_id, incarnation="i", model_revision=REVISION, role=common_pb2.ROLE_COLOCATED,
            state=worker_pb2.EXECUTOR_STATE_READY, kv_blocks=4096, max_tasks=256, block_tokens=16,
        )  # fmt: skip
        members.append(Member(record, cast(ExecutorChannel, SimpleNamespace(usable=True))))
    found = []
    for turn in range(5000):
        load = common_pb2.LoadReport(
            waiting=turn % 9, running=turn % 30, queued_prefill_tokens=turn, kv_blocks_total=4096,
            kv_blocks_free=turn % 4000, prefill_tokens_per_second=1900 + turn % 100, decode_step_seconds=0.03,
        )  # fmt: skip
        member = members[turn % len(members)]
        started = time.thread_time_ns()
        member.reported(load, turn)
        case.table.put(member.view(turn))
        found.append((time.thread_time_ns() - started) / 1e3)
    return found


def loop(table: Columns, request: RequestView) -> str:
    """The same estimate, one executor after the other."""
    best, chosen = float("inf"), ""
    for view in table.views:
        if dropped_for(view, request, POLICY) is None:
            uncached = request.tokens - request.cached_tokens.get(view.te_id, 0)
            cost = queue_seconds(view, POLICY) + uncached / view.prefill_tokens_per_second
            if cost < best:
                best, chosen = cost, view.te_id
    return chosen


def lengths(report: Report, count: int) -> None:
    """Predicted lengths of the answers of Azure's conversation trace, which tells no prompts."""
    trace = read_trace(TRACE)
    predictor = LengthPredictor()
    took: list[float] = []
    hits = covered = said = usual = 0
    seen: Counter[int] = Counter()
    for prompt, tokens in zip(trace.prompt[:count].tolist(), trace.output[:count].tolist(), strict=True):
        started = time.thread_time_ns()
        asked = Asked("azure", "chat", prompt, 8192)
        found = predictor.predict(asked)
        predictor.learn(asked, tokens, found)
        took.append((time.thread_time_ns() - started) / 1e3)
        bucket = tokens // BUCKET_TOKENS
        if found is not None:
            said += 1
            hits += found.close(tokens)
            covered += tokens <= found.tokens
            usual += seen.most_common(1)[0][0] == bucket
        seen[bucket] += 1
    report.add(executors="lengths", blocks=said, p50_us=percentile(took, 50), p99_us=percentile(took, 99))
    report.check("answers in the bucket called the likeliest", 100 * hits / said, "%", "stated", None)
    report.check("answers in the commonest bucket (baseline)", 100 * usual / said, "%", "stated", None)
    share = 100 * covered / said
    report.check("answers no longer than predicted", share, "%", "80 +- 5", abs(share - 80) <= 5)


def main() -> int:
    args = parser(__doc__ or "").parse_args()
    report = Report("scheduling")
    prompts = 300 if args.quick else 1000
    for executors, blocks in ((100, 100_000), (10_000, 200_000 if args.quick else 1_000_000)):
        gc.collect()
        case = Case(executors, blocks, prompts, seed=executors)

        def ours(request: RequestView, draw: Draw, case: Case = case) -> None:
            assert isinstance(decide(case.table, request, POLICY, draw), Decision)

        case.times(ours)  # warm
        rounds: list[list[float]] = []
        loops: list[float] = []
        for _ in range(ROUNDS):
            rounds.append(case.times(ours))
            for hashes in case.prompts[: 20 if executors > 1000 else 100]:
                started = time.thread_time_ns()
                loop(case.table, case.request(hashes))
                loops.append((time.thread_time_ns() - started) / 1e3)
        p50 = median([percentile(times, 50) for times in rounds])
        p99 = median([percentile(times, 99) for times in rounds])
        column = case.table.data[QUEUE, :executors]
        started = time.thread_time_ns()
        for _ in range(1000):
            np.argmin(column + column)
        ceiling = (time.thread_time_ns() - started) / 1e6
        report.add(
            executors=executors, blocks=len(case.index), p50_us=p50, p99_us=p99,
            wall_p50_us=percentile(case.walls, 50), wall_p99_us=percentile(case.walls, 99),
            loop_p50_us=median(loops), two_passes_us=ceiling,
        )  # fmt: skip
        aim = 100 if executors == 100 else 300
        report.check(f"decision p50 at {executors}", p50, "us", f"<= {aim}", p50 <= aim)
        if executors == 100:
            report.check("decision p99 at 100", p99, "us", "<= 500", p99 <= 500)
        updates = updates_of(case)
        p50 = percentile(updates, 50)
        report.check(f"view update p50 at {executors}", p50, "us", "<= 20", p50 <= 20)
        del case
    lengths(report, 3000 if args.quick else 19_000)
    gc.collect()
    tracemalloc.start()
    count = 100_000 if args.quick else 300_000
    index = PrefixIndex(count)
    rng = random.Random(1)
    for batch in range(count // 100):
        te = batch % 100
        index.apply(f"te-{te}", 1 + batch // 100 * 100, [rng.randbytes(16) for _ in range(100)])
    mib = tracemalloc.get_traced_memory()[0] / 2**20 * 1e6 / len(index)
    tracemalloc.stop()
    report.check("memory per million blocks", mib, "MiB", "stated", None)
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
