"""Full fine-tuning behind the same protocol, for comparisons: a slot is a whole copy of the base's weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from veneer.engine.base import Base, Head
from veneer.engine.flat import Flat
from veneer.engine.rows import Rows
from veneer.types import AdapterError, LoraConfig

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

SMALL = 2**24
"""Weights of a base whose passes run side by side. Each has a whole gradient; and the products of larger bases keep all threads busy."""


class FullStack:
    """Every fully fine-tuned copy of an engine. The base itself stays frozen and is what slot None runs."""

    mixes_slots = steps_alone = repeats_prompts = gradient_checkpointing = False

    def __init__(self, base: Base) -> None:
        self.base = base
        self.shapes = {name: p.shape for name, p in base.model.named_parameters()}
        self.size = sum(s.numel() for s in self.shapes.values())
        self.rows = Rows(base.device)
        self.passes_side_by_side = self.size <= SMALL
        self._own = threading.local()

    def stackable(self, slots: Sequence[int | None]) -> bool:
        """Copies of the weights run one at a time."""
        return False

    def create(self, config: LoraConfig | None) -> int:
        """A copy of the base in a slot of its own. Returns the slot."""
        slot = self.claim(config)
        for name, view in self._views(self.rows.published(slot)).items():
            view.copy_(self.base.model.get_parameter(name))
        return slot

    def claim(self, config: LoraConfig | None) -> int:
        """A slot for a copy, all zeros."""
        if config is not None:
            raise AdapterError("this engine trains full copies of the weights and was asked for a low-rank adapter; give None")
        return self.rows.claim(self.size)

    def remove(self, slot: int) -> None:
        self.rows.release(slot)

    def _views(self, row: Tensor) -> dict[str, Tensor]:
        parts = row.split([s.numel() for s in self.shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}

    def named(self, slot: int, row: Tensor) -> dict[str, Tensor]:
        return self._views(row)

    def without_gradient(self, slot: int) -> list[str]:
        """Nothing to tell: rows of the embedding that no token used have none rightly."""
        return []

    def trainable_parameters(self, slot: int) -> int:
        return self.size

    @torch.no_grad()
    def infer(self, flat: Flat, finish: Callable[[Tensor, Head], T], *, published: bool) -> T:
        """As ``LoraStack.infer``; one segment at a time."""
        (slot,) = {segment.slot for segment in flat.segments}
        if slot is None:
            return self.base(flat, finish)
        return self._call(self._views(self.rows.published(slot) if published else self.rows.training(slot)), flat, finish)

    def train(self, flat: Flat, finish: Callable[[Tensor, Head], Tensor]) -> list[Tensor]:
        """As ``LoraStack.train``; one segment at a time."""
        (segment,) = flat.segments
        assert segment.slot is not None
        row = torch.zeros(self.size, device=self.base.device)
        grads = self._views(row)
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self._views(self.rows.training(segment.slot)).items()}
        for name, leaf in leaves.items():
            leaf.grad = grads[name]  # autograd adds in place: straight into the row
        with torch.enable_grad():
            loss = self._call(leaves, flat, finish)
        loss.backward()
        return [row]

    def _call(self, leaves: dict[str, Tensor], flat: Flat, finish: Callable[[Tensor, Head], T]) -> T:
        dtype = self.base.dtype
        weights = {f"model.{name}": leaf.to(dtype) for name, leaf in leaves.items()}
        return functional_call(self._shell(), weights, (flat, finish))

    def _shell(self) -> Base:
        """This thread's: ``functional_call`` puts other tensors into a module's places while it runs, and two threads must not see each
        other's."""
        if not hasattr(self._own, "shell"):
            self._own.shell = _shell_of(self.base, {})
        return self._own.shell


def _shell_of(module: M, known: dict[nn.Module, nn.Module]) -> M:
    """The same modules anew, around the same tensors."""
    if module not in known:
        shell = known[module] = copy.copy(module)
        vars(shell)["_parameters"], vars(shell)["_buffers"] = dict(module._parameters), dict(module._buffers)
        vars(shell)["_modules"] = {name: None if child is None else _shell_of(child, known) for name, child in module._modules.items()}
    return cast(M, known[module])
