"""Low-rank adapters on the linear maps of a frozen model: W + (alpha / rank) B A, many of them side by side.

For every adapted linear map the stack holds A [slots, rank, d_in] and the transpose of B [slots, rank, d_out], as views
into the rows of ``Rows``; a lower rank uses the first lines of its block, the rest stays zero. The rows of a batch are
sorted by slot, and a forward hook on each linear map adds the updates segment by segment. The model's own modules are
left as they are: without a segment the hook returns nothing and the output is the base's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.engine.base import Base
from veneer.engine.rows import Rows
from veneer.types import AdapterError, LoraConfig


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a batch that run through one adapter; slot None is the base alone."""

    slot: int | None
    rows: int


@dataclass
class _Active:
    """What the hooks apply: per segment its length along dim 0, and leaves A, B^T and the scale by module (None: base)."""

    lengths: list[int]
    leaves: list[dict[str, tuple[Tensor, Tensor, float]] | None]


def linear_modules(base: Base) -> dict[str, nn.Linear]:
    return {name: m for name, m in base.model.named_modules() if isinstance(m, nn.Linear)}


def match_targets(base: Base, config: LoraConfig) -> list[str]:
    """Names of the linear maps that a config adapts, in model order.

    Raises:
        AdapterError: a pattern matches nothing, the rank does not fit, or a target cannot be adapted.
    """
    linears = linear_modules(base)
    head = [name for name, m in linears.items() if m is base.head]
    attention = [name for name in linears if "attn" in name or "attention" in name]
    mlp = [name for name in linears if name not in head and name not in attention]
    if config.target_modules:
        chosen: set[str] = set()
        for pattern in config.target_modules:
            found = [name for name in linears if name == pattern or name.endswith("." + pattern)]
            if not found:
                raise AdapterError(f"target {pattern!r} matches no linear map; this base has {_endings(linears)}")
            chosen.update(found)
    else:
        groups = {"train_attn": (config.train_attn, attention), "train_mlp": (config.train_mlp, mlp)}
        groups["train_unembed"] = (config.train_unembed, head)
        if config.train_mlp:
            _refuse_experts(base)
        for switch, (on, found) in groups.items():
            if on and not found:
                raise AdapterError(f"{switch} matches no linear map of {type(base.model).__name__}; set it to false")
        chosen = {name for on, found in groups.values() if on for name in found}
    if not chosen:
        raise AdapterError("nothing would be trained: train_attn, train_mlp and train_unembed are all false")
    if any(".experts." in name for name in chosen):
        _refuse_experts(base)
    names = [name for name in linears if name in chosen]
    narrowest = min(names, key=lambda n: min(linears[n].in_features, linears[n].out_features))
    width = min(linears[narrowest].in_features, linears[narrowest].out_features)
    if not 1 <= config.rank <= width:
        raise AdapterError(f"rank {config.rank} does not fit: it must be from 1 to {width}, the width of {narrowest}")
    if not (math.isfinite(config.alpha) and config.alpha > 0):
        raise AdapterError(f"alpha {config.alpha} must be a positive number")
    return names


def _endings(linears: Mapping[str, nn.Linear]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))


def _refuse_experts(base: Base) -> None:
    for name, parameter in base.model.named_parameters():
        if ".experts." in name or (".experts" in name and parameter.ndim == 3):
            raise AdapterError(f"mixture-of-experts layers cannot be adapted yet ({name}); set train_mlp to false")


