"""What a message of the Tasks stream costs over gRPC and over the plain connection, with nothing around it.

    python -m tests.bench.tasks_stream [--quick] [--json PATH]

Two processes, one stream. "there and back": a submit of 200 prompt tokens is answered by one step event, one
after the other. "pushed": the server sends step events as fast as they are taken. Processor time is each
side's own; the two carriers take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import orjson
import uvloop
from deepflow.v1 import worker_pb2 as pb
from deepflow.v1 import worker_pb2_grpc

from kvtransfer.auth import call_metadata
from kvtransfer.channel import CHANNEL_OPTIONS, SERVER_OPTIONS
from kvtransfer.framed import StreamServer, open_stream
from tests.bench import common
from tests.bench.gateway_rig import Process, wait_for

TOKEN = "secret"
PROMPT = bytes(800)  # 200 tokens
EVENT = pb.TasksResponse(
    step=pb.StepEvent(deltas=[pb.TaskDelta(task_id="job_" + "0" * 27, attempt=1, tokens=[5])])
)


class Service(worker_pb2_grpc.TaskExecutorServicer):
    """A submit is answered by one event; an abort by as many as its attempt says, and what they cost."""

    async def Tasks(self, requests: AsyncIterator[pb.TasksRequest], context: Any) -> None:  # type: ignore[override]  # the read/write API of grpc.aio, which its stubs do not know
        async for request in requests:
            if request.WhichOneof("message") == "submit":
                await context.write(EVENT)
                continue
            started = time.process_time()
            for _ in range(request.abort.attempt):
                await context.write(EVENT)
            spent = (time.process_time() - started) / request.abort.attempt
            await context.write(pb.TasksResponse(welcome=pb.Welcome(te_id=str(spent))))


async def serve(endpoint: Path) -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    worker_pb2_grpc.add_TaskExecutorServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    plain = StreamServer(Service().Tasks, pb.TasksRequest.FromString, token=TOKEN)
    said = {"grpc": f"127.0.0.1:{port}", "plain": f"127.0.0.1:{await plain.start('127.0.0.1')}"}
    endpoint.with_suffix(".new").write_bytes(orjson.dumps(said))
    endpoint.with_suffix(".new").replace(endpoint)
    await asyncio.Event().wait()


async def measure(call: Any, messages: int) -> tuple[float, float, float, float]:
    """Microseconds a message: there and back (time, own processor time), pushed (own, the server's)."""
    submit = pb.TasksRequest(submit=pb.SubmitTask(task_id="t", attempt=1, prompt_tokens=PROMPT))
    answers = aiter(call)
    await call.write(submit)
    await anext(answers)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(messages):
        await call.write(submit)
        await anext(answers)
    turn, turn_cpu = time.perf_counter() - wall, time.process_time() - cpu
    cpu = time.process_time()
    await call.write(pb.TasksRequest(abort=pb.AbortTask(attempt=messages)))
    for _ in range(messages):
        await anext(answers)
    pushed = time.process_time() - cpu
    theirs = float((await anext(answers)).welcome.te_id)
    return 1e6 * turn / messages, 1e6 * turn_cpu / messages, 1e6 * pushed / messages, 1e6 * theirs


async def main() -> int:
    args = common.parser(__doc__.splitlines()[0]).parse_args()
    report = common.Report("tasks_stream")
    messages, rounds = (1000, 3) if args.quick else (4000, 7)
    found: dict[str, list[tuple[float, ...]]] = {"grpc": [], "plain": []}
    with tempfile.TemporaryDirectory(prefix="dfb-") as folder:
        endpoint = Path(folder) / "endpoint"
        command = [sys.executable, "-m", "tests.bench.tasks_stream", "--serve", str(endpoint)]
        server = Process("server", command, Path(folder))
        try:
            wait_for(endpoint.exists, server, "no server")
            said = orjson.loads(endpoint.read_bytes())
            for turn in range(rounds):
                for way in ("grpc", "plain") if turn % 2 else ("plain", "grpc"):
                    async with contextlib.AsyncExitStack() as stack:
                        if way == "grpc":
                            channel = grpc.aio.insecure_channel(said["grpc"], options=CHANNEL_OPTIONS)
                            await stack.enter_async_context(channel)
                            call: Any = worker_pb2_grpc.TaskExecutorStub(channel).Tasks(
                                metadata=call_metadata(TOKEN)
                            )
                        else:
                            call = await open_stream(
                                said["plain"], call_metadata(TOKEN), pb.TasksResponse.FromString, seconds=5
                            )
                        found[way].append(await measure(call, messages))
                        call.cancel()
        finally:
            server.stop()
    middle = {way: [common.median([run[i] for run in runs]) for i in range(4)] for way, runs in found.items()}
    for way, (turn_us, turn_cpu, pushed, theirs) in middle.items():
        report.add(way=way, there_and_back_us=turn_us, client_cpu_us=turn_cpu, pushed_client_cpu_us=pushed,
                   pushed_server_cpu_us=theirs)  # fmt: skip
    for index, name in ((0, "there and back"), (2, "processor time of a message taken"), (3, "of one sent")):
        ratio = middle["plain"][index] / middle["grpc"][index]
        report.check(f"plain / gRPC, {name}", ratio, "x", "<= 0.5", ratio <= 0.5)
    return report.finish(args.json)


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if sys.argv[1:2] == ["--serve"]:
        uvloop.run(serve(Path(sys.argv[2])))
    else:
        common.run(main())
