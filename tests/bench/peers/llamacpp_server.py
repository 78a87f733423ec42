"""llama.cpp's own HTTP server, started by the Python binding of its environment. Run by `servers.py` only.

    llamacpp/bin/python llamacpp_server.py MODEL.gguf PORT THREADS SLOTS CONTEXT

It imports nothing of this project: it runs in the peer's environment.
"""

import signal
import sys

import xllamacpp

ENDS = {signal.SIGTERM, signal.SIGINT}


def main() -> None:
    model, port, threads, slots, context = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = ["m"]
    params.hostnames = ["127.0.0.1"]
    params.port = int(port)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.n_parallel = int(slots)
    params.n_ctx = int(context)  # tokens of all slots together
    params.kv_unified = False  # prompts share no prefix: a slot attends to its own cells alone
    params.cont_batching = True
    params.n_gpu_layers = 0
    params.cache_ram_mib = 0  # prompts are never the same twice
    params.ui = False
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # for the server's threads too: the wait below gets them
    server = xllamacpp.Server(params)
    print("listening on", server.listening_address, flush=True)
    signal.sigwait(ENDS)


if __name__ == "__main__":
    main()
