"""Plain values as JSON and back, between the program that tests and the one that is tested. Standard library alone: it goes into sandboxes.

What arrives is built anew from plain types: an object that says it equals everything does not get across.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

LONGEST = 10_000
"""Elements of an iterator; more are not carried."""


def pack(value: Any) -> Any:
    """Raises:
    TypeError: it is not made of None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict and iterators.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", *([pack(key), pack(entry)] for key, entry in value.items())]
    for name, kind in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return [name, *map(pack, value)]
    if isinstance(value, range):
        return ["list", *value]
    if isinstance(value, Iterator):
        return ["iterator", *map(pack, islice(value, LONGEST))]
    raise TypeError(f"a {type(value).__name__} cannot be carried from one process to the other")


def unpack(packed: Any) -> Any:
    """Raises:
    ValueError, TypeError, KeyError, IndexError: it was not made by ``pack``.
    """
    if not isinstance(packed, list):
        if isinstance(packed, dict):
            raise TypeError("no packed value")
        return packed
    name, *parts = packed
    if name == "dict":
        return {unpack(key): unpack(entry) for key, entry in parts}
    if name == "bytes":
        return bytes.fromhex(parts[0])
    if name == "complex":
        return complex(*map(float, parts))
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
    return kinds[name]([unpack(part) for part in parts])
