"""``arithmetic``: sums of several two-digit numbers. Thinking step by step is possible and not required."""

from __future__ import annotations

import random
from functools import partial

from veneer.envs.dataset import Problem, ProblemDataset, QuestionEnv, exact_match
from veneer.types import Message


def generate(rng: random.Random, terms: tuple[int, int] = (3, 5)) -> Problem:
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(*terms))]
    return Problem("+".join(map(str, numbers)) + "=?", str(sum(numbers)))


def grade(action: Message, answer: str) -> dict[str, float]:
    """Metrics beside ``correct``: ``stepwise`` (partial sums were written down), ``self_corrected`` (a slip was taken back)."""
    reasoning = action.get("reasoning_content", "")
    metrics = exact_match(action, answer)
    metrics["stepwise"] = float("=" in reasoning)
    metrics["self_corrected"] = float("no, " in reasoning)
    return metrics


def arithmetic(min_terms: int = 3, max_terms: int = 5, seed: int = 0) -> ProblemDataset:
    """Sums of ``min_terms`` to ``max_terms`` numbers between 10 and 99."""
    return ProblemDataset("arithmetic", partial(generate, terms=(min_terms, max_terms)), partial(QuestionEnv, grade=grade), seed)
