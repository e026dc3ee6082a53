"""A decoding step of a fused model on a CPU in float32: four products a layer, and behind each one loop that does all the rest."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.engine import compiled
from veneer.engine.cache import SharingRows, StepLayout
from veneer.engine.flat import Flat
from veneer.engine.thin import RowWise

if TYPE_CHECKING:
    from veneer.engine.fused import FusedLayer, FusedModel, Joined, Norm


class Pad:
    """A matrix that is written to again and again, as torch and as numpy see it."""

    def __init__(self, line: int, width: int) -> None:
        self.tensor = torch.zeros(line, width)
        self.array = self.tensor.numpy()


@dataclass
class Scratch:
    """What lies between the products of a step."""

    line: int
    normed: Pad
    qkv: Pad
    attended: Pad
    gate_up: Pad
    act: Pad


class _Layer:
    """A layer's numbers as arrays."""

    def __init__(self, layer: FusedLayer, after: Norm) -> None:
        """``after``: the norm that follows it."""
        self.qkv, self.o, self.gate_up, self.down, self.score = layer.qkv, layer.o, layer.gate_up, layer.down, layer.score
        head_weight = layer.head_norm.weight
        self.head_weight = np.empty((0, 0), np.float32) if head_weight is None else head_weight.numpy()
        self.head_eps = np.float32(layer.head_norm.eps)
        self.norms = [(norm.weight.numpy(), np.float32(norm.eps)) for norm in (layer.norm2, after)]


class Steps:
    """A model that takes one token of each row at a time."""

    def __init__(self, model: FusedModel, turns: tuple[Tensor, Tensor]) -> None:
        """``turns``: cos and sin by position, [context, 1, dim]."""
        self.embedding = model.embedding
        self.first = model.layers[0].norm1
        after = [*(layer.norm1 for layer in model.layers[1:]), model.norm]
        self.layers = [_Layer(layer, norm) for layer, norm in zip(model.layers, after, strict=True)]
        self.turns = [t[:, 0].contiguous().numpy() for t in turns]
        layer = model.layers[0]
        self.widths = (
            layer.qkv.weight.shape[0],
            layer.qkv.weight.shape[1],
            layer.o.weight.shape[0],
            layer.gate_up.weight.shape[1],
            layer.down.weight.shape[0],
        )
        self._lane = threading.local()

    def _scratch(self, line: int) -> Scratch:
        kept: Scratch | None = getattr(self._lane, "scratch", None)
        if kept is None or kept.line != line:
            self._lane.scratch = kept = Scratch(line, *(Pad(line, width) for width in self.widths))
        return kept

    def hidden(self, flat: Flat, layout: StepLayout, updates: RowWise) -> Tensor:
        """[n, d]: the final hidden states, normed, at the wanted places. Good until this thread's next step."""
        x = F.embedding(flat.tokens, self.embedding)
        pads = self._scratch(len(x))
        normed, qkv, attended, gate_up, act = pads.normed, pads.qkv, pads.attended, pads.gate_up, pads.act
        rows = x.numpy()
        compiled.norm_stage(rows, rows, self.first.weight.numpy(), np.float32(self.first.eps), normed.array, *updates.none)
        for layer in self.layers:
            _product(layer.qkv, normed.tensor, qkv.tensor)
            self._attend(layer, layout, normed, qkv, attended, updates)
            _add_product(layer.o, attended.tensor, x)
            updates.thick.add(attended.tensor, x, layer.o.names[0])
            compiled.norm_stage(attended.array, rows, *layer.norms[0], normed.array, *updates.of(layer.o.names[0]))
            _product(layer.gate_up, normed.tensor, gate_up.tensor)
            updates.thick.add(normed.tensor, gate_up.tensor, layer.gate_up.names[0])
            compiled.swiglu_stage(normed.array, gate_up.array, act.array, *updates.of(layer.gate_up.names[0]))
            _add_product(layer.down, act.tensor, x)
            updates.thick.add(act.tensor, x, layer.down.names[0])
            compiled.norm_stage(act.array, rows, *layer.norms[1], normed.array, *updates.of(layer.down.names[0]))
        return normed.tensor if len(flat.wanted) == len(x) else normed.tensor.index_select(0, flat.wanted)

    def _attend(self, layer: _Layer, layout: StepLayout, normed: Pad, qkv: Pad, attended: Pad, updates: RowWise) -> None:
        name, score = layer.qkv.names[0], layer.score
        updates.thick.add(normed.tensor, qkv.tensor, name)
        thin, head = updates.of(name), (layer.head_weight, layer.head_eps, *self.turns)
        for bank in layout.banks:
            assert isinstance(bank, SharingRows)
            compiled.attention_stage(normed.array, qkv.array, *head, *bank.cached(score), attended.array, *thin)


def _product(joined: Joined, x: Tensor, out: Tensor) -> None:
    if joined.bias is None:
        torch.mm(x, joined.weight, out=out)
    else:
        torch.addmm(joined.bias, x, joined.weight, out=out)


def _add_product(joined: Joined, x: Tensor, y: Tensor) -> None:
    y.addmm_(x, joined.weight)
    if joined.bias is not None:
        y += joined.bias
