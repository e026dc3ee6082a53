"""Verdicts: intervals keep their promise, a null comparison is not called a difference, and what is not known is not claimed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from veneer.measure.verdict import MOST_SEEDS, POWER, compare_seeds, pseudo_values, t_interval

DRAWS = 2000
SLACK = 3 * math.sqrt(0.05 * 0.95 / DRAWS)
"""Three standard errors of a simulated share of 5%."""
NUMBERS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=12)


@given(NUMBERS)
@settings(max_examples=100, deadline=None)
def test_the_interval_is_scipys_paired_one(pairs: list[tuple[float, float]]) -> None:
    arm, reference = map(list, zip(*pairs, strict=True))
    found = compare_seeds(arm, reference, 0.05)
    if np.ptp(np.subtract(arm, reference)) < 1e-9:  # scipy's own interval of a constant is no number
        assert found.difference.high - found.difference.low < 1e-8
        return
    expected = stats.ttest_rel(arm, reference).confidence_interval(0.95)
    assert found.difference.low == pytest.approx(expected.low, abs=1e-9)
    assert found.difference.high == pytest.approx(expected.high, abs=1e-9)


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("kind", ["normal", "shares"])
def test_the_interval_covers_in_95_of_100(seeds: int, kind: str) -> None:
    """Shares: every seed has a rate of its own, and each arm solves 256 problems at that rate."""
    rng = np.random.default_rng(seeds)
    if kind == "normal":
        differences = rng.normal(0.02, 0.03, (DRAWS, seeds))
    else:
        rates = np.clip(rng.normal(0.85, 0.04, (DRAWS, seeds)), 0, 1)
        differences = (rng.binomial(256, rates) - rng.binomial(256, np.clip(rates - 0.02, 0, 1))) / 256
    intervals = [t_interval(row) for row in differences]
    covered = sum(i.low <= 0.02 <= i.high for i in intervals) / DRAWS
    assert abs(covered - 0.95) <= 0.02


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_false_verdicts_are_rare(seeds: int) -> None:
    """Of two equal arms at most 5 in 100 are told apart, and of two that differ by the whole margin at most 5 in 100 are called equal."""
    rng = np.random.default_rng(seeds)
    noise = rng.normal(0, 0.03, (DRAWS, seeds))
    null = [compare_seeds(row, [0.0] * seeds, 0.03).verdict for row in noise]
    assert (null.count("better") + null.count("worse")) / DRAWS <= 0.05 + SLACK
    apart = [compare_seeds(row + 0.03, [0.0] * seeds, 0.03).verdict for row in noise]
    assert apart.count("equal") / DRAWS <= 0.05 + SLACK
    assert apart.count("worse") / DRAWS <= 0.025


@pytest.mark.parametrize(("mean", "verdicts"), [(0.0, {"equal"}), (0.05, {"better"}), (-0.05, {"worse"})])
def test_the_seeds_that_are_asked_for_decide(mean: float, verdicts: set[str]) -> None:
    """As often as was promised, where mean and deviation are what they looked like."""
    rng = np.random.default_rng(7)
    five = rng.normal(0, 1, 5)
    five = (five - five.mean()) / five.std(ddof=1) * 0.08 + mean
    first = compare_seeds(five, [0.0] * 5, 0.04)
    assert first.verdict == "undecided"
    assert first.seeds_needed is not None
    draws = rng.normal(mean, 0.08, (1000, first.seeds_needed))
    decided = sum(compare_seeds(row, [0.0] * len(row), 0.04).verdict in verdicts for row in draws) / 1000
    assert POWER - 0.04 <= decided <= POWER + 0.12


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.001, -0.001, 0.002, 0.0, -0.002], "equal"),
        ([0.010, 0.011, 0.012, 0.010, 0.011], "equal"),  # a difference, and none that matters
        ([0.10, 0.12, 0.11, 0.09, 0.10], "better"),
        ([-0.10, -0.12, -0.11, -0.09, -0.10], "worse"),
        ([0.1, -0.1, 0.05, -0.05, 0.0], "undecided"),
        ([0.0, 0.0], "equal"),
        ([0.5, 0.5], "better"),
    ],
)
def test_verdicts(differences: list[float], verdict: str) -> None:
    found = compare_seeds([0.5 + d for d in differences], [0.5] * len(differences), 0.03)
    assert found.verdict == verdict
    assert (found.seeds_needed is not None) == (verdict == "undecided")
    assert verdict in str(found)
    assert found.seeds == len(differences)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_an_error_that_all_seeds_share_is_not_called_a_difference(seeds: int) -> None:
    """However many seeds say the same."""
    rng = np.random.default_rng(seeds)
    rows = rng.normal(0, 0.03, (DRAWS, seeds)) + rng.normal(0, 0.03, (DRAWS, 1))
    told, blind = ([compare_seeds(row, [0.0] * seeds, 0.01, choice).verdict for row in rows] for choice in (0.03, 0.0))
    assert (told.count("better") + told.count("worse")) / DRAWS <= 0.05 + SLACK
    assert (blind.count("better") + blind.count("worse")) / DRAWS > 0.1


def test_a_shared_error_is_said_and_takes_no_equality_away() -> None:
    near, far = [0.501, 0.499, 0.502, 0.5, 0.498], [0.60, 0.62, 0.61, 0.59, 0.60]
    assert compare_seeds(near, [0.5] * 5, 0.03, 0.5).verdict == "equal"
    assert compare_seeds(far, [0.5] * 5, 0.03, 0.01).verdict == "better"
    unsure = compare_seeds(far, [0.5] * 5, 0.03, 0.2)
    assert (unsure.verdict, unsure.seeds_needed) == ("undecided", None)
    assert "choice of rates +-0.2" in str(unsure)
    assert "choice" not in str(compare_seeds(far, [0.5] * 5, 0.03))


def test_a_hopeless_comparison_says_so() -> None:
    found = compare_seeds([1.0, -1.0, 1.0, -0.999], [0.0] * 4, 0.001)
    assert (found.verdict, found.seeds_needed) == ("undecided", None)
    assert f"more than {MOST_SEEDS} seeds would do" in str(found)


@pytest.mark.parametrize(
    ("arm", "reference", "margin", "words"),
    [
        ([0.1], [0.2], 0.1, "two seeds or more"),
        ([0.1, 0.2], [0.1], 0.1, "2 scores against 1"),
        ([0.1, math.nan], [0.1, 0.2], 0.1, "no finite number"),
        ([0.1, 0.2], [0.1, 0.2], 0.0, "margin"),
        ([0.1, 0.2], [0.1, 0.2], math.nan, "margin"),
    ],
)
def test_mistakes(arm: list[float], reference: list[float], margin: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compare_seeds(arm, reference, margin)


@pytest.mark.parametrize("seeds", [4, 6, 10])
def test_what_pairs_have_in_common_has_an_interval_that_covers(seeds: int) -> None:
    """Each seed has a worth, a pair has the mean of its two and a little of its own: neighbours taken for independent cover too seldom."""
    rng = np.random.default_rng(seeds)
    pairs = list(itertools.combinations(range(seeds), 2))
    covered = 0
    for _ in range(DRAWS):
        worth = rng.normal(0.3, 0.1, seeds)
        found = {(i, j): (worth[i] + worth[j]) / 2 + rng.normal(0, 0.01) for i, j in pairs}
        values = pseudo_values(found)
        assert np.mean(values) == pytest.approx(np.mean(list(found.values())))
        interval = t_interval(values)
        covered += interval.low <= 0.3 <= interval.high
    assert abs(covered / DRAWS - 0.95) <= 0.02


def test_two_seeds_make_one_pair_and_no_interval() -> None:
    with pytest.raises(ValueError, match="three seeds or more, not 2"):
        pseudo_values({(0, 1): 0.5})
