"""Requests become jobs, jobs become tasks, tasks are placed on executors and replayed until they end.

    serving    the border to the gateway: a request in, choice deltas out
    records    what is kept of a job and its tasks; states: which change may follow which (pure)
    store      records in Redis; writer: written behind, never in the way of an answer
    choice     one choice of an answer as a pure state machine over executors' events
    executor   the serving job executor: admission, timers, placement; job: what the gateway holds
    holding    choices that wait for an executor, in order, with bounds
    runtime    composition: `async with ServingRuntime(settings) as runtime`

Called by `controlplane.gateway`; calls `controlplane.scheduling` (decisions) and `controlplane.fleet`
(streams to executors). DeepServe (arXiv 2501.14417) section 3: request, job, task.
"""
