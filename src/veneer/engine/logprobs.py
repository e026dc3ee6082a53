"""Log-probabilities of given tokens and entropies, without ever holding the logits of a whole pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from veneer.engine.base import Head
from veneer.engine.flat import TILE

LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**28}
"""Float32 logits held at a time: 16 MiB on a CPU, 1 GiB on a GPU."""
OfChunk = Callable[[Tensor, Tensor, Head, int], tuple[Tensor, ...]]


def target_logprobs(hidden: Tensor, targets: Tensor, head: Head, start: int = 0) -> Tensor:
    """log p(target) of targets int64 [n], or [n, K] for K at a place, after hidden states [n, d], the wanted ones from number ``start``
    on; in the targets' shape. Float32; gradients flow to ``hidden`` and to whatever in ``head`` wants one."""
    return _run(hidden, targets, head, start, _lp_of_chunk, entropy=False)[0]


def target_logprobs_and_entropies(hidden: Tensor, targets: Tensor, head: Head, start: int = 0) -> tuple[Tensor, Tensor]:
    """The same, and the entropy of each whole distribution, float32 [n], in nats; with gradients too."""
    lp, entropy = _run(hidden, targets, head, start, _both_of_chunk, entropy=True)
    return lp, entropy


def _run(hidden: Tensor, targets: Tensor, head: Head, start: int, of_chunk: OfChunk, *, entropy: bool) -> tuple[Tensor, ...]:
    copies = 3 if entropy else 1  # log p, and two of its size beside it
    rows = max(TILE, LOGITS_AT_ONCE[hidden.device.type] // (copies * head.vocab_size))
    if torch.is_grad_enabled() and head.frozen_weight is not None:
        frozen = _Frozen if targets.ndim == 1 else _FrozenMany
        return cast(tuple[Tensor, ...], frozen.apply(hidden, targets, head, start, rows, entropy))
    chunks = _chunks(hidden, targets, rows)
    if torch.is_grad_enabled() and len(chunks) > 1:
        found = [cast(tuple[Tensor, ...], checkpoint(of_chunk, h, t, head, start + at, use_reentrant=False)) for at, h, t in chunks]
    else:
        found = [of_chunk(h, t, head, start + at) for at, h, t in chunks]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _chunks(hidden: Tensor, targets: Tensor, rows: int) -> list[tuple[int, Tensor, Tensor]]:
    return [(at, hidden[at : at + rows], targets[at : at + rows]) for at in range(0, max(1, len(hidden)), rows)]


def _of_chunk(hidden: Tensor, targets: Tensor, head: Head, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities in the targets' shape, and the logits [n, vocab] and their logsumexp [n, 1] behind them."""
    logits = head(hidden, start)
    total = logits.logsumexp(-1, keepdim=True)
    if targets.ndim == 2:
        return logits.gather(1, targets) - total, logits, total
    return logits.gather(1, targets[:, None])[:, 0] - total[:, 0], logits, total


def _lp_of_chunk(hidden: Tensor, targets: Tensor, head: Head, start: int) -> tuple[Tensor]:
    return (_of_chunk(hidden, targets, head, start)[0],)


def _both_of_chunk(hidden: Tensor, targets: Tensor, head: Head, start: int) -> tuple[Tensor, Tensor]:
    lp, logits, total = _of_chunk(hidden, targets, head, start)
    return lp, _entropy(logits - total)


def _entropy(log_p: Tensor) -> Tensor:
    """-sum_v p(v) log p(v), [n] of [n, vocab]."""
    return -(log_p.exp() * log_p).sum(-1)


def _times_head(p: Tensor, weight: Tensor) -> Tensor:
    """sum_v p(v) W[v], [n, d]."""
    p = p.to(weight.dtype)
    filled = p if len(p) >= TILE else F.pad(p, (0, 0, 0, TILE - len(p)))
    return (filled @ weight)[: len(p)]


class _Slopes:
    """What a frozen head makes of a line, chunk by chunk: log-probabilities, the mean of W under each distribution, and where they are
    asked for the entropies H with d H / d hidden = -sum_v p(v) (log p(v) + H) W[v]."""

    def __init__(self, hidden: Tensor, entropy: bool) -> None:
        self.lp: list[Tensor] = []
        self.entropy: list[Tensor] | None = [] if entropy else None
        self.entropy_slope = torch.empty_like(hidden) if entropy else None

    def mean_of(self, at: int, chunk: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> Tensor:
        """Take a chunk's log-probabilities and entropies, and return sum_v p(v) W[v]; its logits are overwritten."""
        lp, logits, total = chunk
        self.lp.append(lp)
        log_p = logits.sub_(total)
        if self.entropy is not None and self.entropy_slope is not None:
            found = _entropy(log_p)
            self.entropy.append(found)
            uneven = log_p.exp().mul_(log_p + found[:, None]).neg_()
            self.entropy_slope[at : at + len(found)] = _times_head(uneven, weight)
        return _times_head(log_p.exp_(), weight)

    def outputs(self) -> tuple[Tensor, ...]:
        return (torch.cat(self.lp),) if self.entropy is None else (torch.cat(self.lp), torch.cat(self.entropy))


def _with_entropy(slope: Tensor, grads: tuple[Tensor, ...], entropy_slope: Tensor | None) -> Tensor:
    return slope if entropy_slope is None else slope + (grads[1][:, None] * entropy_slope).to(slope.dtype)


class _Frozen(torch.autograd.Function):
    """With a frozen unembedding W, d log p(t) / d hidden = W[t] - sum_v p(v) W[v]: one vector a row, known in the forward pass,
    so neither logits nor probabilities are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, start: int, rows: int, entropy: bool) -> tuple[Tensor, ...]:
        weight, found = head.frozen_weight, _Slopes(hidden, entropy)
        assert weight is not None
        slope = torch.empty_like(hidden)
        for at, h, t in _chunks(hidden, targets, rows):
            mean = found.mean_of(at, _of_chunk(h, t, head, start + at), weight)
            torch.sub(weight[t], mean, out=slope[at : at + len(t)])
        ctx.save_for_backward(slope, found.entropy_slope)
        return found.outputs()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, entropy_slope = ctx.saved_tensors
        return _with_entropy((grads[0][:, None] * slope).to(slope.dtype), grads, entropy_slope), *[None] * 5


class _FrozenMany(torch.autograd.Function):
    """The same for K targets a row. One vector each would be K times as much, so the mean of W is kept, and the Ws of the targets are
    added up where their gradients are known: d / d hidden = sum_k g_k W[t_k] - (sum_k g_k) sum_v p(v) W[v]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, start: int, rows: int, entropy: bool) -> tuple[Tensor, ...]:
        weight, found = head.frozen_weight, _Slopes(hidden, entropy)
        assert weight is not None
        mean = torch.empty_like(hidden)
        for at, h, t in _chunks(hidden, targets, rows):
            mean[at : at + len(t)] = found.mean_of(at, _of_chunk(h, t, head, start + at), weight)
        ctx.save_for_backward(mean, targets, weight, found.entropy_slope)
        return found.outputs()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_lp, (mean, targets, weight, entropy_slope) = grads[0], ctx.saved_tensors
        towards = F.embedding_bag(targets, weight, mode="sum", per_sample_weights=d_lp.to(weight.dtype))
        return _with_entropy((towards - d_lp.sum(1, keepdim=True) * mean).to(mean.dtype), grads, entropy_slope), *[None] * 5
