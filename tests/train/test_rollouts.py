"""Episodes from outside: closed behind whoever plays them, played anew where that was asked for, graded as a group."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from veneer.engine import LoraEngine, load_base
from veneer.render import load_renderer
from veneer.train.rollouts import Policy, closing, do_group_rollout
from veneer.types import Message, Observation, SamplingParams, Split, StepResult, Trajectory, TrajectoryGroup


@dataclass
class Episode:
    failing: bool
    log: list[str]

    async def initial_observation(self) -> Observation:
        return Observation([{"role": "user", "content": "sort 321"}])

    async def step(self, action: Message) -> StepResult:
        if self.failing:
            raise OSError("gone")
        return StepResult(0.25, episode_done=True, metrics={"said": 1.0})

    async def close(self) -> None:
        self.log.append("episode closed")
        raise OSError("closing fails too")


@dataclass
class Dataset:
    """The first ``failing`` episodes fail; ``verdicts`` is what the group's grader says."""

    failing: int = 0
    verdicts: Any = None
    log: list[str] = field(default_factory=list)
    name: str = "faulty"

    def env(self, split: Split, index: int) -> Episode:
        self.failing -= 1
        return Episode(self.failing >= 0, self.log)

    async def close(self) -> None:
        self.log.append("dataset closed")


class Graded(Dataset):
    async def compute_group_rewards(
        self, split: Split, index: int, trajectories_G: Sequence[Trajectory]
    ) -> Sequence[tuple[float, Mapping[str, float]]]:
        self.log.append(f"{split} {index} {len(trajectories_G)}")
        if isinstance(self.verdicts, Exception):
            raise self.verdicts
        return self.verdicts


def play(dataset: Any, size: int = 3, retries: int = 0) -> TrajectoryGroup:
    engine = LoraEngine(load_base("nano"))
    policy = Policy(engine, load_renderer("nano"), None, SamplingParams(max_tokens=8), 5.0, retries)

    async def group() -> TrajectoryGroup:
        async with closing(dataset):
            return await do_group_rollout(policy, dataset, "train", 7, size, seed=1)

    return asyncio.run(group())


def test_everything_is_closed() -> None:
    """An episode that holds a process must not leave it behind, and one that cannot be closed has still earned its reward."""
    dataset = Dataset(failing=1)
    group = play(dataset)
    assert group.rewards_G == [0.25, 0.25]
    assert dataset.log == ["episode closed"] * 3 + ["dataset closed"]


@pytest.mark.parametrize(("failing", "retries", "errors"), [(2, 0, 2), (2, 1, 0), (4, 1, 1), (9, 2, 3)])
def test_failed_rollouts_are_played_anew_as_configured(failing: int, retries: int, errors: int) -> None:
    dataset = Dataset(failing)
    group = play(dataset, retries=retries)
    assert [t.error for t in group.trajectories_G].count("step raised OSError: gone") == errors
    assert dataset.log.count("episode closed") == 3 + min(failing, 3 * retries)


def test_the_group_grader_adds_to_the_members_that_finished() -> None:
    dataset = Graded(failing=1, verdicts=[(1.0, {"rank": 1.0}), (0.5, {"rank": 2.0})])
    group = play(dataset)
    assert group.rewards_G == [1.25, 0.75]
    assert [t.metrics for t in group.trajectories_G if t.error is None] == [{"said": 1.0, "rank": 1.0}, {"said": 1.0, "rank": 2.0}]
    assert "train 7 2" in dataset.log


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (KeyError("judge"), "compute_group_rewards raised KeyError"),
        ([(1.0, {})], "compute_group_rewards returned 1 rewards for 3 episodes"),
        ([(float("nan"), {})] * 3, "compute_group_rewards's reward nan must be a finite number"),
        (None, "compute_group_rewards returned None, not a list"),
    ],
)
def test_a_grader_that_fails_fails_its_group(verdicts: Any, words: str) -> None:
    group = play(Graded(verdicts=verdicts))
    assert group.rewards_G == []
    assert all(words in str(t.error) for t in group.trajectories_G)
