"""One frozen base, N stacked adapters. The only package that imports torch."""

from __future__ import annotations

import torch

from veneer.engine.base import Base, load_base
from veneer.engine.engine import LocalEngine
from veneer.engine.full import FullStack
from veneer.engine.lora import LoraStack
from veneer.engine.losses import LOSSES

__all__ = ["LOSSES", "Base", "FullEngine", "LocalEngine", "LoraEngine", "load_base", "set_threads"]


def LoraEngine(base: Base) -> LocalEngine:
    """An engine whose adapters are low-rank updates."""
    return LocalEngine(base, LoraStack(base))


def FullEngine(base: Base) -> LocalEngine:
    """An engine whose adapters are full copies of the base's weights: the comparison arm. Use a base of its own."""
    return LocalEngine(base, FullStack(base))


def set_threads(threads: int) -> None:
    """Threads of one matrix product. Results are reproducible bit for bit only at the same number."""
    torch.set_num_threads(threads)
