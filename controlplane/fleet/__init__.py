"""Who is there: the registry of task executors, one stream to each, and what they last said.

Called by the job executor (`controlplane.jobs`) and, for `/deepflow/v1/executors`, by the gateway.

| module   | what it holds                                                                     |
|----------|------------------------------------------------------------------------------------|
| registry | discovery from Redis; serving goes on with the last known records while it is down  |
| channel  | one bidirectional Tasks stream to one executor: link state, sending, loss           |
| member   | an executor's record, last load report and what was submitted since                 |
| view     | `FleetView`: all members together; snapshots for `scheduling`, events for `jobs`     |
| demand   | what gateways tell whoever scales: activity, held requests, latencies (via Redis)  |

Liveness is the stream; the registry only discovers (house plan, "shared formats").
"""
