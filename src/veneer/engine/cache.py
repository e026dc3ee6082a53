"""Keys and values of running completions, in banks of slots: preallocated, and as long as a row needs for now.

A bank holds rows of one capacity, [slots, kv_heads, capacity, dim] per layer. A row that outgrows its bank moves to the
next. On a CPU in float32 a prompt's keys lie in a slot of their own, which all its completions read; elsewhere each
completion begins with a copy of them, as torch's attention wants its keys in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.engine import compiled
from veneer.engine.attention import Ragged, Score

FINE = 32
"""Attention in torch reads keys up to a multiple of this."""
STEP = 32
"""Capacities are multiples of this up to four of it, then 1, 1.5, 2, 3, 4, 6, ... times that."""
AHEAD = 32
"""A new row gets room for at most this many tokens beyond its prompt."""


def capacity_for(length: int) -> int:
    """The smallest capacity that holds ``length`` positions."""
    if length <= 4 * STEP:
        return max(STEP, -(-length // STEP) * STEP)
    power = 4 * STEP
    while power < length:
        if power * 3 // 2 >= length:
            return power * 3 // 2
        power *= 2
    return power


def places_of(first: int, last: int) -> int:
    """Positions in all banks that a row goes through while it grows from one length to another: each keeps its slots for other rows."""
    return sum({capacity_for(length) for length in range(min(first, last), last + 1)})


class Bank:
    """Slots of one capacity."""

    def __init__(self, capacity: int, device: torch.device, most: int | None = None) -> None:
        """``most``: slots that there may be; None: as many as are claimed."""
        self.capacity, self.device, self.most = capacity, device, most
        self.slots = 0
        self.free: list[int] = []
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for stored in (self.keys, self.values) for t in stored.values())

    @property
    def used(self) -> int:
        return self.slots - len(self.free)

    @property
    def top(self) -> int:
        """One above the highest slot in use; at least 2, because a batch of one product is computed another way."""
        free = set(self.free)
        return max(2, next((s + 1 for s in reversed(range(self.slots)) if s not in free), 0))

    def claim(self, count: int) -> list[int]:
        """``count`` slots, the lowest that are free."""
        if len(self.free) < count:
            short = count - len(self.free)
            grown = max(short, self.slots // 2, 2)
            grown = grown if self.most is None else max(short, min(grown, self.most - self.slots))
            self.free += range(self.slots, self.slots + grown)
            self.slots += grown
            self._arrays.clear()
            for stored in (self.keys, self.values):
                for layer, old in stored.items():
                    new = old.new_zeros(self.slots, *old.shape[1:])
                    new[: len(old)] = old
                    stored[layer] = new
        self.free.sort()
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def release(self, slots: Sequence[int]) -> None:
        self.free += slots

    def wipe(self, slot: int) -> None:
        """Torch's attention multiplies what a row must not see by zero, and zero times infinity is no number."""
        for stored in (self.keys, self.values):
            for layer in stored.values():
                layer[slot].zero_()

    def arrays(self, layer: int, like: Bank) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a layer on a CPU, made when first needed, with heads as another bank has them."""
        if layer not in self._arrays:
            if layer not in self.keys:
                _, heads, _, dim = like.keys[layer].shape
                self.stored(layer, like.keys[layer].new_empty(0, heads, dim))
            self._arrays[layer] = (self.keys[layer].numpy(), self.values[layer].numpy())
        return self._arrays[layer]

    def stored(self, layer: int, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, made when first needed, in the shape and dtype of k [tokens, kv_heads, dim]."""
        if layer not in self.keys:
            shape = (self.slots, k.shape[1], self.capacity, k.shape[2])
            self.keys[layer], self.values[layer] = k.new_zeros(shape), k.new_zeros(shape)
        return self.keys[layer], self.values[layer]

    def move(self, slots: Tensor, target: Bank, places: Tensor) -> None:
        """Copy rows into slots of a larger bank."""
        for mine, theirs in ((self.keys, target.keys), (self.values, target.values)):
            for layer, old in mine.items():
                if layer not in theirs:
                    theirs[layer] = old.new_zeros(target.slots, old.shape[1], target.capacity, old.shape[3])
                theirs[layer][:, :, : self.capacity].index_copy_(0, places, old[slots])


