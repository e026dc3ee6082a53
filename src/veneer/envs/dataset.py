"""Problems as data: what the one-question environments share."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from veneer.types import Env, Message, Observation, Split, StepResult

Grader = Callable[[Message, str], dict[str, float]]
"""(action, gold answer) -> metrics; ``correct`` is the reward."""


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str


def held_out(text: str) -> bool:
    """Whether a problem belongs to the eval split: one in eight, by its text alone, so that no seed can mix the splits. By a digest: a CRC
    is linear, and of texts that differ in a few places it may hold out none, as of reasoning-gym's string_splitting."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()[-1] % 8 == 0


def draw(generate: Callable[[random.Random], Problem], split: Split, index: int, salt: str) -> Problem:
    """The index-th problem of a split. ``salt`` keeps the streams of different datasets and seeds apart."""
    rng = random.Random(f"{salt}/{split}/{index}")
    while True:
        problem = generate(rng)
        if held_out(problem.prompt) == (split == "eval"):
            return problem


def final_answer(action: Message) -> str:
    """What stands after the thinking."""
    return action["content"].strip()


def exact_match(action: Message, answer: str) -> dict[str, float]:
    return {"correct": float(final_answer(action) == answer), "thought": float(bool(action.get("reasoning_content")))}


class QuestionEnv:
    """Asks once and grades the answer."""

    def __init__(self, problem: Problem, grade: Grader = exact_match) -> None:
        self.problem, self.grade = problem, grade

    async def initial_observation(self) -> Observation:
        return Observation([{"role": "user", "content": self.problem.prompt}])

    async def step(self, action: Message) -> StepResult:
        metrics = self.grade(action, self.problem.answer)
        return StepResult(metrics["correct"], episode_done=True, metrics=metrics)

    def gold(self) -> Message:
        return {"role": "assistant", "content": self.problem.answer}


@dataclass(frozen=True)
class ProblemDataset:
    """Problems from a generator, and the environment that plays one."""

    name: str
    generate: Callable[[random.Random], Problem]
    make: Callable[[Problem], Env] = QuestionEnv
    seed: int = 0

    def env(self, split: Split, index: int) -> Env:
        return self.make(draw(self.generate, split, index, f"{self.name}/{self.seed}"))
