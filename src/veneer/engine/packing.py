"""Datums in one line: what is trained together, without padding, and who sees whom.

A request's datums are cut into units by nothing but themselves: about so many tokens each, datums with one prompt side by
side so that it is read once. A pass is one or more units; each attends to itself alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veneer.engine.attention import Ragged, Row, Score
from veneer.engine.flat import Flat, Segment, filled
from veneer.engine.losses import SEQUENCE_RATIO_MASK, Terms, resolve_terms
from veneer.types import Datum, LossName, Tokens

T = TypeVar("T")
Bools = NDArray[np.bool_]

WHOLE = 512
"""Tokens of a request that are not worth two threads."""
ALIKE = 16
"""Tokens at the beginning of two datums that are worth reading once."""


@dataclass(eq=False)
class PassRequest:
    """One ``forward`` or ``forward_backward``."""

    slot: int | None
    data: Sequence[Datum]
    loss_fn: LossName
    loss_config: dict[str, float] | None
    backward: bool
    everywhere: bool = False
    """Log-probabilities also of targets without a weight."""

    @cached_property
    def width(self) -> int:
        """Targets at a position, the most that a datum has; 0 if all have arrays [N]."""
        return max((datum.targets.shape[1] for datum in self.data if datum.targets.ndim == 2), default=0)

    @cached_property
    def terms(self) -> Terms:
        """What is added to the loss."""
        return resolve_terms(self.loss_fn, self.loss_config)

    @property
    def needs_entropy(self) -> bool:
        return self.terms.entropy_coef != 0

    @property
    def kind(self) -> tuple[int, bool]:
        """Only requests of one kind share a pass: what one needs must cost the other nothing."""
        return self.width, self.needs_entropy


@dataclass(eq=False)
class Member:
    """A datum from its first trained position to the last that is read; what lies before is prefix, what lies behind is not needed."""

    index: int
    datum: Datum
    weighted: Bools
    """Which targets are in the loss; in their shape."""
    asked: Bools
    """Whose log-probabilities are wanted: those, and perhaps more."""
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @cached_property
    def trains(self) -> bool:
        """Whether it has a weight."""
        return bool(self.weighted.any())

    @cached_property
    def reads(self) -> Bools:
        """Positions [N] with a target that is asked for."""
        return _any_of(self.asked)

    def beginning(self) -> tuple[bytes, bytes]:
        """What members have in common who share their prefix: its tokens, and whatever is read in it."""
        asked = self.asked[: self.start]
        targets = np.where(asked, self.datum.targets[: self.start], -1).tobytes() if asked.any() else b""
        return self.datum.tokens[: self.start].tobytes(), targets


def _any_of(targets: Bools) -> Bools:
    return targets if targets.ndim == 1 else np.any(targets, 1)


def _member(index: int, datum: Datum, everywhere: bool) -> Member | None:
    """None: nothing of the datum is read."""
    weighted = asked = datum.mask != 0
    trained = np.flatnonzero(_any_of(weighted))
    if everywhere:
        asked = np.ones_like(weighted)
    elif SEQUENCE_RATIO_MASK in datum.per_token and len(trained):
        asked = weighted | (datum.per_token[SEQUENCE_RATIO_MASK] != 0)
    read = trained if asked is weighted else np.flatnonzero(_any_of(asked))
    if not len(read):
        return None
    return Member(index, datum, weighted, asked, int(trained[0]) if len(trained) else 0, int(read[-1]) + 1)


@dataclass(eq=False)
class Unit:
    """Datums of one request that always run together: per prefix its tokens and those who continue it."""

    request: PassRequest
    groups: list[tuple[Tokens, list[Member]]]

    @property
    def members(self) -> list[Member]:
        return [member for _, members in self.groups for member in members]

    @property
    def tokens(self) -> int:
        return sum(len(prefix) + sum(m.length for m in members) for prefix, members in self.groups)

    @cached_property
    def backward(self) -> bool:
        """Whether there is a gradient to find: not if no target has a weight."""
        return self.request.backward and any(member.trains for member in self.members)

    def pieces(self) -> Iterator[tuple[list[Member], int, int]]:
        """The unit's line: consecutive positions of one datum, from one up to another, with all members who read them there: a
        prefix serves those behind it."""
        for prefix, members in self.groups:
            shared = len(prefix) if len(members) > 1 else 0
            if shared:
                yield members, 0, shared
            yield from (([member], shared, member.stop) for member in members)

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
    ones, so that two lanes end together. Datums with one prefix stay together unless they are more than a unit's share. Datums
    without a weight are kept apart, as they need no backward pass."""
    found = (_member(index, datum, request.everywhere) for index, datum in enumerate(request.data))
    members = [member for member in found if member is not None]
    weightless = [member for member in members if not member.trains]
    _find_prefixes(weightless)
    if not request.backward or not weightless:
        return _cut(request, members, budget)
    return [*_cut(request, [member for member in members if member.trains], budget), *_cut(request, weightless, budget)]


