"""``sort``, ``reverse`` and ``count``: small tasks on strings of digits that the bundled base half knows."""

from __future__ import annotations

import random

from veneer.envs.dataset import Problem, ProblemDataset


def _digits(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(low, high)))


def generate_sort(rng: random.Random) -> Problem:
    digits = _digits(rng, 5, 7)
    return Problem(f"sort {digits}", "".join(sorted(digits)))


def generate_reverse(rng: random.Random) -> Problem:
    digits = _digits(rng, 5, 7)
    return Problem(f"reverse {digits}", digits[::-1])


def generate_count(rng: random.Random) -> Problem:
    digits = _digits(rng, 7, 10)
    digit = rng.choice(digits)
    return Problem(f"count {digit} in {digits}", str(digits.count(digit)))


def sort(seed: int = 0) -> ProblemDataset:
    """Put five to seven digits in order."""
    return ProblemDataset("sort", generate_sort, seed=seed)


def reverse(seed: int = 0) -> ProblemDataset:
    """Write five to seven digits backwards."""
    return ProblemDataset("reverse", generate_reverse, seed=seed)


def count(seed: int = 0) -> ProblemDataset:
    """Count how often one digit occurs among seven to ten."""
    return ProblemDataset("count", generate_count, seed=seed)
