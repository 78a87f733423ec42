"""Benches: each prints a table, takes `--quick` (under 50 s) and `--json PATH`; none is run as a test."""
