"""The memory of all adapters: what they sample with side by side in one line, and what training needs, made when it begins."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veneer.types import AdamParams, DivergedError

LARGEST = 1e6
"""No sound adapter has a weight near it."""
NOT_FINITE = "the gradient is not finite, or its square is not; the weights were left as they were. Lower the learning rate"
AT_ONCE = {"cpu": 2**16, "cuda": 2**28}
"""By device: numbers that an optimizer step makes of several rows together, which saves calls; on a CPU memory is what takes the time of
more."""
ALIGNED = 16
"""Every adapter begins at a multiple of this many numbers: where a matrix lies in memory may decide how a library sums."""
BEHIND = 2**25
"""Numbers that a line on a CPU may grow by in its place. A server takes in an adapter a training step, and to copy all others took longer
than the load itself."""


class Line:
    """One tensor that pieces of any length are taken from and given back to."""

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros(0, device=device)
        self._room = np.zeros(0, np.float32)
        """On a CPU: what the line may grow into where it is; it begins there."""
        self._gaps: list[tuple[int, int]] = []
        """(begin, end) of what is free, in order, no two of which touch."""

    def take(self, size: int) -> int:
        """Where ``size`` zeros begin. The line grows, and the tensor may move, when there is no room."""
        at = next((i for i, (begin, end) in enumerate(self._gaps) if end - begin >= size), None)
        if at is None:
            self._grow(size)
            at = len(self._gaps) - 1
        begin, end = self._gaps.pop(at)
        if end - begin > size:
            self._gaps.insert(at, (begin + size, end))
        self.tensor[begin : begin + size].zero_()
        return begin

    def give(self, begin: int, size: int) -> None:
        at, end = bisect_left(self._gaps, (begin, begin)), begin + size
        if at < len(self._gaps) and self._gaps[at][0] == end:
            end = self._gaps.pop(at)[1]
        if at > 0 and self._gaps[at - 1][1] == begin:
            begin = self._gaps.pop(at - 1)[0]
            at -= 1
        self._gaps.insert(at, (begin, end))

    def _grow(self, size: int) -> None:
        """By half, or so that ``size`` fits at the end."""
        old, length = self.tensor, len(self.tensor)
        tail = length - self._gaps[-1][0] if self._gaps and self._gaps[-1][1] == length else 0
        new = max(length + size - tail, length + length // 2 // ALIGNED * ALIGNED)
        if old.device.type != "cpu":
            self.tensor = torch.zeros(new, device=old.device)
            self.tensor[:length] = old
        else:
            if new > len(self._room):
                self._room = _zeros(new + BEHIND)
                self._room[:length] = old.numpy()
            self.tensor = torch.from_numpy(self._room[:new])  # whose storage is no larger than the line
        self.give(length, new - length)


def _zeros(size: int) -> NDArray[np.float32]:
    """Memory that nobody has written to yet, so that the system has given out none."""
    raw = np.zeros(size + ALIGNED, np.float32)
    skipped = -raw.ctypes.data % (4 * ALIGNED) // 4
    return raw[skipped : skipped + size]


@dataclass
class Trained:
    """What an adapter that is trained has beside its published row, each [size]."""

    weights: Tensor
    grad: Tensor
    m: Tensor
    v: Tensor
    steps: int = 0
    """Of Adam."""


class Rows:
    """Flat parameter vectors, one a slot, each of its own size: a published row to sample from, and for those that are trained a
    training row with gradient and Adam moments. Rows never mix."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.line = Line(device)
        """The published rows."""
        self.trained: dict[int, Trained] = {}
        self._places: dict[int, tuple[int, int]] = {}
        """slot -> where its published row begins, and its size."""
        self._free: list[int] = []

    def __len__(self) -> int:
        """Slots in use."""
        return len(self._places)

    def claim(self, size: int) -> int:
        """A zeroed slot of ``size`` numbers. Views of published rows may be of old memory afterwards."""
        slot = self._free.pop() if self._free else len(self._places)
        self._places[slot] = (self.line.take(_whole(size)), size)
        return slot

    def release(self, slot: int) -> None:
        begin, size = self._places.pop(slot)
        self.line.give(begin, _whole(size))
        self.trained.pop(slot, None)
        self._free.append(slot)

    def begin(self, slot: int) -> int:
        """Where its published row begins in ``line``."""
        return self._places[slot][0]

    def size(self, slot: int) -> int:
        return self._places[slot][1]

    def published(self, slot: int) -> Tensor:
        """[size], a view."""
        begin, size = self._places[slot]
        return self.line.tensor[begin : begin + size]

    def neighbours(self, slots: Sequence[int]) -> bool:
        """Whether the published rows are equally long and lie behind each other in this order."""
        begin, size = self._places[slots[0]]
        return all(self._places[slot] == (begin + i * _whole(size), size) for i, slot in enumerate(slots))

    def stacked(self, slot: int, count: int) -> Tensor:
        """The published rows of ``count`` neighbours from ``slot`` on, [count, size], a view."""
        begin, size = self._places[slot]
        return self.line.tensor[begin : begin + count * _whole(size)].view(count, -1)[:, :size]

    def training(self, slot: int) -> Tensor:
        """The weights as training left them, [size]: the published ones where nobody has trained."""
        return self.trained[slot].weights if slot in self.trained else self.published(slot)

    def open(self, slot: int) -> Trained:
        """What training changes; from the first time on its weights are apart from the published ones."""
        if slot not in self.trained:
            weights = self.published(slot).clone()
            grad, m, v = torch.zeros_like(weights), torch.zeros_like(weights), torch.zeros_like(weights)
            self.trained[slot] = Trained(weights, grad, m, v)
        return self.trained[slot]

    def publish(self, slot: int) -> None:
        if slot in self.trained:
            self.published(slot).copy_(self.trained[slot].weights)

    def drop_gradient(self, slot: int) -> float:
        """Returns its L2 norm."""
        if slot not in self.trained:
            return 0.0
        grad = self.trained[slot].grad
        norm = float(torch.linalg.vector_norm(grad))
        grad.zero_()
        return norm

    def adam(self, slots: Sequence[int], params: Sequence[AdamParams]) -> list[float | DivergedError]:
        """One AdamW step with bias correction (Kingma & Ba, https://arxiv.org/abs/1412.6980, algorithm 1; decoupled decay)
        for several slots in one go, each with its own settings. Clears the gradients and returns their L2 norms before
        clipping. A row whose gradient or new weights would not be finite, or with a weight beyond ``LARGEST``, keeps its
        weights, moments and step, and has the reason in place of its norm.
        """
        norms = [float(torch.linalg.vector_norm(self.open(slot).grad)) for slot in slots]
        refused = {slot: DivergedError(NOT_FINITE) for slot, norm in zip(slots, norms, strict=True) if not norm < float("inf")}
        for size in {self.size(slot) for slot in slots}:
            alike = [(s, p, n) for s, p, n in zip(slots, params, norms, strict=True) if self.size(s) == size and s not in refused]
            together = max(1, AT_ONCE[self.device.type] // size)
            for begin in range(0, len(alike), together):
                group = alike[begin : begin + together]
                refused |= self._update([s for s, _, _ in group], [p for _, p, _ in group], [n for _, _, n in group])
        for slot in slots:
            self.trained[slot].grad.zero_()
        return [refused.get(slot, norm) for slot, norm in zip(slots, norms, strict=True)]

    def _update(self, slots: list[int], params: list[AdamParams], norms: list[float]) -> dict[int, DivergedError]:
        """Of rows of one size. The new rows are made beside the old ones, which they replace where they are sound; why not, by slot,
        where they are not."""

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]

        rows = [self.trained[slot] for slot in slots]
        times = [row.steps + 1 for row in rows]
        beta1, beta2 = column([p.beta1 for p in params]), column([p.beta2 for p in params])
        clip = [p.grad_clip_norm / n if 0 < p.grad_clip_norm < n else 1.0 for p, n in zip(params, norms, strict=True)]
        rate = column([p.learning_rate / (1 - p.beta1**t) for p, t in zip(params, times, strict=True)])
        debias = column([1 / (1 - p.beta2**t) for p, t in zip(params, times, strict=True)])
        g = _stack([row.grad for row in rows]) * column(clip)
        v = (_stack([row.v for row in rows]) * beta2).add_(g.square().mul_(1 - beta2))
        m = _stack([row.m for row in rows])
        m = g.sub_(m).mul_(1 - beta1).add_(m)  # in the gradient's place: full copies of a model are large
        change = (v * debias).sqrt_().add_(column([p.eps for p in params]))
        torch.div(m, change, out=change).mul_(rate)
        decay = column([1 - p.learning_rate * p.weight_decay for p in params])
        w = (_stack([row.weights for row in rows]) * decay).sub_(change)
        refused: dict[int, DivergedError] = {}
        for i, (slot, row, settings) in enumerate(zip(slots, rows, params, strict=True)):
            low, high = torch.aminmax(w[i])  # NaN if any is; the norm of infinity took ten times as long
            largest = float(torch.maximum(-low, high))
            if largest <= LARGEST:
                row.weights.copy_(w[i])
                row.m.copy_(m[i])
                row.v.copy_(v[i])
                row.steps += 1
            else:
                refused[slot] = DivergedError(_why(largest, settings))
        return refused


def _whole(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _stack(rows: list[Tensor]) -> Tensor:
    """[k, size]; a single row is not copied."""
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _why(largest: float, params: AdamParams) -> str:
    what = f"a weight of {largest:.3g}, beyond {LARGEST:g}" if largest < float("inf") else "a weight that is not finite"
    cause = f"learning rate {params.learning_rate:g}, weight decay {params.weight_decay:g}, eps {params.eps:g}"
    advice = "Lower the learning rate or the weight decay" if params.eps else "Give an eps above 0"
    return f"this step ({cause}) would make {what}; nothing was changed but the gradient dropped. {advice}"
