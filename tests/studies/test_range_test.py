"""What a range test makes of the ends of its runs. The runs themselves are the lab's (test_lab.py) and the verb's (test_plan_verb.py)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.studies.range_test import FACTOR, POINTS, Tried, choose, grid

RATES = grid(1.5e-3)


def ends(*after: float | None) -> Sequence[Tried]:
    """None: the run diverged."""
    return [Tried(rate, 0.12, 0.0 if one is None else one, one is None) for rate, one in zip(RATES, after, strict=True)]


def test_a_grid_has_its_centre_in_the_middle() -> None:
    assert len(RATES) == POINTS
    assert RATES[POINTS // 2] == 1.5e-3
    assert [b / a for a, b in itertools.pairwise(RATES)] == [FACTOR] * (POINTS - 1)


def test_the_best_rate_is_taken() -> None:
    found = choose(ends(0.3, 0.5, 0.8, 0.6, None))
    assert (found.value, found.low, found.high, found.edge) == (1.5e-3, 0.75e-3, 3e-3, "")


def test_rates_that_cannot_be_told_apart_share_the_middle() -> None:
    """128 problems at 0.8 have a standard error of 0.035."""
    found = choose(ends(0.3, 0.79, 0.8, 0.6, None))
    assert found.value == pytest.approx(1.5e-3 / math.sqrt(2))
    assert (found.low, found.high) == (0.375e-3, 3e-3)


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
