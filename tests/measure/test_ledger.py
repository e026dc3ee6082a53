"""What a run received and what it cost, by hand and by closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from veneer.measure.bits import corrected_bits, reward_bits
from veneer.measure.ledger import ledger, preference_ledger, teacher_ledger, text_ledger


def step(number: int, groups: list[list[float]]) -> dict[str, float]:
    mixed = sum(len(set(group)) > 1 for group in groups) / len(groups)
    bits, corrected = (sum(measure(group) for group in groups) for measure in (reward_bits, corrected_bits))
    counts = {"episodes": sum(map(len, groups)), "by_group/frac_mixed": mixed}
    return {"step": number, **counts, "bits": bits, "bits/corrected": corrected}


def test_a_ledger_by_hand() -> None:
    between = {"step": 2, "train_mean_nll": 1.0}  # one of rejection sampling, in which nothing is played
    metrics = [
        {"step": 0},
        step(1, [[1, 0, 1, 0], [0, 0, 0, 0]]),
        between,
        step(2, [[1, 1, 1, 0], [1, 1, 0, 0]]),
        step(3, [[1] * 4, [0] * 4]),
    ]
    timings = [{"step": 0, "eval": 9.0}, *({"step": i, "sample": 2.0, "train": 1.0} for i in (1, 2, 3))]
    found = ledger(metrics, timings, 100)
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert found.bits == pytest.approx(4 + 4 * quarter + 4)
    assert found.bits < found.bits_corrected < 12 * 1.5
    assert found.bits_per_episode == pytest.approx(found.bits / 24)
    assert (found.capacity_bits, found.saturation) == (100, pytest.approx(found.bits / 100))
    assert found.dead_episodes == 4 + 0 + 8
    begun_before = [{name: value for name, value in m.items() if name != "bits/corrected"} for m in metrics]
    assert ledger(begun_before, timings, 100).bits_corrected == pytest.approx(found.bits)
    assert found.dead_sampling_seconds == pytest.approx(1.0 + 0.0 + 2.0)
    with pytest.raises(ValueError, match="no step"):
        ledger(metrics[:1], timings, 100)


def test_texts_are_counted_when_they_are_read_first() -> None:
    """Five rows in batches of two are read in two steps and a half; what comes later was read before."""
    metrics = [{"step": 0, "eval/mean_nll": 9.0}, *({"step": i, "train_mean_nll": 2.0 / i, "tokens": 10.0} for i in range(1, 8))]
    found = text_ledger(metrics, 5, 2, 200)
    assert found.bits == pytest.approx(10 * (2 + 1 + 1 / 3) / math.log(2))
    assert (found.capacity_bits, found.saturation) == (200, pytest.approx(found.bits / 200))
    assert text_ledger(metrics[:2], 5, 2, 200).bits == pytest.approx(20 / math.log(2)), "a run that ends before has read less"
    with pytest.raises(ValueError, match="no step"):
        text_ledger(metrics[:1], 5, 2, 200)


def test_preferences_are_a_bit_a_pair_at_first() -> None:
    """And less behind that, where the policy prefers what was chosen. The second epoch tells nothing new, nor does a row that a batch
    larger than the file reads again."""
    metrics = [{"step": 0, "eval/loss": 9.0}, *({"step": i, "loss": loss} for i, loss in ((1, math.log(2)), (2, 0.1), (3, 0.5)))]
    found = preference_ledger(metrics, 5, 4, 50)
    assert found.bits == pytest.approx(4 + 0.1 / math.log(2))
    assert found.saturation == pytest.approx(found.bits / 50)
    assert preference_ledger(metrics, 3, 16, 50).bits == pytest.approx(3)
    with pytest.raises(ValueError, match="no step"):
        preference_ledger(metrics[:1], 8, 4, 50)


def test_a_teacher_tells_what_the_student_lacks() -> None:
    """Where it sampled; of the student's own samples there is no such number."""
    sampled = {"episodes": 4, "tokens/mean": 5.0}
    steps = [{"step": 1, "kl/teacher_student": 2.0, "tokens": 18, **sampled}, {"step": 2, "kl/teacher_student": 0.5, **sampled}]
    metrics = [{"step": 0, "eval/kl/student_teacher": 3.0}, *steps]
    assert teacher_ledger(metrics, 10).bits == pytest.approx((36 + 10) / math.log(2)), "an older run did not count what was trained on"
    with pytest.raises(ValueError, match="no step"):
        teacher_ledger([{"step": 1, "kl/student_teacher": 2.0, "tokens": 18, **sampled}], 10)


def test_texts_of_a_known_source_have_its_bits() -> None:
    """Of a model that knows no better, and learns nothing, what is to be learned are the bits of all tokens."""
    metrics = [{"step": i, "train_mean_nll": math.log(16), "tokens": 25.0} for i in range(1, 5)]
    assert text_ledger(metrics, 8, 2, 1).bits == pytest.approx(4 * 25 * 4)


def test_bits_of_bernoulli_rewards_are_the_closed_form() -> None:
    """Within 2% of H(p) an episode: by the plug-in estimate of large groups, by the corrected one of eight where one in two is solved."""
    rng = np.random.default_rng(0)
    for p in (0.1, 0.3, 0.5, 0.9):
        groups = (rng.random((200, 256)) < p).astype(float)
        mean = np.mean([reward_bits(list(group)) for group in groups]) / 256
        assert mean == pytest.approx(-p * math.log2(p) - (1 - p) * math.log2(1 - p), rel=0.02)
    small = (rng.random((20_000, 8)) < 0.5).astype(float)
    assert np.mean([corrected_bits(list(group)) for group in small]) / 8 == pytest.approx(1.0, rel=0.02)
