"""What a run received from its rewards, what it could hold, and what episodes cost that taught nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ledger:
    bits: float
    """Received: of all groups the entropy of their rewards, which bounds what a policy gradient can learn from them."""
    bits_per_episode: float
    capacity_bits: int
    """One for each trained parameter, as "LoRA Without Regret" counts (https://thinkingmachines.ai/blog/lora/); two is the most that was
    seen in one (Allen-Zhu & Li 2024, https://arxiv.org/abs/2404.05405)."""
    saturation: float
    """Received over capacity: above 1 the adapter could not even store what it was told."""
    dead_episodes: int
    """Of groups whose rewards were all the same: played, and of no use to most estimators."""
    dead_sampling_seconds: float
    """What playing them took, if they took as long as others."""


def ledger(metrics: Sequence[Mapping[str, Any]], timings: Sequence[Mapping[str, float]], parameters: int) -> Ledger:
    """Of a run's metrics.jsonl and timings.jsonl, and the number of its trained parameters.

    Raises:
        ValueError: no step was made.
    """
    steps = [m for m in metrics if m["step"] > 0]
    if not steps:
        raise ValueError("no step was made: nothing was received")
    episodes = sum(m["episodes"] for m in steps)
    bits = math.fsum(m["bits"] for m in steps)
    dead = {m["step"]: 1 - m["by_group/frac_mixed"] for m in steps}
    seconds = math.fsum(dead.get(int(t["step"]), 0.0) * t.get("sample", 0.0) for t in timings)
    return Ledger(
        bits=bits,
        bits_per_episode=bits / episodes,
        capacity_bits=parameters,
        saturation=bits / parameters,
        dead_episodes=round(sum(m["episodes"] * dead[m["step"]] for m in steps)),
        dead_sampling_seconds=seconds,
    )
