"""What several tries at a problem reach, and how often a group of them teaches something: unbiased, from n >= k tries."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from veneer.measure.intervals import Mean, wilson


def pass_at_k(tries: int, solved: int, k: int) -> float:
    """The chance that of k tries one solves the problem: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, https://arxiv.org/abs/2107.03374).

    Raises:
        ValueError: fewer than k tries.
    """
    if not 0 <= solved <= tries or not 1 <= k <= tries:
        raise ValueError(f"pass@{k} of {tries} tries with {solved} solved")
    return 1.0 - math.comb(tries - solved, k) / math.comb(tries, k)


def useful_share(rewards: Sequence[float], group_size: int) -> float:
    """The chance that ``group_size`` of these tries have two different rewards: 1 - sum over rewards v of C(n_v, G) / C(n, G).

    Raises:
        ValueError: fewer tries than a group has members.
    """
    if not 1 <= group_size <= len(rewards):
        raise ValueError(f"a group of {group_size} from {len(rewards)} tries")
    alike = sum(math.comb(count, group_size) for count in Counter(rewards).values())
    return 1.0 - alike / math.comb(len(rewards), group_size)


def mean_share(values_P: Sequence[float], tries: int) -> Mean:
    """The mean of one share a problem, each from ``tries`` tries, with Wilson's interval at the number of trials that would have this
    standard error (the effective sample size of Korn & Graubard 1998): between one a problem, when
    the tries of a problem are all alike, and all tries.

    Raises:
        ValueError: no values.
    """
    if not values_P:
        raise ValueError("no shares")
    problems = len(values_P)
    mean = math.fsum(values_P) / problems
    spread = math.fsum((v - mean) ** 2 for v in values_P) / max(problems - 1, 1) / problems
    effective = mean * (1 - mean) / spread if spread > 0 else 0.0
    trials = round(max(problems, min(effective, problems * tries)))
    around = wilson(round(mean * trials), trials)
    return Mean(mean, min(around.low, mean), max(around.high, mean))
