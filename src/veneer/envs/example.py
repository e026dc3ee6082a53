"""An environment of one's own: digits are to be sorted, and a wrong answer may be mended once, for half the reward."""

from __future__ import annotations

import random
from dataclasses import dataclass

from veneer.envs.dataset import Problem, draw
from veneer.types import Message, Observation, Split, StepResult


def generate(rng: random.Random) -> Problem:
    """A problem from a generator of random numbers, and nothing else: the same number always gives the same problem."""
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(4, 6)))
    return Problem(f"sort {digits}", "".join(sorted(digits)))


@dataclass
class Episode:
    """Played once: what is shown first, and an answer to every turn of the model."""

    problem: Problem
    tries: int = 0

    async def initial_observation(self) -> Observation:
        return Observation([{"role": "user", "content": self.problem.prompt}])

    async def step(self, action: Message) -> StepResult:
        """``action["content"]`` is what stands behind the thinking. The metrics appear in every line of metrics.jsonl."""
        self.tries += 1
        answer = action["content"].strip()
        correct = float(answer == self.problem.answer)
        places = sum(a == b for a, b in zip(answer, self.problem.answer, strict=False)) / len(self.problem.answer)
        metrics = {"correct": correct, "places": places, "tries": float(self.tries)}
        if correct or self.tries == 2:
            return StepResult(correct / self.tries, episode_done=True, metrics=metrics)
        again: Message = {"role": "user", "content": "wrong, again"}
        return StepResult(0.0, episode_done=False, next_messages=[again], metrics=metrics)

    def gold(self) -> Message:
        """What a perfect policy says next: `veneer env check` says it, and sees that it earns 1."""
        return {"role": "assistant", "content": self.problem.answer}


@dataclass(frozen=True)
class Example:
    """Problems by number. ``draw`` keeps the splits apart by the text of the problem, whatever the seed."""

    seed: int
    name: str = "example"

    def env(self, split: Split, index: int) -> Episode:
        return Episode(draw(generate, split, index, f"{self.name}/{self.seed}"))


def example(seed: int = 0) -> Example:
    """Sort four to six digits, with a second try."""
    return Example(seed)
