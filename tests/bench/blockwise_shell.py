"""An executor that pulls as a block table without runs does: one gRPC call for each block.

The baseline of tests/bench/pipelining.py, which starts it in place of `flowserve.shell`.
"""

from __future__ import annotations

from dataclasses import replace

from flowserve.shell.__main__ import main
from kvtransfer.runs import Move
from kvtransfer.transports.base import Job
from kvtransfer.transports.grpc_read import GrpcTransport

_whole = GrpcTransport.copy


async def _copy(self: GrpcTransport, job: Job) -> None:
    for move in job.moves:
        for index in range(move.count):
            await _whole(self, replace(job, moves=[Move(move.src + index, move.dst + index, 1)]))


if __name__ == "__main__":
    GrpcTransport.copy = _copy  # type: ignore[method-assign]  # what this program is for
    main()
