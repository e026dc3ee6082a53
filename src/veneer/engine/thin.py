"""Updates of thin adapters for inference on a CPU in float32, row by row: a batch in which every row has an adapter of its own costs
what one adapter for all would cost, and a row's numbers are its own whoever else is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from veneer.engine import compiled
from veneer.engine.flat import Segment
from veneer.engine.update import Active, Lows
from veneer.types import LoraConfig


@dataclass
class Places:
    """Where the adapters' matrices for one product begin in the line of published rows, -1 where there are none: int64 [slots, outputs]."""

    columns: np.ndarray
    """int64 [outputs + 1]: where each output begins in the product."""
    at_a: np.ndarray
    at_b: np.ndarray


class ThinAdapters:
    """The index of all thin adapters of a stack."""

    def __init__(self, products: Sequence[Sequence[str]], widths: Mapping[str, int]) -> None:
        """``products``: linear maps that share a product; ``widths``: their outputs."""
        self.products = products
        self.ranks, self.scales = np.zeros(0, np.int64), np.zeros(0, np.float32)
        """By slot; rank 0 is no thin adapter."""
        self.places: dict[str, Places] = {}
        for names in products:
            columns, empty = np.cumsum([0, *(widths[name] for name in names)]), np.zeros((0, len(names)), np.int64)
            self.places[names[0]] = Places(columns, empty, empty)

    def put(self, slot: int, config: LoraConfig, layout: Mapping[str, tuple[int, int]], begin: int) -> None:
        """``layout``: where A and B^T of each linear map begin in the adapter's row, which begins at ``begin`` of the line. A thick
        adapter is noted as none."""
        if slot >= len(self.ranks):
            more = max(slot + 1 - len(self.ranks), len(self.ranks) // 2)  # not one at a time: it copies everything
            self.ranks, self.scales = np.pad(self.ranks, (0, more)), np.pad(self.scales, (0, more))
            for places in self.places.values():
                places.at_a, places.at_b = (np.pad(at, ((0, more), (0, 0)), constant_values=-1) for at in (places.at_a, places.at_b))
        self.ranks[slot] = config.rank if config.rank <= compiled.THIN else 0
        self.scales[slot] = config.alpha / config.rank
        for names in self.products:
            places = self.places[names[0]]
            for output, name in enumerate(names):
                at_a, at_b = layout.get(name, (None, None))
                places.at_a[slot, output] = -1 if at_a is None else begin + at_a
                places.at_b[slot, output] = -1 if at_b is None else begin + at_b

    def slots(self, segments: Sequence[Segment], counts: Sequence[int]) -> np.ndarray:
        """int64: the slot of each of ``counts`` rows a segment, -1 for the base alone or a thick adapter."""
        thin = [-1 if s.slot is None or not self.ranks[s.slot] else s.slot for s in segments]
        return np.repeat(np.array(thin, np.int64), counts)


@dataclass(frozen=True)
class RowWise:
    """Updates by row."""

    index: ThinAdapters
    line: np.ndarray
    """float32: the adapters, all of them."""
    slots: np.ndarray
    thick: Active
    """What is added by segment."""

    def touches(self, name: str) -> bool:
        here = self.slots[self.slots >= 0]
        return bool((self.index.places[name].at_a[here] >= 0).any()) or self.thick.touches(name)

    def of(self, name: str) -> tuple[np.ndarray, ...]:
        """What ``compiled.add_thin`` wants of a product."""
        places = self.index.places[name]
        return self.line, self.slots, places.at_a, places.at_b, places.columns, self.index.ranks, self.index.scales

    @property
    def none(self) -> tuple[np.ndarray, ...]:
        """The same, but nothing is added."""
        places = next(iter(self.index.places.values()))
        return self.line, self.slots[:0], places.at_a, places.at_b, places.columns, self.index.ranks, self.index.scales

    def rest(self, x: Tensor, y: Tensor, name: str) -> tuple[np.ndarray, ...]:
        """Add what thick adapters add, and hand over what is left for a compiled loop to add."""
        self.thick.add(x, y, name)
        return self.of(name)

    def add(self, x: Tensor, y: Tensor, name: str) -> Lows:
        inner = y.contiguous()
        compiled.add_thin(x.contiguous(), inner, *self.of(name))
        if inner is not y:
            y.copy_(inner)
        return self.thick.add(x, y, name)

    def cut(self, start: int, stop: int) -> RowWise:
        return RowWise(self.index, self.line, self.slots[start:stop], self.thick.cut(start, stop))
