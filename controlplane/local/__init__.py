"""The whole stack on one machine: a supervisor with processes where a cluster has pods.

`deepflow up` runs it. It starts Valkey, the task executors and the gateways, loads models into
warm executors, sets roles (it is the one leader of its executors) and restarts whatever dies.
"""
