"""Self-correction, counted: the figures decide whether somebody believes that a model checks its work."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.measure.habits import Habits, find_habits, habit_metrics, work_out
from veneer.types import Sample, Trajectory, Transition


def counts(text: str) -> tuple[int, int, int, int, int]:
    h = find_habits([text])
    return h.verifications, h.backtracks, h.incorrect_to_correct, h.correct_to_incorrect, h.still_incorrect


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("27+94=121\n121+38=159", (0, 0, 0, 0, 0)),
        ("27+94=111\nno, 27+94=121\n121+38=159", (0, 1, 1, 0, 0)),
        ("27+94=121\nno, 27+94=111", (0, 1, 0, 1, 0)),
        ("27+94=111\nno, 27+94=131\nno, 27+94=121", (0, 2, 1, 0, 1)),
        ("27 + 94 = 111. Wait, that's wrong: 27+94 = 121", (0, 2, 1, 0, 0)),
        ("27+94=111 and then 27+94=111", (0, 0, 0, 0, 0)),
        ("x+94=111, no x+94=121", (0, 0, 0, 0, 0)),
        ("3*4=12=6*2", (0, 0, 0, 0, 0)),
        ("(2+3)*4=24. Let me check: (2+3)*4=20. Verify: yes", (2, 0, 1, 0, 0)),
        ("1/3=0.3, actually 1/4=0.25, actually 1/4=0.2", (0, 2, 0, 1, 0)),
        ("To verify, I plug the value back in. I made a mistake. Let's try again.", (2, 2, 0, 0, 0)),
        ("There is no, or hardly any, waiting here; an actual checkpoint.", (0, 0, 0, 0, 0)),
        ("5/0=1, no, 5/0=2", (0, 0, 0, 0, 0)),
        ("", (0, 0, 0, 0, 0)),
    ],
)
def test_counts_by_hand(text: str, expected: tuple[int, int, int, int, int]) -> None:
    assert counts(text) == expected


def test_a_correction_may_come_a_turn_later() -> None:
    """Agents notice a slip when a tool answers."""
    assert find_habits(["12*12=122", "no, 12*12=144"]) == Habits(0, 1, 1, 0, 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(-3, 3)), max_size=8))
def test_changes_are_told_by_arithmetic(steps: list[tuple[int, int, int]]) -> None:
    """Each sum is stated with some error and then rightly: every error that is not zero is one correction, whatever the numbers."""
    distinct = {(a, b): error for a, b, error in steps}
    text = "\n".join(f"{a}+{b}={a + b + error}\nno, {a}+{b}={a + b}" for (a, b), error in distinct.items())
    assert counts(text)[2:] == (sum(error != 0 for error in distinct.values()), 0, 0)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-*/(). =no,wait\n", max_size=200))
def test_nothing_that_a_policy_writes_breaks_it(text: str) -> None:
    """And no more is found than there are equations and words."""
    found = find_habits([text])
    assert 0 <= found.incorrect_to_correct + found.correct_to_incorrect + found.still_incorrect < max(text.count("="), 1)
    assert 0 <= found.verifications + found.backtracks <= len(text)


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2+3*4", 14), ("(2+3)*4", 20), ("-2+1", -1), ("0.1+0.2", Fraction(3, 10)), ("7/2", Fraction(7, 2)), ("2\u00d73", 6)],
)
def test_arithmetic_is_exact(expression: str, value: int | Fraction) -> None:
    assert work_out(expression) == value


@pytest.mark.parametrize("expression", ["2**9999999", "a+1", "__import__('os')", "1/0", "(" * 60, "", "1+" * 40 + "1", "1_0+1j"])
def test_only_arithmetic_is_worked_out(expression: str) -> None:
    """The text is a policy's: nothing in it is ever run, and nothing in it takes long."""
    assert work_out(expression) is None


def episode(text: str, reward: float, error: str | None = None, **metrics: float) -> Trajectory:
    nothing = np.zeros(0, np.int64)
    sample = Sample(nothing, np.zeros(0, np.float32), "stop", "base", None)
    action = {"role": "assistant", "content": "", "reasoning_content": text}
    return Trajectory([Transition(nothing, sample, action, reward, metrics)], reward, error)  # pyright: ignore


def test_metrics_by_hand() -> None:
    """Four finished episodes: two take something back (one helps, one harms), one checks; of two with a failed call one is solved."""
    metrics = habit_metrics(
        [
            episode("1+1=3\nno, 1+1=2", 1.0, tool_errors=1.0),
            episode("1+1=2\nno, 1+1=3", 0.0, invalid_calls=2.0),
            episode("let me check", 1.0),
            episode("", 0.0),
            episode("1+1=3\nno, 1+1=2", 0.0, error="died"),
        ]
    )
    assert metrics == {
        "habits/verification": 0.25,
        "habits/backtracking": 0.5,
        "habits/correction": 0.5,
        "habits/incorrect_to_correct": 0.5,
        "habits/correct_to_incorrect": 0.5,
        "habits/recovery": 0.5,
    }
    assert habit_metrics([episode("", 0.0, error="died")]) == {}
    assert set(habit_metrics([episode("2+2=4", 1.0)])) == {"habits/verification", "habits/backtracking", "habits/correction"}
