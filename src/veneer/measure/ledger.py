"""What a run received from its rewards, texts, preferences or teacher, what it could hold, and what episodes cost that taught nothing."""

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
    bits_corrected: float
    """Without most of what the plug-in estimate lacks in small groups."""
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
    """Of a run's metrics.jsonl and timings.jsonl, and the number of its trained parameters. Steps in which nothing was played say nothing.

    Raises:
        ValueError: nothing was played to train on.
    """
    steps = [m for m in metrics if "bits" in m]
    if not steps:
        raise ValueError("no step was made: nothing was received")
    episodes = sum(m["episodes"] for m in steps)
    bits = math.fsum(m["bits"] for m in steps)
    dead = {m["step"]: 1 - m["by_group/frac_mixed"] for m in steps}
    seconds = math.fsum(dead.get(int(t["step"]), 0.0) * t.get("sample", 0.0) for t in timings)
    return Ledger(
        bits=bits,
        bits_per_episode=bits / episodes,
        bits_corrected=math.fsum(m.get("bits/corrected", m["bits"]) for m in steps),  # a run that an older Veneer began has none
        capacity_bits=parameters,
        saturation=bits / parameters,
        dead_episodes=round(sum(m["episodes"] * dead[m["step"]] for m in steps)),
        dead_sampling_seconds=seconds,
    )


@dataclass(frozen=True)
class Taught:
    bits: float
    """What there was to learn, at most: in texts, in preferences, or from a teacher."""
    capacity_bits: int
    """As of ``Ledger``."""
    saturation: float
    """To be learned over capacity."""


def text_ledger(metrics: Sequence[Mapping[str, Any]], rows: int, batch_size: int, parameters: int) -> Taught:
    """Of the metrics.jsonl of supervised training, whose losses are nats a token before the step, and of the rows that were trained on:
    the loss on what was read for the first time (prequential coding; "LoRA Without Regret", section on capacity). Where an epoch ends
    within a batch, all of the batch is counted.

    Raises:
        ValueError: no step was made.
    """
    steps = [m for m in metrics if "train_mean_nll" in m][: math.ceil(rows / batch_size)]
    return _taught([m["train_mean_nll"] * m["tokens"] for m in steps], parameters)


def preference_ledger(metrics: Sequence[Mapping[str, Any]], pairs: int, batch_size: int, parameters: int) -> Taught:
    """The same of preferences, whose loss is the nats that telling which answer is the better one takes: at most about a bit a pair, and
    that where the policy cannot tell them apart.

    Raises:
        ValueError: no step was made.
    """
    steps = [m for m in metrics if "loss" in m][: math.ceil(pairs / batch_size)]
    return _taught([m["loss"] * batch_size for m in steps], parameters)


def teacher_ledger(metrics: Sequence[Mapping[str, Any]], parameters: int) -> Taught:
    """Of distillation: by how much student and teacher differed on what was sampled, KL divergence by KL divergence, whichever of them
    sampled. Every step samples anew.

    Raises:
        ValueError: no step was made.
    """
    ways = ("kl/student_teacher", "kl/teacher_student")
    played = [(m[way], m) for m in metrics for way in ways if way in m]
    return _taught([kl * m.get("tokens", m["tokens/mean"] * m["episodes"]) for kl, m in played], parameters)


def _taught(nats: Sequence[float], parameters: int) -> Taught:
    if not nats:
        raise ValueError("no step was made: nothing was read")
    bits = math.fsum(nats) / math.log(2)
    return Taught(bits, parameters, bits / parameters)
