"""Self-correction, watched: what a rollout does about its own work, read from its text.

Verification and backtracking are two of the four habits that Gandhi et al. count in reasoning traces
(https://arxiv.org/abs/2503.01307), found here by the words that announce them. Whether a correction helped is told as
Kumar et al. tell it (SCoRe, https://arxiv.org/abs/2409.12917, section 3): what was incorrect and became correct, and what was
correct and became incorrect. Words are a sign and no proof: "wait" in a story is no backtracking. The counts compare one
policy with itself over a run, not two models that speak differently.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from veneer.types import Trajectory

VERIFICATION = re.compile(
    r"\b(let me|let's|i('ll| will| should)?|to) (double[- ]?check|check|verify|confirm|re-?read|test)\b"
    r"|\b(check|verify|verification|sanity check):|\b(checking|verifying)\b|\bplug(ging)? [^.\n]{0,40}\bback\b",
    re.IGNORECASE,
)
BACKTRACKING = re.compile(
    r"(^|[\n.!?]\s*)no,|\b(wait|actually|scratch that|on second thought|oops)\b"
    r"|\b(that|this)('s| is| was) (wrong|incorrect|not right|not correct)\b|\b(let me|let's) (try again|start over|redo|re-?do|rethink)\b"
    r"|\bi made (a|an) (mistake|error|slip)\b",
    re.IGNORECASE,
)
_SIGNS = r"+\-*/\u00d7\u00b7"
CLAIM = re.compile(rf"(?<![\w{_SIGNS}.)=])(?P<left>[\d(][\d{_SIGNS}(). ]*)=\s*(?P<right>-?\d+(?:\.\d+)?)(?![\d.]*[{_SIGNS}=(])")
"""An equation with numbers alone on its left and one number on its right."""
LONGEST = 64
"""Characters of a left side that is worked out; longer ones are no step of a calculation."""


@dataclass(frozen=True)
class Habits:
    """Counts in one rollout."""

    verifications: int
    backtracks: int
    incorrect_to_correct: int
    """Equations that were stated wrongly and stated again, rightly."""
    correct_to_incorrect: int
    still_incorrect: int
    """Stated again, otherwise and still wrongly."""


def find_habits(texts: Sequence[str]) -> Habits:
    """``texts``: what one rollout wrote, turn by turn."""
    text = "\n".join(texts)
    changes = _changes(text)
    return Habits(
        verifications=sum(1 for _ in VERIFICATION.finditer(text)),
        backtracks=sum(1 for _ in BACKTRACKING.finditer(text)),
        incorrect_to_correct=changes.count((False, True)),
        correct_to_incorrect=changes.count((True, False)),
        still_incorrect=changes.count((False, False)),
    )


def habit_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Of finished episodes: shares that verify, backtrack and take back an equation; of the equations taken back, shares that became
    correct and incorrect; of the episodes in which a tool call failed, the share that was solved all the same. Shares of nothing are
    left out."""
    finished = [t for t in trajectories if t.error is None]
    if not finished:
        return {}
    found = [find_habits([_written(t, i) for i in range(len(t.transitions))]) for t in finished]
    helped, harmed, neither = (
        sum(getattr(h, name) for h in found) for name in ("incorrect_to_correct", "correct_to_incorrect", "still_incorrect")
    )
    corrected = sum(h.incorrect_to_correct + h.correct_to_incorrect + h.still_incorrect > 0 for h in found)
    metrics = {
        "habits/verification": sum(h.verifications > 0 for h in found) / len(found),
        "habits/backtracking": sum(h.backtracks > 0 for h in found) / len(found),
        "habits/correction": corrected / len(found),
    }
    if changes := helped + harmed + neither:
        metrics |= {"habits/incorrect_to_correct": helped / changes, "habits/correct_to_incorrect": harmed / changes}
    stumbled = [t for t in finished if t.metrics.get("tool_errors", 0.0) + t.metrics.get("invalid_calls", 0.0) > 0]
    if stumbled:
        metrics["habits/recovery"] = sum(t.reward >= 1 for t in stumbled) / len(stumbled)
    return metrics


def _written(trajectory: Trajectory, turn: int) -> str:
    action = trajectory.transitions[turn].action
    return f"{action.get('reasoning_content', '')}\n{action['content']}"


def _changes(text: str) -> list[tuple[bool, bool]]:
    """Per equation that is stated again with another result: whether it was right before and is right now."""
    last: dict[str, Fraction] = {}
    changes: list[tuple[bool, bool]] = []
    for claim in CLAIM.finditer(text):
        left, right = claim["left"].replace(" ", ""), Fraction(claim["right"])
        truth = work_out(left)
        if truth is None:
            continue
        if left in last and last[left] != right:
            changes.append((last[left] == truth, right == truth))
        last[left] = right
    return changes


_OPERATORS: dict[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def work_out(expression: str) -> Fraction | None:
    """The value of sums, differences, products and quotients of numbers, exactly; None if it is nothing of the kind."""
    if len(expression) > LONGEST:
        return None
    try:
        return _value(ast.parse(expression.replace("\u00d7", "*").replace("\u00b7", "*"), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("no arithmetic")
