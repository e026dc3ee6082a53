"""Rewards of a group to advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Advantage = Callable[[Sequence[float]], list[float]]


def group_mean(rewards_G: Sequence[float]) -> list[float]:
    """reward - mean(rewards), no division by the standard deviation (Dr. GRPO, https://arxiv.org/abs/2503.20783)."""
    mean = sum(rewards_G) / len(rewards_G)
    return [reward - mean for reward in rewards_G]


ADVANTAGES: dict[str, Advantage] = {"group_mean": group_mean}


def is_constant(rewards_G: Sequence[float]) -> bool:
    """Whether a group carries no bits: one value, or fewer than two members."""
    return len(set(rewards_G)) < 2
