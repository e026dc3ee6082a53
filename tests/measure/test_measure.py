"""Intervals and bits: the numbers that verdicts rest on."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.measure.bits import advantage_bits, corrected_bits, entropy_bits, expected_reward_bits, reward_bits
from veneer.measure.intervals import mean_interval, reward_interval, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # closed forms: 0 of n has the upper end z^2 / (n + z^2), n/2 of n has 1/2 -+ z / (2 sqrt(n + z^2)), z^2 = 3.841459
        (0, 10, 0.0, 3.841458820694124 / 13.841458820694124),
        (5, 10, 0.5 - 0.979981992270027 / 13.841458820694124**0.5, 0.5 + 0.979981992270027 / 13.841458820694124**0.5),
        (10, 10, 10 / 13.841458820694124, 1.0),
        (1, 1, 1 / 4.841458820694124, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E
        (15, 148, 0.0624, 0.1605),  # its table I, method 3, printed to four digits
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_reference_values(successes: int, trials: int, low: float, high: float) -> None:
    """A wrong interval turns noise into a verdict."""
    rate = wilson(successes, trials)
    digits = 1e-9 if trials in (1, 10) else 5.1e-5
    assert (rate.low, rate.high) == (pytest.approx(low, abs=digits), pytest.approx(high, abs=digits))
    assert (rate.successes, rate.trials, rate.value) == (successes, trials, successes / trials)


@pytest.mark.parametrize("trials", [10, 64, 256])
def test_wilson_covers_the_truth(trials: int) -> None:
    """95% means that nineteen of twenty intervals hold the true rate, averaged over rates."""
    covered = []
    for p in [(i + 0.5) / 200 for i in range(200)]:
        rates = [wilson(k, trials) for k in range(trials + 1)]
        weights = [math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(trials + 1)]
        covered.append(sum(w for w, r in zip(weights, rates, strict=True) if r.low <= p <= r.high))
    assert 0.945 < sum(covered) / len(covered) < 0.965


def test_wilson_covers_in_simulation() -> None:
    """The same by drawing, without the binomial formula."""
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        p = rng.random()
        rate = wilson(sum(rng.random() < p for _ in range(50)), 50)
        hits += rate.low <= p <= rate.high
    assert abs(hits / 2000 - 0.95) < 0.02


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=300))
def test_the_interval_of_pass_or_fail_is_wilsons(rewards: list[float]) -> None:
    """One score for all environments, without losing the better interval where it is known."""
    score, share = reward_interval(rewards), wilson(int(sum(rewards)), len(rewards))
    assert (score.value, score.low, score.high) == (share.value, share.low, share.high)


def test_the_interval_of_parts_covers_in_simulation() -> None:
    """64 episodes of a policy that mostly earns nothing, as an untrained one in a shop does."""
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        rewards = [rng.uniform(0.5, 1) if rng.random() < 0.25 else 0.0 for _ in range(64)]
        score = reward_interval(rewards)
        hits += score.low <= 0.25 * 0.75 <= score.high
    assert abs(hits / 2000 - 0.95) < 0.02


def test_a_single_part_tells_nothing() -> None:
    assert vars(reward_interval([0.25])) == {"value": 0.25, "low": 0.0, "high": 1.0}
    assert reward_interval([0.25, 0.5]) == mean_interval([0.25, 0.5])


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_ordered_and_symmetric(pair: tuple[int, int]) -> None:
    """An interval lies in [0, 1], holds its estimate, and treats success and failure alike."""
    k, n = pair
    rate, mirror = wilson(k, n), wilson(n - k, n)
    assert 0 <= rate.low <= rate.value + 1e-12
    assert rate.value - 1e-12 <= rate.high <= 1
    assert (rate.low, rate.high) == (pytest.approx(1 - mirror.high, abs=1e-12), pytest.approx(1 - mirror.low, abs=1e-12))
    assert wilson(k, n, z=1.0).high - wilson(k, n, z=1.0).low < rate.high - rate.low


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_nonsense(successes: int, trials: int) -> None:
    """A division by zero deep in a report helps nobody."""
    with pytest.raises(ValueError, match="trials"):
        wilson(successes, trials)


@pytest.mark.parametrize("size", [2, 8, 31])
def test_bits_of_bernoulli_groups(size: int) -> None:
    """G times the binary entropy of the pass rate."""
    for k in range(size + 1):
        p = k / size
        entropy = 0.0 if k in (0, size) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)
        assert reward_bits([1.0] * k + [0.0] * (size - k)) == pytest.approx(size * entropy, abs=1e-9)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=40), st.randoms())
def test_bits_are_bounded(rewards: list[float], rng: random.Random) -> None:
    """Pass or fail is at most one bit an episode, whatever the order and the names of the two values."""
    bits = reward_bits(rewards)
    assert 0 <= bits <= len(rewards) + 1e-9
    shuffled = [2 * r - 1 for r in rewards]
    rng.shuffle(shuffled)
    assert reward_bits(shuffled) == pytest.approx(bits)


@given(st.floats(allow_nan=False), st.integers(0, 20))
def test_constant_groups_carry_nothing(reward: float, size: int) -> None:
    """A group in which all got the same teaches nothing."""
    assert reward_bits([reward] * size) == 0


def test_bits_of_distinct_rewards() -> None:
    """Four different rewards: two bits each."""
    assert reward_bits([0.0, 0.25, 0.5, 1.0]) == pytest.approx(8.0)


# ---------------------------------------------------------------- pass or fail at a known chance


def entropy(weights: list[float]) -> float:
    return -math.fsum(w * math.log2(w) for w in weights if w > 0)


def of_groups(chance: float, size: int) -> list[tuple[float, tuple[float, ...]]]:
    """Every group there can be, with its probability."""
    groups = itertools.product((0.0, 1.0), repeat=size)
    return [(math.prod(chance if r else 1 - chance for r in group), group) for group in groups]


@given(st.floats(0, 1), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_closed_forms_are_the_sums_over_all_groups(chance: float, size: int) -> None:
    """The mean of the measure, and the entropy of what a policy gradient is given."""
    groups = of_groups(chance, size)
    assert entropy_bits(chance) == pytest.approx(entropy([chance, 1 - chance]), abs=1e-12)
    assert expected_reward_bits(chance, size) == pytest.approx(math.fsum(w * reward_bits(group) for w, group in groups), abs=1e-9)
    centred: dict[tuple[float, ...], float] = {}
    for weight, group in groups:
        mean = sum(group) / size
        key = tuple(round(r - mean, 9) for r in group)
        centred[key] = centred.get(key, 0.0) + weight
    assert advantage_bits(chance, size) == pytest.approx(entropy(list(centred.values())), abs=1e-9)


@given(st.floats(0.001, 0.999), st.integers(2, 40))
@settings(max_examples=100, deadline=None)
def test_what_the_correction_misses_is_known(chance: float, size: int) -> None:
    """Zhang's tail; less than the plug-in estimate misses, and less than Miller's correction leaves."""
    weights = [math.comb(size, k) * chance**k * (1 - chance) ** (size - k) for k in range(size + 1)]
    groups = [[1.0] * k + [0.0] * (size - k) for k in range(size + 1)]
    corrected = math.fsum(w * corrected_bits(group) for w, group in zip(weights, groups, strict=True))
    tails = (p * math.fsum((1 - p) ** k / k for k in range(size, size + 60_000)) for p in (chance, 1 - chance))
    assert corrected / size == pytest.approx(entropy_bits(chance) - math.fsum(tails) / math.log(2), abs=1e-9)
    miller = [reward_bits(group) + (len(set(group)) - 1) / (2 * math.log(2)) for group in groups]
    assert expected_reward_bits(chance, size) < math.fsum(w * m for w, m in zip(weights, miller, strict=True)) < corrected + 1e-9


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.8])
def test_bits_of_large_groups_are_the_closed_form(chance: float) -> None:
    """Within 2%, drawn."""
    rng = random.Random(0)
    groups = [[float(rng.random() < chance) for _ in range(256)] for _ in range(200)]
    for bits in (reward_bits, corrected_bits):
        assert sum(map(bits, groups)) / (200 * 256) == pytest.approx(entropy_bits(chance), rel=0.02)


def test_constant_groups_are_not_corrected_into_something() -> None:
    assert corrected_bits([1.0] * 8) == 0
    assert corrected_bits([]) == 0
    with pytest.raises(ValueError, match="from 0 to 1"):
        entropy_bits(1.5)
