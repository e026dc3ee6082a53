"""One forward pass: the tokens of many rows and many adapters in one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.engine.attention import Layout

TILE = 16
"""A float32 matrix product on one thread gives a row the same bits in any batch of at least this many rows, and others in
smaller ones: shorter batches are filled up, so that no result depends on its company."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens that run through one adapter; slot None is the base alone."""

    slot: int | None
    tokens: int
    wanted: int
    """How many of their final hidden states are wanted."""


@dataclass
class Flat:
    """All that a pass reads. Its line may be longer than its segments: the rest is filling."""

    tokens: Tensor
    """int64 [line]."""
    positions: Tensor
    """int64 [line], each within its own sequence."""
    layout: Layout
    segments: Sequence[Segment]
    wanted: Tensor
    """int64 [n]: the places whose final hidden states are wanted, in the order of the segments."""


def filled(values: list[int], device: torch.device) -> Tensor:
    """int64 on ``device``, filled up with zeros to a full tile."""
    return torch.tensor(values + [0] * (TILE - len(values)), dtype=torch.long).to(device)


def runs(pieces: Iterable[Segment]) -> list[Segment]:
    """Neighbours of one slot joined, empty ones dropped."""
    segments: list[Segment] = []
    for piece in pieces:
        if segments and segments[-1].slot == piece.slot:
            segments[-1] = Segment(piece.slot, segments[-1].tokens + piece.tokens, segments[-1].wanted + piece.wanted)
        elif piece.tokens:
            segments.append(piece)
    return segments
