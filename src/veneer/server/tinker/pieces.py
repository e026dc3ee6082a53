"""How many pieces a protobuf body would be parsed into. An empty message is two bytes on the wire and dozens in memory, so a body of
megabytes could take gigabytes; the walk reads tags and lengths alone (https://protobuf.dev/programming-guides/encoding/)."""

from __future__ import annotations

from typing import Any

from veneer.types import DataError

MOST = 250_000
"""A request of the SDK has up to 1,024 datums of a dozen pieces each."""
SMALL = 2**20
"""Bytes from which on it is worth a look."""
NUMBERS: dict[int, Any] = {}
"""A packed list of numbers, each of which takes eight bytes."""
TENSOR = {4: NUMBERS}
DATUM = {1: {}, 2: {2: TENSOR}}
REQUEST = {3: DATUM}
"""The fields of a ``ForwardBackwardRequest`` that hold fields, by number."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def check_pieces(body: bytes) -> None:
    """
    Raises:
        DataError: there are too many. What is broken otherwise the parser tells better.
    """
    if len(body) > SMALL and _count(body, 0, len(body), REQUEST, 0) > MOST:
        raise DataError(f"the request has more than {MOST} parts; send fewer datums at once")


def _count(body: bytes, at: int, end: int, fields: dict[int, Any], found: int) -> int:
    """``found`` and the pieces between two places, no further than just beyond ``MOST``."""
    while at < end and found <= MOST:
        tag, at = _varint(body, at, end)
        found += 1
        kind = tag & 7
        if kind == VARINT:
            _, at = _varint(body, at, end)
        elif kind == BYTES:
            length, at = _varint(body, at, end)
            inside = fields.get(tag >> 3)
            if inside is NUMBERS:
                found += length
            elif inside is not None:
                found = _count(body, at, min(at + length, end), inside, found)
            at += length
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        else:
            break
    return found


def _varint(body: bytes, at: int, end: int) -> tuple[int, int]:
    """The number and the place behind it; at the end of the bytes 0."""
    number = shift = 0
    while at < end:
        byte = body[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
        if shift > 63:
            break
    return 0, end
