"""Reads a GGUF file's header (format version 2 and 3): metadata and the table of tensors.

Own code because a start waits for it: the `gguf` package builds an array object per token of the
vocabulary, which takes seconds; here string arrays are walked over without making strings.
Specification: ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from flowserve.models.errors import BadWeights, UnsupportedModel

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MAX_ENTRIES = 1 << 24
"""Bound of counts in a header (ours), so that a torn file fails at once instead of after a long walk."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    name: str
    shape: tuple[int, ...]  # torch order: rows first
    kind: int  # ggml type number
    offset: int  # bytes from the start of the file


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    fields: dict[str, Any]  # arrays only where asked for, else their length as `range(n)`
    tensors: dict[str, TensorEntry]


class _Cursor:
    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def string(self) -> str:
        length = self.take("Q")
        if length > len(self.data) - self.at:
            raise ValueError(f"string of {length} bytes")
        value = bytes(self.data[self.at : self.at + length]).decode("utf-8", "replace")
        self.at += length
        return value

    def value(self, kind: int, keep: bool) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"metadata type {kind}")
        item, count = self.take("I"), self.take("Q")
        if count > MAX_ENTRIES:
            raise ValueError(f"array of {count} items")
        if item in _SCALARS:
            code = f"{count}{_SCALARS[item]}"
            size = struct.calcsize("<" + code)
            values = struct.unpack_from("<" + code, self.data, self.at) if keep else range(count)
            self.at += size
            return values
        if item == _STRING and not keep:
            for _ in range(count):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
            return range(count)
        return [self.value(item, keep) for _ in range(count)]


def read_header(data: memoryview, keep: Collection[str] = ()) -> GGUFHeader:
    """Parses the header of a mapped file; arrays named in `keep` are read, others only counted.

    Raises BadWeights for a torn header, UnsupportedModel for another version or byte order.
    """
    try:
        if bytes(data[:4]) != b"GGUF":
            raise BadWeights("not a GGUF file")
        cursor = _Cursor(data)
        cursor.at = 4
        version = cursor.take("I")
        if version not in (2, 3):
            raise UnsupportedModel(f"GGUF version {version} is not implemented; implemented are 2 and 3")
        tensor_count, field_count = cursor.take("Q"), cursor.take("Q")
        if tensor_count > MAX_ENTRIES or field_count > MAX_ENTRIES:
            raise ValueError(f"{tensor_count} tensors and {field_count} metadata entries")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            name = cursor.string()
            fields[name] = cursor.value(cursor.take("I"), name in keep)
        raw = []
        for _ in range(tensor_count):
            name = cursor.string()
            dimensions = [cursor.take("Q") for _ in range(cursor.take("I"))]
            raw.append((name, tuple(reversed(dimensions)), cursor.take("I"), cursor.take("Q")))
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"alignment {alignment!r}")
    except (struct.error, ValueError, OverflowError, IndexError, RecursionError) as error:
        if isinstance(error, BadWeights | UnsupportedModel):
            raise
        raise BadWeights(f"torn GGUF header: {error}") from error
    start = -(-cursor.at // alignment) * alignment
    return GGUFHeader(
        fields, {name: TensorEntry(name, shape, kind, start + at) for name, shape, kind, at in raw}
    )
