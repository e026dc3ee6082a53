"""Datums in one line: what is trained together, without padding, and who sees whom.

A request's datums are cut into units by nothing but themselves: about so many tokens each, datums with one prompt side by
side so that it is read once. A pass is one or more units; each attends to itself alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from veneer.engine.attention import Ragged, Row, Score
from veneer.engine.flat import Flat, Segment, filled
from veneer.types import Datum, Tokens

T = TypeVar("T")

WHOLE = 512
"""Tokens of a request that are not worth two threads."""


@dataclass(eq=False)
class PassRequest:
    """One ``forward`` or ``forward_backward``."""

    slot: int | None
    data: Sequence[Datum]
    loss_fn: str
    loss_config: dict[str, float] | None
    backward: bool


@dataclass
class Member:
    """A datum from its first trained position to its last; what lies before is prefix, what lies behind is not needed."""

    index: int
    datum: Datum
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass
class Unit:
    """Datums of one request that always run together: per prefix its tokens and those who continue it."""

    request: PassRequest
    groups: list[tuple[Tokens, list[Member]]]

    @property
    def tokens(self) -> int:
        return sum(len(prefix) + sum(m.length for m in members) for prefix, members in self.groups)

    @property
    def trained(self) -> int:
        """Tokens with a weight."""
        return sum(int((m.datum.mask != 0).sum()) for _, members in self.groups for m in members)

    def halves(self) -> list[Unit]:
        """Two units of about half the datums each; none for a single datum."""
        singles = [(prefix, member) for prefix, members in self.groups for member in members]
        middle = len(singles) // 2
        return [Unit(self.request, [(p, [m]) for p, m in part]) for part in (singles[:middle], singles[middle:])] if middle else []


class _Units:
    """Units that attend each to itself."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, int, Ragged]] = []

    @property
    def lengths(self) -> list[int]:
        return [stop - start for start, stop, _ in self.parts]

    def add(self, start: int, length: int, ragged: Ragged) -> None:
        self.parts.append((start, start + length, ragged))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score: Score) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0][2].attend(q, k, v, score)
        outputs = [ragged.attend(q[a:b], k[a:b], v[a:b], score) for a, b, ragged in self.parts]
        outputs.append(torch.zeros_like(q[self.parts[-1][1] :]))
        return torch.cat(outputs)


def cut(request: PassRequest, budget: int) -> list[Unit]:
    """A request's datums as units of at most ``budget`` tokens, a longer datum being one by itself: an even number of about equal
    ones, so that two lanes end together. Datums with one prefix stay together unless they are more than a unit's share."""
    groups: dict[bytes, tuple[Tokens, list[Member]]] = {}
    for index, datum in enumerate(request.data):
        trained = np.flatnonzero(datum.mask)
        if len(trained):
            start, stop = int(trained[0]), int(trained[-1]) + 1
            prefix = datum.tokens[:start]
            groups.setdefault(prefix.tobytes(), (prefix, []))[1].append(Member(index, datum, start, stop))
    total = sum(_size(prefix, members) for prefix, members in groups.values())
    count = 1 if total <= min(budget, WHOLE) else 2 * -(-total // (2 * budget))
    share = -(-total // count)
    pieces: list[tuple[Tokens, list[Member]]] = []
    for prefix, members in groups.values():
        parts = min(len(members), -(-_size(prefix, members) // share))
        pieces += [(prefix, part) for part in _spread(members, [m.length for m in members], parts, budget - len(prefix))]
    return [Unit(request, part) for part in _spread(pieces, [_size(*piece) for piece in pieces], count, budget)]


def _size(prefix: Tokens, members: Sequence[Member]) -> int:
    return len(prefix) + sum(m.length for m in members)


def _spread(items: Sequence[T], sizes: Sequence[int], count: int, limit: int) -> list[list[T]]:
    """Items over ``count`` parts, the largest first and each to the part that is smallest so far; to a new one if a part would grow
    beyond ``limit``."""
    parts: list[list[T]] = [[] for _ in range(count)]
    filled = [0] * count
    for i in sorted(range(len(items)), key=lambda i: -sizes[i]):
        smallest = filled.index(min(filled))
        if parts[smallest] and filled[smallest] + sizes[i] > limit:
            parts.append([])
            filled.append(0)
            smallest = -1
        parts[smallest].append(items[i])
        filled[smallest] += sizes[i]
    return [part for part in parts if part]


def join(units: Iterable[Unit], budget: int, mixes_slots: bool) -> list[list[Unit]]:
    """Units that share a pass: neighbours, as long as they fit."""
    passes: list[list[Unit]] = []
    room = 0
    for unit in units:
        if not passes or unit.tokens > room or not mixes_slots:
            passes.append([])
            room = budget
        passes[-1].append(unit)
        room -= unit.tokens
    return passes


@dataclass
class _Line:
    """A line of tokens while it grows."""

    tokens: list[Tokens]
    positions: list[np.ndarray]
    wanted: list[np.ndarray]
    length: int = 0

    def append(self, tokens: Tokens, first: int) -> None:
        """``tokens``, the first of which has position ``first`` in its sequence."""
        self.tokens.append(tokens)
        self.positions.append(np.arange(first, first + len(tokens)))
        self.length += len(tokens)


def pack(units: Sequence[Unit], device: torch.device, window: int | None) -> Flat:
    """One pass over units, a segment each, in which every trained position is wanted."""
    line, layout = _Line([], [], []), _Units()
    for unit in units:
        start, rows = line.length, list[Row]()
        for prefix, members in unit.groups:
            shared = len(prefix) if len(members) > 1 else 0
            prefix_start = line.length - start
            if shared:
                rows.append(Row(prefix_start, shared))
                line.append(prefix, 0)
            for member in members:
                first = member.start if shared else 0
                rows.append(Row(line.length - start, member.stop - first, prefix_start, shared))
                line.wanted.append(line.length - first + np.flatnonzero(member.datum.mask))
                line.append(member.datum.tokens[first : member.stop], first)
        layout.add(start, line.length - start, Ragged(rows, device, window))
    return Flat(
        filled(np.concatenate(line.tokens).tolist(), device),
        filled(np.concatenate(line.positions).tolist(), device),
        layout,
        [Segment(unit.request.slot, length, unit.trained) for unit, length in zip(units, layout.lengths, strict=True)],
        torch.from_numpy(np.concatenate(line.wanted)).to(device),
    )


def trained(units: Sequence[Unit], field: str, device: torch.device) -> Tensor:
    """An array of all datums at the trained positions [n], in the order of the line."""
    data = [m.datum for unit in units for _, members in unit.groups for m in members]
    return torch.from_numpy(np.concatenate([getattr(d, field)[d.mask != 0] for d in data])).to(device)


def owners(unit: Unit, device: torch.device) -> Tensor:
    """Which datum of the unit each trained token belongs to, int64 [n]."""
    counts = [int((m.datum.mask != 0).sum()) for _, members in unit.groups for m in members]
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device)
