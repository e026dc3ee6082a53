"""The adapter axis: the weights, gradients and moments of all adapters as rows of stacked tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.types import AdamParams

FIELDS = ("training", "published", "grads", "m", "v")


class Rows:
    """Flat parameter vectors [slots, size]: a training row with gradient and Adam moments, and a published row to sample from.

    A slot holds one adapter, in the first numbers of its row; the rest stays zero. Rows never mix.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.free: list[int] = []
        self.training, self.published, self.grads, self.m, self.v = (torch.zeros(0, size, device=device) for _ in FIELDS)
        self.steps: list[int] = []

    def claim(self, size: int) -> int:
        """A zeroed slot with room for ``size`` numbers; the stack grows, and its tensors move, when there is none."""
        slots = len(self.steps)
        if not self.free:
            grown = max(1, slots // 2)
            self.steps += [0] * grown
            self.free = list(range(slots + grown - 1, slots - 1, -1))
        if size > self.size or len(self.steps) > slots:
            self.size = max(size, self.size)
            for name in FIELDS:
                old: Tensor = getattr(self, name)
                new = torch.zeros(len(self.steps), self.size, device=self.device)
                new[:slots, : old.shape[1]] = old
                setattr(self, name, new)
        slot = self.free.pop()
        for name in FIELDS:
            getattr(self, name)[slot].zero_()
        self.steps[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        self.free.append(slot)

    def publish(self, slot: int) -> None:
        self.published[slot].copy_(self.training[slot])

    def adam(self, slots: Sequence[int], params: Sequence[AdamParams]) -> list[float]:
        """One AdamW step with bias correction (Kingma & Ba, https://arxiv.org/abs/1412.6980, algorithm 1; decoupled decay)
        for several slots in one go, each with its own settings. Clears the gradients and returns their L2 norms before
        clipping. A row whose gradient is not finite keeps its weights and moments, and its norm says so.
        """
        norms = [float(torch.linalg.vector_norm(self.grads[slot])) for slot in slots]  # row by row: a sum over rows rounds otherwise
        finite = [(s, p, n) for s, p, n in zip(slots, params, norms, strict=True) if n < float("inf")]
        if finite:
            for slot, _, _ in finite:
                self.steps[slot] += 1
            self._update([s for s, _, _ in finite], [p for _, p, _ in finite], [n for _, _, n in finite])
        for slot in slots:
            self.grads[slot].zero_()
        return norms

    def _update(self, slots: list[int], params: list[AdamParams], norms: list[float]) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]

        times = [self.steps[slot] for slot in slots]
        beta1, beta2 = column([p.beta1 for p in params]), column([p.beta2 for p in params])
        clip = [p.grad_clip_norm / n if 0 < p.grad_clip_norm < n else 1.0 for p, n in zip(params, norms, strict=True)]
        rate = column([p.learning_rate / (1 - p.beta1**t) for p, t in zip(params, times, strict=True)])
        debias = column([1 / (1 - p.beta2**t) for p, t in zip(params, times, strict=True)])
        one_run = slots == list(range(slots[0], slots[0] + len(slots)))
        at = slice(slots[0], slots[-1] + 1) if one_run else torch.tensor(slots, device=self.device)
        w, g, m, v = self.training[at], self.grads[at] * column(clip), self.m[at], self.v[at]  # views if one run, else copies
        m.add_((g - m) * (1 - beta1))
        v.mul_(beta2).add_(g.square() * (1 - beta2))
        denominator = (v * debias).sqrt_().add_(column([p.eps for p in params]))
        w.mul_(column([1 - p.learning_rate * p.weight_decay for p in params]))
        w.sub_(m / denominator * rate)
        if not one_run:
            self.training[at], self.m[at], self.v[at] = w, m, v
