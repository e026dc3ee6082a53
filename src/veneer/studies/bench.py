"""What a study counts, weighs and times engines with, what merges adapters, and what makes bases of other widths. Whoever starts a study
hands them in; the engine package has them (``engine/counting.py``, ``engine/merge.py``, ``engine/random_base.py``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from veneer.shapes import ModelShape
from veneer.types import Checkpoint, Engine

Source = str | Mapping[str, Any]
"""A base by name or folder; or the content of a config.json, whose weights are then random."""
Work = Callable[[], object]


class Flops(Protocol):
    @property
    def linear(self) -> float:
        """Of products with weights."""
        ...

    @property
    def total(self) -> float:
        """And of attention."""
        ...


class Opened(Protocol):
    """A base in memory."""

    @property
    def engine(self) -> Engine: ...

    @property
    def shape(self) -> ModelShape: ...

    @property
    def written_out(self) -> bool:
        """Adapters run in layers that the engine writes out, and not through transformers' modules."""
        ...

    @property
    def base_bytes(self) -> int: ...

    @property
    def unseen_rank(self) -> int:
        """Up to this rank adapters are added while sampling by what no counter sees."""
        ...


class Bench(Protocol):
    def open(self, source: Source, weights: Literal["lora", "full"], *, as_modules: bool = False, exact: bool = False) -> Opened:
        """``as_modules``: the same, but its adapters run through transformers' modules. ``exact``: in float32 on any device.

        Raises:
            BaseError: there is none, or it cannot be run.
        """
        ...

    def shape_of(self, source: Source) -> ModelShape:
        """Also of a model that is only known by name."""
        ...

    def count_flops(self, work: Work) -> Flops: ...

    def peak_bytes(self, work: Work) -> int:
        """Of the tensors that the work makes, when they were most."""
        ...

    def seconds(self, work: Work) -> float:
        """Until it is done."""
        ...


class Stored(Protocol):
    """What storing the sum cost."""

    @property
    def lost(self) -> float:
        """|stored - exact| / |update|."""
        ...

    @property
    def changed(self) -> float:
        """Share of the adapted weights that are not the base's any more."""
        ...


class Merge(Protocol):
    def __call__(self, base: str, checkpoint: Checkpoint, folder: Path, dtype: str, /) -> Stored:
        """Write the base with the adapter in its weights.

        Raises:
            AdapterError: it was made for another base, or is a full copy.
        """
        ...


class RandomBase(Protocol):
    def __call__(self, base: str, folder: Path, width: int, layers: int, seed: int, /) -> None:
        """Write a model of the base's kind with random weights.

        Raises:
            BaseError: there is none of that width.
        """
        ...
