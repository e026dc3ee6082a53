"""Keys and values of prompts that were read before, for prompts that begin alike.

They are kept in blocks of 16 tokens, each found by its parent, its tokens and the digests of the weights that read them, as in
vLLM's automatic prefix caching (https://docs.vllm.ai/en/latest/design/prefix_caching.html); looked up in a dictionary, so
compared exactly. What is found has the bits that reading it again would give: see ``grain``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from threading import Lock
from typing import Any

import numpy as np
import torch

from veneer.engine.attention import STEPS, Ragged, Row, Score, padded
from veneer.engine.base import Base
from veneer.engine.cache import Bank, copy_positions
from veneer.engine.memory import out_of_memory
from veneer.engine.request import SampleRequest

BLOCK = 16
"""Tokens."""
KEPT = 2**26
"""Bytes."""
KEYS_AT_ONCE = 512
"""The CPU's attention kernel takes so many keys of a row at a time."""
SUMS = (256, 128)
"""A product over more than so many of them adds up in two halves: on an Intel Xeon, and on an AMD EPYC."""

Key = tuple[object, ...]


def grain(length: int, stop: int, window: int | None, longest: int) -> Key:
    """In which pieces attention at the positions before ``stop`` is computed in a row of this length: how many queries at a time, and
    over how many keys where a sum is cut by their number, as those over more than ``longest`` are. Zeros behind the last key that is
    seen change nothing else."""
    row = padded(length)
    if window is not None and row > window:
        return "masked", row
    step = next(step for below, step in STEPS if row < below)
    rest = row % KEYS_AT_ONCE
    cut = rest > longest and stop > row - rest + rest // 2
    return "causal", step, rest if cut else 0


@cache
def longest_sum(dim: int, context: int) -> int | None:
    """The longest of SUMS with which rows of one grain have the same bits on this machine; None: its kernels cut their sums otherwise."""
    return next((longest for longest in SUMS if grains_hold(dim, context, longest)), None)


def grains_hold(dim: int, context: int, longest: int) -> bool:
    """Whether rows of one grain have the same bits on this machine, tried out on random rows of each."""
    lengths = [n for n in (*range(32, 192, 32), *range(192, 768, 64), *range(768, 1793, 256)) if n <= context]
    q, k, v = (torch.randn(max(lengths, default=1), 1, dim, generator=torch.Generator().manual_seed(i)) for i in range(3))
    first: dict[Key, torch.Tensor] = {}
    for n in lengths:
        out = Ragged([Row(0, n)], q.device, None).attend(q[:n], k[:n], v[:n], Score(0, dim**-0.5))
        for start in range(0, n, BLOCK):
            here = out[start : start + BLOCK]
            if not torch.equal(first.setdefault((start, grain(n, start + BLOCK, None, longest)), here), here):
                return False
    return True


@dataclass(eq=False)
class _Block:
    key: Key
    serial: int
    """Names it to its children; never given twice."""
    slot: int
    digests: frozenset[str]
    """Of all adapters behind its numbers, those of the blocks before it included."""


class Prefixes:
    """The blocks of an engine; least recently used first out. Crews on several threads may keep what they read at the same time."""

    def __init__(self, base: Base) -> None:
        self.base, self._serials, self._lock = base, count(), Lock()
        self._begin(KEPT // (base.cache_numbers * BLOCK * 4))

    def _begin(self, most: int) -> None:
        """With nothing, and room for ``most`` blocks."""
        self.most, self.bank = most, Bank(BLOCK, self.base.device, most)
        self._blocks: OrderedDict[Key, _Block] = OrderedDict()
        """By parent and what ``_parts`` says; a block is never used later than its children."""

    def recall(self, request: SampleRequest, bank: Bank, slot: int) -> int:
        """Copy what is there of a prompt to a slot; how many of its tokens that is. The last one is always left to be read."""
        longest = self._longest(self.bank)
        if longest is None:
            return 0
        with self._lock:
            found = self._find(request, longest)[: (len(request.prompt) - 1) // BLOCK]
            self._touch(found)
            copy_positions(self.bank, _places(found), bank, _in_row(slot, range(len(found))), BLOCK)
        return len(found) * BLOCK

    def keep(self, request: SampleRequest, bank: Bank, slot: int) -> None:
        """Take over a prompt that was read to a slot, as far as it fills blocks."""
        longest = self._longest(bank)
        if len(request.prompt) < BLOCK or longest is None:
            return
        with self._lock:
            chain = self._find(request, longest)
            self._touch(chain)  # so that what makes room is not its own beginning
            known, parts = len(chain), list(self._parts(request, longest))[len(chain) : self.most]
            slots = self._claim(len(parts))
            if not slots:
                return
            for part, place in zip(parts, slots, strict=True):
                parent = chain[-1] if chain else None
                digests = frozenset(digest for _, digest in part[-1] if digest is not None)
                key = (None if parent is None else parent.serial, *part)
                block = _Block(key, next(self._serials), place, digests | (parent.digests if parent is not None else frozenset()))
                self._blocks[key] = block
                chain.append(block)
            self._touch(chain)
            copy_positions(bank, _in_row(slot, range(known, len(chain))), self.bank, _places(chain[known:]), BLOCK)

    def drop(self, digest: str) -> None:
        """Forget whatever an adapter with this digest had a part in."""
        with self._lock:
            for block in [block for block in self._blocks.values() if digest in block.digests]:
                self._forget(block)

    def _longest(self, bank: Bank) -> int | None:
        """Of a bank's keys; None: it has none yet, or cannot be shared."""
        keys = next(iter(bank.keys.values()), None)
        return None if keys is None else longest_sum(keys.shape[-1], self.base.context_length)

    def _parts(self, request: SampleRequest, longest: int) -> Iterator[tuple[Any, ...]]:
        """What tells the blocks of a prompt from others, beside their parents: grain, tokens, and the digests by place within them."""
        length, tokens, spans = len(request.prompt), request.prompt.tobytes(), request.spans
        width = request.prompt.itemsize
        for start in range(0, length - BLOCK + 1, BLOCK):
            stop = start + BLOCK
            weights = tuple((max(span.start - start, 0), span.digest) for span in spans if span.start < stop and start < span.stop)
            yield grain(length, stop, self.base.window, longest), tokens[start * width : stop * width], weights

    def _find(self, request: SampleRequest, longest: int) -> list[_Block]:
        """The blocks of a prompt that are there, from its beginning on."""
        found: list[_Block] = []
        for part in self._parts(request, longest):
            block = self._blocks.get((found[-1].serial if found else None, *part))
            if block is None:
                break
            found.append(block)
        return found

    def _touch(self, chain: Sequence[_Block]) -> None:
        for block in reversed(chain):
            self._blocks.move_to_end(block.key)

    def _claim(self, count: int) -> list[int]:
        """Slots for new blocks; none where there is no memory for what is only a convenience."""
        while len(self._blocks) + count > self.most:
            self._forget(next(iter(self._blocks.values())))
        try:
            return self.bank.claim(count)
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._begin(len(self._blocks) // 2)
            return []

    def _forget(self, block: _Block) -> None:
        del self._blocks[block.key]
        self.bank.release([block.slot])


def _places(blocks: Sequence[_Block]) -> np.ndarray:
    """int64 [blocks, 2]: slots, and where in them."""
    return np.array([(block.slot, 0) for block in blocks], np.int64).reshape(-1, 2)


def _in_row(slot: int, numbers: Iterable[int]) -> np.ndarray:
    """The same for blocks of a prompt."""
    return np.array([(slot, number * BLOCK) for number in numbers], np.int64).reshape(-1, 2)
