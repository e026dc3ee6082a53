"""What training did to a policy beside its reward: two policies that each tried the same problems many times."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from veneer.measure.intervals import Mean
from veneer.measure.pass_at_k import pass_at_k

DRAWS = 2000
"""Resamples of a bootstrap."""
FEW = 8
"""Solutions among which different ones are counted: more would leave too many problems out."""
FAR = 64
"""Tries at which a fall of pass@k counts as lost ground, or the most there are."""


@dataclass(frozen=True)
class Tries:
    """What a policy did with one problem, again and again; the same place in all lists is the same try."""

    rewards: Sequence[float]
    answers: Sequence[str]
    """What stands behind the thinking: equal texts are one answer."""
    texts: Sequence[str]
    """All that was written, thinking too: equal texts are one solution."""
    tokens: Sequence[int]
    """How many the policy wrote."""

    @property
    def solved(self) -> int:
        """Tries with a reward of 1 or more."""
        return sum(reward >= 1.0 for reward in self.rewards)


@dataclass(frozen=True)
class Change:
    """A number of both policies, and the mean difference problem by problem; each with its 95% interval."""

    start: Mean
    end: Mean
    difference: Mean
    """end - start."""
    problems: int
    """On which it could be measured."""


@dataclass(frozen=True)
class Scorecard:
    problems: int
    tries: int
    """Of each problem by each policy."""
    reward: Change
    pass_at_k: dict[int, Change]
    """Of k = 1, 2, 4 and so on up to half the tries."""
    crossover: int | None
    """The smallest k from which on the start solves as many problems as the end, or more, though it solves fewer in one try."""
    answer_entropy: Change
    """Bits of the answers to a problem: plug-in, so at most log2 of the tries, and low if these are few."""
    distinct_solutions: Change | None
    """How many of FEW correct solutions differ; None: no problem has so many on both sides."""
    tokens: Change
    gained: Sequence[int]
    """Problems that the end solves in one of its tries at least, and the start in none."""
    lost: Sequence[int]
    warnings: Sequence[str] = field(default_factory=list[str])


def make_scorecard(start_P: Sequence[Tries], end_P: Sequence[Tries]) -> Scorecard:
    """Compare two policies on the same problems, in the same order.

    Raises:
        ValueError: fewer than two problems, other problems, or not as many tries of all.
    """
    counts = {len(tries.rewards) for tries in (*start_P, *end_P)}
    if len(start_P) != len(end_P) or len(start_P) < 2 or len(counts) != 1:
        raise ValueError(
            f"{len(start_P)} and {len(end_P)} problems with {sorted(counts)} tries; two or more are needed, all tried as often"
        )
    tries = counts.pop()
    ks = [2**i for i in range(max(1, tries // 2).bit_length())]

    def change(measure: Callable[[Tries], float]) -> Change:
        return compare_problems([measure(one) for one in start_P], [measure(one) for one in end_P])

    curve = {k: change(lambda one, k=k: pass_at_k(tries, one.solved, k)) for k in ks}
    reward = change(lambda one: math.fsum(one.rewards) / tries)
    many = [(s, e) for s, e in zip(start_P, end_P, strict=True) if min(s.solved, e.solved) >= FEW]
    distinct = compare_problems([_distinct(s) for s, _ in many], [_distinct(e) for _, e in many]) if len(many) > 1 else None
    pairs = list(enumerate(zip(start_P, end_P, strict=True)))
    return Scorecard(
        problems=len(start_P),
        tries=tries,
        reward=reward,
        pass_at_k=curve,
        crossover=find_crossover(curve),
        answer_entropy=change(lambda one: entropy_bits(one.answers)),
        distinct_solutions=distinct,
        tokens=change(lambda one: math.fsum(one.tokens) / tries),
        gained=[i for i, (s, e) in pairs if e.solved and not s.solved],
        lost=[i for i, (s, e) in pairs if s.solved and not e.solved],
        warnings=_warnings(reward, curve),
    )


def find_crossover(curve: dict[int, Change]) -> int | None:
    """In a pass@k of rising k whose first difference is above 0: the k from which on no difference is."""
    differences = [(k, change.difference.value) for k, change in curve.items()]
    if differences[0][1] <= 0:
        return None
    behind = [k for k, value in differences if value > 0]
    return next((k for k, _ in differences if k > behind[-1]), None)


def _warnings(reward: Change, curve: dict[int, Change]) -> list[str]:
    """In words, what a rising reward hides."""
    far = max(k for k in curve if k <= FAR)
    gain, fall = reward.difference, curve[far].difference
    if gain.value <= 0 or fall.value >= 0 or far == 1:
        return []
    sure = gain.low > 0 and fall.high < 0
    certainty = "both beyond chance" if sure else "not beyond chance on so few problems"
    return [f"the reward rises by {gain} and pass@{far} changes by {fall}, {certainty}: it is surer of less than it could do"]


# ---------------------------------------------------------------- one problem


def entropy_bits(values: Sequence[str]) -> float:
    """Of the distribution of different values among these."""
    return sum(count / len(values) * math.log2(len(values) / count) for count in Counter(values).values())


def distinct_among(values: Sequence[str], few: int) -> float:
    """How many different ones ``few`` of these values have, on average over all choices: the sum over kinds v of
    1 - C(n - n_v, few) / C(n, few) (rarefaction, Hurlbert 1971, https://doi.org/10.2307/1934145). Of two samples the smaller would look
    less diverse otherwise.

    Raises:
        ValueError: fewer values than that.
    """
    return sum(pass_at_k(len(values), count, few) for count in Counter(values).values())


def _distinct(tries: Tries) -> float:
    return distinct_among([text for text, reward in zip(tries.texts, tries.rewards, strict=True) if reward >= 1.0], FEW)


# ---------------------------------------------------------------- all problems


def compare_problems(start_P: Sequence[float], end_P: Sequence[float]) -> Change:
    """Means over problems, and of the differences, with bootstrap intervals over problems: the same resamples for all three.

    Raises:
        ValueError: fewer than two, or not as many on both sides.
    """
    start, end = np.asarray(start_P, np.float64), np.asarray(end_P, np.float64)
    if start.shape != end.shape:
        raise ValueError(f"{len(start)} problems at the start and {len(end)} at the end")
    return Change(bootstrap_mean(start), bootstrap_mean(end), bootstrap_mean(end - start), len(start))


def bootstrap_mean(values_P: NDArray[np.float64]) -> Mean:
    """The mean with its 95% bootstrap interval, by percentiles that are set out as far as Student's quantile exceeds the normal one, and as
    the variance of n resampled values falls short (the expanded percentile interval, Hesterberg 2015, https://arxiv.org/abs/1411.5279):
    the plain one is too narrow for the few dozen problems that a scorecard has.

    Raises:
        ValueError: fewer than two values.
    """
    count = len(values_P)
    if count < 2:
        raise ValueError(f"an interval needs at least two problems, not {count}")
    from scipy.special import ndtr, stdtrit

    tail = float(ndtr(math.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.025)))
    picks = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    low, high = np.quantile(picks @ values_P / count, [tail, 1 - tail])
    mean = float(values_P.mean())
    return Mean(mean, min(float(low), mean), max(float(high), mean))
