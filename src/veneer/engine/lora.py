"""Low-rank adapters on the linear maps of a frozen model: W + (alpha / rank) B A, many of them side by side.

Every adapter has a slot in ``Rows``; A [rank, d_in] and the transpose of B [rank, d_out] of each adapted map are views into
its rows. The tokens of a pass are sorted by slot, and each linear map adds the updates segment by segment: through a forward
hook on Hugging Face's module, or inside ``FusedModel``. The model's own modules are left as they are: without a segment
the output is the base's.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.engine import compiled
from veneer.engine.base import Base, Head, PlainHead
from veneer.engine.flat import TILE, Flat
from veneer.engine.fused import FusedModel
from veneer.engine.rows import Rows
from veneer.engine.thin import RowWise, ThinAdapters
from veneer.engine.update import Active, Adapted, Output, Part, Updates, wide_rows
from veneer.types import AdapterError, LoraConfig

T = TypeVar("T")

STACK = 3
"""This many adapters with equally many rows are one batched product rather than one product each."""


def linear_modules(base: Base) -> dict[str, nn.Linear]:
    return {name: m for name, m in base.model.named_modules() if isinstance(m, nn.Linear)}


def match_targets(base: Base, config: LoraConfig) -> list[str]:
    """Names of the linear maps that a config adapts, in model order.

    Raises:
        AdapterError: a pattern matches nothing, the rank does not fit, or a target cannot be adapted.
    """
    linears = linear_modules(base)
    head_map = base.head
    head = [name for name, m in linears.items() if m is head_map]
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
    passes_side_by_side = True

    def __init__(self, base: Base, *, gradient_checkpointing: bool = False) -> None:
        """``gradient_checkpointing`` keeps only each layer's input for the backward pass and computes the rest again."""
        self.base, self.gradient_checkpointing = base, gradient_checkpointing
        self.linears = linear_modules(base)
        self.configs: dict[int, LoraConfig] = {}
        self.layouts: dict[int, dict[str, tuple[int, int]]] = {}
        """slot -> module -> where A and B^T begin in the slot's row."""
        self.rows = Rows(base.device)
        self.fused = FusedModel.of(base)
        self.products = [] if self.fused is None else self.fused.products
        joined = {name for names in self.products for name in names}
        self.products += [[name] for name in self.linears if name not in joined]
        self.head_name = next(name for name, linear in self.linears.items() if linear is base.head)
        self.thin: ThinAdapters | None = None
        if compiled.runs_on(next(base.model.parameters())):
            self.thin = ThinAdapters(self.products, {name: linear.out_features for name, linear in self.linears.items()})
        self._matched: dict[LoraConfig, list[str]] = {}
        self._kept_parts: dict[tuple[int, int], dict[str, Part]] = {}
        self._training_parts: dict[int, tuple[Tensor, dict[str, Part]]] = {}
        """By slot, with the row that they are views of."""
        self._stackable: dict[tuple[int | None, ...], bool] = {}
        self._lane = threading.local()
        if self.fused is None:
            for name, linear in self.linears.items():
                if name != self.head_name:
                    linear.register_forward_hook(self._make_hook(name))
            base.model.get_input_embeddings().register_forward_hook(self._start_gradient)
            if gradient_checkpointing:
                _checkpoint_layers(base)

    @property
    def steps_alone(self) -> bool:
        """Whether two decoding steps run side by side without waiting for the interpreter most of the time."""
        return self.fused is not None and self.fused.steps is not None

    @property
    def repeats_prompts(self) -> bool:
        """In the written-out layers on a CPU, where a position's rotation depends on nothing else and attention takes a row in pieces that
        its length decides."""
        return self.steps_alone

    # ------------------------------------------------ slots

    def create(self, config: LoraConfig | None) -> int:
        """A fresh adapter in a slot of its own: A uniform in +-1/sqrt(d_in), B zero. Returns the slot."""
        slot = self.claim(config)
        generator = torch.Generator().manual_seed(self.configs[slot].seed % 2**63)
        for name, (a, _) in self.views(slot, self.rows.published(slot)).items():
            bound = 1 / math.sqrt(self.linears[name].in_features)
            a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
        return slot

    def claim(self, config: LoraConfig | None) -> int:
        """A slot for an adapter of this shape, all zeros."""
        if config is None:
            raise AdapterError("this engine trains low-rank adapters and was asked for a full copy; give a LoraConfig")
        layout: dict[str, tuple[int, int]] = {}
        names = self._targets(replace(config, seed=0, target_modules=tuple(config.target_modules)))
        targets = [self.linears[name] for name in names]
        at_a, at_b = 0, config.rank * sum(linear.in_features for linear in targets)
        for name, linear in zip(names, targets, strict=True):  # all As, then all Bs: those of joined maps lie together
            layout[name] = (at_a, at_b)
            at_a, at_b = at_a + config.rank * linear.in_features, at_b + config.rank * linear.out_features
        behind = [(wide_rows(ranks, shared=True) - ranks) * d_in for d_in, ranks in self._products_of(names, config.rank)]
        size = at_b + max(*behind, *(linear.in_features for linear in targets))  # so that ``Part.wide`` ends within the row
        slot = self.rows.claim(size)
        self._forget()
        self.configs[slot], self.layouts[slot] = config, layout
        if self.thin is not None:
            self.thin.put(slot, config, layout, self.rows.begin(slot))
        return slot

    def _targets(self, shape: LoraConfig) -> list[str]:
        """As ``match_targets``: a server loads one shape again and again, and walking the model takes a third of that."""
        if shape not in self._matched:
            self._matched[shape] = match_targets(self.base, shape)
        return self._matched[shape]

    def _products_of(self, names: Collection[str], rank: int) -> Iterator[tuple[int, int]]:
        """Of every product that an adapter of these linear maps takes part in: its input's width, and the adapter's ranks there."""
        for joined in self.products:
            if mine := [name for name in joined if name in names]:
                yield self.linears[mine[0]].in_features, rank * len(mine)

    def remove(self, slot: int) -> None:
        del self.configs[slot], self.layouts[slot]
        self._forget()
        self.rows.release(slot)

    def _forget(self) -> None:
        """Views and shapes that were kept; the rows may have moved."""
        self._kept_parts.clear()
        self._training_parts.clear()
        self._stackable.clear()

    def views(self, slot: int, row: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Module -> (A [rank, d_in], B^T [rank, d_out]) inside one of the slot's rows [size], or inside a stack of rows of one shape
        [k, size] with k in front."""
        rank, stack, views = self.configs[slot].rank, row.shape[:-1], {}
        for name, (at_a, at_b) in self.layouts[slot].items():
            linear = self.linears[name]
            a = row[..., at_a : at_a + rank * linear.in_features].view(*stack, rank, linear.in_features)
            bt = row[..., at_b : at_b + rank * linear.out_features].view(*stack, rank, linear.out_features)
            views[name] = (a, bt)
        return views

    def named(self, slot: int, row: Tensor) -> dict[str, Tensor]:
        """PEFT's names and orientation: ``<module>.lora_A.weight`` [rank, d_in], ``<module>.lora_B.weight`` [d_out, rank]."""
        named = {}
        for name, (a, bt) in self.views(slot, row).items():
            named[f"{name}.lora_A.weight"], named[f"{name}.lora_B.weight"] = a, bt.T
        return named

    def trainable_parameters(self, slot: int) -> int:
        return sum(t.numel() for t in self.named(slot, self.rows.published(slot)).values())

    def without_gradient(self, slot: int) -> list[str]:
        """Adapted linear maps whose B has a gradient of exactly zero beside others that have one: their hook was never called, or
        they lead nowhere. A gradient of zero everywhere says nothing about any of them."""
        views = self.views(slot, self.rows.open(slot).grad)
        zero = [name for name, (_, bt) in views.items() if not bt.any()]
        return zero if len(zero) < len(views) else []

    # ------------------------------------------------ passes

    def stackable(self, slots: Sequence[int | None]) -> bool:
        """Whether these adapters, each with as many rows, are one batched product: neighbours of one shape, and enough of them."""
        key = tuple(slots)
        if key not in self._stackable:
            enough = self.thin is None and len(key) >= STACK and None not in key
            self._stackable[key] = enough and self._are_alike([slot for slot in key if slot is not None])
        return self._stackable[key]

    def _are_alike(self, slots: Sequence[int]) -> bool:
        same = [(self.layouts[slot], self.configs[slot].rank, self.configs[slot].alpha) for slot in slots]
        return self.rows.neighbours(slots) and all(shape == same[0] for shape in same)

    @torch.no_grad()
    def infer(self, flat: Flat, finish: Callable[[Tensor, Head], T], *, published: bool) -> T:
        """``finish`` of the wanted hidden states [n, d] and the head, with the published or the training rows, no gradient."""
        updates, of_wanted = self._updates(flat, published)
        if self.fused is not None:
            hidden = self.fused.hidden(flat, updates)
        else:
            with self._running(updates):
                hidden = self.base.hidden(flat)
        return finish(hidden, self._head(of_wanted))

    def train(self, flat: Flat, finish: Callable[[Tensor, Head], Tensor]) -> list[Tensor]:
        """Back-propagate the loss that ``finish`` returns. Per segment its gradient, shaped as the slot's row."""
        grads = [torch.zeros(0 if s.slot is None else self.rows.size(s.slot), device=self.base.device) for s in flat.segments]
        parts = [
            None if s.slot is None else self._parts_of(s.slot, self.rows.training(s.slot), g)
            for s, g in zip(flat.segments, grads, strict=True)
        ]
        active = Active([s.tokens for s in flat.segments], parts)
        head = self._head(Active([s.wanted for s in flat.segments], parts))
        if self.fused is not None:
            self.fused.train(flat, active, lambda hidden: finish(hidden, head), self.gradient_checkpointing)
            return grads
        with self._running(active):
            with torch.enable_grad():
                loss = finish(self.base.hidden(flat), head)
            loss.backward()
        return grads

    def _updates(self, flat: Flat, published: bool) -> tuple[Updates, Updates]:
        """What the segments add to the rows of their tokens, and to those that are wanted."""
        tokens, wanted = [s.tokens for s in flat.segments], [s.wanted for s in flat.segments]
        if published:
            return self._published_updates(flat, tokens), self._published_updates(flat, wanted)
        parts = [None if s.slot is None else self._parts_in_training(s.slot) for s in flat.segments]
        return Active(tokens, parts), Active(wanted, parts)

    def _parts_in_training(self, slot: int) -> dict[str, Part]:
        row = self.rows.training(slot)
        kept, parts = self._training_parts.get(slot, (None, None))
        if parts is None or kept is not row:
            if slot not in self.rows.trained:
                return self._published_parts(slot) or {}
            parts = self._parts_of(slot, row)
            self._training_parts[slot] = row, parts
        return parts

    def _published_updates(self, flat: Flat, counts: Sequence[int]) -> Updates:
        """What the segments add to their ``counts`` rows."""
        slots = [s.slot for s in flat.segments]
        if self.thin is not None:
            thick = [None if slot is None or self.thin.ranks[slot] else self._published_parts(slot) for slot in slots]
            by_segment = Active(counts, thick) if any(thick) else Active([], [])
            return RowWise(self.thin, self.rows.line.tensor.numpy(), self.thin.slots(flat.segments, counts), by_segment)
        if len(set(counts)) == 1 and counts[0] >= TILE and sum(counts) == len(flat.tokens) and self.stackable(slots):
            return Active([len(flat.tokens)], [self._published_parts(slots[0], len(slots))])
        return Active(counts, [self._published_parts(slot) for slot in slots])

    def _published_parts(self, slot: int | None, count: int = 1) -> dict[str, Part] | None:
        """The views of a slot's row, or of ``count`` rows from there on, by product; kept, for a decoding step has no time to
        make them."""
        if slot is None:
            return None
        key = (slot, count)
        if key not in self._kept_parts:
            self._kept_parts[key] = self._parts_of(slot, self.rows.published(slot) if count == 1 else self.rows.stacked(slot, count))
        return self._kept_parts[key]

    def _parts_of(self, slot: int, row: Tensor, grads: Tensor | None = None) -> dict[str, Part]:
        config, views = self.configs[slot], self.views(slot, row)
        wanted = None if grads is None else self.views(slot, grads)
        parts: dict[str, Part] = {}
        for names in self.products:
            outputs: list[Output] = []
            at, columns = 0, 0
            for name in names:
                width = self.linears[name].out_features
                if name in views:
                    grad_bt = None if wanted is None else wanted[name][1]
                    here = slice(at, at + config.rank)
                    outputs.append(Output(here, slice(columns, columns + width), views[name][1], grad_bt))
                    at += config.rank
                columns += width
            if outputs:
                first, d_in = next(name for name in names if name in views), self.linears[names[0]].in_features
                begin = self.layouts[slot][first][0]
                rows = wide_rows(at, shared=grads is None)
                wide = row[..., begin : begin + rows * d_in].view(*row.shape[:-1], rows, d_in)
                grad_a = None if grads is None else grads[begin : begin + at * d_in].view(at, d_in)
                parts[names[0]] = Part(wide[..., :at, :], wide, outputs, config.alpha / config.rank, grad_a)
        return parts

    def _head(self, updates: Updates) -> Head:
        """``updates`` of the wanted hidden states."""
        return AdaptedHead(self.base, updates, self.head_name) if updates.touches(self.head_name) else PlainHead(self.base)

    @contextmanager
    def _running(self, active: Updates) -> Iterator[None]:
        """Let the hooks of this thread add ``active``."""
        self._lane.active = active
        try:
            yield
        finally:
            self._lane.active = None

    def _make_hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            active = getattr(self._lane, "active", None)
            if active is None or not active.touches(name):
                return None
            return cast(Tensor, Adapted.apply(output, args[0], active, name))

        return hook

    def _start_gradient(self, _module: nn.Module, _args: Any, embedded: Tensor) -> Tensor | None:
        """Autograd follows what comes from a tensor that wants a gradient, and the frozen embeddings want none."""
        return embedded.requires_grad_() if torch.is_grad_enabled() and getattr(self._lane, "active", None) is not None else None


@dataclass(frozen=True)
class AdaptedHead:
    """An unembedding that some segment adapts."""

    base: Base
    active: Updates
    """Cut by wanted hidden states, not by tokens."""
    name: str
    frozen_weight: None = None

    @property
    def vocab_size(self) -> int:
        return self.base.vocab_size

    def __call__(self, hidden: Tensor, start: int) -> Tensor:
        here = self.active.cut(start, start + len(hidden))
        return self.base.shaped(cast(Tensor, Adapted.apply(self.base.raw_logits(hidden).clone(), hidden, here, self.name)))


def _checkpoint_layers(base: Base) -> None:
    """Have autograd keep only the inputs of the model's layers (https://arxiv.org/abs/1604.06174)."""
    body: Any = base.model.base_model
    for layer in body.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
