"""The adapter axis: the weights, gradients and moments of all adapters as rows of stacked tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veneer.types import AdamParams, RunError


class Rows:
    """Flat parameter vectors [slots, size]: a training row with gradient and Adam moments, and a published row to sample from.

    A slot holds one adapter. Rows never mix: every operation below touches the row of one slot.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.free: list[int] = []
        self.training, self.published, self.grads, self.m, self.v = (torch.zeros(0, size, device=device) for _ in range(5))
        self.steps: list[int] = []

    def _tensors(self) -> tuple[str, ...]:
        return ("training", "published", "grads", "m", "v")

    def claim(self) -> int:
        """A zeroed slot; the stack doubles when none is free."""
        if not self.free:
            slots = len(self.steps)
            grown = max(1, slots)
            for name in self._tensors():
                old: Tensor = getattr(self, name)
                setattr(self, name, torch.cat([old, torch.zeros(grown, self.size, device=self.device)]))
            self.steps += [0] * grown
            self.free = list(range(slots + grown - 1, slots - 1, -1))
        slot = self.free.pop()
        self.clear(slot)
        return slot

    def clear(self, slot: int) -> None:
        for name in self._tensors():
            getattr(self, name)[slot].zero_()
        self.steps[slot] = 0

    def release(self, slot: int) -> None:
        self.free.append(slot)

    def publish(self, slot: int) -> None:
        self.published[slot].copy_(self.training[slot])

    def adam(self, slot: int, p: AdamParams) -> float:
        """One AdamW step with bias correction (Kingma & Ba, https://arxiv.org/abs/1412.6980, algorithm 1; decoupled decay).
        Clears the gradient and returns its L2 norm before clipping.

        Raises:
            RunError: the gradient is not finite; the weights are left as they were.
        """
        w, g, m, v = self.training[slot], self.grads[slot], self.m[slot], self.v[slot]
        norm = float(torch.linalg.vector_norm(g))
        if not math.isfinite(norm):
            g.zero_()
            raise RunError("the gradient is not finite; the weights were left as they were. Lower the learning rate")
        if p.grad_clip_norm > 0 and norm > p.grad_clip_norm:
            g.mul_(p.grad_clip_norm / norm)
        self.steps[slot] += 1
        t = self.steps[slot]
        m.lerp_(g, 1 - p.beta1)
        v.mul_(p.beta2).addcmul_(g, g, value=1 - p.beta2)
        denominator = (v / (1 - p.beta2**t)).sqrt_().add_(p.eps)
        w.mul_(1 - p.learning_rate * p.weight_decay)
        w.addcdiv_(m, denominator, value=-p.learning_rate / (1 - p.beta1**t))
        g.zero_()
        return norm
