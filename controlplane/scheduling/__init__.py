"""Pure placement policy: cluster view in, decision out.

Called by the job executor for every task (and by the digital twin at any scale); the house plan keeps
clocks, sockets and random sources out of it, so whatever changes over time is an argument.

| module  | what it holds                                                                       |
|---------|-------------------------------------------------------------------------------------|
| types   | `ExecutorView`, `ClusterView`, `RequestView`, `Policy`, `Decision`, `Unplaceable`    |
| decide  | filter → choose mode → score → pick, and the late placement of decode tasks          |
| prefix  | which executor holds which prefix blocks, from the executors' exact cache events     |
"""
