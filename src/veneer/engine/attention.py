"""Attention over tokens in one line: the seam through which Hugging Face's module code meets packed rows and caches.

A pass hands the model all its tokens as one row, [1, tokens]. Everything but attention works token by token; attention
asks the pass's ``Layout`` which tokens see which. transformers calls ``attend_in_line`` through its attention registry
(https://huggingface.co/docs/transformers/attention_interface), with the layout as a keyword of the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

IMPLEMENTATION = "veneer_in_line"
STEPS = ((192, 32), (768, 64), (1 << 62, 256))
"""Below each length, rows are padded to multiples of the number beside it, which is how many queries the CPU's attention kernel
takes at a time: so each row is computed in the same pieces whatever its neighbours are."""


@dataclass(frozen=True)
class Score:
    """How one layer turns queries and keys into scores."""

    layer: int
    scale: float
    window: int | None = None
    """A query sees keys less than this many positions back; None: all."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap) (Gemma 2, https://arxiv.org/abs/2408.00118)."""


class Layout(Protocol):
    """Which tokens of a pass see which keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score: Score) -> Tensor:
        """q [tokens, heads, dim], k and v [tokens, kv_heads, dim] -> [tokens, heads, dim]; padding tokens get anything finite."""
        ...


def attend_in_line(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, dim] as transformers hands it over -> [1, tokens, heads, dim]."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return layout.attend(q, k, v, Score(module.layer_idx, scale, sliding_window, softcap))[None], None


AttentionInterface.register(IMPLEMENTATION, attend_in_line)


def scores_to_output(q: Tensor, k: Tensor, v: Tensor, score: Score, mask: Tensor | None, causal: bool) -> Tensor:
    """Plain attention of q [rows, heads, queries, dim] over k, v [rows, kv_heads, keys, dim]; mask bool, True sees."""
    if score.softcap is None:
        grouped = k.shape[1] != q.shape[1]
        if grouped and q.is_cuda and mask is not None:  # CUDA's masked kernels take no groups and would fall back to the slow path
            k, v, grouped = k.repeat_interleave(q.shape[1] // k.shape[1], 1), v.repeat_interleave(q.shape[1] // v.shape[1], 1), False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=score.scale, enable_gqa=grouped)
    rows, heads, queries, dim = q.shape
    logits = (q.reshape(rows, k.shape[1], -1, dim) @ k.mT).view(rows, heads, queries, -1) * score.scale
    logits = score.softcap * torch.tanh(logits / score.softcap)
    if causal:
        mask = torch.ones(queries, queries, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    weights = logits.softmax(-1, dtype=torch.float32).to(q.dtype).view(rows, k.shape[1], -1, k.shape[2])
    return (weights @ v).view(rows, heads, queries, dim)


# ---------------------------------------------------------------- rows of one pass


@dataclass(frozen=True)
class Row:
    """Consecutive tokens of the line that continue one sequence, after a prefix that may serve several rows."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass
class _Block:
    """Rows of about one length, padded to [rows, queries] and [rows, keys]: a table of places in the line for each."""

    rows: int
    columns: int
    """Keys of a row."""
    queries: Tensor | slice
    keys: Tensor | slice
    mask: Tensor | None
    """bool [rows, 1, queries, keys]; None: causal, no prefix."""
    distance: Tensor | None
    """Positions from key to query, int32 [rows, 1, queries, keys]; None where no window is shorter than the rows."""
    windows: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def seen(self, window: int | None) -> Tensor | None:
        if window is None or self.columns <= window:
            return self.mask
        assert self.distance is not None, "the model slides its attention without saying so in its configuration"
        if window not in self.windows:
            near = (self.distance >= 0) & (self.distance < window)
            self.windows[window] = near if self.mask is None else near & self.mask
        return self.windows[window]


