"""Episodes from outside: closed behind whoever plays them, played anew where that was asked for, graded as a group."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from veneer.engine import LoraEngine, load_base
from veneer.envs import load_env
from veneer.render import load_renderer
from veneer.train.evaluate import Evaluation, evaluate
from veneer.train.rollouts import Policy, closing, do_group_rollout
from veneer.types import Message, Observation, SamplingParams, Split, StepResult, Trajectory, TrajectoryGroup, Ungraded


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


def test_one_member_may_go_ungraded() -> None:
    """A judge that had no answer for one of three costs that one; a reward that is none, too."""
    group = play(Graded(verdicts=[(1.0, {}), Ungraded("the judge is silent"), (float("nan"), {})]))
    assert group.rewards_G == [1.25]
    assert [t.error for t in group.trajectories_G] == [
        None,
        "the judge is silent",
        "compute_group_rewards's reward nan must be a finite number",
    ]


def test_a_turn_keeps_its_text() -> None:
    """What reward functions of other trainers read: the marks of thinking among it, the end of the turn not."""
    engine, renderer = LoraEngine(load_base("nano")), load_renderer("nano")
    policy = Policy(engine, renderer, None, SamplingParams(max_tokens=48), 5.0)
    turns = [t.transitions[0] for t in asyncio.run(do_group_rollout(policy, Dataset(), "train", 0, 12, seed=1)).trajectories_G]
    for turn in turns:
        stopped = turn.sample.stop_reason == "stop"
        assert turn.text + ("<|im_end|>" if stopped else "") == renderer.decode(turn.sample.tokens)
    assert any("</think>" in turn.text for turn in turns)


@dataclass
class Three(Dataset):
    def problem_count(self, split: Split) -> int:
        return 3


def test_a_finite_dataset_is_evaluated_once() -> None:
    """Three problems played eighty times are three trials, and the interval must say so."""
    policy = Policy(LoraEngine(load_base("nano")), load_renderer("nano"), None, SamplingParams(max_tokens=4), 5.0)
    assert asyncio.run(evaluate(policy, Three(), 256, 0)).solved.trials == 3
    assert asyncio.run(evaluate(policy, Three(), 2, 0)).solved.trials == 2


@pytest.mark.parametrize("name", ["arithmetic", "sort", "reverse", "count", "calculator", "tools", "browse", "workflow", "shop"])
def test_every_environment_that_comes_along_is_played_and_scored(name: str) -> None:
    """Those that need no file and no sandbox, as `veneer eval` plays them."""

    async def score() -> Evaluation:
        async with closing(load_env(name)) as dataset:
            return await evaluate(Policy(engine, load_renderer("nano"), None, SamplingParams(max_tokens=64)), dataset, 6, 0)

    engine = LoraEngine(load_base("nano"))
    result = asyncio.run(score())
    assert result.means["failed"] == 0, [t.error for t in result.trajectories]
    assert result.solved.trials == 6
    assert result.reward.low <= result.means["reward"] <= result.reward.high


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (KeyError("judge"), "compute_group_rewards raised KeyError"),
        ([(1.0, {})], "compute_group_rewards returned 1 rewards for 3 episodes"),
        ([(float("nan"), {})] * 3, "compute_group_rewards's reward nan must be a finite number"),
        (None, "compute_group_rewards returned None, not a list"),
        ([1.0] * 3, "compute_group_rewards's list returned 1.0, not a tuple"),
    ],
)
def test_a_grader_that_fails_fails_its_group(verdicts: Any, words: str) -> None:
    group = play(Graded(verdicts=verdicts))
    assert group.rewards_G == []
    assert all(words in str(t.error) for t in group.trajectories_G)
