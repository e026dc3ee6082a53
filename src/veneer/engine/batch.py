"""What the device knows of the running completions between two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from veneer.engine.base import Base
from veneer.engine.cache import BankRows, SharingRows
from veneer.engine.draws import Chooser, uniforms
from veneer.engine.flat import TILE, Segment, runs
from veneer.engine.request import Completion

DRAWS = 32
"""Steps whose random numbers are made in one go."""
SLACK = 1.25
"""A line may be this much longer than its rows if that gives every adapter the same number of them."""


@dataclass
class Batch:
    """The running rows, sorted by slot, in a line that may hold filling between and behind them."""

    rows: list[Completion]
    places: Tensor
    """int64 [rows]: where they are in the line."""
    segments: list[Segment]
    """Of the line, filling included."""
    newest: Tensor
    """int64 [line]"""
    positions: Tensor
    """int64 [line]"""
    draws: Tensor
    """[DRAWS, rows]: the uniform numbers of the coming steps."""
    choose: Chooser
    banks: list[BankRows | SharingRows]
    steps_left: int
    """Until some row outgrows its bank, or the numbers run out."""
    last: int
    """The last position of the base's context: rows that ended there stay there until they leave."""
    step: int = 0

    @classmethod
    def of(cls, rows: list[Completion], base: Base, stackable: Callable[[Sequence[int | None]], bool]) -> Batch:
        """``stackable``: whether adapters in these slots work as one stack if each has as many rows as the others."""

        device = base.device

        def column(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        segments = runs(Segment(row.acting.slot, 1, 1) for row in rows)
        width = max([TILE, *(s.tokens for s in segments)])
        if len(segments) * width <= SLACK * len(rows) and stackable([s.slot for s in segments]):
            segments = [Segment(s.slot, width, s.wanted) for s in segments]
        starts = accumulate((s.tokens for s in segments[:-1]), initial=0)
        taken = {s.slot: iter(range(start, start + s.tokens)) for s, start in zip(segments, starts, strict=False)}
        places = [next(taken[row.acting.slot]) for row in rows]
        line = max(sum(s.tokens for s in segments), TILE) if rows else 0
        at = column(places)
        counts = torch.arange(DRAWS, device=device)[:, None] + column([len(row.tokens) for row in rows])
        return cls(
            rows,
            at,
            segments,
            column([0] * line).index_copy_(0, at, column([row.tokens[-1] for row in rows])),
            column([0] * line).index_copy_(0, at, column([row.position for row in rows])),
            uniforms(column([row.key for row in rows]).expand(DRAWS, -1), counts),
            Chooser([row.request.params for row in rows], device, [row.request.top_logprobs for row in rows]),
            _homes(rows, places, device),
            min([DRAWS, *(row.left for row in rows)]),
            base.context_length - 1,
        )

    def advance(self, tokens: Tensor) -> None:
        """Take in the tokens [rows] that a step drew."""
        self.newest = tokens if len(tokens) == len(self.newest) else self.newest.index_copy(0, self.places, tokens)
        self.positions = (self.positions + 1).clamp_(max=self.last)
        self.steps_left -= 1
        self.step += 1


def _homes(rows: list[Completion], places: list[int], device: torch.device) -> list[BankRows | SharingRows]:
    """Rows by where their keys are. ``places``: theirs in the line."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((id(row.bank), 0 if row.shared is None else id(row.shared.bank)), []).append(i)
    homes: list[BankRows | SharingRows] = []
    for members in groups.values():
        bank = rows[members[0]].bank
        assert bank is not None
        readers = [(shared.bank, shared.slot, shared.length, i) for i in members if (shared := rows[i].shared) is not None]
        if readers:
            readers.sort(key=lambda reader: reader[1])  # who reads the same comes one after the other
            slots = np.array([(places[i], rows[i].place, slot, length) for _, slot, length, i in readers], np.int64)
            homes.append(SharingRows(bank, readers[0][0], *np.ascontiguousarray(slots.T)))
        else:
            lines, slots = (
                torch.tensor(column, device=device) for column in ([places[i] for i in members], [rows[i].place for i in members])
            )
            homes.append(BankRows(bank, lines, slots, bank.top, max(rows[i].position for i in members)))
    return homes
