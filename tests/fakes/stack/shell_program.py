"""A stand-in for the TE-shell: the TaskExecutor service with a model and a role, and no engine.

`FAKE_SHELL=crash` ends it at once, `unsupported` refuses every model. Tasks in the file of $FAKE_SHELL_TASKS
are what each executor says that it has waiting, with long prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import grpc
from deepflow.v1 import common_pb2, worker_pb2, worker_pb2_grpc


class Shell(worker_pb2_grpc.TaskExecutorServicer):
    def __init__(self, te_id: str) -> None:
        self.te_id, self.revision = te_id, ""
        self.role, self.epoch, self.draining = common_pb2.ROLE_COLOCATED, 0, False

    async def GetStatus(self, request, context):
        state = worker_pb2.EXECUTOR_STATE_READY if self.revision else worker_pb2.EXECUTOR_STATE_WARM
        if self.draining:
            state = worker_pb2.EXECUTOR_STATE_DRAINING
        path = os.environ.get("FAKE_SHELL_TASKS", "")
        said = Path(path).read_text() if path and os.path.exists(path) and not self.draining else ""
        tasks = int(said or 0)
        record = worker_pb2.ExecutorRecord(
            te_id=self.te_id, state=state, model_revision=self.revision, pid=os.getpid()
        )
        load = common_pb2.LoadReport(
            role=self.role, role_epoch=self.epoch, kv_blocks_total=10, kv_blocks_free=10, waiting=tasks,
            queued_prefill_tokens=3000 * tasks, prefill_tokens_per_second=1000.0,
        )  # fmt: skip
        return worker_pb2.ExecutorStatus(record=record, load=load, tasks=tasks)

    async def Drain(self, request, context):
        self.draining = True
        return worker_pb2.DrainResponse(drained=True)

    async def LoadModel(self, request, context):
        metadata = dict(context.invocation_metadata())
        if metadata["authorization"] != f"Bearer {os.environ['DEEPFLOW_CLUSTER_TOKEN']}":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")
        if os.environ.get("FAKE_SHELL") == "unsupported":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "architecture 'x' is not supported")
        self.revision = request.model_revision
        return worker_pb2.LoadModelResponse(model_revision=self.revision, kv_blocks=10, block_tokens=16)

    async def SetRole(self, request, context):
        if request.epoch <= self.epoch and (request.role, request.epoch) != (self.role, self.epoch):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "stale epoch")
        self.role, self.epoch = request.role, request.epoch
        return worker_pb2.SetRoleResponse(role=self.role, epoch=self.epoch)


async def main() -> None:
    parser = argparse.ArgumentParser()
    for name in (
        "te-id",
        "listen",
        "endpoint-file",
        "role",
        "device",
        "tensor-parallel",
        "threads",
        "shm-dir",
        "weights-dir",
        "weights-bytes",
    ):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    _ = os.environ["REDIS_URL"]  # as the real one: it may hold a password, so it is on no command line
    if os.environ.get("FAKE_SHELL") == "crash":
        sys.exit("no such device")
    server = grpc.aio.server()
    worker_pb2_grpc.add_TaskExecutorServicer_to_server(Shell(arguments.te_id), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    endpoint = {"address": f"127.0.0.1:{port}", "metrics_url": "", "pid": os.getpid(), "incarnation": "1"}
    with open(arguments.endpoint_file + ".new", "w") as file:
        json.dump(endpoint, file)
    os.replace(arguments.endpoint_file + ".new", arguments.endpoint_file)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