def _find_prefixes(weightless: Iterable[Member]) -> None:
    """No weight tells where a prompt ends, so neighbours that begin alike share what they have in common."""
    runs: list[tuple[list[Member], int]] = []
    for member in weightless:
        run, common = runs[-1] if runs else ([], 0)
        alike = _alike(run[0], member, common if len(run) > 1 else member.stop) if run else 0
        if alike >= ALIKE and alike * len(run) >= common * (len(run) - 1):
            run.append(member)
            runs[-1] = run, alike
        else:
            runs.append(([member], 0))
    for run, common in runs:
        for member in run:
            member.start = common


def _alike(one: Member, other: Member, limit: int) -> int:
    """How many of the first ``limit`` positions are the same, the last of each datum apart."""
    a, b, n = one.datum, other.datum, min(one.stop - 1, other.stop - 1, limit)
    if a.targets.shape[1:] != b.targets.shape[1:]:
        return 0
    differ = (a.tokens[:n] != b.tokens[:n]) | _any_of(a.targets[:n] != b.targets[:n])
    return int(np.argmax(differ)) if differ.any() else n


def _cut(request: PassRequest, members: Sequence[Member], budget: int) -> list[Unit]:
    groups: dict[tuple[bytes, bytes], tuple[Tokens, list[Member]]] = {}
    for member in members:
        groups.setdefault(member.beginning(), (member.datum.tokens[: member.start], []))[1].append(member)
    total = sum(_size(*group) for group in groups.values())
    count = 1 if total <= min(budget, WHOLE) else 2 * -(-total // (2 * budget))
    share = -(-total // count)
    pieces: list[tuple[Tokens, list[Member]]] = []
    for prefix, alike in groups.values():
        parts = min(len(alike), -(-_size(prefix, alike) // share))
        pieces += [(prefix, part) for part in _spread(alike, [m.length for m in alike], parts, budget - len(prefix))]
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
    """Units that share a pass: neighbours of one kind, as long as they fit."""
    passes: list[list[Unit]] = []
    room = 0
    for unit in units:
        if not passes or unit.tokens > room or not mixes_slots or unit.request.kind != passes[-1][0].request.kind:
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
    """One pass over units, a segment each, in which every position with a target that is asked for is wanted."""
    line, layout, wanted = _Line([], [], []), _Units(), list[int]()
    for unit in units:
        start, rows, prefix, count = line.length, list[Row](), 0, 0
        for readers, first, stop in unit.pieces():
            at = line.length - start
            prefix = prefix if first else at  # a piece that begins later continues the last one that began at 0
            rows.append(Row(at, stop - first, prefix, first))
            places = np.flatnonzero(readers[0].reads[first:stop])
            count += len(places)
            line.wanted.append(line.length + places)
            line.append(readers[0].datum.tokens[first:stop], first)
        layout.add(start, line.length - start, Ragged(rows, device, window))
        wanted.append(count)
    return Flat(
        filled(np.concatenate(line.tokens).tolist(), device),
        filled(np.concatenate(line.positions).tolist(), device),
        layout,
        [Segment(u.request.slot, length, n) for u, length, n in zip(units, layout.lengths, wanted, strict=True)],
        torch.from_numpy(np.concatenate(line.wanted)).to(device),
    )
