"""Helpers shared by tests and benches: they start real processes and speak the real protocols."""
