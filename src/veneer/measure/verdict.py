"""Is one arm equal to another, better or worse? From one score a seed and arm, compared seed by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from veneer.measure.intervals import Mean

Verdict = Literal["equal", "better", "worse", "undecided"]
POWER = 0.8
"""The chance with which the seeds that an undecided comparison asks for would decide it."""
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Comparison:
    """Of an arm with a reference over the same seeds."""

    difference: Mean
    """arm - reference, the mean over seeds with its 95% interval."""
    deviation: float
    """Standard deviation of the differences."""
    seeds: int
    margin: float
    """A difference smaller than this is none that matters."""
    verdict: Verdict
    seeds_needed: int | None
    """How many would decide an undecided comparison with a chance of POWER, if mean and deviation are what they look like; None: it
    is decided, or would need more than MOST_SEEDS."""
    choice: float = 0.0
    """Standard deviation of an error that all seeds share, as that of having chosen learning rates on few runs."""

    def __str__(self) -> str:
        return f"{self.verdict} ({self._difference}){self.wanted}"

    @property
    def numbers(self) -> str:
        """The same without the verdict, for beside another word for it."""
        return f"{self._difference}{self.wanted}"

    def said(self, better: str, worse: str) -> str:
        """The verdict where more is neither better nor worse."""
        return {"better": better, "worse": worse}.get(self.verdict, self.verdict)

    @property
    def _difference(self) -> str:
        choice = f", choice of rates +-{self.choice:.2g}" if self.choice else ""
        return f"{self.difference}, margin {self.margin:g}, {self.seeds} seeds{choice}"

    @property
    def wanted(self) -> str:
        """How many seeds would decide it, if it is undecided, for behind numbers of its own."""
        return f"; {self.seeds_needed or f'more than {MOST_SEEDS}'} seeds would do" if self.verdict == "undecided" else ""


def seeds_wanted(comparisons: Iterable[Comparison]) -> str:
    """How many seeds would decide all of them, in words; empty if all are decided."""
    unsure = [one for one in comparisons if one.verdict == "undecided"]
    return max(unsure, key=lambda one: one.seeds_needed or MOST_SEEDS + 1).wanted if unsure else ""


def compare_seeds(
    arm: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray, margin: float, choice: float = 0.0
) -> Comparison:
    """Compare scores, one a seed, of which more is better; the same place in both is the same seed.

    The interval is Student's t for paired differences. An arm is ``equal`` if all of it lies within ``margin`` of 0 (two one-sided
    tests, Schuirmann 1987, https://doi.org/10.1007/BF01068419, at 2.5% each), else ``better`` or ``worse`` if it excludes 0, else
    ``undecided``: no evidence of a difference is no evidence of there being none. ``choice``: standard deviation of an error that all
    seeds share; a difference is better or worse only if an interval that is as much wider excludes 0 too.

    Raises:
        ValueError: fewer than two seeds, not as many in both, a score that is no finite number, or no margin.
    """
    if len(arm) != len(reference) or len(arm) < 2:
        raise ValueError(f"{len(arm)} scores against {len(reference)}; a comparison needs the same two seeds or more on both sides")
    if not margin > 0:
        raise ValueError(f"a margin of {margin}; it must be more than 0")
    differences = np.asarray(arm, np.float64) - np.asarray(reference, np.float64)
    if not np.isfinite(differences).all():
        raise ValueError("a score is no finite number; give what a diverged run scored")
    difference, deviation = t_interval(differences), float(differences.std(ddof=1))
    verdict = _judge(difference, _widened(difference, deviation, len(differences), choice), margin)
    needed = _seeds_needed(difference.value, deviation, len(differences), margin, choice) if verdict == "undecided" else None
    return Comparison(difference, deviation, len(differences), margin, verdict, needed, choice)


def t_interval(values: Sequence[float] | np.ndarray) -> Mean:
    """The mean of a few values with Student's 95% interval, which is wider than the normal one: 1.4 times for five.

    Raises:
        ValueError: fewer than two values.
    """
    numbers = np.asarray(values, np.float64)
    if len(numbers) < 2:
        raise ValueError(f"an interval needs at least two values, not {len(numbers)}")
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(numbers) - 1, 0.975))
    mean, half = float(numbers.mean()), quantile * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Mean(mean, mean - half, mean + half)


def pseudo_values(pairs: Mapping[tuple[int, int], float]) -> list[float]:
    """Of a mean over all pairs of seeds, a value for each seed: pairs that share a seed are not independent, these nearly are, and have its
    mean. n m - (n - 1) m without the pairs of a seed (the jackknife of a U-statistic; Arvesen 1969,
    https://doi.org/10.1214/aoms/1177697287).

    Raises:
        ValueError: of fewer than three seeds.
    """
    seeds = sorted({seed for pair in pairs for seed in pair})
    if len(seeds) < 3:
        raise ValueError(f"an interval of what pairs of seeds have in common needs three seeds or more, not {len(seeds)}")
    whole = float(np.mean(list(pairs.values())))
    without = [float(np.mean([value for pair, value in pairs.items() if seed not in pair])) for seed in seeds]
    return [len(seeds) * whole - (len(seeds) - 1) * one for one in without]


def _widened(difference: Mean, deviation: float, seeds: int, choice: float) -> Mean:
    """The interval of a difference with an error that all seeds share."""
    from scipy.special import stdtrit

    half = float(stdtrit(seeds - 1, 0.975)) * math.hypot(deviation / math.sqrt(seeds), choice)
    return Mean(difference.value, difference.value - half, difference.value + half)


def _judge(difference: Mean, widened: Mean, margin: float) -> Verdict:
    if -margin < difference.low and difference.high < margin:
        return "equal"
    if widened.low > 0:
        return "better"
    return "worse" if widened.high < 0 else "undecided"


def _seeds_needed(mean: float, deviation: float, seeds: int, margin: float, choice: float) -> int | None:
    """The usual sample size of a paired t test, (t_0.975 + t_POWER) * deviation / sqrt(n), for whichever is nearer: that the difference
    is not 0, or that it is less than the margin."""
    from scipy.special import stdtrit

    more = np.arange(seeds + 1, MOST_SEEDS + 1)
    error, sure = deviation / np.sqrt(more), stdtrit(more - 1, 0.975)
    differs = sure * np.hypot(error, choice) + stdtrit(more - 1, POWER) * error <= abs(mean)
    equals = (sure + stdtrit(more - 1, (1 + POWER) / 2)) * error <= margin - abs(mean)  # it can fail on either side
    enough = differs | equals
    return int(more[enough.argmax()]) if enough.any() else None
