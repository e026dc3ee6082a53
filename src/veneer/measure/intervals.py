"""Confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
