"""What this machine's CPU does in a second: a product of matrices and a copy, each as fast as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from veneer.engine.memory import total_memory

SIDE = 1024
"""Of the matrices: 4 MiB each, beyond the small caches."""
COPIED = 2**26
"""Bytes."""
SECONDS = 0.3
"""For each of the two."""


@dataclass(frozen=True)
class Speed:
    flops: float
    """A second, in float32."""
    bandwidth: float
    """Bytes a second that are read and written."""
    memory: int
    """Bytes that there are."""


def measure_cpu(threads: int) -> Speed:
    """With so many threads. The best of several tries: others may use the machine too."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
        source, target = torch.ones(COPIED // 4), torch.empty(COPIED // 4)
        products, copies = 2 * SIDE**3 / _quickest(lambda: torch.mm(a, b)), 2 * COPIED / _quickest(lambda: target.copy_(source))
        return Speed(products, copies, total_memory(a.device))
    finally:
        torch.set_num_threads(before)


def _quickest(work: Callable[[], object]) -> float:
    work()
    best, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best
