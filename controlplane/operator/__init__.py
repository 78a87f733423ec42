"""The operator: executors as pods, driven by custom resources. `deepflow operator` runs it.

Follows DeepServe (arXiv 2501.14417, section 5: warm pods, model-agnostic until a model is loaded) with the
level-triggered reconcile of Kubernetes controllers. What to do is decided in `plan/`, from values; everything
here only reads, acts and says what is:

| module     | what it holds                                                                        |
|------------|--------------------------------------------------------------------------------------|
| plan/      | the decisions: pure functions, one phase per file                                      |
| cluster    | the stores that watches keep, the executors, what is spoken for                        |
| executors  | what each executor says of itself; load, role, drain                                   |
| acting     | one action: one write or one call, on the very object that was planned for             |
| servings   | the controller of ModelServings                                                        |
| pools      | the controller of WarmPools; `pods` is the template                                    |
| scaling    | the activator (0 to 1, on demand) and the autoscaler (all else); `scalers` who decides |
| statuses   | conditions, written only when they differ                                              |
| queue, run | work queue and workers; lease, probes, the process                                     |
"""
