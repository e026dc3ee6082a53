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
class Offered:
    bits: float
    """What there was to learn."""
    capacity_bits: int
    """As of ``Ledger``."""
    saturation: float
    """To be learned over capacity."""


def text_ledger(metrics: Sequence[Mapping[str, Any]], rows: int, batch_size: int, parameters: int) -> Offered:
    """Of the metrics.jsonl of supervised training, whose losses are nats a token before the step, and of the rows that were trained on:
    the loss on what was read for the first time (prequential coding; "LoRA Without Regret", section on capacity). Where an epoch ends
    within a batch, its share of the batch is counted.

    Raises:
        ValueError: no step was made.
    """
    nats = [m["train_mean_nll"] * m["tokens"] for m in metrics if "train_mean_nll" in m]
    return _offered(_first_epoch(nats, rows, batch_size), parameters)


def preference_ledger(metrics: Sequence[Mapping[str, Any]], pairs: int, batch_size: int, parameters: int) -> Offered:
    """Of DPO: what it takes to say which answer of each pair is the better one, to whom the texts and the reference are given and who
    bets on it as the loss has it: the loss on pairs that were read for the first time. A bit a pair as long as policy and reference are
    the same, less where the policy has come to prefer what was chosen, more where the opposite. The gradient carries the texts too, so an
    adapter may store more than that.

    Raises:
        ValueError: no step was made.
    """
    return _offered(_first_epoch([m["loss"] * batch_size for m in metrics if "loss" in m], pairs, batch_size), parameters)


def teacher_ledger(metrics: Sequence[Mapping[str, Any]], parameters: int) -> Offered:
    """Of off-policy distillation: by how many more nats the student would have written down what the teacher sampled than the teacher
    itself, which is the KL divergence of teacher and student (the redundancy of a prequential code, Cover & Thomas 2006, 13.1). Every step
    samples anew. What a teacher says of the student's own samples is a number a token, of which no such sum is the measure.

    Raises:
        ValueError: no step was made, or none of this kind.
    """
    played = [(m["kl/teacher_student"], m) for m in metrics if "kl/teacher_student" in m]
    return _offered([kl * m.get("tokens", m["tokens/mean"] * m["episodes"]) for kl, m in played], parameters)


def _first_epoch(nats: Sequence[float], rows: int, batch_size: int) -> list[float]:
    """Of the nats of batches, those of rows that were read for the first time."""
    fresh = [min(batch_size, rows - at) / batch_size for at in range(0, rows, batch_size)]
    return [share * batch for share, batch in zip(fresh, nats, strict=False)]


def _offered(nats: Sequence[float], parameters: int) -> Offered:
    if not nats:
        raise ValueError("no step was made: there was nothing to learn")
    bits = math.fsum(nats) / math.log(2)
    return Offered(bits, parameters, bits / parameters)