def copy_positions(source: Bank, places: np.ndarray, target: Bank, to: np.ndarray, length: int) -> None:
    """Keys and values of ``length`` positions from each of some places to others, on a CPU in float32. Both int64 [n, 2]: slots, and the
    first positions in them."""
    for layer in source.keys if len(places) else ():
        compiled.copy_positions(*source.arrays(layer, source), places, *target.arrays(layer, source), to, length)


@dataclass
class BankRows:
    """The rows of a decoding step that live in one bank."""

    bank: Bank
    rows: Tensor
    """int64 [n]: their places in the line."""
    slots: Tensor
    """int64 [n]"""
    top: int
    longest: int
    """The highest position among them when they were put together."""

    def begin(self, positions: Tensor, step: int) -> None:
        """Open the step number ``step`` since then: positions [decoding rows] of the tokens that are about to be read."""
        self.positions = positions[self.rows]
        self.seen = min(-(-(self.longest + step + 1) // FINE) * FINE, self.bank.capacity)
        self._masks: dict[tuple[int | None, int], Tensor] = {}
        self._write: Tensor | None = None

    def _mask(self, window: int | None, kv_heads: int) -> Tensor:
        """[top * kv_heads, 1, seen]: 0 where a row sees a key, -inf elsewhere. A slot without a row sees one key, so that nothing is
        ever a NaN."""
        if window is not None and window >= self.seen:
            window = None
        if (window, kv_heads) not in self._masks:
            newest = torch.zeros(self.top, dtype=torch.long, device=self.slots.device).index_copy_(0, self.slots, self.positions)
            back = newest[:, None] - torch.arange(self.seen, device=newest.device)
            hidden = back < 0 if window is None else (back < 0) | (back >= window)
            mask = torch.zeros(hidden.shape, device=newest.device).masked_fill_(hidden, -torch.inf)
            self._masks[window, kv_heads] = mask.repeat_interleave(kv_heads, 0)[:, None]
        return self._masks[window, kv_heads]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score: Score, out: Tensor) -> None:
        """q [line, heads, dim], k and v [line, kv_heads, dim] -> the bank's rows of out [line, heads, dim]; k and v are kept."""
        keys, values = self.bank.stored(score.layer, k)
        q, k, v = q[self.rows], k[self.rows], v[self.rows]
        (_, heads, dim), kv_heads, top = q.shape, k.shape[1], self.top
        if self._write is None:
            every = torch.arange(kv_heads, device=q.device)
            self._write = ((self.slots[:, None] * kv_heads + every) * self.bank.capacity + self.positions[:, None]).view(-1)
        keys.view(-1, dim).index_copy_(0, self._write, k.reshape(-1, dim))
        values.view(-1, dim).index_copy_(0, self._write, v.reshape(-1, dim))
        q = q.new_zeros(top, heads, dim).index_copy_(0, self.slots, q)
        groups, mask = heads // kv_heads, self._mask(score.window, kv_heads)
        q, seen = q.reshape(top * kv_heads, groups, dim), keys[:top, :, : self.seen].flatten(0, 1).mT
        logits = torch.bmm(q, seen).float() * score.scale
        if score.softcap is not None:
            logits = score.softcap * torch.tanh(logits / score.softcap)
        weights = logits.add_(mask).softmax(-1).to(v.dtype)
        found = torch.bmm(weights, values[:top, :, : self.seen].flatten(0, 1)).view(top, heads, dim).index_select(0, self.slots)
        out.index_copy_(0, self.rows, found)


@dataclass(eq=False)
class Shared:
    """A prompt's keys and values, which all its completions read."""

    bank: Bank
    slot: int
    length: int
    readers: int
    known: int = 0
    """Positions from the first on that were there before it was read."""


@dataclass
class SharingRows:
    """The rows of a decoding step on a CPU in float32 that live in one bank and read prompts in one bank."""

    bank: Bank
    shared_bank: Bank
    rows: np.ndarray
    """int64 [n]: their places in the line."""
    slots: np.ndarray
    shared_slots: np.ndarray
    shared: np.ndarray
    """int64 [n]: the lengths of their prompts."""

    def begin(self, positions: Tensor, step: int) -> None:
        """As ``BankRows.begin``."""
        self.positions = positions.numpy()[self.rows]

    def cached(self, score: Score) -> tuple[Any, ...]:
        """What ``compiled.attend_cached`` wants to know of the cache."""
        theirs = self.shared_bank.arrays(score.layer, self.shared_bank)
        own = self.bank.arrays(score.layer, self.shared_bank)
        where = self.rows, self.slots, self.positions, self.shared_slots, self.shared
        return *own, *theirs, *where, *compiled.scoring(score)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score: Score, out: Tensor) -> None:
        """As ``BankRows.attend``."""
        compiled.attend_cached(q, k, v, *self.cached(score), out=out)