class Ragged:
    """Rows of any lengths that attend causally, each to itself and its prefix."""

    def __init__(self, rows: Sequence[Row], device: torch.device, window: int | None) -> None:
        """``window``: of the layers that have one. Rows with prefixes are padded to the longest of their block, and so should be blocks
        that always run together."""
        self.blocks: list[_Block] = []
        self.attended = 0
        """Query places, padding included."""
        places: list[np.ndarray] = []
        by_width: dict[tuple[bool, int], list[Row]] = {}
        for row in rows:
            by_width.setdefault((row.prefix_length > 0, padded(row.length)), []).append(row)
        groups = [sorted(group, key=lambda row: row.start) for group in by_width.values()]
        for group in groups:
            block, place = _block(group, device, window)
            self.blocks.append(block)
            places.append(place + self.attended)
            self.attended += block.rows * place.shape[1]
        lengths = [np.array([row.length for row in group]) for group in groups]
        self.tokens = sum(row.length for row in rows)
        inverse = np.zeros(self.tokens, np.int64)
        for group, place, length in zip(groups, places, lengths, strict=True):
            real = np.arange(place.shape[1]) < length[:, None]
            starts = np.array([row.start for row in group])[:, None] + np.arange(place.shape[1])
            inverse[starts[real]] = place[real]
        in_order = self.attended == self.tokens and bool((inverse == np.arange(self.tokens)).all())
        self.inverse = None if in_order else torch.from_numpy(inverse).to(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score: Score) -> Tensor:
        outputs = []
        for block in self.blocks:
            qb = _rows(q, block.queries, block.rows)
            kb, vb = (_rows(t, block.keys, block.rows) for t in (k, v))
            mask = block.seen(score.window)
            out = scores_to_output(qb, kb, vb, score, mask, causal=mask is None)
            outputs.append(out.transpose(1, 2).reshape(-1, *q.shape[1:]))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self.inverse is not None:
            out = out.index_select(0, self.inverse)
        return out if len(out) == len(q) else F.pad(out, (0, 0, 0, 0, 0, len(q) - len(out)))


def padded(length: int) -> int:
    """The number of queries that a row of this length takes up."""
    step = next(step for below, step in STEPS if length < below)
    return -(-length // step) * step


def _rows(t: Tensor, places: Tensor | slice, rows: int) -> Tensor:
    """[tokens, heads, dim] -> [rows, heads, columns, dim]."""
    picked = t[places] if isinstance(places, slice) else t.index_select(0, places)
    return picked.reshape(rows, -1, *t.shape[1:]).transpose(1, 2)


def _block(group: list[Row], device: torch.device, window: int | None) -> tuple[_Block, np.ndarray]:
    """A block, and [rows, queries] where each of its outputs will lie."""
    start, length, prefix_start, prefix = (
        np.array([getattr(row, name) for row in group])[:, None] for name in ("start", "length", "prefix_start", "prefix_length")
    )
    i, j = np.arange(padded(int(length.max()))), np.arange(prefix.max())
    queries = start + np.minimum(i, length - 1)  # padding repeats the last token
    keys = np.concatenate([prefix_start + np.minimum(j, np.maximum(prefix - 1, 0)), queries], axis=1)
    mask = None
    if len(j):
        own = np.broadcast_to(i[:, None] >= i, (len(group), len(i), len(i)))
        before = np.broadcast_to((j < prefix)[:, None, :], (len(group), len(i), len(j)))
        mask = torch.from_numpy(np.concatenate([before, own], axis=2)[:, None]).to(device)
    distance = None
    if window is not None and keys.shape[1] > window:
        at, key_at = prefix + i, np.concatenate([np.broadcast_to(j, (len(group), len(j))), prefix + i], axis=1)
        distance = torch.from_numpy((at[:, :, None] - key_at[:, None, :]).astype(np.int32)[:, None]).to(device)
    place = np.arange(len(group) * len(i)).reshape(len(group), len(i))
    return _Block(len(group), keys.shape[1], _places(queries, device), _places(keys, device), mask, distance), place


def _places(table: np.ndarray, device: torch.device) -> Tensor | slice:
    """A table of places; a slice where they are consecutive, which spares the copy."""
    flat = table.reshape(-1)
    if (np.diff(flat) == 1).all():
        return slice(int(flat[0]), int(flat[-1]) + 1)
    return torch.from_numpy(flat).to(device)
