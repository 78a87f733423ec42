"""The control plane: HTTP gateway, job executor, scheduling policy, fleet view, local supervisor, CLI.

Rooms and who may import whom: docs/architecture.md.
"""
