"""Sampling: many requests, many adapters, one batch that decodes in lockstep.

Each distinct (adapter, prompt) is prefilled once and its cache is shared out to its completions. Rows that finish are
dropped from the batch. Randomness is counter-based: the draw at a position depends on (seed, sequence, position) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from veneer.engine.base import Base
from veneer.engine.lora import Segment
from veneer.types import Floats, SamplingParams, Tokens

ROWS = 256
"""Completions that decode together."""
COMPACT = 0.75
"""The batch is shrunk once fewer than this share of its rows are still running."""


class Weights(Protocol):
    """What runs the model: ``LoraStack`` or ``FullStack``."""

    mixes_slots: bool

    def call(self, segments: Sequence[Segment], *, train: bool, selected: Tensor | None = None, **inputs: Any) -> Tensor: ...


@dataclass
class SampleRequest:
    prompt: Tokens
    slot: int | None
    """Bound by the engine when the request's turn comes."""
    params: SamplingParams
    n: int
    prompt_logprobs: bool = False


@dataclass
class Completion:
    """A row while it grows."""

    request: SampleRequest
    index: int
    budget: int
    uniforms: Floats
    stop_tokens: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: str | None = None


def uniforms(seed: int, sequence: int, count: int) -> Floats:
    """[count] numbers in [0, 1), a pure function of (seed, sequence, position): SplitMix64's finaliser over a counter
    (Steele, Lea & Flood, https://doi.org/10.1145/2714064.2660195)."""
    with np.errstate(over="ignore"):
        x = _mix(np.array([seed & (2**64 - 1)], np.uint64))
        x = _mix(x + np.uint64(0x9E3779B97F4A7C15) * np.uint64(sequence + 1))
        x = _mix(x + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=np.uint64))
    return ((x >> np.uint64(40)).astype(np.float32)) * np.float32(2**-24)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------- the distribution


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


class Chooser:
    """Draws one token per row by inverting the cumulative distribution at a given uniform number."""

    def __init__(self, rows: Sequence[Completion], device: torch.device) -> None:
        params = [row.request.params for row in rows]
        self.temperature = torch.tensor([p.temperature for p in params], device=device)
        self.top_k = torch.tensor([p.top_k for p in params], device=device)
        self.top_p = torch.tensor([p.top_p for p in params], device=device)
        self.greedy = self.temperature == 0
        self.any_greedy, self.tempered = bool(self.greedy.any()), bool((self.temperature != 1).any())
        self.truncates = any(p.top_k > 0 or p.top_p < 1 for p in params)

    def select(self, kept: Tensor) -> None:
        for name in ("temperature", "top_k", "top_p", "greedy"):
            setattr(self, name, getattr(self, name)[kept])

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """logits [rows, vocab], uniform [rows] -> tokens [rows], logprobs [rows]. A greedy row reports temperature 1."""
        if self.tempered:
            logits = logits / torch.where(self.greedy, 1.0, self.temperature)[:, None]
        if self.truncates:
            kept = truncate(logits, self.top_k, self.top_p)
            logits = torch.where(self.greedy[:, None], logits, kept)
        logprobs = logits.log_softmax(-1)
        cumulative = logprobs.exp().cumsum(-1)
        total = cumulative[:, -1:]
        target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))  # below it, however rounded
        tokens = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)
        if self.any_greedy:
            tokens = torch.where(self.greedy[:, None], logits.argmax(-1, keepdim=True), tokens)
        return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


# ---------------------------------------------------------------- the cache


class PreallocatedLayer(DynamicLayer):
    """A cache layer with room for the whole completion, so that a decoding step writes one column instead of copying all."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, dim = key_states.shape
            self._keys = key_states.new_empty(rows, heads, self.capacity, dim)
            self._values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[3])
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self.length = end
        return self._view()

    def _view(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        self._keys, self._values = self._keys[indices], self._values[indices]
        self._view()


def make_cache(base: Base, capacity: int) -> tuple[DynamicCache, bool]:
    """transformers' cache for this model, its plain layers preallocated, and whether one bool mask does for all layers."""
    cache = DynamicCache(config=base.model.config)
    plain = bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)
    plain = plain and base.model.config._attn_implementation == "sdpa"  # eager attention adds its mask: a bool one would be wrong
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache, plain


# ---------------------------------------------------------------- the loop


