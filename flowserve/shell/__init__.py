"""The TE-shell: the process around one engine (`python -m flowserve.shell`).

It serves the worker protocol (protos/deepflow/v1/worker.proto) and the KV-transfer service on one
gRPC port, loads a model into a warm process, keeps the executor's record in the registry, carries
step events from the engine's thread to the gateways' streams, and ends the process in order.
Gateways, peers and the leader (operator, or the local supervisor) talk to it; nothing imports it.

    process      composition: who is started, in which order it all ends
    settings     command line and environment
    lifecycle    warm -> loading -> ready -> draining | failed; roles under epochs
    loading      a path and a revision -> executor, cache, running engine
    service      the TaskExecutor service           streams, outbox   what each gateway is still to be told
    handover     engine thread <-> kvtransfer       convert           protobuf <-> flowserve.engine.types
    registry     the record under its lease         watchdog          a hung engine ends the process
    template     `python -m flowserve.shell.template`: forks executors (cpu), see docs/architecture.md

See README.md beside this file. DeepServe (arXiv 2501.14417) sections 3 (TE-shell) and 6 (warm pods).
"""
