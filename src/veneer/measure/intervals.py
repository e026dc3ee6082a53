"""Confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
"""97.5% quantile of the standard normal."""


@dataclass(frozen=True)
class Rate:
    """A share of successes with its 95% interval."""

    successes: int
    trials: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.successes / self.trials

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Mean:
    """A mean with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


def mean_interval(values: Sequence[float] | NDArray[np.float64], z: float = Z95) -> Mean:
    """The mean and z standard errors to either side.

    Raises:
        ValueError: fewer than two values.
    """
    numbers = np.asarray(values, np.float64)
    if len(numbers) < 2:
        raise ValueError(f"an interval needs at least two values, not {len(numbers)}")
    mean, half = float(numbers.mean()), z * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Mean(mean, mean - half, mean + half)


def reward_interval(rewards: Sequence[float]) -> Mean:
    """The mean of held-out rewards: by Wilson where each is 0 or 1, a share then, and else by the normal distribution. A single reward
    between them tells no more than that the mean may be anything from 0 to 1.

    Raises:
        ValueError: no rewards.
    """
    if all(reward in (0.0, 1.0) for reward in rewards):
        share = wilson(int(sum(rewards)), len(rewards))
        return Mean(share.value, share.low, share.high)
    if len(rewards) == 1:
        return Mean(rewards[0], min(0.0, rewards[0]), max(1.0, rewards[0]))
    return mean_interval(rewards)


def paired_difference(before: Sequence[bool], after: Sequence[bool], z: float = Z95) -> Mean:
    """Of two shares over the same trials, after - before: Wald's interval with half a pair added to each cell of the two by two table,
    which keeps its promise in small samples too (Agresti & Min 2005, https://doi.org/10.1002/sim.1781).

    Raises:
        ValueError: no trials, or not as many after as before.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} trials before and {len(after)} after; a pair each is needed")
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    trials, differing = len(before) + 2, gained + lost + 1.0
    centre = (gained - lost) / trials
    half = z * math.sqrt(differing - (gained - lost) ** 2 / trials) / trials
    return Mean((gained - lost) / len(before), max(-1.0, centre - half), min(1.0, centre + half))


def wilson(successes: int, trials: int, z: float = Z95) -> Rate:
    """Wilson's score interval for a binomial share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes of {trials} trials")
    p, n = successes / trials, trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if successes == 0 else max(0.0, centre - half)  # exactly: rounding leaves 1e-17
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return Rate(successes, trials, low, high)
