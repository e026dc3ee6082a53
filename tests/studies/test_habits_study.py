"""What is seen in episodes, and how a gain is divided into doing a thing more often and doing it better."""

from __future__ import annotations

import numpy as np
import pytest

from veneer.studies.habits import Seen, habits_result, more_often, see
from veneer.types import Sample, Trajectory, TrajectoryGroup, Transition


def episode(reasoning: str, content: str, reward: float) -> Trajectory:
    sample = Sample(np.array([1]), np.zeros(1, np.float32), "stop", "nano", None)
    turn = Transition(np.array([0]), sample, {"role": "assistant", "content": content, "reasoning_content": reasoning}, reward)
    return Trajectory([turn], reward)


def test_what_is_seen() -> None:
    """One that answers at once, one that works, one that works and mends a slip, one that spoils what was right."""
    group = TrajectoryGroup(
        0,
        [
            episode("", "53", 1.0),
            episode("11+22=33", "53", 0.0),
            episode("11+22=34\nno, 11+22=33\n33+20=53", "53", 1.0),
            episode("11+22=33\nno, 11+22=43", "63", 0.0),
        ],
    )
    seen = see([group, group])
    assert seen == Seen(8, worked=6, worked_right=2, direct_right=2, took_back=4, took_back_right=2, mended=2, spoilt=2, still_wrong=0)
    assert (seen.works, seen.right, seen.takes_back, seen.mends) == (0.75, 0.5, 0.5, 0.5)
    assert (seen.right_if_worked, seen.right_if_direct) == (pytest.approx(1 / 3), 1.0)


def counts(works: float, right_if_worked: float, right_if_direct: float, episodes: int = 1000) -> Seen:
    worked = round(works * episodes)
    return Seen(episodes, worked, round(worked * right_if_worked), round((episodes - worked) * right_if_direct), 0, 0, 0, 0, 0)


def test_a_gain_is_divided() -> None:
    """All of it where nothing but the habit changed, none of it where the habit did not, and the parts make up the whole."""
    often = (counts(0.2, 0.8, 0.1), counts(0.9, 0.8, 0.1))
    assert more_often(*often) == pytest.approx(often[1].right - often[0].right)
    better = (counts(0.5, 0.4, 0.1), counts(0.5, 0.8, 0.1))
    assert more_often(*better) == 0
    base, after = counts(0.2, 0.5, 0.1), counts(0.8, 0.7, 0.3)
    better_at_either = (base.works + after.works) / 2 * 0.2 + (1 - (base.works + after.works) / 2) * 0.2
    assert more_often(base, after) + better_at_either == pytest.approx(after.right - base.right)


def test_words() -> None:
    pairs = [(counts(0.2, 0.5, 0.1 + e), counts(0.9, 0.5, 0.1 + e)) for e in (0.0, 0.01, 0.02)]
    works, right, part, back, mends = habits_result(pairs).findings
    assert [works.verdict, right.verdict, back.verdict, mends.verdict] == ["more", "equal", "equal", "undecided"]
    assert part.verdict == "100%"
    nothing = [(counts(0.5, 0.5, 0.5), counts(0.5, 0.5, 0.5))] * 2
    assert habits_result(nothing).findings[2].verdict == "undecided"
