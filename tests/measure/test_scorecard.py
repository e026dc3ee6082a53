"""Two policies side by side: closed forms, coverage by simulation, and the words about what a reward hides."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from veneer.measure.scorecard import Tries, bootstrap_mean, compare_problems, distinct_among, entropy_bits, find_crossover, make_scorecard


def tries(solved: int, of: int, answers: list[str] | None = None, tokens: int = 5) -> Tries:
    texts = answers or [f"{i}" for i in range(of)]
    return Tries([1.0] * solved + [0.0] * (of - solved), texts, texts, [tokens] * of)


@pytest.mark.parametrize(("values", "bits"), [("aaaa", 0.0), ("aabb", 1.0), ("abcd", 2.0), ("aaab", 0.8112781244591328)])
def test_entropy_of_answers(values: str, bits: float) -> None:
    assert entropy_bits(list(values)) == pytest.approx(bits)


def test_different_solutions_are_counted_among_equally_many() -> None:
    """By all choices, on random samples."""
    rng = random.Random(0)
    for _ in range(50):
        values = rng.choices("abcde", k=rng.randint(3, 8))
        few = rng.randint(1, len(values))
        choices = list(itertools.combinations(values, few))
        assert distinct_among(values, few) == pytest.approx(sum(len(set(choice)) for choice in choices) / len(choices))
    with pytest.raises(ValueError, match="pass@5 of 4"):
        distinct_among(list("abcd"), 5)


def test_intervals_cover_the_truth() -> None:
    """Mean pass rates of 24 problems whose own rates are spread as pass rates are: 95 of 100 intervals, within two."""
    rng = np.random.default_rng(0)
    covered = []
    for a, b in ((0.8, 1.6), (2.0, 2.0)):
        hits = 0
        for _ in range(1000):
            found = bootstrap_mean(rng.binomial(32, rng.beta(a, b, 24)) / 32)
            hits += found.low <= a / (a + b) <= found.high
        covered.append(hits / 1000)
    assert covered == pytest.approx([0.95, 0.95], abs=0.02)


def test_differences_are_paired() -> None:
    """What all problems gain alike is certain, however much they differ among themselves."""
    start = np.linspace(0, 0.8, 20)
    change = compare_problems(list(start), list(start + 0.1))
    assert change.difference.low == pytest.approx(0.1)
    assert change.difference.high == pytest.approx(0.1)
    assert change.start.high - change.start.low > 0.1


def test_a_policy_beside_itself_has_changed_nothing() -> None:
    rng = random.Random(1)
    same = [tries(rng.randint(0, 32), 32, rng.choices("abc", k=32)) for _ in range(12)]
    card = make_scorecard(same, same)
    assert (card.problems, card.tries, card.crossover, card.gained, card.lost, card.warnings) == (12, 32, None, [], [], [])
    assert list(card.pass_at_k) == [1, 2, 4, 8, 16]
    changes = [card.reward, card.answer_entropy, card.tokens, *card.pass_at_k.values()]
    assert all((c.difference.value, c.difference.low, c.difference.high) == (0, 0, 0) for c in changes)


def test_a_sharpened_policy_is_called_so() -> None:
    """Where it solved half the tries of every problem, it now solves all of two thirds of them and none of the rest."""
    start = [tries(64, 128) for _ in range(30)]
    end = [tries(128 if i % 3 else 0, 128, ["same"] * 128, tokens=3) for i in range(30)]
    card = make_scorecard(start, end)
    assert card.reward.difference.value == pytest.approx(1 / 6)
    assert card.pass_at_k[64].start.value == pytest.approx(1.0)
    assert card.pass_at_k[64].end.value == pytest.approx(2 / 3)
    assert card.crossover == 2  # 1 - 1/4 and a little more, beside 2/3
    assert (list(card.gained), list(card.lost)) == ([], list(range(0, 30, 3)))
    assert card.answer_entropy.start.value == pytest.approx(7.0)
    assert card.answer_entropy.end.value == 0.0
    assert card.distinct_solutions is not None
    assert (card.distinct_solutions.start.value, card.distinct_solutions.end.value) == (pytest.approx(8.0), pytest.approx(1.0))
    assert card.distinct_solutions.problems == 20
    assert card.tokens.difference.value == -2
    (warning,) = card.warnings
    assert "pass@64 changes by -0.333" in warning
    assert ("both beyond chance" in warning) == (card.reward.difference.low > 0)


def test_one_that_gains_everywhere_is_not() -> None:
    card = make_scorecard([tries(i, 64) for i in range(20)], [tries(i + 20, 64) for i in range(20)])
    assert card.warnings == []
    assert card.crossover is None
    assert list(card.gained) == [0]
    assert list(card.pass_at_k) == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("differences", "crossover"),
    [([0.3, 0.1, -0.1], 4), ([0.3, -0.1, 0.1, -0.2], 8), ([0.3, 0.2], None), ([-0.1, -0.2], None), ([0.3, 0.0], 2), ([0.0, 0.1], None)],
)
def test_the_crossover_is_where_the_start_is_ahead_for_good(differences: list[float], crossover: int | None) -> None:
    curve = {2**i: compare_problems([0.5, 0.5], [0.5 + d, 0.5 + d]) for i, d in enumerate(differences)}
    assert find_crossover(curve) == crossover


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 problems"):
        make_scorecard([tries(1, 4)] * 2, [tries(1, 4)])
    with pytest.raises(ValueError, match=r"\[4, 5\] tries"):
        make_scorecard([tries(1, 4)] * 2, [tries(1, 5)] * 2)
    with pytest.raises(ValueError, match="1 and 1 problems"):
        make_scorecard([tries(1, 4)], [tries(1, 4)])
    assert math.isclose(bootstrap_mean(np.array([0.0, 1.0])).value, 0.5)
