"""Rewards of a group to advantages."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.types import TrajectoryGroup


def group_mean(rewards_G: Sequence[float]) -> list[float]:
    """reward - mean(rewards), no division by the standard deviation (Dr. GRPO, https://arxiv.org/abs/2503.20783)."""
    mean = sum(rewards_G) / len(rewards_G)
    return [reward - mean for reward in rewards_G]


def is_constant(rewards_G: Sequence[float]) -> bool:
    """Whether a group carries no bits: one value, or fewer than two members."""
    return len(set(rewards_G)) < 2


def compute_advantages(groups_P: Sequence[TrajectoryGroup]) -> list[list[float] | None]:
    """Per group the advantages of its finished members; None for a group without bits, which is dropped."""
    return [None if is_constant(group.rewards_G) else group_mean(group.rewards_G) for group in groups_P]
