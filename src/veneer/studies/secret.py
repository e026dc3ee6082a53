"""Bandits with a secret, for studies: which of the actions are rewarded? The ideal learner's posterior, in closed form and by simulation,
and REINFORCE on softmax policies, many side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.measure.bits import entropy_bits, reward_bits

Numbers = NDArray[np.float64]

SECRET = 64
"""Bits: how much there is to be learned, at least."""
GROUP = 8
"""Episodes between two steps of REINFORCE."""
EARNS = 0.9
PATIENCE = 16
"""REINFORCE gives up after so many episodes for each action."""


# ---------------------------------------------------------------- the secret, and whoever knows all that can be known


@dataclass(frozen=True)
class Task:
    """Which ``rewarded`` of ``actions`` actions are it?"""

    actions: int
    rewarded: int

    @property
    def chance(self) -> float:
        """Of a reward, before anything is known."""
        return self.rewarded / self.actions

    @cached_property
    def bits(self) -> float:
        """The secret's: log2 of the number of sets that it may be."""
        return math.log2(math.comb(self.actions, self.rewarded))

    @property
    def claimed(self) -> float:
        """Episodes that it takes to be told all of it, by the claim: log2 K / H(p)."""
        return self.bits / entropy_bits(self.chance)

    @property
    def ideal(self) -> float:
        """Episodes that the ideal learner takes in the mean: it stops when the actions that are left are all rewarded or all not, and
        in a random order the last run of one kind is (n - k) / (k + 1) + k / (n - k + 1) actions long in the mean."""
        n, k = self.actions, self.rewarded
        return n - (n - k) / (k + 1) - k / (n - k + 1)


def make_task(chance: Fraction) -> Task:
    """The smallest with this chance and a secret of SECRET bits or more. What is certain or impossible holds none."""
    if chance in (0, 1):
        return Task(SECRET, int(chance * SECRET))
    tasks = (Task(size * chance.denominator, size * chance.numerator) for size in itertools.count(1))
    return next(task for task in tasks if task.bits >= SECRET)


def remaining_bits(task: Task, asked: Any, found: Any) -> Numbers:
    """The posterior's entropy when ``found`` of ``asked`` different actions were rewarded: all sets that agree with that are as likely
    as each other, C(n - asked, k - found) of them. -inf where there are none."""
    return _log2_choose(task.actions - np.asarray(asked), task.rewarded - np.asarray(found))


def _log2_choose(n: Any, k: Any) -> Numbers:
    from scipy.special import gammaln

    n, k = np.asarray(n, np.float64), np.asarray(k, np.float64)
    logs = (gammaln(n + 1) - gammaln(np.clip(k, 0, None) + 1) - gammaln(np.clip(n - k, 0, None) + 1)) / math.log(2)
    return np.where((k >= 0) & (k <= n), logs, -np.inf)


def ask(task: Task, courses: int, episodes: int, rng: np.random.Generator) -> Numbers:
    """Bits [episodes] by which the posterior's entropy falls in each of the first episodes, the mean over ``courses`` secrets. They are
    drawn as the actions are tried, by selection sampling (Knuth, The Art of Computer Programming 3.4.2, algorithm S)."""
    found, before = np.zeros(courses, np.int64), np.full(courses, task.bits)
    dropped = np.empty(episodes)
    for t in range(episodes):
        found += rng.random(courses) * (task.actions - t) < task.rewarded - found
        after = remaining_bits(task, t + 1, np.arange(t + 2))[found]
        dropped[t], before = (before - after).mean(), after
    return dropped


def expected_bits(task: Task, episodes: int) -> Numbers:
    """The same in closed form: of the entropy H((k - h) / (n - t)) of the next reward behind t episodes with h rewards, the mean over
    the hypergeometric distribution of h. All n of them sum to log2 K, and none is above H(p), as (k - h) / (n - t) has the mean p."""
    n, k, t, h = task.actions, task.rewarded, np.arange(episodes)[:, None], np.arange(episodes)[None, :]
    with np.errstate(invalid="ignore"):  # -inf less -inf, where no set agrees
        weights = 2 ** (_log2_choose(k, h) + _log2_choose(n - k, t - h) - _log2_choose(n, t))
        p = np.clip((k - h) / (n - t), 0, 1)
        entropy = -p * np.log2(p, where=p > 0, out=np.zeros_like(p)) - (1 - p) * np.log2(1 - p, where=p < 1, out=np.zeros_like(p))
    return (weights * entropy).sum(axis=1)


