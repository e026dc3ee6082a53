"""How often a policy solves each of some problems, and how much it reads and writes meanwhile: what a plan begins with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.train.metrics import commonest
from veneer.train.rollouts import Policy, closing, derive_seed, do_rollouts
from veneer.types import EnvDataset, Finite, RunError, Trajectory


@dataclass(frozen=True)
class Tried:
    """Of training problems that were tried equally often."""

    rates_P: Sequence[float]
    """The share of tries with a reward of at least 1."""
    tries: int
    prompt_tokens: float
    """Of an episode's first prompt, on average."""
    drawn_tokens: float
    """An episode's sampled tokens, on average."""
    longest: int
    """Sampled tokens of the longest episode."""


async def try_problems(policy: Policy, dataset: EnvDataset, problems: int, tries: int, seed: int) -> Tried:
    """Try the first so many training problems. The dataset is closed behind it.

    Raises:
        RunError: no problem was tried without a failure.
    """
    async with closing(dataset):
        count = min(problems, dataset.problem_count("train")) if isinstance(dataset, Finite) else problems
        groups_P = await do_rollouts(policy, dataset, "train", range(count), tries, derive_seed("plan", seed))
    whole = [group for group in groups_P if len(group.rewards_G) == tries]
    if not whole:
        errors = [t.error for group in groups_P for t in group.trajectories_G if t.error is not None]
        raise RunError(f"no problem of {dataset.name} was tried without a failure: {commonest(errors)[0][1]}")
    episodes = [t for group in whole for t in group.trajectories_G]
    return Tried(
        [sum(reward >= 1 for reward in group.rewards_G) / tries for group in whole],
        tries,
        statistics.fmean(len(t.transitions[0].prompt) for t in episodes),
        statistics.fmean(_drawn(t) for t in episodes),
        max(map(_drawn, episodes)),
    )


def _drawn(trajectory: Trajectory) -> int:
    return sum(len(turn.sample.tokens) for turn in trajectory.transitions)
