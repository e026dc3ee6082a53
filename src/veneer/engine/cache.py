"""Keys and values of running completions, in banks of slots: preallocated, and as long as a row needs for now.

A bank holds rows of one capacity, [slots, kv_heads, capacity, dim] per layer. A row that outgrows its bank moves to the
next; capacities are fixed numbers, so the arithmetic of a row's attention never depends on how long its neighbours are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.engine.attention import Ragged, Score

FINE = 32
"""Attention reads keys up to a multiple of this in small banks."""
SMALL = 256
"""Up to this capacity a sum over more keys, all with weight zero, gives the same bits; longer sums are cut up by their length."""
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


class Bank:
    """Slots of one capacity."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.slots = 0
        self.free: list[int] = []
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.mask = torch.empty(0, capacity, device=device)
        """0 where a slot has a key, -inf elsewhere, [slots, capacity]; a slot that was never used has one of zeros, so that
        nothing is ever a NaN."""

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
            grown = max(count - len(self.free), self.slots // 2, 2)
            self.free += range(self.slots, self.slots + grown)
            self.slots += grown
            self.mask = F.pad(self.mask, (0, 0, 0, grown), value=-torch.inf)
            self.mask[-grown:, 0] = 0
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

    def stored(self, layer: int, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, made when first needed, in the shape and dtype of k [tokens, kv_heads, dim]."""
        if layer not in self.keys:
            shape = (self.slots, k.shape[1], self.capacity, k.shape[2])
            self.keys[layer], self.values[layer] = k.new_zeros(shape), k.new_zeros(shape)
        return self.keys[layer], self.values[layer]

    def open(self, slots: Tensor, length: int) -> None:
        """Say that these slots hold keys at the first ``length`` positions and none behind."""
        self.mask[slots] = torch.where(torch.arange(self.capacity, device=self.device) < length, 0.0, -torch.inf)

    def move(self, slots: Tensor, target: Bank, places: Tensor) -> None:
        """Copy rows into slots of a larger bank."""
        for mine, theirs in ((self.keys, target.keys), (self.values, target.values)):
            for layer, old in mine.items():
                if layer not in theirs:
                    theirs[layer] = old.new_zeros(target.slots, old.shape[1], target.capacity, old.shape[3])
                theirs[layer][:, :, : self.capacity].index_copy_(0, places, old[slots])
        target.mask[places] = F.pad(self.mask[slots], (0, target.capacity - self.capacity), value=-torch.inf)


@dataclass
class BankRows:
    """The rows of a decoding step that live in one bank."""

    bank: Bank
    rows: Tensor | None
    """int64 [n]: their places in the line; None: all the decoding rows, and slot by slot."""
    slots: Tensor
    """int64 [n]"""
    top: int
    longest: int
    """The highest position among them when they were put together."""

    def begin(self, positions: Tensor, step: int) -> None:
        """Open the step number ``step`` since then: positions [decoding rows] of the tokens that are about to be read."""
        self.seen = (
            min(-(-(self.longest + step + 1) // FINE) * FINE, self.bank.capacity) if self.bank.capacity <= SMALL else self.bank.capacity
        )
        self.positions = positions if self.rows is None else positions[self.rows]
        self.bank.mask[self.slots, self.positions] = 0
        self._masks: dict[tuple[int | None, int], Tensor] = {}
        self._write: Tensor | None = None

    def _mask(self, window: int | None, kv_heads: int) -> Tensor:
        """[top * kv_heads, 1, seen]: 0 where a row sees a key, -inf elsewhere."""
        if window is not None and window >= self.seen:
            window = None
        if (window, kv_heads) not in self._masks:
            mask = self.bank.mask[: self.top, : self.seen]
            if window is not None:
                newest = torch.zeros(self.top, dtype=torch.long, device=mask.device).index_copy_(0, self.slots, self.positions)
                far = newest[:, None] - torch.arange(self.seen, device=mask.device) >= window
                mask = mask.masked_fill(far, -torch.inf)
            self._masks[window, kv_heads] = mask.repeat_interleave(kv_heads, 0)[:, None]
        return self._masks[window, kv_heads]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score: Score) -> Tensor:
        """q [n, heads, dim], k and v [n, kv_heads, dim] -> [n, heads, dim]; k and v are kept."""
        keys, values = self.bank.stored(score.layer, k)
        (n, heads, dim), kv_heads, top = q.shape, k.shape[1], self.top
        if self._write is None:
            every = torch.arange(kv_heads, device=q.device)
            self._write = ((self.slots[:, None] * kv_heads + every) * self.bank.capacity + self.positions[:, None]).view(-1)
        keys.view(-1, dim).index_copy_(0, self._write, k.reshape(-1, dim))
        values.view(-1, dim).index_copy_(0, self._write, v.reshape(-1, dim))
        if self.rows is not None:
            q = q.new_zeros(top, heads, dim).index_copy_(0, self.slots, q)
        elif n < top:
            q = F.pad(q, (0, 0, 0, 0, 0, top - n))
        groups, mask = heads // kv_heads, self._mask(score.window, kv_heads)
        q, seen = q.reshape(top * kv_heads, groups, dim), keys[:top, :, : self.seen].flatten(0, 1).mT
        if score.softcap is None and q.dtype == torch.float32:
            weights = torch.baddbmm(mask.expand(-1, groups, -1), q, seen, alpha=score.scale).softmax(-1)
        else:
            logits = torch.bmm(q, seen).float() * score.scale
            if score.softcap is not None:
                logits = score.softcap * torch.tanh(logits / score.softcap)
            weights = logits.add_(mask).softmax(-1).to(v.dtype)
        out = torch.bmm(weights, values[:top, :, : self.seen].flatten(0, 1)).view(top, heads, dim)
        return out[:n] if self.rows is None else out.index_select(0, self.slots)


@dataclass(frozen=True)
class Fill:
    """A prompt's keys and values go to the slots of its completions."""

    start: int
    length: int
    bank: Bank
    slots: Tensor


@dataclass
class StepLayout:
    """A step of the sampler: decoding rows first, one token each, then whole prompts."""

    decoding: int
    banks: Sequence[BankRows]
    prompts: Ragged | None
    fills: Sequence[Fill]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score: Score) -> Tensor:
        parts: list[Tensor] = []
        n = self.decoding
        if n:
            parts.append(self._decode(q[:n], k[:n], v[:n], score))
        if self.prompts is not None:
            parts.append(self.prompts.attend(q[n:], k[n:], v[n:], score))
            for fill in self.fills:
                here = slice(n + fill.start, n + fill.start + fill.length)
                for new, stored in zip((k[here], v[here]), fill.bank.stored(score.layer, k), strict=True):
                    copies = new.transpose(0, 1).expand(len(fill.slots), -1, -1, -1)
                    stored[:, :, : fill.length].index_copy_(0, fill.slots, copies)
        elif len(q) > n:
            parts.append(torch.zeros_like(q[n:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, score: Score) -> Tensor:
        if len(self.banks) == 1 and self.banks[0].rows is None:
            return self.banks[0].attend(q, k, v, score)
        out = torch.zeros_like(q)
        for bank in self.banks:
            rows = slice(None) if bank.rows is None else bank.rows
            out[rows] = bank.attend(q[rows], k[rows], v[rows], score)
        return out
