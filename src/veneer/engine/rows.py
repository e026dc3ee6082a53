"""The adapter axis: the weights, gradients and moments of all adapters as rows of stacked tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.types import AdamParams, RequestError

FIELDS = ("training", "published", "grads", "m", "v")
LARGEST = 1e6
"""No sound adapter has a weight near it."""
NOT_FINITE = "the gradient is not finite, or its square is not; the weights were left as they were. Lower the learning rate"


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

    def adam(self, slots: Sequence[int], params: Sequence[AdamParams]) -> list[float | RequestError]:
        """One AdamW step with bias correction (Kingma & Ba, https://arxiv.org/abs/1412.6980, algorithm 1; decoupled decay)
        for several slots in one go, each with its own settings. Clears the gradients and returns their L2 norms before
        clipping. A row whose gradient or new weights would not be finite, or with a weight beyond ``LARGEST``, keeps its
        weights, moments and step, and has the reason in place of its norm.
        """
        norms = [float(torch.linalg.vector_norm(self.grads[slot])) for slot in slots]  # row by row: a sum over rows rounds otherwise
        finite = [(s, p, n) for s, p, n in zip(slots, params, norms, strict=True) if n < float("inf")]
        refused = self._update([s for s, _, _ in finite], [p for _, p, _ in finite], [n for _, _, n in finite]) if finite else {}
        refused |= {slot: RequestError(NOT_FINITE) for slot, norm in zip(slots, norms, strict=True) if not norm < float("inf")}
        for slot in slots:
            self.grads[slot].zero_()
        return [refused.get(slot, norm) for slot, norm in zip(slots, norms, strict=True)]

    def _update(self, slots: list[int], params: list[AdamParams], norms: list[float]) -> dict[int, RequestError]:
        """The new rows are made beside the old ones, which they replace where they are sound; why not, by slot, where they are not."""

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]

        times = [self.steps[slot] + 1 for slot in slots]
        beta1, beta2 = column([p.beta1 for p in params]), column([p.beta2 for p in params])
        clip = [p.grad_clip_norm / n if 0 < p.grad_clip_norm < n else 1.0 for p, n in zip(params, norms, strict=True)]
        rate = column([p.learning_rate / (1 - p.beta1**t) for p, t in zip(params, times, strict=True)])
        debias = column([1 / (1 - p.beta2**t) for p, t in zip(params, times, strict=True)])
        one_run = slots == list(range(slots[0], slots[0] + len(slots)))
        at = slice(slots[0], slots[-1] + 1) if one_run else torch.tensor(slots, device=self.device)
        g = self.grads[at] * column(clip)
        v = (self.v[at] * beta2).add_(g.square().mul_(1 - beta2))
        m = g.sub_(self.m[at]).mul_(1 - beta1).add_(self.m[at])  # in the gradient's place: full copies of a model are large
        change = (v * debias).sqrt_().add_(column([p.eps for p in params]))
        torch.div(m, change, out=change).mul_(rate)
        w = (self.training[at] * column([1 - p.learning_rate * p.weight_decay for p in params])).sub_(change)
        refused: dict[int, RequestError] = {}
        for i, (slot, settings) in enumerate(zip(slots, params, strict=True)):
            low, high = torch.aminmax(w[i])  # NaN if any is; the norm of infinity took ten times as long
            largest = float(torch.maximum(-low, high))
            if largest <= LARGEST:
                self.training[slot], self.m[slot], self.v[slot] = w[i], m[i], v[i]
                self.steps[slot] += 1
            else:
                refused[slot] = RequestError(_why(largest, settings))
        return refused


def _why(largest: float, params: AdamParams) -> str:
    what = f"a weight of {largest:.3g}, beyond {LARGEST:g}" if largest < float("inf") else "a weight that is not finite"
    cause = f"learning rate {params.learning_rate:g}, weight decay {params.weight_decay:g}, eps {params.eps:g}"
    advice = "Lower the learning rate or the weight decay" if params.eps else "Give an eps above 0"
    return f"this step ({cause}) would make {what}; nothing was changed but the gradient dropped. {advice}"
