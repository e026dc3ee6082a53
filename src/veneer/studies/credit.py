"""What is told of an episode whose right course is known: one word about the whole, one about each line, or one about each token.

A completion is laid beside the worked solution line by line: its last line, if it came to an end, beside the last one, every other beside
the line of the same number. A token is right if the solution has it at its place in that line, a line if it is the solution's, the whole if
its answer is. Nothing is passed on: what a token earns is its own feedback, or that of its line, or that of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np

from veneer.measure.bits import corrected_bits
from veneer.types import Floats, Tokens

Feedback = Literal["end", "steps", "tokens"]
Place = tuple[int, int]
"""Line and token in it; -1 is the last line, and all of a line, or of the whole."""
LAST = -1


@dataclass(frozen=True)
class Judged:
    """A completion, token by token."""

    places_T: Sequence[Place]
    """What the feedback is about: tokens of one place are told one thing."""
    rewards_T: Sequence[float]


@dataclass(frozen=True)
class Case:
    """A completion and what it should have been."""

    sampled: Tokens
    ended: bool
    """Its last token ends the turn."""
    reference: Tokens
    """The worked solution, with the token that ends the turn."""
    right: bool
    """The answer is."""


def judge(case: Case, feedback: Feedback, breaks: Set[int]) -> Judged:
    """``breaks``: tokens that end a line."""
    if feedback == "end":
        return Judged([(LAST, LAST)] * len(case.sampled), [float(case.right)] * len(case.sampled))
    *before, last = lines_of(case.reference, breaks)
    mine = lines_of(case.sampled, breaks)
    places, rewards = list[Place](), list[float]()
    for number, line in enumerate(mine):
        ends = case.ended and number == len(mine) - 1
        beside = last if ends else before[number] if number < len(before) else line[:0]
        at = LAST if ends else number
        if feedback == "steps":
            places += [(at, LAST)] * len(line)
            rewards += [float(np.array_equal(line, beside))] * len(line)
        else:
            places += [(at, i) for i in range(len(line))]
            rewards += [float(i < len(beside) and token == beside[i]) for i, token in enumerate(line)]
    return Judged(places, rewards)


def lines_of(tokens: Tokens, breaks: Set[int]) -> list[Tokens]:
    """With the token that ends each; the last may have none. At least one line."""
    ends = [i + 1 for i, token in enumerate(tokens) if int(token) in breaks]
    lines = np.split(tokens, ends)
    return lines[:-1] if len(lines) > 1 and not len(lines[-1]) else lines


def centred_by_place(group: Sequence[Judged]) -> list[Floats]:
    """Advantages: what each token earns less what the members of the group earn at its place in the mean, those that came there."""
    told = _by_place(group)
    means = {place: sum(rewards) / len(rewards) for place, rewards in told.items()}
    return [np.array([r - means[p] for p, r in zip(one.places_T, one.rewards_T, strict=True)], np.float32) for one in group]


def bits_of(group: Sequence[Judged]) -> float:
    """What the feedback on a group tells at most: the sum over its places of what each tells by itself, as the whole is no more than its
    parts (Shannon 1948, subadditivity of entropy)."""
    return sum(corrected_bits(rewards) for rewards in _by_place(group).values())


def _by_place(group: Sequence[Judged]) -> dict[Place, list[float]]:
    """A reward of each member that came to a place."""
    told = dict[Place, list[float]]()
    for one in group:
        for place, reward in dict(zip(one.places_T, one.rewards_T, strict=True)).items():
            told.setdefault(place, []).append(reward)
    return told
