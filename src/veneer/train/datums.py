"""Trajectories and conversations to datums. The one-token shift happens here and nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from veneer.types import Adapter, Datum, Floats, Tokens, Trajectory


def trajectory_to_data(trajectory: Trajectory, advantage: float) -> list[Datum]:
    """One datum per run of turns in which each prompt extends the last; normally one for the whole episode.

    The advantage stands on every sampled token; mask is 1 there and 0 on all that was not sampled.
    """
    data: list[Datum] = []
    row: _Row | None = None
    for turn in trajectory.transitions:
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
