"""A number of a plan, with what it rests on."""

from __future__ import annotations

import math
from dataclasses import dataclass

TML = "https://thinkingmachines.ai/blog/lora/"
"""LoRA Without Regret."""


@dataclass(frozen=True)
class Figure:
    """What is planned, how it was found, and how far it can be trusted."""

    name: str
    value: float | None
    """None: it cannot be told; ``note`` says why."""
    unit: str
    formula: str
    source: str
    low: float | None = None
    high: float | None = None
    """The range in which it is to be expected; None: it is exact, or ``note`` says what is not known."""
    note: str = ""

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.name}: {self.value}")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"{self.name}: from {self.low} to {self.high}")

    @property
    def text(self) -> str:
        """Value and unit, as a person reads them."""
        return "-" if self.value is None else written(self.value, self.unit)

    @property
    def range(self) -> str:
        """The range, or nothing."""
        if self.low is None or self.high is None:
            return ""
        return f"{written(self.low, self.unit)} to {written(self.high, self.unit)}"


def written(value: float, unit: str) -> str:
    """With a unit of a size that suits it."""
    if unit == "bytes":
        return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    if unit == "FLOPs":
        return _scaled(value, 1000, ("FLOPs", "KFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs", "ZFLOPs"))
    if unit == "seconds":
        return f"{value:.3g} s" if value < 120 else f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"
    if value == round(value) and abs(value) < 1e15:
        return f"{value:,.0f} {unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip() if abs(value) < 1000 else f"{value:,.0f} {unit}".rstrip()


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    place = min(len(units) - 1, max(0, int(math.log(max(value, 1), step) + 1e-9)))
    number = value / step**place
    return f"{number:.0f} {units[0]}" if place == 0 else f"{number:.3g} {units[place]}" if number < 1000 else f"{number:.0f} {units[place]}"
