"""The digital twin: a discrete-event simulation that runs the real scheduling code over simulated executors.

Called by `deepflow simulate` and by the benches. Answers what no single machine can try: which policy is
better, on recorded traffic, at hundreds of executors. Executors take the time that `deepflow calibrate`
measured on a real engine, and schedule their steps as `flowserve.engine.scheduler` does; placement, prefix
index and role control are those of `controlplane.scheduling` itself (DeepServe section 5, FlowKV section
3). Imports nothing else of ours.

| module     | what it holds                                                             |
|------------|---------------------------------------------------------------------------|
| workload   | requests as columns: recorded traces, Poisson, phases; superposed, merged |
| costs      | the cost profile of an executor, its fit and its file                     |
| measure    | which steps a calibration measures                                        |
| executor   | one simulated executor                                                    |
| task, pool | its tasks and step budget; its KV blocks                                  |
| cluster    | the event loop, hand-overs, what is held and dropped                      |
| ours       | the real policy as a gateway runs it                                      |
| baselines  | what others do                                                            |
| results    | figures, paired comparisons, fairness                                     |
| starts     | steps of a start from stated bandwidths; weights going round a fleet        |
| plots      | distributions, roles over time, utilisation                               |
"""
