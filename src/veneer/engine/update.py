"""The low-rank update of one linear map, for the segments of a pass: y += scale x A^T B^T, and its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.engine.flat import TILE


@dataclass(frozen=True)
class Output:
    """B of one linear map: from some columns of x A^T to some columns of the product's output."""

    ranks: slice
    columns: slice
    bt: Tensor
    """[rank, d_out], the transpose of B."""
    grad_bt: Tensor | None = None
    """Where its gradient is added up; None: no gradient is wanted."""


@dataclass(frozen=True)
class Part:
    """One adapter on one product of the base, float32. A product that joins several linear maps has their As above each other.
    Or a stack of k adapters of one shape, each for as many tokens: then every tensor has k in front."""

    a: Tensor
    """[ranks, d_in]"""
    wide: Tensor
    """``a``, and whatever numbers lie behind it as further rows, up to ``wide_rows``."""
    outputs: Sequence[Output]
    scale: float
    """alpha / rank"""
    grad_a: Tensor | None = None


def wide_rows(ranks: int, *, shared: bool) -> int:
    """How many columns a product with ``a`` is given, so that a row's bits do not depend on the other rows: with one column they do, and on
    two threads of an AMD EPYC with 17 to 23 of them. ``shared``: it may run on several threads, as in sampling."""
    return 24 if shared and 16 < ranks < 24 else max(ranks, 2)


class Updates(Protocol):
    """What a pass adds to the products of the base, each known by the name of its first linear map."""

    def touches(self, name: str) -> bool: ...

    def add(self, x: Tensor, y: Tensor, name: str) -> Lows:
        """Add to y [line, d_out] in place, from x [line, d_in]; returns what ``propagate`` needs."""
        ...

    def cut(self, start: int, stop: int) -> Updates:
        """What is added from place ``start`` to ``stop`` of the line."""
        ...


Lows = Sequence[Tensor | None]
"""Of one product: x A^T per segment."""


@dataclass(frozen=True)
class Active:
    """Updates by segment: its tokens and its parts by product (None: the base alone)."""

    tokens: Sequence[int]
    parts: Sequence[Mapping[str, Part] | None]

    def touches(self, name: str) -> bool:
        return any(parts is not None and name in parts for parts in self.parts)

    def add(self, x: Tensor, y: Tensor, name: str) -> Lows:
        return add_updates(x, y, self, name)

    def cut(self, start: int, stop: int) -> Active:
        tokens, at = [], 0
        for count in self.tokens:
            tokens.append(max(0, min(stop, at + count) - max(start, at)))
            at += count
        return Active(tokens, self.parts)


def add_updates(x: Tensor, y: Tensor, active: Active, name: str) -> list[Tensor | None]:
    """Add every segment's update to y [line, d_out] in place, from x [line, d_in]; returns x A^T of each, for ``propagate``.
    The products run in float32 and over at least ``TILE`` rows."""
    if not active.touches(name):
        return [None] * len(active.parts)
    lows: list[Tensor | None] = []
    at, line = 0, x.shape[0]
    for tokens, parts in zip(active.tokens, active.parts, strict=True):
        part = None if parts is None or not tokens else parts.get(name)
        if part is None:
            lows.append(None)
        elif tokens < TILE:
            xs, ys = x[at : at + tokens].to(part.a.dtype), y[at : at + tokens]
            filled = F.pad(ys, (0, 0, 0, TILE - tokens))
            lows.append(_add(F.pad(xs, (0, 0, 0, TILE - tokens)), filled, part)[:tokens])
            ys.copy_(filled[:tokens])
        elif part.a.ndim == 3:  # no gradient flows here
            _add_stack(x.to(part.a.dtype), y, part)
            lows.append(None)
        elif tokens == line:
            lows.append(_add(x if x.dtype == part.a.dtype else x.to(part.a.dtype), y, part))
        else:
            lows.append(_add(x[at : at + tokens].to(part.a.dtype), y[at : at + tokens], part))
        at += tokens
    return lows


def _add_stack(x: Tensor, y: Tensor, part: Part) -> None:
    stack = len(part.a)
    xs, ys = x.view(stack, -1, x.shape[1]), y.view(stack, -1, y.shape[1])
    low = torch.bmm(xs, part.wide.mT)
    for out in part.outputs:
        _add_product(ys[..., out.columns], low[..., out.ranks], out.bt, part.scale)


def _add(x: Tensor, y: Tensor, part: Part) -> Tensor:
    low = torch.mm(x, part.wide.T)[:, : len(part.a)]
    for out in part.outputs:
        whole = out.columns == slice(0, y.shape[1])
        ys, ls = (y, low) if whole else (y[:, out.columns], low[:, out.ranks])
        _add_product(ys, ls, out.bt, part.scale)
    return low


def _add_product(y: Tensor, low: Tensor, bt: Tensor, scale: float) -> None:
    """y += scale low B^T, of matrices or of stacks of them."""
    if y.dtype != bt.dtype:
        y.add_((low @ bt).mul_(scale).to(y.dtype))
    elif bt.shape[-2] == 1:  # products over one rank round in more than one way
        y.addcmul_(low, bt, value=scale)
    elif y.ndim == 2:  # scaled here: on two threads a product with an alpha rounds by the number of its rows
        y.addmm_(low * scale, bt)
    else:
        y.baddbmm_(low * scale, bt)


def propagate(x: Tensor, dy: Tensor, dx: Tensor | None, lows: Sequence[Tensor | None], active: Active, name: str) -> None:
    """Add the gradients of A and B^T of every segment where its parts want them, and the update's share of x's gradient to dx."""
    at = 0
    for tokens, parts, low in zip(active.tokens, active.parts, lows, strict=True):
        if parts is not None and low is not None:
            part, here = parts[name], slice(at, at + tokens)
            xs, dys = x[here].to(low.dtype), dy[here].to(low.dtype)
            d_low = torch.empty_like(low)
            for out in part.outputs:
                d_out = dys[:, out.columns]
                torch.mm(d_out, out.bt.T, out=d_low[:, out.ranks])
                if out.grad_bt is not None:
                    out.grad_bt.addmm_(low[:, out.ranks].T, d_out, alpha=part.scale)
            d_low *= part.scale
            if part.grad_a is not None:
                part.grad_a.addmm_(d_low.T, xs)
            if dx is not None:
                if dx.dtype == low.dtype:
                    dx[here].addmm_(d_low, part.a)
                else:
                    dx[here].add_((d_low @ part.a).to(dx.dtype))
        at += tokens


class Adapted(torch.autograd.Function):
    """The same as a node of autograd's graph, for linear maps that Hugging Face's module code runs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, active: Updates, name: str) -> Tensor:
        """y [..., d_out], changed in place and so first, as autograd wants it where y is a view; x [..., d_in]."""
        ctx.mark_dirty(y)
        ctx.lows = active.add(x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]), name)
        ctx.save_for_backward(x)
        ctx.active, ctx.name = active, name
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (dy,), (x,) = grads, ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        flat_dx = None if dx is None else dx.view(-1, x.shape[-1])
        propagate(x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), flat_dx, ctx.lows, ctx.active, ctx.name)
        return dy, dx, None, None
