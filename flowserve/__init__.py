"""FlowServe, the inference worker: shell, engine, RTC, executors, models, devices.

Never imports `controlplane`: the worker protocol in protos/ is all they share.
"""
