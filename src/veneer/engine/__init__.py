"""One frozen base, N stacked adapters. The only package that imports torch."""

from __future__ import annotations

import os

# MKL with fixed block sizes: otherwise, on an AMD EPYC, a row's bits depend on its company where widths are odd. It is read at the first
# product (https://www.intel.com/content/www/us/en/docs/onemkl/developer-guide-macos/2024-0/specifying-code-branches.html).
os.environ.setdefault("MKL_CBWR", "AUTO")

import torch

from veneer.engine.base import Base, default_device, load_base
from veneer.engine.engine import LocalEngine
from veneer.engine.full import FullStack
from veneer.engine.lora import LoraStack
from veneer.engine.losses import LOSSES

__all__ = ["LOSSES", "Base", "FullEngine", "LocalEngine", "LoraEngine", "default_device", "load_base", "set_threads"]


def LoraEngine(
    base: Base,
    *,
    gradient_checkpointing: bool = False,
    patience: float | None = None,
    threads: int | None = None,
    beside: LocalEngine | None = None,
) -> LocalEngine:
    """An engine whose adapters are low-rank updates.

    Args:
        gradient_checkpointing: keep only each layer's input for the backward pass and compute the rest again: less memory, more time.
        patience: seconds after which a pass through the base counts as stuck and is given up. Every pass then runs on a thread of its own.
        threads: CPU threads of each matrix product when sampling, and passes side by side when training; None: what ``set_threads`` said.
            Training gives the same bits at any number; sampling does wherever a product of two threads adds up as one does, which large
            models' do not.
        beside: an engine whose threads it shares, with their number and patience: the two must be asked by one thread.
    """
    return LocalEngine(base, LoraStack(base, gradient_checkpointing=gradient_checkpointing), patience, threads, beside)


def FullEngine(base: Base, *, patience: float | None = None, threads: int | None = None) -> LocalEngine:
    """An engine whose adapters are full copies of the base's weights: the comparison arm. Use a base of its own."""
    return LocalEngine(base, FullStack(base), patience, threads)


def set_threads(threads: int) -> None:
    """CPU threads of what the calling thread computes. With ``patience`` an engine computes on threads of its own: then set 1 before a base
    is loaded, and give the engine its ``threads``. Two threads of a process that each share their products with helpers take more helpers
    than there are cores, and GNU's OpenMP then lets all of them sleep after every product: sampling took 118 ms in place of 66."""
    torch.set_num_threads(threads)
