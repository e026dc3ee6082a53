"""What a range test makes of the ends of its runs. The runs themselves are the lab's (test_lab.py) and the verb's (test_plan_verb.py)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.studies.range_test import FACTOR, POINTS, RUNG, Tried, beyond, choose, climb, grid, ladder

RATES = grid(1.5e-3)


def ends(*after: float | None) -> Sequence[Tried]:
    """None: the run diverged."""
    return [Tried(rate, 0.12, 0.0 if one is None else one, one is None) for rate, one in zip(RATES, after, strict=True)]


def test_a_grid_has_its_centre_in_the_middle() -> None:
    assert len(RATES) == POINTS
    assert RATES[POINTS // 2] == 1.5e-3
    assert [b / a for a, b in itertools.pairwise(RATES)] == [FACTOR] * (POINTS - 1)


def test_a_ladder_leaves_no_gap_that_a_grid_would_not_fill() -> None:
    """Wherever the best rate is, it is within the grid around the nearest rung."""
    rungs = ladder()
    assert [b / a for a, b in itertools.pairwise(rungs)] == pytest.approx([RUNG] * (len(rungs) - 1))
    assert grid(1.0)[0] < 1 / math.sqrt(RUNG) < 1 < math.sqrt(RUNG) < grid(1.0)[-1]


def test_a_grid_is_widened_where_the_good_ones_go_up_to_a_side() -> None:
    low, high = RATES[0], RATES[-1]
    assert beyond(ends(0.2, 0.5, 0.8, 0.6, None)) == []
    assert beyond(ends(0.2, 0.3, 0.4, 0.5, 0.8)) == [high * FACTOR, high * FACTOR**2]
    assert beyond(ends(0.8, 0.79, 0.4, 0.3, None)) == [low / FACTOR**2, low / FACTOR]
    assert beyond(ends(0.8, 0.79, 0.8, 0.79, 0.8)) == [low / FACTOR**2, low / FACTOR, high * FACTOR, high * FACTOR**2]
    assert beyond(ends(0.12, 0.12, 0.12, 0.12, 0.12)) == []


def test_a_ladder_leads_to_what_improved_and_else_away_from_harm() -> None:
    assert climb(ends(0.12, 0.14, 0.4, 0.0, None)) == RATES[2]
    assert climb(ends(0.12, 0.13, 0.12, 0.02, None)) == RATES[2]
    assert climb(ends(0.12, None, 0.12, 0.02, None)) == RATES[2]
    assert climb(ends(0.0, 0.0, None, None, None)) == RATES[0]


def test_the_vertex_of_the_best_three_is_taken() -> None:
    even = choose(ends(0.3, 0.6, 0.8, 0.6, None))
    assert (even.value, even.low, even.high, even.edge) == (1.5e-3, 0.75e-3, 3e-3, "")
    below = choose(ends(0.3, 0.7, 0.8, 0.5, None))
    assert below.value == pytest.approx(1.5e-3 * FACTOR ** (0.5 * (0.7 - 0.5) / (0.7 - 1.6 + 0.5)))
    cliff = choose(ends(0.3, 0.7, 0.8, None, None))
    assert cliff.value is not None
    assert below.value is not None
    assert cliff.value < below.value


def test_rates_that_cannot_be_told_apart_are_in_the_range() -> None:
    """256 problems at 0.8 have a standard error of 0.025."""
    found = choose(ends(0.3, 0.79, 0.8, 0.6, None))
    assert (found.low, found.high) == (0.375e-3, 3e-3)
    assert choose(ends(0.3, 0.77, 0.8, 0.6, None)).low == 0.75e-3
    several = [dataclasses.replace(one, problems=3 * one.problems) for one in ends(0.3, 0.78, 0.8, 0.6, None)]
    assert choose(several).low == 0.75e-3  # which 768 problems do tell apart


def test_an_edge_is_told() -> None:
    assert choose(ends(0.2, 0.3, 0.4, 0.5, 0.8)).edge == "highest tried"
    assert choose(ends(0.8, 0.5, 0.4, 0.3, None)).edge == "lowest tried"


@pytest.mark.parametrize("after", [(0.12, 0.13, 0.11, None, None), (None,) * 5, (0.0,) * 5])
def test_nothing_is_taken_where_nothing_improved(after: Sequence[float | None]) -> None:
    assert choose(ends(*after)).value is None


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=POINTS, max_size=POINTS))
def test_a_diverged_rate_is_never_taken(after: list[float | None]) -> None:
    """And what is taken lies within its range and the grid."""
    found = choose(ends(*after))
    if found.value is not None:
        assert found.low < found.value < found.high
        assert RATES[0] <= found.value <= RATES[-1]
        assert any(one is not None for one in after)
