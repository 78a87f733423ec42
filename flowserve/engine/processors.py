"""Logit processors: constraints on what may be sampled, whose state travels with a task.

A task names its processor in `processor_state` (name, version, payload, framed by `pack_state`). The
executor that runs the task restores it, applies it before each draw, and a prefill hands its state
over to the decode side, so a grammar works the same on one executor and on two.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

_MAGIC = b"DFLP"
_HEADER = struct.Struct("<4sHHI")  # magic, length of the name, version, length of the payload
MAX_STATE_BYTES = 1 << 20
"""Bound of a processor's state on the wire (ours): a grammar's stack, not its text."""


class LogitProcessor(Protocol):
    """Bound to one sequence; called on the engine's thread only."""

    def apply(self, logits: torch.Tensor, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        """Changed logits of one row [vocab]; the input may be changed and returned."""
        ...

    def advance(self, token: int) -> None:
        """`token` was sampled."""
        ...

    def state(self) -> bytes:
        """What `restore` needs to make an equal processor elsewhere."""
        ...


Restore = Callable[[int, bytes], LogitProcessor]
"""(version, payload) to a processor; raises ValueError for what it cannot read."""

_registry: dict[str, Restore] = {}


def register(name: str, restore: Restore) -> None:
    """Makes a kind of processor known; a name is registered once."""
    if name in _registry:
        raise ValueError(f"a logit processor named {name!r} is registered already")
    _registry[name] = restore


def pack_state(name: str, version: int, payload: bytes) -> bytes:
    encoded = name.encode()
    return _HEADER.pack(_MAGIC, len(encoded), version, len(payload)) + encoded + payload


def restore(state: bytes) -> LogitProcessor | None:
    """The processor of a task's `processor_state`; None for an empty one. Raises ValueError."""
    if not state:
        return None
    if len(state) > MAX_STATE_BYTES:
        raise ValueError(f"processor state of {len(state)} bytes exceeds {MAX_STATE_BYTES}")
    if len(state) < _HEADER.size:
        raise ValueError("processor state is torn")
    magic, name_length, version, length = _HEADER.unpack_from(state)
    if magic != _MAGIC or len(state) != _HEADER.size + name_length + length:
        raise ValueError("processor state is torn or of another format")
    name = state[_HEADER.size : _HEADER.size + name_length].decode("utf-8", "replace")
    if name not in _registry:
        known = ", ".join(sorted(_registry))
        raise ValueError(f"logit processor {name!r} is not known here; known are {known}")
    return _registry[name](version, state[_HEADER.size + name_length :])


class TokenChoices:
    """The output is exactly one of several token sequences, then an end token.

    The plainest constraint with a state (which choices are still possible, how far we are), and what
    "answer with one of these labels" needs.
    """

    NAME, VERSION = "token_choices", 1
    MAX_TOKENS = 65_536
    """Tokens of all choices together (ours)."""

    def __init__(self, choices: Sequence[Sequence[int]], end_token: int, written: Sequence[int] = ()) -> None:
        if not choices or any(not choice for choice in choices):
            raise ValueError("choices must be non-empty token sequences")
        if sum(len(choice) for choice in choices) > self.MAX_TOKENS:
            raise ValueError(f"choices hold more than {self.MAX_TOKENS} tokens")
        self._choices = [tuple(choice) for choice in choices]
        self._end = end_token
        self._written: list[int] = list(written)

    def allowed(self) -> list[int]:
        done = tuple(self._written)
        return sorted(
            {
                choice[len(done)] if len(choice) > len(done) else self._end
                for choice in self._choices
                if choice[: len(done)] == done
            }
        ) or [self._end]

    def apply(self, logits: torch.Tensor, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        allowed = torch.tensor(self.allowed(), device=logits.device)
        kept = logits[allowed]
        logits.fill_(-torch.inf)
        logits[allowed] = kept
        return logits

    def advance(self, token: int) -> None:
        self._written.append(token)

    def state(self) -> bytes:
        groups = [*self._choices, tuple(self._written)]
        counts = struct.pack(f"<II{len(groups)}I", self._end, len(groups), *(len(group) for group in groups))
        flat = [token for group in groups for token in group]
        return pack_state(self.NAME, self.VERSION, counts + struct.pack(f"<{len(flat)}I", *flat))

    @classmethod
    def restore(cls, version: int, payload: bytes) -> TokenChoices:
        if version != cls.VERSION:
            raise ValueError(f"{cls.NAME} state of version {version}; this executor reads {cls.VERSION}")
        try:
            end, count = struct.unpack_from("<II", payload)
            if count < 2 or count > cls.MAX_TOKENS:
                raise ValueError(f"{cls.NAME} state names {count} groups")
            lengths = struct.unpack_from(f"<{count}I", payload, 8)
            flat = struct.unpack_from(f"<{sum(lengths)}I", payload, 8 + 4 * count)
        except struct.error as error:
            raise ValueError(f"{cls.NAME} state is torn") from error
        groups, offset = [], 0
        for length in lengths:
            groups.append(flat[offset : offset + length])
            offset += length
        return cls(groups[:-1], end, groups[-1])


register(TokenChoices.NAME, TokenChoices.restore)
