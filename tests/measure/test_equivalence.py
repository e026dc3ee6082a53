"""Gaps between programs: what the weighted rewards estimate is checked against distributions small enough to add up."""

from __future__ import annotations

import math

import numpy as np
import pytest

from veneer.measure.equivalence import REWARD_LIMIT, Text, compare, reward_gap
from veneer.measure.intervals import mean_interval, paired_difference
from veneer.types import Floats

REWARDS = np.array([0.0, 1.0, 0.0, 1.0, 0.5])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum())


def drawn(seed: int, count: int, apart: float) -> tuple[list[Text], list[list[Floats]], list[list[Floats]], float]:
    """Texts of two tokens from q, their log-probabilities under p and p', and E_p'[R] - E_p[R] exactly. A text's reward is its last
    token's. Each of q, p and p' is ``apart`` from a common distribution."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0, 1, 5)
    q, p, other = (log_softmax(common + rng.normal(0, apart, 5)) for _ in range(3))
    tokens = rng.choice(5, (count, 2), p=np.exp(q) / np.exp(q).sum())
    rows = [[log[row].astype(np.float32) for row in tokens] for log in (q, p, other)]
    texts = [Text([rows[0][i]], float(REWARDS[tokens[i, 1]])) for i in range(count)]
    exact = float((np.exp(other) - np.exp(p)) @ REWARDS)
    return texts, [[row] for row in rows[1]], [[row] for row in rows[2]], exact


def test_the_reward_gap_is_the_difference_of_expectations() -> None:
    """Nineteen of twenty intervals hold the exact difference, from texts that neither side drew."""
    held, gaps = 0, []
    for seed in range(400):
        texts, p, other, exact = drawn(seed, 200, 0.2)
        gap = reward_gap(texts, p, other)
        assert gap is not None
        held += gap.low <= exact <= gap.high
        gaps.append(gap.value - exact)
    assert 0.92 <= held / 400 <= 0.98
    assert abs(np.mean(gaps)) < 3 * np.std(gaps) / math.sqrt(400) + 1e-3  # no bias that matters


def test_equal_sides_have_no_gap() -> None:
    texts, p, _, _ = drawn(0, 50, 0.5)
    gap = compare(texts, p, p, 0.0)
    assert gap.reward is not None
    assert (gap.largest, gap.mean, gap.reward.value, gap.within, gap.tokens) == (0, 0, 0, True, 100)


def test_a_text_in_parts_is_one_text() -> None:
    """A conversation of several rows weighs as one: its probabilities multiply."""
    texts, p, other, _ = drawn(1, 50, 0.3)
    parted = [Text([t.sampled[0][:1], t.sampled[0][1:]], t.reward) for t in texts]
    split = [[[row[0][:1], row[0][1:]] for row in side] for side in (p, other)]
    whole, parts = reward_gap(texts, p, other), reward_gap(parted, *split)
    assert whole is not None
    assert parts is not None
    assert parts.value == pytest.approx(whole.value, abs=1e-12)


def test_one_wrong_token_is_told() -> None:
    """The largest gap is of single tokens: a mean would hide one in a thousand."""
    texts, p, _, _ = drawn(2, 500, 0.3)
    other = [[row[0].copy()] for row in p]
    other[123][0][1] -= np.float32(0.2)
    gap = compare(texts, p, other, 0.1)
    assert gap.largest == pytest.approx(0.2, abs=1e-6)
    assert gap.mean < 1e-3
    assert not gap.within


def test_a_reward_that_differs_is_told_only_where_the_interval_says_so() -> None:
    """Log-probabilities within their limit, and yet another reward; and noise is not called a difference."""
    texts, p, other, exact = drawn(3, 4000, 0.3)
    gap = compare(texts, p, other, limit=10.0)
    assert abs(exact) > REWARD_LIMIT
    assert not gap.within
    few = compare(texts[:6], p[:6], other[:6], limit=10.0)
    assert few.reward is not None
    assert few.within == (few.reward.low <= 0 <= few.reward.high or abs(few.reward.value) <= REWARD_LIMIT)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_over_every_limit(bad: float) -> None:
    texts, p, _, _ = drawn(4, 5, 0.3)
    other = [[row[0].copy()] for row in p]
    other[0][0][0] = bad
    gap = compare([Text(t.sampled, None) for t in texts], p, other, 1.0)
    assert gap.largest == math.inf
    assert not gap.within


def test_texts_without_rewards_have_no_reward_gap() -> None:
    texts, p, other, _ = drawn(5, 5, 0.01)
    assert compare([Text(t.sampled, None) for t in texts], p, other, 1.0).reward is None


def test_mean_interval() -> None:
    """By hand: mean 2, standard deviation 1, three numbers."""
    mean = mean_interval([1.0, 2.0, 3.0])
    assert (mean.value, mean.high - 2, 2 - mean.low) == (2, pytest.approx(1.959964 / math.sqrt(3)), pytest.approx(1.959964 / math.sqrt(3)))
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1.0])


@pytest.mark.parametrize("trials", [24, 64, 256])
def test_paired_difference_covers_the_truth(trials: int) -> None:
    """95% of the intervals hold the true difference of shares, over pairs that agree more or less often."""
    rng = np.random.default_rng(trials)
    held = []
    for _ in range(3000):
        gained, lost = rng.dirichlet([1, 1, 4])[:2]
        kinds = rng.choice(3, trials, p=[gained, lost, 1 - gained - lost])
        both = rng.random(trials) < 0.5
        before = np.where(kinds == 0, False, np.where(kinds == 1, True, both))
        after = np.where(kinds == 0, True, np.where(kinds == 1, False, both))
        found = paired_difference(before.tolist(), after.tolist())
        assert -1 <= found.low <= found.value + 1e-12
        assert found.value - 1e-12 <= found.high <= 1
        held.append(found.low <= gained - lost <= found.high)
    assert 0.935 < np.mean(held) < 0.975


def test_pairs_that_agree_leave_little_room() -> None:
    """That is what pairing is for: with 100 of 100 pairs alike, shares of 0.5 differ by 3 points at most, not by 14."""
    wins = [True, False] * 50
    found = paired_difference(wins, wins)
    assert found.value == 0
    assert found.high < 0.03
    with pytest.raises(ValueError, match="a pair each"):
        paired_difference([True], [])
