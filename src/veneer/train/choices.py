"""Functions in tables: a name and settings from a configuration become a function and its full settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from veneer.types import RequestError

F = TypeVar("F")
Settings = Mapping[str, float]
Table = Mapping[str, tuple[F, Settings]]
"""name -> (function, its settings with their defaults)."""


def resolve(kind: str, table: Table[F], name: str, config: Settings | None) -> tuple[F, dict[str, float]]:
    """The function and its full settings. ``kind``: what the table holds, for the message.

    Raises:
        RequestError: an unknown name or setting, or a setting that is not a finite number.
    """
    if name not in table:
        raise RequestError(f"unknown {kind} {name!r}; there are {', '.join(table)}")
    function, defaults = table[name]
    for key, value in (config or {}).items():
        if key not in defaults:
            raise RequestError(f"{kind} {name!r} has no setting {key!r}; it has {', '.join(defaults) or 'none'}")
        if not math.isfinite(value):
            raise RequestError(f"{kind} {name!r}: setting {key!r} must be a finite number, and is {value}")
    return function, {**defaults, **(config or {})}
