"""What a run received and what it cost, by hand and by closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from veneer.measure.bits import reward_bits
from veneer.measure.ledger import ledger


def step(number: int, groups: list[list[float]]) -> dict[str, float]:
    mixed = sum(len(set(group)) > 1 for group in groups) / len(groups)
    bits = sum(reward_bits(group) for group in groups)
    return {"step": number, "episodes": sum(map(len, groups)), "bits": bits, "by_group/frac_mixed": mixed}


def test_a_ledger_by_hand() -> None:
    metrics = [{"step": 0}, step(1, [[1, 0, 1, 0], [0, 0, 0, 0]]), step(2, [[1, 1, 1, 0], [1, 1, 0, 0]]), step(3, [[1] * 4, [0] * 4])]
    timings = [{"step": 0, "eval": 9.0}, *({"step": i, "sample": 2.0, "train": 1.0} for i in (1, 2, 3))]
    found = ledger(metrics, timings, 100)
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert found.bits == pytest.approx(4 + 4 * quarter + 4)
    assert found.bits_per_episode == pytest.approx(found.bits / 24)
    assert (found.capacity_bits, found.saturation) == (100, pytest.approx(found.bits / 100))
    assert found.dead_episodes == 4 + 0 + 8
    assert found.dead_sampling_seconds == pytest.approx(1.0 + 0.0 + 2.0)
    with pytest.raises(ValueError, match="no step"):
        ledger(metrics[:1], timings, 100)


def test_bits_of_bernoulli_rewards_are_the_closed_form() -> None:
    """Of groups large enough for a plug-in estimate: within 2% of H(p) an episode."""
    rng = np.random.default_rng(0)
    for p in (0.1, 0.3, 0.5, 0.9):
        groups = (rng.random((200, 256)) < p).astype(float)
        mean = np.mean([reward_bits(list(group)) for group in groups]) / 256
        assert mean == pytest.approx(-p * math.log2(p) - (1 - p) * math.log2(1 - p), rel=0.02)
