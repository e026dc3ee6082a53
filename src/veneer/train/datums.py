"""Trajectories and conversations to datums. The one-token shift happens here and nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from veneer.train.advantages import Advantages
from veneer.types import Adapter, Datum, Floats, Tokens, Trajectory, TrajectoryGroup


def groups_to_data(groups_P: Sequence[TrajectoryGroup], advantages_P: Advantages, *, mask_truncated: bool = False) -> list[list[Datum]]:
    """Per finished episode of the groups with a signal its datums.

    ``mask_truncated``: an episode that ran into a limit has none; it stays in its group's baseline, and counts among the batch's
    episodes (DAPO's overlong filtering, https://arxiv.org/abs/2503.14476, section 3.4; TRL's ``mask_truncated_completions``).
    """
    return [
        [] if mask_truncated and trajectory.truncated else trajectory_to_data(trajectory, advantages_T)
        for group, advantages_G in zip(groups_P, advantages_P, strict=True)
        if advantages_G is not None
        for trajectory, advantages_T in zip((t for t in group.trajectories_G if t.error is None), advantages_G, strict=True)
    ]


def trajectory_to_data(trajectory: Trajectory, advantages_T: Sequence[float] | None = None) -> list[Datum]:
    """One datum per run of turns in which each prompt extends the last; normally one for the whole episode.

    A turn's advantage stands on every token that was sampled in it, 0 where none is given; mask is 1 there and 0 on all that was not
    sampled.
    """
    advantages_T = [0.0] * len(trajectory.transitions) if advantages_T is None else advantages_T
    data: list[Datum] = []
    row: _Row | None = None
    for turn, advantage in zip(trajectory.transitions, advantages_T, strict=True):
        if row is None or row.adapter != turn.sample.adapter or not row.is_prefix_of(turn.prompt):
            data += [] if row is None else [row.shifted()]
            row = _Row(turn.sample.adapter)
        row.add(turn.prompt[row.length :], None, 0.0)
        row.add(turn.sample.tokens, turn.sample.logprobs, advantage)
    data += [] if row is None else [row.shifted()]
    return data


def supervised_data(turns: Sequence[tuple[Tokens, Tokens]]) -> list[Datum]:
    """Prompts and answers of one conversation, in order, to datums whose loss is on the answers alone.

    One datum per run of turns in which each prompt extends the last. A chat template that shows an earlier answer otherwise than it
    was given, such as without its thinking, begins a new one: every answer is trained behind the very tokens it would be sampled behind.
    """
    rows: list[_Row] = []
    for prompt, answer in turns:
        if not rows or not rows[-1].is_prefix_of(prompt):
            rows.append(_Row(None))
        rows[-1].add(prompt[rows[-1].length :], None, 0.0)
        rows[-1].add(answer, np.zeros(len(answer), np.float32), 0.0)
    return [row.shifted() for row in rows]


def weighed(datum: Datum, weight: float) -> Datum:
    """The datum with its trained tokens weighing so much in a sum of losses."""
    return dataclasses.replace(datum, mask=datum.mask * np.float32(weight))


class _Row:
    """A token row as it grows turn by turn."""

    def __init__(self, adapter: Adapter | None) -> None:
        self.adapter, self.length = adapter, 0
        self.tokens: list[Tokens] = []
        self.logprobs: list[Floats] = []
        self.advantages: list[Floats] = []
        self.mask: list[Floats] = []

    def is_prefix_of(self, prompt: Tokens) -> bool:
        return len(prompt) >= self.length and np.array_equal(prompt[: self.length], np.concatenate(self.tokens))

    def add(self, tokens: Tokens, logprobs: Floats | None, advantage: float) -> None:
        """``logprobs`` None: these tokens were not sampled."""
        zeros = np.zeros(len(tokens), np.float32)
        self.tokens.append(tokens)
        self.logprobs.append(zeros if logprobs is None else logprobs)
        self.advantages.append(zeros if logprobs is None else zeros + np.float32(advantage))
        self.mask.append(zeros if logprobs is None else zeros + np.float32(1))
        self.length += len(tokens)

    def shifted(self) -> Datum:
        def joined(parts: Sequence[Floats]) -> Floats:
            return np.concatenate(parts)[1:]

        tokens = np.concatenate(self.tokens)
        return Datum(tokens[:-1], tokens[1:], joined(self.logprobs), joined(self.advantages), joined(self.mask), self.adapter)
