"""The first 64 bytes of a TensorRT-RTX engine, read without the library and without a GPU.

The layout is not documented. It was read off engines that TensorRT-RTX 1.7.1 built for one and for
several targets (tests/runtime/engines/test_header.py builds some again), so every field is compared
with the manifest before it is believed. All numbers are little-endian:

| bytes | what |
| --- | --- |
| 0..3, 28..31 | `vtrt` |
| 16..23 | bytes of the whole file |
| 24..27 | version, a byte each: 1, 7, 1, 116 |
| 32..39 | targets, a bit each: see `TARGET_BITS` |
| 56..63 | bytes of the weights |
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

HEADER_BYTES = 64
MAGIC = b"vtrt"
TARGET_BITS = {"sm75": 1, "sm80": 2, "sm86": 4, "sm89": 8, "sm120": 16, "sm121": 32}
_FIELDS = struct.Struct("<4s12xQ4B4sQ16xQ")


@dataclass(frozen=True, kw_only=True)
class EngineHeader:
    """What the header says.

    Attributes:
        file_bytes: of the whole engine.
        version: of TensorRT-RTX, e.g. 1.7.1.116.
        targets: GPU architectures, e.g. (`sm86`, `sm89`), oldest first.
        unknown_targets: bits of architectures that this project does not know, 0 for none.
        weight_bytes: of the weights, which lie in device memory.
    """

    file_bytes: int
    version: str
    targets: tuple[str, ...]
    unknown_targets: int
    weight_bytes: int


class EngineHeaderError(ValueError):
    """The bytes are no header of a TensorRT-RTX engine; the message says what they are."""


def read_engine_header(blob: bytes) -> EngineHeader:
    """Read the header of an engine.

    Args:
        blob: the engine, or its first `HEADER_BYTES`.

    Raises:
        EngineHeaderError: too short, or another beginning.
    """
    if len(blob) < HEADER_BYTES:
        raise EngineHeaderError(
            f"it has {len(blob)} bytes, an engine of TensorRT-RTX begins with {HEADER_BYTES} of "
            "header"
        )
    magic, size, *version, again, targets, weights = _FIELDS.unpack_from(blob)
    if magic != MAGIC or again != MAGIC:
        raise EngineHeaderError(
            f"it begins with {magic!r}, an engine of TensorRT-RTX with {MAGIC!r}"
        )
    return EngineHeader(
        file_bytes=size,
        version=".".join(map(str, version)),
        targets=tuple(name for name, bit in TARGET_BITS.items() if targets & bit),
        unknown_targets=targets & ~sum(TARGET_BITS.values()),
        weight_bytes=weights,
    )


def pack_engine_header(header: EngineHeader) -> bytes:
    """The bytes that `read_engine_header` reads; stand-ins for engines are made with it."""
    bits = sum(TARGET_BITS[name] for name in header.targets) | header.unknown_targets
    version = [int(part) for part in header.version.split(".")]
    return _FIELDS.pack(MAGIC, header.file_bytes, *version, MAGIC, bits, header.weight_bytes)
