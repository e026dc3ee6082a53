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
    turned: np.ndarray
    low: np.ndarray


class _Layer:
    """A layer's numbers as arrays."""

    def __init__(self, layer: FusedLayer, after: Norm) -> None:
        """``after``: the norm that follows it."""
        self.qkv, self.o, self.gate_up, self.down, self.score = layer.qkv, layer.o, layer.gate_up, layer.down, layer.score
        head_weight = np.empty((0, 0), np.float32) if layer.head_norm.weight is None else layer.head_norm.weight.numpy()
        self.head_norm = head_weight, np.float32(layer.head_norm.eps)
        self.norms = [(norm.weight.numpy(), np.float32(norm.eps)) for norm in (layer.norm2, after)]
        self.heads, self.dim = layer.heads, layer.dim

    @property
    def widths(self) -> list[int]:
        """Of the matrices in ``Scratch``."""
        return [
            self.qkv.weight.shape[0],
            self.qkv.weight.shape[1],
            self.o.weight.shape[0],
            self.gate_up.weight.shape[1],
            self.down.weight.shape[0],
        ]


class Steps:
    """A model that takes one token of each row at a time."""

    def __init__(self, model: FusedModel, turns: tuple[Tensor, Tensor]) -> None:
        """``turns``: cos and sin by position, [context, 1, dim]."""
        self.embedding = model.embedding
        first, after = model.layers[0].norm1, [*(layer.norm1 for layer in model.layers[1:]), model.norm]
        self.first = first.weight.numpy(), np.float32(first.eps)
        self.layers = [_Layer(layer, norm) for layer, norm in zip(model.layers, after, strict=True)]
        self.turns = [t[:, 0].contiguous().numpy() for t in turns]
        self._lane = threading.local()

    def _scratch(self, line: int) -> Scratch:
        """This thread's."""
        kept: Scratch | None = getattr(self._lane, "scratch", None)
        if kept is None or kept.line != line:
            layer = self.layers[0]
            normed, qkv, attended, gate_up, act = (Pad(line, width) for width in layer.widths)
            turned, low = np.empty((layer.heads + 1, layer.dim), np.float32), np.empty(compiled.THIN, np.float32)
            self._lane.scratch = kept = Scratch(line, normed, qkv, attended, gate_up, act, turned, low)
        return kept

    def hidden(self, flat: Flat, layout: StepLayout, updates: RowWise) -> Tensor:
        """[n, d]: the final hidden states, normed, at the wanted places. Good until this thread's next step."""
        x = F.embedding(flat.tokens, self.embedding)
        rows, pads = x.numpy(), self._scratch(len(x))
        normed, qkv, attended, gate_up, act, low = pads.normed, pads.qkv, pads.attended, pads.gate_up, pads.act, pads.low
        compiled.norm_stage(rows, rows, *self.first, normed.array, *updates.none, low)
        for layer in self.layers:
            _product(layer.qkv, normed.tensor, qkv.tensor)
            thin = updates.rest(normed.tensor, qkv.tensor, layer.qkv.names[0])
            for bank in layout.banks:
                assert isinstance(bank, SharingRows)
                cached = bank.cached(layer.score)
                room = compiled.room_to_attend(cached[0], cached[2]), pads.turned
                before = normed.array, qkv.array, *layer.head_norm, *self.turns
                compiled.attention_stage(*before, *cached, attended.array, *room, *thin, low)
            _add_product(layer.o, attended.tensor, x)
            thin = updates.rest(attended.tensor, x, layer.o.names[0])
            compiled.norm_stage(attended.array, rows, *layer.norms[0], normed.array, *thin, low)
            _product(layer.gate_up, normed.tensor, gate_up.tensor)
            thin = updates.rest(normed.tensor, gate_up.tensor, layer.gate_up.names[0])
            compiled.swiglu_stage(normed.array, gate_up.array, act.array, *thin, low)
            _add_product(layer.down, act.tensor, x)
            thin = updates.rest(act.tensor, x, layer.down.names[0])
            compiled.norm_stage(act.array, rows, *layer.norms[1], normed.array, *thin, low)
        return normed.tensor if len(flat.wanted) == len(x) else normed.tensor.index_select(0, flat.wanted)


def _product(joined: Joined, x: Tensor, out: Tensor) -> None:
    if joined.bias is None:
        torch.mm(x, joined.weight, out=out)
    else:
        torch.addmm(joined.bias, x, joined.weight, out=out)


def _add_product(joined: Joined, x: Tensor, y: Tensor) -> None:
    y.addmm_(x, joined.weight)
    if joined.bias is not None:
        y += joined.bias
