"""pass@k and useful groups against counting them out, and the interval against simulated problems."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.measure.intervals import wilson
from veneer.measure.pass_at_k import mean_share, pass_at_k, useful_share

rewards = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=9)


@given(rewards, st.data())
def test_pass_at_k_is_the_share_of_subsets_that_solve(tries: list[float], data: st.DataObject) -> None:
    """What "unbiased" means: every k of the n tries, counted out."""
    k = data.draw(st.integers(1, len(tries)))
    subsets = list(itertools.combinations(tries, k))
    share = sum(1.0 in subset for subset in subsets) / len(subsets)
    assert pass_at_k(len(tries), tries.count(1.0), k) == pytest.approx(share)


@given(rewards, st.data())
def test_useful_share_is_the_share_of_groups_with_two_rewards(tries: list[float], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(tries)))
    groups = list(itertools.combinations(tries, size))
    assert useful_share(tries, size) == pytest.approx(sum(len(set(group)) > 1 for group in groups) / len(groups))


def test_more_tries_than_there_are() -> None:
    with pytest.raises(ValueError, match="pass@9 of 8 tries"):
        pass_at_k(8, 1, 9)
    with pytest.raises(ValueError, match="a group of 9 from 8 tries"):
        useful_share([0.0] * 8, 9)
    with pytest.raises(ValueError, match="no shares"):
        mean_share([], 8)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40))
def test_the_interval_holds_its_mean(solved: list[int]) -> None:
    shares = [count / 8 for count in solved]
    found = mean_share(shares, 8)
    assert found.value == pytest.approx(math.fsum(shares) / len(shares))
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert found.high > found.low


def test_tries_that_are_all_alike_count_once() -> None:
    """Eight copies of one answer are one observation; eight independent ones are eight."""
    alike = mean_share([1.0] * 20 + [0.0] * 20, 8)
    rate = wilson(20, 40)
    assert (alike.low, alike.high) == (pytest.approx(rate.low, abs=0.01), pytest.approx(rate.high, abs=0.01))
    spread = mean_share([0.5, 0.375, 0.625] * 13, 8)
    assert spread.high - spread.low < 0.6 * (alike.high - alike.low)


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 20.0])
def test_it_covers_the_truth(sharpness: float) -> None:
    """Problems of different difficulty, eight tries each: about 95 of 100 intervals must hold the mean over all problems."""
    rng = random.Random(1)
    held = 0
    for _ in range(400):
        rates = [rng.betavariate(0.3 * sharpness, 0.7 * sharpness) for _ in range(48)]
        shares = [sum(rng.random() < rate for _ in range(8)) / 8 for rate in rates]
        found = mean_share(shares, 8)
        held += found.low <= 0.3 <= found.high
    assert held >= 0.92 * 400