class LoraStack:
    """Every adapter of an engine."""

    mixes_slots = True
    """One forward pass can serve rows of different slots."""

    def __init__(self, base: Base) -> None:
        self.base, self.max_rank = base, 0
        self.linears = linear_modules(base)
        self.configs: dict[int, LoraConfig] = {}
        self.targets: dict[int, list[str]] = {}
        self.layout: dict[str, tuple[int, int]] = {}
        self.rows = Rows(0, base.device)
        self._active: _Active | None = None
        self._head: _Active | None = None
        for name, linear in self.linears.items():
            linear.register_forward_hook(self._make_hook(name))

    # ------------------------------------------------ slots

    def create(self, config: LoraConfig | None) -> int:
        """A fresh adapter in a slot of its own: A uniform in +-1/sqrt(d_in), B zero. Returns the slot."""
        if config is None:
            raise AdapterError("this engine trains low-rank adapters and was asked for a full copy; give a LoraConfig")
        targets = match_targets(self.base, config)
        if config.rank > self.max_rank:
            self._widen(config.rank)
        slot = self.rows.claim()
        self.configs[slot], self.targets[slot] = config, targets
        generator = torch.Generator().manual_seed(config.seed % 2**63)
        for name, (a, _) in self.views(slot, self.rows.training).items():
            bound = 1 / math.sqrt(self.linears[name].in_features)
            a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
        self.rows.publish(slot)
        return slot

    def remove(self, slot: int) -> None:
        del self.configs[slot], self.targets[slot]
        self.rows.release(slot)

    def _widen(self, rank: int) -> None:
        """Lay the rows out anew for a higher rank and move every adapter over."""
        old_rows, old_layout = self.rows, self.layout
        offset, self.layout = 0, {}
        for name, linear in self.linears.items():
            self.layout[name] = (offset, offset + rank * linear.in_features)
            offset += rank * (linear.in_features + linear.out_features)
        self.max_rank, self.rows = rank, Rows(offset, self.base.device)
        while len(self.rows.steps) < len(old_rows.steps):
            self.rows.claim()
        self.rows.free, self.rows.steps = old_rows.free, old_rows.steps
        for slot in self.configs:
            for field in ("training", "published", "grads", "m", "v"):
                old = self._views(slot, getattr(old_rows, field), old_layout)
                for name, (a, bt) in self.views(slot, getattr(self.rows, field)).items():
                    a.copy_(old[name][0])
                    bt.copy_(old[name][1])

    def views(self, slot: int, stacked: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Module -> (A [rank, d_in], B^T [rank, d_out]) inside one row of ``stacked`` [slots, size]."""
        return self._views(slot, stacked, self.layout)

    def _views(self, slot: int, stacked: Tensor, layout: dict[str, tuple[int, int]]) -> dict[str, tuple[Tensor, Tensor]]:
        rank, row, views = self.configs[slot].rank, stacked[slot], {}
        for name in self.targets[slot]:
            (at_a, at_b), linear = layout[name], self.linears[name]
            a = row[at_a : at_a + rank * linear.in_features].view(rank, linear.in_features)
            bt = row[at_b : at_b + rank * linear.out_features].view(rank, linear.out_features)
            views[name] = (a, bt)
        return views

    def named(self, slot: int, stacked: Tensor) -> dict[str, Tensor]:
        """PEFT's names and orientation: ``<module>.lora_A.weight`` [rank, d_in], ``<module>.lora_B.weight`` [d_out, rank]."""
        named = {}
        for name, (a, bt) in self.views(slot, stacked).items():
            named[f"{name}.lora_A.weight"], named[f"{name}.lora_B.weight"] = a, bt.T
        return named

    def trainable_parameters(self, slot: int) -> int:
        return sum(t.numel() for t in self.named(slot, self.rows.training).values())

    def without_gradient(self, slot: int) -> list[str]:
        """Adapted linear maps whose B has a gradient of exactly zero: their hook was never called, or they lead nowhere."""
        return [name for name, (_, bt) in self.views(slot, self.rows.grads).items() if not bt.any()]

    # ------------------------------------------------ forward

    def call(self, segments: Sequence[Segment], *, train: bool, selected: Tensor | None = None, **inputs: Any) -> Tensor:
        """Run the base over a batch whose dim 0 is cut into segments. ``train`` uses the training rows and lets gradients flow
        into ``rows.grads``; otherwise the published rows serve. ``selected`` as in ``Base.forward``."""
        leaves = [None if s.slot is None else self._leaves(s.slot, train) for s in segments]
        active = _Active([s.rows for s in segments], leaves) if any(leaves) else None
        self._active, self._head = active, active
        if active is not None and selected is not None and self.base.head_is_plain:  # the head sees chosen positions, not rows
            counts = selected.sum(1).split(active.lengths)
            self._head = _Active([int(c.sum()) for c in counts], leaves)
        try:
            return self.base(selected=selected, **inputs)
        finally:
            self._active = self._head = None

    def _leaves(self, slot: int, train: bool) -> dict[str, tuple[Tensor, Tensor, float]]:
        config = self.configs[slot]
        scale = config.alpha / config.rank
        stacked = self.rows.training if train else self.rows.published
        views = self.views(slot, stacked)
        if not (train and torch.is_grad_enabled()):
            return {name: (a, bt, scale) for name, (a, bt) in views.items()}
        grads, leaves = self.views(slot, self.rows.grads), {}
        for name, (a, bt) in views.items():
            a_leaf, bt_leaf = a.detach().requires_grad_(), bt.detach().requires_grad_()
            a_leaf.grad, bt_leaf.grad = grads[name]  # autograd adds in place: straight into the stack
            leaves[name] = (a_leaf, bt_leaf, scale)
        return leaves

    def _make_hook(self, name: str):
        is_head = self.linears[name] is self.base.head

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            active = self._head if is_head else self._active
            if active is None:
                return None
            if len(active.lengths) == 1:
                return _adapted(args[0], output, active.leaves[0], name)
            xs, ys = args[0].split(active.lengths), output.split(active.lengths)
            return torch.cat([_adapted(x, y, leaves, name) for x, y, leaves in zip(xs, ys, active.leaves, strict=True)])

        return hook


def _adapted(x: Tensor, y: Tensor, leaves: dict[str, tuple[Tensor, Tensor, float]] | None, name: str) -> Tensor:
    """y + scale * x A^T B^T, computed in float32. x [..., d_in], y [..., d_out]."""
    if leaves is None or name not in leaves:
        return y
    a, bt, scale = leaves[name]
    flat = x.reshape(-1, x.shape[-1]).to(a.dtype)
    low = flat @ a.T
    if y.dtype == a.dtype:
        return torch.addmm(y.reshape(-1, y.shape[-1]), low, bt, alpha=scale).view(y.shape)
    return y + (low @ bt).mul(scale).to(y.dtype).view(y.shape)
