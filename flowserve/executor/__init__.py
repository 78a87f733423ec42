"""SPMD executors: run one batch on one device. The engine (`flowserve.engine`) is the only caller."""