@dataclass(frozen=True)
class Fill:
    """A prompt's keys and values go to these slots."""

    start: int
    length: int
    bank: Bank
    slots: Tensor
    first: int = 0
    """Their position in the prompt."""


@dataclass(frozen=True)
class Known:
    """Positions of prompts, in one bank, whose keys and values were there before the pass: int64 [n] each."""

    bank: Bank
    slots: Tensor
    positions: Tensor
    places: Tensor
    """In a line of whole prompts."""


@dataclass(frozen=True)
class Whole:
    """Makes the line of a pass that reads only the ends of some prompts one of whole prompts, so that attention takes each prompt in the
    pieces in which it would take all of it."""

    length: int
    read: Tensor
    """int64 [tokens]: the places of what the pass reads."""
    known: Sequence[Known]

    def queries(self, q: Tensor) -> Tensor:
        """Zeros for what was read before."""
        return q.new_zeros(self.length, *q.shape[1:]).index_copy_(0, self.read, q[: len(self.read)])

    def stored(self, new: Tensor, stores: Sequence[Tensor]) -> Tensor:
        """Keys, or values; ``stores``: those of the banks."""
        whole = new.new_empty(self.length, *new.shape[1:]).index_copy_(0, self.read, new[: len(self.read)])
        for known, store in zip(self.known, stores, strict=True):
            whole.index_copy_(0, known.places, store.transpose(1, 2)[known.slots, known.positions])
        return whole

    def ends(self, out: Tensor, line: int) -> Tensor:
        """Of the pass's tokens, filled up to its line."""
        return F.pad(out.index_select(0, self.read), (0, 0, 0, 0, 0, line - len(self.read)))


@dataclass
class PromptLayout:
    """Prompts that start."""

    prompts: Ragged
    """All of them whole."""
    fills: Sequence[Fill]
    whole: Whole | None = None
    """None: the pass reads all of all of them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score: Score) -> Tensor:
        for fill in self.fills:
            here = slice(fill.start, fill.start + fill.length)
            for new, stored in zip((k[here], v[here]), fill.bank.stored(score.layer, k), strict=True):
                copies = new.transpose(0, 1).expand(len(fill.slots), -1, -1, -1)
                stored[:, :, fill.first : fill.first + fill.length].index_copy_(0, fill.slots, copies)
        if self.whole is None:
            return self.prompts.attend(q, k, v, score)
        stores = [known.bank.stored(score.layer, k) for known in self.whole.known]
        keys, values = (self.whole.stored(new, [store[i] for store in stores]) for i, new in enumerate((k, v)))
        return self.whole.ends(self.prompts.attend(self.whole.queries(q), keys, values, score), len(q))


@dataclass
class StepLayout:
    """A decoding step: one token of each row."""

    banks: Sequence[BankRows | SharingRows]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score: Score) -> Tensor:
        out = torch.zeros_like(q)
        for bank in self.banks:
            bank.attend(q, k, v, score, out)
        return out
