"""The engine's bounds and targets. Built by the TE-shell."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Every queue, batch and wait of the engine is bounded by one of these."""

    max_tasks: int = 256
    """Waiting and running tasks together; one more is refused with QUEUE_FULL."""
    max_running: int = 64
    """Tasks that hold blocks: decoding, in prefill, pulling, or populating."""
    max_batch_tokens: int = 512
    """Tokens of one step over all sequences."""
    chunk_seconds: float = 0.25
    """What a step with prefill should take. Half of the product's aim (no step over 0.5 s), because the
    cost model is an estimate."""
    chunked_prefill: bool = True
    """False: every prompt in one step, whatever it takes (tests compare chunked with unchunked)."""
    enable_prefix_cache: bool = True
    admission_reserve: float = 0.02
    """Part of the pool kept free on admission while others run, so that a new prompt does not make
    running ones run out at once (ours)."""
    prefix_wait_seconds: float = 5.0
    """How long a task waits at most for a prefix that another one is computing (ours)."""
    role_bonus_seconds: float = 1.0
    """How far ahead of earlier arrivals a role lets the kind it prefers go (ours): a preference that
    can starve nobody."""
    idle_tick_seconds: float = 0.25
    """Longest sleep of an idle loop; half of what the load report's age may reach."""
    compact_call_seconds: float = 0.0
    """What a call of a KV transfer costs: where runs cost more than copies, a prefill's blocks are copied
    into one before they are announced. 0 = never."""
    stuck_seconds: float = 60.0
    """A task or transfer without progress for so long counts as stuck (twice the default lease)."""

    def __post_init__(self) -> None:
        for name in ("max_tasks", "max_running", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, is {getattr(self, name)}")
        if self.max_running > self.max_batch_tokens:
            raise ValueError("max_running must not exceed max_batch_tokens: each decode takes one token")
        if self.chunk_seconds <= 0:
            raise ValueError(f"chunk_seconds must be positive, is {self.chunk_seconds}")
