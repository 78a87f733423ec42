"""KV transfer between task executors: pools, leases, the pull protocol and its transports.

Called by the TE-shell, which owns one `Sender`, one `KVTransferService` and one `Receiver`, and by
`flowserve.devices` and `flowserve.rtc`, which allocate and number the blocks of a pool. Follows
DeepServe's DistFlow (arXiv 2501.14417) and FlowKV (arXiv 2504.03775); see README.md beside this file.
"""
