"""Pure placement policy: cluster view in, decision out.

Called by the job executor for every task (and by the digital twin at any scale); the house plan keeps
clocks, sockets and random sources out of it, so whatever changes over time is an argument.

| module  | what it holds                                                                       |
|---------|-------------------------------------------------------------------------------------|
| types   | `ExecutorView`, `ClusterView`, `RequestView`, `Policy`, `Decision`, `Unplaceable`    |
| decide  | filter → choose mode → score → pick, and the late placement of decode tasks           |
| columns | the view as numpy columns, one row an executor, touched alone by each change          |
| prefix  | which executor holds which prefix blocks, from the executors' exact cache events      |
| heatmap | where splitting prefill from decode pays, as data and a look-up                       |
| early   | whether a prefill that starts gets its decode executor now                            |
| roles   | role control: a look at the load a second in, role changes out                        |
| admission | who goes first while executors are full, and who is dropped when too many wait      |
| lengths | how long an answer will be, learned from the traffic                                  |
"""
