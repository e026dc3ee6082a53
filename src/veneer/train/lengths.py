"""Answers that run into the limit of their length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from veneer.types import RequestError, Trajectory, TrajectoryGroup


def soft_overlong(length: int, max_tokens: int, cache: int) -> float:
    """DAPO's soft overlong punishment (https://arxiv.org/abs/2503.14476, equation 13): 0 up to max_tokens - cache, then falling in a line
    to -1 at max_tokens, and -1 beyond.

    Raises:
        RequestError: the cache is not from 1 to max_tokens.
    """
    if not 0 < cache <= max_tokens:
        raise RequestError(f"soft overlong punishment: its cache must be from 1 to max_tokens = {max_tokens} tokens, and is {cache}")
    return max(-1.0, min(0.0, (max_tokens - cache - length) / cache))


def punish_overlong(groups_P: Sequence[TrajectoryGroup], max_tokens: int, cache: int) -> list[TrajectoryGroup]:
    """The groups with the punishment of its longest turn added to the reward of every finished episode, where ``max_tokens`` is the
    limit of a turn. Like what a grader of the group adds, it counts at the last turn.

    Raises:
        RequestError: as ``soft_overlong``.
    """

    def punished(trajectory: Trajectory) -> Trajectory:
        if trajectory.error is not None:
            return trajectory
        longest = max((len(turn.sample.tokens) for turn in trajectory.transitions), default=0)
        return replace(trajectory, reward=trajectory.reward + soft_overlong(longest, max_tokens, cache))

    return [replace(group, trajectories_G=[punished(t) for t in group.trajectories_G]) for group in groups_P]
