"""`python -m controlplane.gateway`: one gateway process.

    --host 127.0.0.1 --port 8000 | --fd N     listen, or serve an inherited listening socket
    --redis-url URL --gateway-id gw-0
    --catalogue FILE                          the models, as a supervisor writes them
    --kubernetes [--kube-namespace NAME]      the models, as ModelServings say
    --prometheus-dir DIR                      /metrics covers all processes that share DIR
    --require-key                             keys are needed on loopback too
    --endpoint-file FILE                      written when serving: {"address", "pid"}

Bounds and deadlines: `DEEPFLOW_GATEWAY_*`, see `settings.py`. SIGTERM and SIGINT drain; again: at once.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

GC_ALLOCATIONS = 2_000
"""Objects between two looks of the collector at the youngest ones (Python's 700 are two requests' worth; ten
thousand let what long streams leave behind grow by a quarter in two minutes of 1,000 of them)."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m controlplane.gateway", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--fd", type=int, help="an inherited listening TCP socket")
    parser.add_argument("--redis-url", default=os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"))
    parser.add_argument("--catalogue", default="", metavar="FILE")
    parser.add_argument("--kubernetes", action="store_true")
    parser.add_argument("--kube-namespace", default="", metavar="NAME")
    parser.add_argument("--gateway-id", default="gw-0")
    parser.add_argument("--prometheus-dir", metavar="DIR")
    parser.add_argument("--require-key", action="store_true")
    parser.add_argument("--endpoint-file", metavar="FILE")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    arguments = parser.parse_args()
    if not (arguments.catalogue or arguments.kubernetes):
        parser.error("give --catalogue FILE or --kubernetes")
    return arguments


def main() -> None:
    arguments = _arguments()
    logging.basicConfig(
        level=arguments.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    if arguments.prometheus_dir:
        # Before prometheus_client is imported anywhere: it chooses its storage on import.
        os.makedirs(arguments.prometheus_dir, exist_ok=True)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = arguments.prometheus_dir
    # One text at a time is encoded; the tokenizer's own thread pool would only take cores from executors.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(arguments))


async def _serve(arguments: argparse.Namespace) -> None:
    from controlplane.gateway.app import create_app
    from controlplane.gateway.server import GatewayServer, uvicorn_config
    from controlplane.gateway.settings import GatewaySettings
    from controlplane.jobs.tracing import Tracing, TracingError

    try:
        Tracing.from_env(os.environ, arguments.gateway_id)
    except TracingError as error:
        sys.exit(str(error))
    overrides: dict[str, object] = {
        "gateway_id": arguments.gateway_id,
        "redis_url": arguments.redis_url,
        "catalogue_path": arguments.catalogue,
        "kubernetes": arguments.kubernetes,
        "kube_namespace": arguments.kube_namespace,
    }
    if arguments.require_key:
        overrides["require_key"] = True
    settings = GatewaySettings.from_env(overrides=overrides)
    app = create_app(settings)

    def on_drain() -> None:
        gateway = getattr(app.state, "gateway", None)
        if gateway is not None:
            gateway.draining = True

    def on_started() -> None:
        _settle_memory()
        logging.getLogger("controlplane.gateway").info("serving on http://%s", address)
        if arguments.endpoint_file:
            _write_endpoint(Path(arguments.endpoint_file), address)

    listening = _listen(arguments)
    address = "{}:{}".format(*listening.getsockname()[:2])
    server = GatewayServer(uvicorn_config(app, settings), settings, on_drain=on_drain, on_started=on_started)
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, server.begin_drain)
    await server.serve(sockets=[listening])


def _settle_memory() -> None:
    """What the process holds by now (code, tables of a vocabulary) stays: the collector need not look through
    it again and again, which took tens of milliseconds a time. Requests leave few cycles behind."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS, 10, 10)


def _listen(arguments: argparse.Namespace) -> socket.socket:
    if arguments.fd is not None:
        inherited = socket.socket(fileno=arguments.fd)
        inherited.setblocking(False)
        return inherited
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((arguments.host, arguments.port))
    except OSError as error:
        sys.exit(f"cannot listen on {arguments.host}:{arguments.port}: {error.strerror}")
    listening.setblocking(False)
    return listening


def _write_endpoint(path: Path, address: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(f'{{"address": "{address}", "pid": {os.getpid()}}}\n')
    os.replace(file.name, path)


if __name__ == "__main__":
    main()
