"""Episodes in which a script speaks instead of a policy, through the very loop that trains."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np

from veneer.render import Renderer
from veneer.train.rollouts import Policy, do_group_rollout
from veneer.train.timebox import EnvFailure
from veneer.types import (
    Closable,
    Engine,
    Env,
    EnvDataset,
    GroupGrader,
    Message,
    Observation,
    Sample,
    SamplingParams,
    Split,
    StepResult,
    Tokens,
    Trajectory,
    Ungraded,
)

T = TypeVar("T")
Speech = Callable[[Env], Message]
"""What is said next in an episode, whose environment is given."""
BASE = "script"


@dataclass(frozen=True)
class Played:
    trajectory: Trajectory
    grading_ms: float
    """All of its steps, and what the group's grader took."""


async def play(
    dataset: EnvDataset, renderer: Renderer, context_length: int, env_seconds: float, split: Split, index: int, speech: Speech
) -> Played:
    """One episode with one member."""
    watched = (GradedWatch if isinstance(dataset, GroupGrader) else Watch)(dataset)
    engine = _Script(watched, renderer, context_length, speech)
    policy = Policy(cast("Engine", engine), renderer, None, SamplingParams(), env_seconds)
    group = await do_group_rollout(policy, watched, split, index, 1, seed=0)
    return Played(group.trajectories_G[0], watched.milliseconds)


def say(text: str) -> Speech:
    return lambda env: {"role": "assistant", "content": text}


class _Script:
    """Has of an engine what an episode asks for."""

    def __init__(self, watched: Watch, renderer: Renderer, context_length: int, speech: Speech) -> None:
        self.watched, self.renderer, self.context_length, self.speech = watched, renderer, context_length, speech

    async def sample(self, prompt: Tokens, adapter: str | None, params: SamplingParams, *, top_logprobs: int = 0) -> list[Sample]:
        env = self.watched.playing
        assert env is not None
        try:
            message = self.speech(env.env)
            asked: Message = {"role": "user", "content": "?"}
            tokens = self.renderer.build_supervised_example([asked, message])[1]
        except Exception as error:  # the user's gold() may raise anything, and say what no template takes
            raise EnvFailure(f"its answer cannot be said ({type(error).__name__}: {error})") from error
        return [Sample(tokens, np.zeros(len(tokens), np.float32), "stop", BASE, None)]


@dataclass
class Watch:
    """A dataset whose episodes are timed."""

    dataset: EnvDataset
    playing: WatchedEnv | None = None
    milliseconds: float = 0.0

    @property
    def name(self) -> str:
        return self.dataset.name

    def env(self, split: Split, index: int) -> Env:
        self.playing = WatchedEnv(self.dataset.env(split, index), self)
        return self.playing

    async def timed(self, call: Awaitable[T]) -> T:
        started = time.perf_counter()
        try:
            return await call
        finally:
            self.milliseconds += 1000 * (time.perf_counter() - started)


class GradedWatch(Watch):
    async def compute_group_rewards(
        self, split: Split, index: int, trajectories_G: Sequence[Trajectory]
    ) -> Sequence[tuple[float, Mapping[str, float]] | Ungraded]:
        assert isinstance(self.dataset, GroupGrader)
        return await self.timed(self.dataset.compute_group_rewards(split, index, trajectories_G))


@dataclass
class WatchedEnv:
    env: Env
    watch: Watch

    async def initial_observation(self) -> Observation:
        return await self.env.initial_observation()

    async def step(self, action: Message) -> StepResult:
        return await self.watch.timed(self.env.step(action))

    async def close(self) -> None:
        if isinstance(self.env, Closable):
            await self.env.close()
