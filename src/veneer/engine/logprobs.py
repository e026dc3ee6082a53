"""Log-probabilities of given tokens, without ever holding the logits of a whole pass."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from veneer.engine.base import Head
from veneer.engine.flat import TILE

LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**28}
"""Float32 logits held at a time: 16 MiB on a CPU, 1 GiB on a GPU."""


def target_logprobs(hidden: Tensor, targets: Tensor, head: Head, start: int = 0) -> Tensor:
    """log p(target) of targets int64 [n], or [n, K] for K at a place, after hidden states [n, d], the wanted ones from number ``start``
    on; in the targets' shape. Float32; gradients flow to ``hidden`` and to whatever in ``head`` wants one."""
    rows = max(TILE, LOGITS_AT_ONCE[hidden.device.type] // head.vocab_size)
    if not torch.is_grad_enabled():
        return torch.cat([_of_chunk(h, t, head, start + at)[0] for at, h, t in _chunks(hidden, targets, rows)])
    if head.frozen_weight is not None:
        frozen = _Frozen if targets.ndim == 1 else _FrozenMany
        return cast(Tensor, frozen.apply(hidden, targets, head, start, rows))
    if len(hidden) <= rows:
        return _of_chunk(hidden, targets, head, start)[0]
    chunks = [checkpoint(_of_chunk, h, t, head, start + at, use_reentrant=False) for at, h, t in _chunks(hidden, targets, rows)]
    return torch.cat([cast(tuple[Tensor, Tensor, Tensor], chunk)[0] for chunk in chunks])


def _chunks(hidden: Tensor, targets: Tensor, rows: int) -> list[tuple[int, Tensor, Tensor]]:
    return [(at, hidden[at : at + rows], targets[at : at + rows]) for at in range(0, max(1, len(hidden)), rows)]


def _of_chunk(hidden: Tensor, targets: Tensor, head: Head, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities in the targets' shape, and the logits [n, vocab] and their logsumexp [n, 1] behind them."""
    logits = head(hidden, start)
    total = logits.logsumexp(-1, keepdim=True)
    if targets.ndim == 2:
        return logits.gather(1, targets) - total, logits, total
    return logits.gather(1, targets[:, None])[:, 0] - total[:, 0], logits, total


def _mean_of_head(logits: Tensor, total: Tensor, weight: Tensor) -> Tensor:
    """sum_v p(v) W[v], [n, d]; the logits are overwritten."""
    p = logits.sub_(total).exp_().to(weight.dtype)
    filled = p if len(p) >= TILE else F.pad(p, (0, 0, 0, TILE - len(p)))
    return (filled @ weight)[: len(p)]


class _Frozen(torch.autograd.Function):
    """With a frozen unembedding W, d log p(t) / d hidden = W[t] - sum_v p(v) W[v]: one vector a row, known in the forward pass,
    so neither logits nor probabilities are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, start: int, rows: int) -> Tensor:
        weight, found = head.frozen_weight, []
        assert weight is not None
        slope = torch.empty_like(hidden)
        for at, h, t in _chunks(hidden, targets, rows):
            lp, logits, total = _of_chunk(h, t, head, start + at)
            torch.sub(weight[t], _mean_of_head(logits, total, weight), out=slope[at : at + len(t)])
            found.append(lp)
        ctx.save_for_backward(slope)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (d_lp,), (slope,) = grads, ctx.saved_tensors
        return (d_lp[:, None] * slope).to(slope.dtype), None, None, None, None


class _FrozenMany(torch.autograd.Function):
    """The same for K targets a row. One vector each would be K times as much, so the mean of W is kept, and the Ws of the targets are
    added up where their gradients are known: d / d hidden = sum_k g_k W[t_k] - (sum_k g_k) sum_v p(v) W[v]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, start: int, rows: int) -> Tensor:
        weight, found = head.frozen_weight, []
        assert weight is not None
        mean = torch.empty_like(hidden)
        for at, h, t in _chunks(hidden, targets, rows):
            lp, logits, total = _of_chunk(h, t, head, start + at)
            mean[at : at + len(t)] = _mean_of_head(logits, total, weight)
            found.append(lp)
        ctx.save_for_backward(mean, targets, weight)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (d_lp,), (mean, targets, weight) = grads, ctx.saved_tensors
        towards = F.embedding_bag(targets, weight, mode="sum", per_sample_weights=d_lp.to(weight.dtype))
        return (towards - d_lp.sum(1, keepdim=True) * mean).to(mean.dtype), None, None, None, None