@torch.no_grad()
def sample_all(base: Base, weights: Weights, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
    """Completions of every request, in request order."""
    completions = [[_start(base, request, i) for i in range(request.n)] for request in requests]
    rows = [row for group in completions for row in group if row.budget > 0]
    rows.sort(key=lambda row: (-1 if row.request.slot is None else row.request.slot, len(row.request.prompt)))
    for batch in _cut(rows, weights.mixes_slots):
        _decode(base, weights, batch)
    return completions


def _start(base: Base, request: SampleRequest, index: int) -> Completion:
    budget = min(request.params.max_tokens, base.context_length - len(request.prompt))
    stop = request.params.stop_token_ids
    stop_tokens = frozenset(base.eos_token_ids if stop is None else stop)
    row = Completion(request, index, budget, uniforms(request.params.seed, index, budget), stop_tokens)
    row.stop_reason = "length" if budget == 0 else None
    return row


def _cut(rows: list[Completion], mixes_slots: bool) -> list[list[Completion]]:
    batches: list[list[Completion]] = []
    for row in rows:
        full = not batches or len(batches[-1]) == ROWS
        if full or (not mixes_slots and batches[-1][0].request.slot != row.request.slot):
            batches.append([])
        batches[-1].append(row)
    return batches


def _segments(rows: Sequence[Completion]) -> list[Segment]:
    segments: list[Segment] = []
    for row in rows:
        slot = row.request.slot
        if segments and segments[-1].slot == slot:
            segments[-1] = Segment(slot, segments[-1].rows + 1)
        else:
            segments.append(Segment(slot, 1))
    return segments


def _decode(base: Base, weights: Weights, rows: list[Completion]) -> None:
    """Prefill the distinct prompts, left-padded to one width, then draw a token a step for every row until all are done."""
    device = base.device
    leaders = list({(r.request.slot, r.request.prompt.tobytes()): r for r in rows}.values())
    place = {(r.request.slot, r.request.prompt.tobytes()): i for i, r in enumerate(leaders)}
    width = max(len(r.request.prompt) for r in rows)
    capacity = width + max(r.budget for r in rows)
    tokens = torch.zeros(len(leaders), width, dtype=torch.long)
    mask = torch.zeros(len(leaders), capacity, dtype=torch.long)
    for i, row in enumerate(leaders):
        tokens[i, width - len(row.request.prompt) :] = torch.from_numpy(row.request.prompt)
        mask[i, width - len(row.request.prompt) :] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    padded = bool((mask == 0).any())
    cache, plain = make_cache(base, capacity)
    positions = (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
    prefill_mask = mask[:, :width] if padded else None
    logits = weights.call(
        _segments(leaders), train=False, input_ids=tokens, attention_mask=prefill_mask, position_ids=positions, past_key_values=cache
    )
    shared = torch.tensor([place[(r.request.slot, r.request.prompt.tobytes())] for r in rows], device=device)
    cache.batch_select_indices(shared)
    logits, mask, position = logits[shared], mask[shared], positions[shared, -1:]
    choose = Chooser(rows, device)
    draws = torch.stack([torch.from_numpy(np.resize(r.uniforms, capacity - width)) for r in rows], dim=1).to(device)
    for step in range(capacity - width):
        chosen, logprobs = choose(logits, draws[step])
        _append(base, rows, chosen.tolist(), logprobs.tolist())
        running = [i for i, row in enumerate(rows) if row.stop_reason is None]
        if not running:
            return
        if len(running) <= COMPACT * len(rows):
            kept = torch.tensor(running, device=device)
            rows = [rows[i] for i in running]
            cache.batch_select_indices(kept)
            choose.select(kept)
            chosen, mask, position, draws = chosen[kept], mask[kept], position[kept], draws[:, kept]
        position = position + 1
        attention: Tensor | None = mask[:, : width + step + 1] if padded else None
        if attention is not None and plain:  # as sdpa takes it: no need for transformers to build it anew each step
            attention = attention[:, None, None, :].bool()
        logits = weights.call(
            _segments(rows),
            train=False,
            input_ids=chosen[:, None],
            attention_mask=attention,
            position_ids=position,
            past_key_values=cache,
        )


def _append(base: Base, rows: list[Completion], tokens: list[int], logprobs: list[float]) -> None:
    for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
        if row.stop_reason is not None:
            continue
        row.tokens.append(token)
        row.logprobs.append(logprob)
        if token in row.stop_tokens or _ends_with_stop(base, row):
            row.stop_reason = "stop"
        elif len(row.tokens) >= row.budget:
            row.stop_reason = "length"


def _ends_with_stop(base: Base, row: Completion) -> bool:
    """Whether the newest token completed a stop text. A token is at least one byte, so a tail of that many tokens is enough."""
    if not row.request.params.stop:
        return False
    longest = max(len(text.encode()) for text in row.request.params.stop)
    tail = base.decode(row.tokens[-longest:])
    before = base.decode(row.tokens[-longest:-1])
    return any(text in tail and text not in before for text in row.request.params.stop)
