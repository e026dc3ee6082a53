"""Full fine-tuning behind the same protocol, for comparisons: a slot is a whole copy of the base's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from veneer.engine.base import Base
from veneer.engine.lora import Segment
from veneer.engine.rows import Rows
from veneer.types import AdapterError, LoraConfig


class FullStack:
    """Every fully fine-tuned copy of an engine. The base itself stays frozen and is what slot None runs."""

    mixes_slots = False

    def __init__(self, base: Base) -> None:
        self.base = base
        self.shapes = {name: p.shape for name, p in base.model.named_parameters()}
        self.rows = Rows(sum(s.numel() for s in self.shapes.values()), base.device)

    def create(self, config: LoraConfig | None) -> int:
        if config is not None:
            raise AdapterError("this engine trains full copies of the weights and was asked for a low-rank adapter; give None")
        slot = self.rows.claim()
        for name, view in self.views(slot, self.rows.training).items():
            view.copy_(self.base.model.get_parameter(name))
        self.rows.publish(slot)
        return slot

    def remove(self, slot: int) -> None:
        self.rows.release(slot)

    def views(self, slot: int, stacked: Tensor) -> dict[str, Tensor]:
        parts = stacked[slot].split([s.numel() for s in self.shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}

    def named(self, slot: int, stacked: Tensor) -> dict[str, Tensor]:
        return self.views(slot, stacked)

    def without_gradient(self, slot: int) -> list[str]:
        """Nothing to tell: rows of the embedding that no token used have none rightly."""
        return []

    def trainable_parameters(self, slot: int) -> int:
        return self.rows.size

    def call(self, segments: Sequence[Segment], *, train: bool, selected: Tensor | None = None, **inputs: Any) -> Tensor:
        """As ``LoraStack.call``; one segment at a time."""
        (segment,) = segments
        if segment.slot is None:
            return self.base(selected=selected, **inputs)
        dtype = self.base.model.dtype
        leaves = self.views(segment.slot, self.rows.training if train else self.rows.published)
        if train and torch.is_grad_enabled():
            grads = self.views(segment.slot, self.rows.grads)
            leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
            for name, leaf in leaves.items():
                leaf.grad = grads[name]
        weights = {f"model.{name}": leaf.to(dtype) for name, leaf in leaves.items()}
        return functional_call(self.base, weights, (), {"selected": selected, **inputs})
