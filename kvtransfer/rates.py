"""What pulls over each transport take, as measured: what a fetch is weighed by before it is begun.

Fed by the receiver's loop, asked from any thread. Two numbers a transport: bytes per second while it copies,
and seconds of everything around it (calls, announcements, wake-ups). Pure but for the metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvtransfer import metrics

LEARNING = 0.2
"""Weight of the newest pull (ours)."""
LEAST_BYTES = 1 << 20
"""Smaller copies say more of the machine's timers than of the transport's rate (ours)."""
FIRST_RATES: Mapping[str, float] = MappingProxyType(
    {"shm": 4e9, "unix": 2e9, "tcp": 1e9, "grpc": 8e8, "nixl": 1e9, "mooncake": 1e9}
)
"""Bytes per second until one was measured (ours): about half of what tests.bench.kv_transfer showed."""
FIRST_RATE = 8e8
FIRST_OVERHEAD = 0.01
"""Seconds around a copy until some were measured (ours)."""
DOUBT = 0.02
"""An estimate that keeps a transport from being used moves so much towards the first guess (ours)."""


class TransportRates:
    def __init__(self) -> None:
        self._rates = dict(FIRST_RATES)
        self._overheads: dict[str, float] = {}

    def copied(self, transport: str, size: int, seconds: float) -> None:
        """`size` bytes were copied in `seconds`."""
        if size >= LEAST_BYTES and seconds > 0:
            known = self._rates.get(transport, FIRST_RATE)
            self._rates[transport] = known + LEARNING * (size / seconds - known)
            metrics.RATE.labels(transport).set(self._rates[transport])

    def fetched(self, transport: str, overhead: float) -> None:
        """A fetch spent `overhead` seconds on other things than copying."""
        known = self._overheads.get(transport, FIRST_OVERHEAD)
        self._overheads[transport] = known + LEARNING * (overhead - known)

    def seconds(self, transport: str, size: int) -> float:
        """Expected time of fetching `size` bytes."""
        overhead = self._overheads.get(transport, FIRST_OVERHEAD)
        return overhead + size / self._rates.get(transport, FIRST_RATE)

    def declined(self, transport: str) -> None:
        """The estimate was acted upon, and will not be tested."""
        rate, first = self._rates.get(transport, FIRST_RATE), FIRST_RATES.get(transport, FIRST_RATE)
        self._rates[transport] = rate + DOUBT * (first - rate)
        overhead = self._overheads.get(transport, FIRST_OVERHEAD)
        self._overheads[transport] = overhead + DOUBT * (FIRST_OVERHEAD - overhead)
