"""From logits to tokens: the distribution that was asked for, and draws that depend on (seed, sequence, position) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from veneer.engine import compiled
from veneer.types import SamplingParams

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BITS = 2**64


def _signed(x: int) -> int:
    """The int64 with the bits of an unsigned number."""
    x %= BITS
    return x - BITS if x >= BITS // 2 else x


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea & Flood, https://doi.org/10.1145/2714064.2660195) on the bits of int64 numbers."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(FIRST)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(SECOND)
    return x ^ ((x >> 31) & (2**33 - 1))


def _mix_one(x: int) -> int:
    """The same on one unsigned number."""
    x = (x ^ (x >> 30)) * FIRST % BITS
    x = (x ^ (x >> 27)) * SECOND % BITS
    return x ^ (x >> 31)


def sequence_key(seed: int, sequence: int) -> int:
    """What stands for (seed, sequence) in ``uniforms``; an int64."""
    return _signed(_mix_one((_mix_one(seed % BITS) + GOLDEN * (sequence + 1)) % BITS))


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1) with 24 random bits, a pure function of key and position. Both int64 and of one shape; float32."""
    bits = _mix(keys + (positions + 1) * _signed(GOLDEN))
    return ((bits >> 40) & (2**24 - 1)).to(torch.float32) * 2**-24


def truncate(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside the top k and the nucleus. logits [rows, vocab] after temperature; top_k and top_p [rows]; k 0 keeps all.
    The nucleus is the smallest set whose probability reaches top_p, taken after top-k, as in transformers."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    k = torch.where(top_k > 0, top_k, logits.shape[1])[:, None]
    ordered = ordered.masked_fill(rank >= k, -torch.inf)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    outside = (before >= top_p[:, None]) & (top_p < 1)[:, None] & (rank > 0)  # rounding may take a sum of everything to 1 early
    ordered = ordered.masked_fill(outside, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(1, order, ordered)


@dataclass(frozen=True)
class Likeliest:
    """The k likeliest tokens of the rows that asked for k, sorted."""

    rows: Sequence[int]
    tokens: np.ndarray
    """int64 [len(rows), k]; 0 where fewer than k have any probability."""
    logprobs: np.ndarray
    """float32 [len(rows), k]; -inf there."""


@dataclass(frozen=True)
class Drawn:
    """One token for each row."""

    tokens: Tensor
    """int64 [rows]"""
    logprobs: Tensor
    """[rows]"""
    likeliest: Sequence[Likeliest] = ()


class Chooser:
    """Draws one token per row by inverting the cumulative distribution at a given uniform number."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device, likeliest: Sequence[int] = ()) -> None:
        """``likeliest``: how many of the likeliest tokens each row wants to know; none by default."""
        self.tempered = any(p.temperature not in (0, 1) for p in params)
        self.truncates = any(p.top_k > 0 or p.top_p < 1 for p in params)
        self.any_greedy = any(p.temperature == 0 for p in params)
        self.temperature = torch.tensor([p.temperature or 1.0 for p in params], device=device)[:, None] if self.tempered else None
        self.greedy = torch.tensor([p.temperature == 0 for p in params], device=device)[:, None] if self.any_greedy else None
        if self.truncates:
            self.top_k = torch.tensor([0 if p.temperature == 0 else p.top_k for p in params], device=device)
            self.top_p = torch.tensor([1.0 if p.temperature == 0 else p.top_p for p in params], device=device)
        self.wanted = {k: [row for row, wants in enumerate(likeliest) if wants == k] for k in set(likeliest) - {0}}
        """Rows by k: which of equally likely tokens are taken must not depend on what others ask for."""

    def shaped(self, logits: Tensor) -> Tensor:
        """Logits [rows, vocab] of the distributions that are sampled: after temperature, top-k and top-p; a greedy row's as they are."""
        if self.temperature is not None:
            logits = logits / self.temperature
        return truncate(logits, self.top_k, self.top_p) if self.truncates else logits

    def draw(self, logits: Tensor, uniform: Tensor) -> Drawn:
        """logits [rows, vocab], uniform [rows]. What is told is of the distribution that is sampled; a greedy row's has temperature 1."""
        shaped = self.shaped(logits)
        return Drawn(*self(shaped, uniform), self.likeliest(shaped))

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Shaped logits [rows, vocab], uniform [rows] -> tokens [rows], logprobs [rows]."""
        if compiled.runs_on(logits):
            return compiled.choose(logits, uniform if self.greedy is None else torch.where(self.greedy[:, 0], -1.0, uniform))
        logprobs = logits.log_softmax(-1)
        cumulative = logprobs.exp().cumsum(-1)
        total = cumulative[:, -1:]
        target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))  # below it, however rounded
        tokens = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)
        if self.greedy is not None:
            tokens = torch.where(self.greedy, logits.argmax(-1, keepdim=True), tokens)
        return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]

    def likeliest(self, logits: Tensor) -> list[Likeliest]:
        """Of shaped logits [rows, vocab], for the rows that want them."""
        found: list[Likeliest] = []
        for k, rows in self.wanted.items():
            here = logits[rows]
            tokens = here.topk(k).indices
            logprobs = compiled.logprobs_of(here, tokens) if compiled.runs_on(here) else here.log_softmax(-1).gather(1, tokens)
            found.append(Likeliest(rows, tokens.masked_fill(logprobs == -torch.inf, 0).cpu().numpy(), logprobs.cpu().numpy()))
        return found
