"""One rank beyond the first of a tensor-parallel executor, a process of its own.

Started and driven by `flowserve.executor.ranks`, over two socket pairs that only the two processes hold:
on one the steps, in the order in which the first rank takes them, on the other, served by a thread,
reads and writes of this rank's KV pages for transfers. When the driver's end closes, however it ended,
this process ends at once, also out of a collective that nobody else will enter.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import flowserve.devices.collective  # noqa: F401  with torch.distributed: before there is a model
from flowserve.devices import open_device
from flowserve.executor.batch import Ints, RaggedBatch
from flowserve.models.loader import DTYPES, open_model
from kvtransfer.layout import KVLayout
from kvtransfer.pool import BlockStore

log = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED = 0, 1


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What a rank is to be. Only built by the driver, only read by its ranks."""

    rank: int
    size: int
    meeting_file: Path
    path: Path
    device: str
    layout: KVLayout  # of this rank's pool: its share of the KV heads
    num_blocks: int
    max_len: int  # tokens
    threads: int


@dataclass(frozen=True, slots=True)
class Prepare:
    """All have loaded: steps may be recorded, which takes all of them."""


@dataclass(frozen=True, slots=True)
class Forward:
    batch: RaggedBatch


@dataclass(frozen=True, slots=True)
class Logits:
    rows: Ints


@dataclass(frozen=True, slots=True)
class Sleep:
    """The pool is given back, weights go to host memory. Answered with None."""


@dataclass(frozen=True, slots=True)
class Wake:
    """Undoes Sleep, with an empty pool. Answered with None, or what went wrong."""


@dataclass(frozen=True, slots=True)
class LoadBlocks:
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class StoreBlocks:
    """Followed by the blocks' bytes."""

    start: int


def serve_pages(pages: Connection, store_now: Callable[[], BlockStore]) -> None:
    """Answers reads with bytes and writes with None until the driver is gone, then ends the process."""
    try:
        while True:
            request = pages.recv()
            store = store_now()
            if isinstance(request, LoadBlocks):
                pages.send_bytes(store.load(request.start, request.count))
            else:
                store.store(request.start, pages.recv_bytes())
                pages.send(None)
    except (EOFError, OSError):
        os._exit(EXIT_OK)  # the driver is gone
    except Exception:  # a task boundary: the driver sees the end of this process
        log.exception("blocks could not be read or written")
        os._exit(EXIT_FAILED)


def run(steps: Connection, pages: Connection) -> None:
    """Loads this rank's part, meets the others, then takes steps until the driver says or is gone.

    What cannot be loaded is sent to the driver, which raises it; a step that raises ends the process.
    """
    spec: RankSpec = steps.recv()
    try:
        device = open_device(spec.device)
        device.set_threads(spec.threads)
        source = open_model(spec.path)
        pool = device.make_pool(spec.layout, spec.num_blocks)
    except Exception as error:  # noqa: BLE001  a task boundary: told to the driver
        steps.send(error)
        return
    threading.Thread(target=serve_pages, args=(pages, lambda: pool.store), name="pages", daemon=True).start()
    steps.send(None)
    group = device.join(spec.rank, spec.size, spec.meeting_file)
    try:
        model = device.make_model(
            source,
            dtype=DTYPES[spec.layout.dtype],
            max_len=spec.max_len,
            block_tokens=spec.layout.block_tokens,
            threads=spec.threads,
            group=group,
        )
    except Exception as error:  # noqa: BLE001  a task boundary: told to the driver
        steps.send(error)
        return
    steps.send(None)
    with torch.inference_mode():
        while (request := steps.recv()) is not None:
            if isinstance(request, Prepare):
                device.prepare(model, pool, spec.max_len)
            elif isinstance(request, Forward):
                model.forward(request.batch, pool.pages)
            elif isinstance(request, Sleep):
                pool.close()
                model.sleep()
                steps.send(None)
            elif isinstance(request, Wake):
                try:
                    pool = device.make_pool(spec.layout, spec.num_blocks)
                    model.wake()
                except Exception as error:  # noqa: BLE001  a task boundary: told to the driver
                    steps.send(error)
                    return
                steps.send(None)
            else:
                model.logits(request.rows)
    group.close()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a Ctrl-C reaches all: the driver ends its ranks in order
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    steps, pages = (Connection(int(fd)) for fd in sys.argv[1:3])
    code = EXIT_OK
    with contextlib.suppress(ValueError):  # told to the driver once there is a model
        open_device(sys.argv[3])
    try:
        run(steps, pages)
    except EOFError:
        log.info("the driver is gone")
    except Exception:  # a task boundary: the others must not wait for this rank
        log.exception("a rank failed")
        code = EXIT_FAILED
    os._exit(code)  # collectives' threads do not always end
