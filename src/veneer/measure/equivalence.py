"""Do other programs say of an adapter's completions what the trainer says? Gaps of log-probabilities, and what they mean for rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from veneer.measure.intervals import Mean, mean_interval
from veneer.types import Floats

REWARD_LIMIT = 0.01
"""A reward may be off by this much, or by what its interval cannot tell from 0."""


@dataclass(frozen=True)
class Text:
    """What an adapter wrote in one episode, a part for each row of tokens (a conversation may need several)."""

    sampled: Sequence[Floats]
    """[tokens] log-probabilities under the distribution that it was drawn from."""
    reward: float | None
    """None: nobody graded it."""


@dataclass(frozen=True)
class Gap:
    """Between one side and the trainer."""

    tokens: int
    largest: float
    """Of |log-probability of the side - that of the trainer| over all sampled tokens, in nats."""
    mean: float
    """Of the same absolute differences."""
    limit: float
    reward: Mean | None
    """Expected reward if this side wrote, less that if the trainer did."""

    @property
    def within(self) -> bool:
        reward = self.reward
        told_apart = reward is not None and abs(reward.value) > REWARD_LIMIT and not reward.low <= 0 <= reward.high
        return self.largest <= self.limit and not told_apart


def compare(texts: Sequence[Text], trainer: Sequence[Sequence[Floats]], other: Sequence[Sequence[Floats]], limit: float) -> Gap:
    """``trainer`` and ``other``: per text and part the log-probabilities of the same tokens, [tokens]."""
    gaps = np.concatenate([o - t for first, second in zip(trainer, other, strict=True) for t, o in zip(first, second, strict=True)])
    largest = float(np.abs(gaps).max()) if np.isfinite(gaps).all() else math.inf
    reward = reward_gap(texts, trainer, other) if all(text.reward is not None for text in texts) else None
    return Gap(gaps.size, largest, float(np.abs(gaps).mean()), limit, reward)


def reward_gap(texts: Sequence[Text], trainer: Sequence[Sequence[Floats]], other: Sequence[Sequence[Floats]]) -> Mean | None:
    """The difference of two expected rewards, E_other[R] - E_trainer[R], from texts that neither need have drawn: each reward's distance
    from the mean, weighted by p_other / q - p_trainer / q, where q drew the text (importance sampling; the mean is a control variate,
    as the weights' own expectation is 0). None for fewer than two texts.
    """
    if len(texts) < 2:
        return None
    rewards = np.array([text.reward for text in texts], np.float64)
    weights = np.array([_ratio(o, text) - _ratio(t, text) for text, t, o in zip(texts, trainer, other, strict=True)])
    return mean_interval((rewards - rewards.mean()) * weights)


def _ratio(logprobs: Sequence[Floats], text: Text) -> float:
    """p / q of a whole text."""
    with np.errstate(over="ignore"):
        return float(np.exp(sum(float((p - q).sum(dtype=np.float64)) for p, q in zip(logprobs, text.sampled, strict=True))))