# ---------------------------------------------------------------- REINFORCE


class Learners:
    """Policies side by side, each with a secret of its own. None looks at the actions' order, so the rewarded ones are the first k."""

    def __init__(self, task: Task, rates_R: Sequence[float], rng: np.random.Generator) -> None:
        self.task, self.rng, self.steps = task, rng, 0
        self.rates = np.asarray(rates_R, np.float64)
        self.logits = np.zeros((len(self.rates), task.actions))
        self.tried = np.zeros(self.logits.shape, bool)
        self.printed = np.zeros(len(self.rates))
        """Bits by the measure of real runs."""
        self._bits = np.array([reward_bits([1.0] * c + [0.0] * (GROUP - c)) for c in range(GROUP + 1)])

    @property
    def policies(self) -> Numbers:
        odds = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def step(self) -> None:
        """A group of episodes, and what is learned of it."""
        rows = np.arange(len(self.rates))[:, None]
        ends = (self.policies.cumsum(axis=1) + rows).ravel()  # the policies one behind the other, each one long
        draws = np.searchsorted(ends, (self.rng.random((len(rows), GROUP)) + rows).ravel(), side="right").reshape(len(rows), GROUP)
        actions = np.clip(draws - rows * self.task.actions, 0, self.task.actions - 1)  # rounding may end a policy just below one
        rewards = actions < self.task.rewarded
        advantages = rewards - rewards.mean(axis=1, keepdims=True)
        np.add.at(self.logits, (rows, actions), self.rates[:, None] * advantages)
        self.tried[rows, actions] = True
        self.printed += self._bits[rewards.sum(axis=1)]
        self.steps += 1

    @property
    def solved(self) -> NDArray[np.bool_]:
        k = self.task.rewarded
        read = self.logits[:, :k].min(axis=1) > self.logits[:, k:].max(axis=1)
        return read & (self.policies[:, :k].sum(axis=1) >= EARNS)

    @property
    def received(self) -> Numbers:
        """Bits by the exact posterior."""
        k = self.task.rewarded
        return self.task.bits - remaining_bits(self.task, self.tried.sum(axis=1), self.tried[:, :k].sum(axis=1))

    @property
    def narrowed(self) -> Numbers:
        """Bits of entropy that the policy has lost."""
        policies = self.policies
        logs = np.log2(policies, where=policies > 0, out=np.zeros_like(policies))
        return math.log2(self.task.actions) + (policies * logs).sum(axis=1)

    def keep(self, rows: NDArray[np.bool_]) -> None:
        """Go on with these alone."""
        self.rates, self.logits, self.tried, self.printed = self.rates[rows], self.logits[rows], self.tried[rows], self.printed[rows]


@dataclass(frozen=True)
class Ends:
    """What became of learners, [R]."""

    told: Numbers
    """Episodes until they had been told all of the secret; inf: they had not within PATIENCE."""
    solved: Numbers
    """Episodes until the bandit was solved; inf: it was not."""
    received: Numbers
    printed: Numbers
    narrowed: Numbers


def play(task: Task, rates_R: Sequence[float], rng: np.random.Generator) -> Ends:
    """Let them learn, each until it has solved its bandit."""
    learners, left = Learners(task, rates_R, rng), np.arange(len(rates_R))
    ends = Ends(*np.full((2, len(left)), np.inf), *np.zeros((3, len(left))))
    while len(left):
        learners.step()
        episodes = learners.steps * GROUP
        told = left[learners.received > task.bits - 1e-6]
        ends.told[told] = np.minimum(ends.told[told], episodes)
        solved = learners.solved
        ends.solved[left[solved]] = episodes
        if (gone := solved | (episodes >= PATIENCE * task.actions)).any():
            for into, now in ((ends.received, learners.received), (ends.printed, learners.printed), (ends.narrowed, learners.narrowed)):
                into[left[gone]] = now[gone]
            learners.keep(~gone)
            left = left[~gone]
    return ends
