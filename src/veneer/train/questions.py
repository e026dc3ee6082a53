"""A file of questions as an environment: each is asked once, and nothing is rewarded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.train.rows import Conversation, permutation, question, read_rows
from veneer.types import Env, Message, Observation, Split, StepResult


class QuestionOnly:
    def __init__(self, asked: Conversation) -> None:
        self.asked = asked

    async def initial_observation(self) -> Observation:
        return Observation(self.asked.messages, self.asked.tools)

    async def step(self, action: Message) -> StepResult:
        return StepResult(0.0, episode_done=True)


@dataclass(frozen=True)
class Questions:
    """Those to train on in a new seeded order each time all have been asked; those held out in the file's."""

    name: str
    train: Sequence[Conversation]
    held_out: Sequence[Conversation]

    def env(self, split: Split, index: int) -> Env:
        if split == "eval":
            return QuestionOnly(self.held_out[index])
        epoch, place = divmod(index, len(self.train))
        return QuestionOnly(self.train[permutation(len(self.train), f"{self.name}/{epoch}")[place]])


def load_questions(path: Path, held_out: float) -> Questions:
    """
    Raises:
        DataError: names the file and the line.
    """
    return Questions(path.name, *read_rows(path, "distill.data", "'prompt' or 'messages'", held_out, question))
